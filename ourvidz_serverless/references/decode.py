"""Image files become plain pixels, and images get the size that a model needs.

An image file is untrusted: its header is checked before a pixel is decoded.
"""

from __future__ import annotations

import io
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ourvidz_serverless.references.picture_files import PNG, Png, orientation, read_png
from ourvidz_serverless.references.policy import ReferencePolicy, refused

#: A JPEG has about ten scans, but may have thousands of a few bytes, each a pass over all pixels:
#: this many take some ten seconds. Scans are counted by their marker in the whole file; in the
#: video that some phones append the marker occurs by chance, up to 300 times in 20 MB.
MAX_SCANNED_PIXELS = 8_000_000_000

#: The transposition that turns an image upright, by its EXIF orientation; 1 is upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: The colour that `pad` fills with: the middle of a model's range, neither light nor dark.
GREY = (128, 128, 128)


def decode(data: bytes, policy: ReferencePolicy) -> Image.Image:
    """The image in a PNG, JPEG or WebP file: upright, RGB in sRGB, nothing but pixels.

    Raises ReferenceFrameError for another format, and for an image that is too large, too long
    and thin, animated or damaged.
    """
    png = read_png(data) if data.startswith(PNG) else None
    try:
        image = Image.open(io.BytesIO(png.file if png else data), formats=("PNG", "JPEG", "WEBP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise refused(f"more than {policy.max_pixels} pixels") from exc
    except Exception as exc:  # a decoder may raise anything for malformed bytes
        raise refused("not a PNG, JPEG or WebP image") from exc
    _check_shape(image, policy)
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
    if image.width * image.height * scans > MAX_SCANNED_PIXELS:
        raise refused("the image has too many scans")
    try:
        return _plain(image, png)
    except Exception as exc:  # as above
        raise refused("the image is damaged") from exc


def _check_shape(image: Image.Image, policy: ReferencePolicy) -> None:
    """Raise ReferenceFrameError by the header alone, before any pixel is decoded."""
    if image.width * image.height > policy.max_pixels:
        raise refused(f"more than {policy.max_pixels} pixels")
    if max(image.size) > policy.max_aspect * min(image.size):
        raise refused(f"one side is more than {policy.max_aspect:g} times the other")
    # A JPEG's further frames are a phone's depth and gain maps: the first one is the image.
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise refused("the image is animated")


def _plain(image: Image.Image, png: Png | None) -> Image.Image:
    """The image over white, in sRGB, upright. An orientation in XMP is ignored."""
    profile = png.profile if png else image.info.get("icc_profile")
    exif = png.exif if png else image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    image.load()
    alpha = _opaque(image, png) if png and png.key else None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    # A new image, so that it holds nothing of the file but its pixels.
    plain = Image.new("RGB", image.size, "white")
    plain.paste(_srgb(image, profile), mask=alpha)
    transposition = TRANSPOSITIONS.get(orientation(exif))
    return plain if transposition is None else plain.transpose(transposition)


def _opaque(image: Image.Image, png: Png) -> Image.Image:
    """A mask: 0 where a PNG has its transparent colour, 255 elsewhere."""
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    key = np.array(png.key)
    if png.depth < 8:
        key = key * 255 // (2**png.depth - 1)  # as Pillow spreads the samples
    elif png.depth == 16 and image.mode == "RGB":
        samples = samples.astype(np.uint16) << 8 | _low_bytes(png)
    is_key = (samples.reshape(image.height, image.width, -1) == key).all(axis=-1)
    return Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))


def _low_bytes(png: Png) -> np.ndarray:
    """The low bytes of 16-bit RGB, of which Pillow keeps only the high bytes."""
    image = Image.open(io.BytesIO(png.file), formats=("PNG",))
    # Read with the other byte order, the low byte is the high one.
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return np.asarray(image)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image's colours, converted to sRGB by its profile, without its alpha."""
    if image.mode == "I;16":
        image = image.point(lambda grey: grey * (1 / 256)).convert("L")  # `convert` alone clips
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB")
    try:
        return cast(
            Image.Image,
            ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            ),
        )
    except (ImageCms.PyCMSError, OSError):
        # The profile is broken, or for another kind of pixels: browsers ignore it too.
        return image.convert("RGB")


def fit(
    image: Image.Image,
    width: int,
    height: int,
    mode: Literal["crop", "pad", "stretch"],
    background: tuple[int, int, int] = GREY,
) -> Image.Image:
    """An image at exactly `width` x `height` pixels.

    `crop` keeps the largest centre of that shape, `pad` the whole image on `background`, and
    `stretch` the whole image, distorted.
    """
    size = (width, height)
    if mode == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    padded = Image.new("RGB", size, background)
    corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
    padded.paste(image.resize(inner, Image.Resampling.LANCZOS), corner)
    return padded
