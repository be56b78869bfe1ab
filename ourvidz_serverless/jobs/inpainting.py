"""Inpainting and outpainting: a picture at the job's size, and which of its pixels are made anew.

The model makes a whole picture. Here its pixels are composited over the reference, so that a pixel
that is not repainted comes back as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.jobs.media import ResizeMode
from ourvidz_serverless.references import decode

Size = tuple[int, int]
Box = tuple[int, int, int, int]

#: Greys darker than this count as black, and as far from white as white: a JPEG's black is never
#: quite black, and resizing makes edges that swing as much.
NOISE = 16

#: How far, in pixels, new and old pixels are mixed inside the edges at which a picture is extended.
SEAM = 16

BLACK = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Inpainting:
    """A picture, and a mask of mode L and the same size: black pixels are kept, white ones made
    anew, and grey ones are mixtures."""

    picture: Image.Image
    mask: Image.Image

    def composite(self, pixels: np.ndarray) -> np.ndarray:
        """The picture (height, width, 3), with generated pixels where the mask is not black."""
        return np.asarray(Image.composite(Image.fromarray(pixels), self.picture, self.mask))


def masked(
    picture: Image.Image, mask: Image.Image, size: Size, mode: ResizeMode, blur: int
) -> Inpainting:
    """A picture and its mask, both fitted to a size in the same way.

    Raises InvalidPrompt if the mask has another shape than the picture, or nothing is white in it.
    """
    _check_shape(picture, mask)
    fitted = decode.fit(mask, *size, mode, background=BLACK)
    greys = _softened(_greys(fitted), blur)
    _check_white(greys)
    return Inpainting(decode.fit(picture, *size, mode), greys)


def extended(picture: Image.Image, mask: Image.Image | None, size: Size, blur: int) -> Inpainting:
    """A picture in the middle of a larger one whose rest is made anew.

    The picture is made smaller if it does not fit, and never larger. With a `mask` a part of it is
    made anew too. Raises InvalidPrompt as `masked` does, or if there is nothing to make anew.
    """
    box = _middle(picture.size, size)
    inside = (box[2] - box[0], box[3] - box[1])
    greys = _seam(box, size)
    if mask:
        _check_shape(picture, mask)
        inner = Image.new("L", size)
        inner.paste(_greys(mask.resize(inside, Image.Resampling.LANCZOS)), box)
        greys = ImageChops.lighter(greys, _softened(inner, blur))
        _check_white(greys)
    elif inside == size:
        raise InvalidPrompt(
            "config.resize_mode: nothing is left to extend, "
            f"the reference fills {size[0]}x{size[1]}"
        )
    if inside != picture.size:
        picture = picture.resize(inside, Image.Resampling.LANCZOS)
    return Inpainting(_continued(picture, box, size), greys)


def _check_shape(picture: Image.Image, mask: Image.Image) -> None:
    """Raise InvalidPrompt unless the mask is the picture's, perhaps at another scale.

    Each side of a scaled mask was rounded, so it may be up to a pixel off.
    """
    (width, height), (mask_width, mask_height) = picture.size, mask.size
    if abs(mask_width * height - mask_height * width) > width + height:
        raise InvalidPrompt(
            f"config.mask: Input should have the shape of the reference, {width}x{height}, "
            f"and has {mask_width}x{mask_height}"
        )


def _check_white(mask: Image.Image) -> None:
    if mask.getbbox() is None:
        raise InvalidPrompt(
            "config.mask: Input should be white where the reference is repainted, "
            "and all that the job uses of it is black"
        )


def _greys(mask: Image.Image) -> Image.Image:
    """A mask's greys; nearly black is black, and nearly white is white."""
    return mask.convert("L").point(
        lambda grey: 0 if grey < NOISE else 255 if grey > 255 - NOISE else grey
    )


def _softened(mask: Image.Image, blur: int) -> Image.Image:
    """A mask whose greys rise over `blur` pixels inside its edges. Its black pixels stay black."""
    if blur < 1:
        return mask
    total = np.zeros((mask.height, mask.width), np.uint16)
    for _ in range(blur):
        total += np.asarray(mask)
        mask = mask.filter(ImageFilter.MinFilter(3))
    return Image.fromarray((total // blur).astype(np.uint8))


def _middle(size: Size, target: Size) -> Box:
    """Where a picture lies in the middle of a larger one: left, top, right, bottom."""
    (width, height), (whole_width, whole_height) = size, target
    scale = min(1, whole_width / width, whole_height / height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (whole_width - width) // 2, (whole_height - height) // 2
    return left, top, left + width, top + height


def _seam(box: Box, size: Size) -> Image.Image:
    """A mask that is white outside the box, and black inside it beyond the seam."""
    across, down = (_ramp(box[axis], box[axis + 2], size[axis]) for axis in (0, 1))
    return Image.fromarray((255 * np.maximum(across, down[:, None])).astype(np.uint8))


def _ramp(start: int, end: int, length: int) -> np.ndarray:
    """For each of `length` pixels the share, from 0 to 1, that is new: it falls over the seam.

    There is no seam at an end where nothing is added.
    """
    at = np.arange(length) + 0.5
    before = at - start if start > 0 else np.full(length, np.inf)
    after = end - at if end < length else np.full(length, np.inf)
    share: np.ndarray = np.clip(1 - np.minimum(before, after) / SEAM, 0, 1)
    return share


def _continued(picture: Image.Image, box: Box, size: Size) -> Image.Image:
    """The picture in its box. Around it each pixel is the nearest one of the picture.

    The VAE mixes neighbours, so a grey surrounding would be seen at the picture's edges.
    """
    left, top, right, bottom = box
    around = ((top, size[1] - bottom), (left, size[0] - right), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), around, mode="edge"))
