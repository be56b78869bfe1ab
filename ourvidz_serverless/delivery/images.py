"""Pixels become files: PNG, JPEG, WebP and thumbnails, each marked as made by a model.

All functions are pure and take arrays. They may run in as many threads as there are pictures.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from ourvidz_serverless.delivery.png import Pixels, encode_png
from ourvidz_serverless.delivery.provenance import xmp_packet

Format = Literal["png", "jpeg", "webp"]

FILES: dict[Format, tuple[str, str]] = {
    "png": ("png", "image/png"),
    "jpeg": ("jpg", "image/jpeg"),
    "webp": ("webp", "image/webp"),
}
THUMBNAIL_QUALITY = 80

#: Lossless WebP: libwebp's method and effort. More effort takes twice as long for 1 % of the size.
LOSSLESS = {"lossless": True, "method": 2, "quality": 50}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A file, with the facts that a storage and the document need."""

    data: bytes
    format: Format
    extension: str
    mime: str


def encode_image(
    pixels: Pixels, format: Format = "png", quality: int | None = 95, composite: bool = False
) -> Encoded:
    """A picture as a file. PNG keeps every pixel; JPEG (4:4:4) and WebP use `quality`.

    WebP without a quality keeps every pixel too.

    `pixels` is uint8, shape (height, width, 3), sRGB, with its memory in any order. `composite`:
    a picture from the caller is part of this one. Raises ValueError for other arrays.
    """
    _check(pixels)
    xmp = xmp_packet(composite)
    if format == "png":
        data = encode_png(pixels, xmp)
    else:
        data = _by_pillow(Image.fromarray(pixels), format, quality, xmp)
    return Encoded(data, format, *FILES[format])


def thumbnail(pixels: Pixels, size: int = 256, composite: bool = False) -> Encoded:
    """A small WebP of a picture: `size` pixels on its longer side, or fewer if it has fewer."""
    _check(pixels)
    image = Image.fromarray(pixels)
    image.thumbnail((size, size))
    data = _by_pillow(image, "webp", THUMBNAIL_QUALITY, xmp_packet(composite))
    return Encoded(data, "webp", *FILES["webp"])


def _check(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(
            "pixels must be uint8 of shape (height, width, 3) and not empty, "
            f"not {pixels.dtype} of shape {pixels.shape}"
        )


def _by_pillow(image: Image.Image, format: Format, quality: int | None, xmp: bytes) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = LOSSLESS if quality is None else {"quality": quality}
    if format == "jpeg":
        options = {**options, "subsampling": "4:4:4"}
    image.save(file, format, xmp=xmp, **options)
    return file.getvalue()
