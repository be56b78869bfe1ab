"""An image file becomes plain pixels of the size that a model needs, or is refused."""

import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.references.decode import GREY, decode, fit
from ourvidz_serverless.references.picture_files import PNG, orientation, read_png
from ourvidz_serverless.references.policy import ReferencePolicy
from tests.examples import examples
from tests.references.images import IMAGE, SECRET, encoded, plain_words, quarters


def refusal_of(data: bytes, **limits: object) -> str:
    with pytest.raises(ReferenceFrameError) as refused:
        decode(data, ReferencePolicy(**limits))
    return plain_words(refused.value)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM", "PDF", "JPEG2000"])
def test_other_formats_are_refused(format: str) -> None:
    assert refusal_of(encoded(quarters(), format)) == "not a PNG, JPEG or WebP image"


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", IMAGE[:20], b"<svg/>", b"\xff\xd8\xff"]
)
def test_a_file_that_is_no_image_is_refused(data: bytes) -> None:
    assert refusal_of(data) == "not a PNG, JPEG or WebP image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_half_an_image_is_refused(format: str) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    data = encoded(noise, format)

    assert refusal_of(data[: len(data) // 2]) in (
        "the image is damaged",
        "not a PNG, JPEG or WebP image",
    )


@examples(150)
@given(
    st.sampled_from([encoded(quarters(), format) for format in ("PNG", "JPEG", "WEBP")]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_corrupted_image_is_decoded_or_refused(
    data: bytes, changes: list[tuple[int, int]]
) -> None:
    corrupted = bytearray(data)
    for position, byte in changes:
        corrupted[position % len(corrupted)] = byte

    with suppress(ReferenceFrameError):
        assert decode(bytes(corrupted), SMALL).mode == "RGB"


@given(st.binary(max_size=60), st.sampled_from([b"", PNG, encoded(quarters())[:50]]))
def test_any_bytes_behind_a_png_s_first_ones_are_read_as_far_as_they_go(
    data: bytes, first: bytes
) -> None:
    assert read_png(first + data).file.startswith(PNG)


@given(
    st.binary(max_size=60), st.sampled_from([b"", b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff"])
)
def test_any_exif_gives_an_orientation(data: bytes, first: bytes) -> None:
    assert 1 <= orientation(first + data) <= 8


SMALL = ReferencePolicy(max_pixels=100_000)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG's header without a body: whoever wants its pixels finds it damaged."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 4, b"IDAT")


def webp_that_claims(width: int, height: int) -> bytes:
    size = [(side - 1).to_bytes(3, "little") for side in (width, height)]
    body = b"WEBPVP8X" + struct.pack("<I4x", 10) + size[0] + size[1]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        png_that_claims(9000, 8000),
        png_that_claims(10_000, 9_500),
        png_that_claims(100_000, 100_000),
        png_that_claims(2**31 - 1, 2**31 - 1),
        webp_that_claims(16_000, 16_000),
    ],
)
def test_a_decompression_bomb_is_refused_by_its_header(data: bytes) -> None:
    assert refusal_of(data) == "more than 64000000 pixels"


def test_an_image_of_exactly_the_limit_is_accepted() -> None:
    assert decode(IMAGE, ReferencePolicy(max_pixels=48 * 32)).size == (48, 32)
    assert refusal_of(IMAGE, max_pixels=48 * 32 - 1) == "more than 1535 pixels"


@pytest.mark.parametrize("size", [(9, 1), (1, 9), (1601, 200)])
def test_a_long_and_thin_image_is_refused(size: tuple[int, int]) -> None:
    assert "one side is more than 8 times" in refusal_of(encoded(Image.new("L", size)))


def test_a_text_chunk_that_inflates_without_end_is_ignored() -> None:
    text = PngInfo()
    text.add_text("bomb", "x" * 50_000_000, zip=True)

    assert decode(encoded(quarters(), pnginfo=text), SMALL).tobytes() == quarters().tobytes()


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(Image.new("L", (4000, 3000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]

    assert refusal_of(data[:-2] + scan * 1000 + data[-2:]) == "the image has too many scans"


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])

    assert refusal_of(data) == "the image is animated"


def test_a_phones_jpeg_with_a_second_frame_is_its_first_one() -> None:
    data = encoded(
        Image.new("RGB", (16, 16), "red"),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (16, 16), "blue")],
    )

    assert decode(data, SMALL).getpixel((8, 8))[0] > 250


STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_upright_whatever_its_orientation_in_the_file(
    orientation: int, format: str
) -> None:
    turn = STORED[orientation]
    stored = quarters() if turn is None else quarters().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}

    image = decode(encoded(stored, format, exif=exif, **options), SMALL)

    assert image.tobytes() == quarters().tobytes()


def profile(*, swapped: bool = False, space: str = "sRGB") -> bytes:
    """An ICC profile; a swapped one means green where it says red."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    if swapped:
        data = data.replace(b"rXYZ", b"temp", 1).replace(b"gXYZ", b"rXYZ", 1)
        data = data.replace(b"temp", b"gXYZ", 1)
    return data


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_colours_are_converted_from_the_files_profile(format: str) -> None:
    red = Image.new("RGB", (16, 16), "red")
    image = decode(encoded(red, format, icc_profile=profile(swapped=True)), SMALL)

    assert image.getpixel((8, 8)) == pytest.approx((0, 255, 0), abs=4)


def test_a_profile_applies_to_images_with_alpha_and_with_a_palette() -> None:
    for mode in ("RGBA", "P"):
        data = encoded(
            Image.new("RGB", (4, 4), "red").convert(mode), icc_profile=profile(swapped=True)
        )

        assert decode(data, SMALL).getpixel((2, 2)) == pytest.approx((0, 255, 0), abs=4)


@pytest.mark.parametrize("broken", [b"no profile", profile()[:200], profile(space="LAB")])
def test_a_broken_profile_is_ignored(broken: bytes) -> None:
    image = decode(encoded(quarters(), icc_profile=broken), SMALL)

    assert image.tobytes() == quarters().tobytes()


def with_transparency(mode: str) -> Image.Image:
    """Transparent to the left, opaque red or black to the right."""
    image = Image.new("LA" if mode == "LA" else "RGBA", (4, 2))
    image.paste((0, 255) if mode == "LA" else (255, 0, 0, 255), (2, 0, 4, 2))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = decode(encoded(with_transparency(mode)), SMALL)

    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((3, 0)) == ((0, 0, 0) if mode == "LA" else (255, 0, 0))


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3))])
def test_a_colour_that_stands_for_transparency_lies_over_white(mode: str, colour: object) -> None:
    data = encoded(Image.new(mode, (4, 2), colour), transparency=colour)

    assert decode(data, SMALL).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(mode: str) -> None:
    data = encoded(Image.new(mode, (8, 8), 0), "JPEG" if mode == "CMYK" else "PNG")
    image = decode(data, SMALL)

    assert image.mode == "RGB"
    assert image.getpixel((4, 4)) == ((255, 255, 255) if mode == "CMYK" else (0, 0, 0))


def test_sixteen_bits_of_grey_become_eight() -> None:
    grey = Image.new("I;16", (8, 8), 32768)

    assert decode(encoded(grey), SMALL).getpixel((4, 4)) == (128, 128, 128)


def test_only_the_pixels_of_a_file_remain() -> None:
    exif = Image.Exif()
    exif[0x010E] = SECRET
    data = encoded(quarters(), exif=exif, icc_profile=profile(), dpi=(72, 72)) + SECRET.encode()
    image = decode(data, SMALL)

    assert (type(image), image.info, dict(image.getexif())) == (Image.Image, {}, {})
    assert SECRET.encode() not in encoded(image)


# --- to size ---


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 64), (31, 200), (1000, 8)])
@pytest.mark.parametrize("shape", [(48, 32), (1, 8), (800, 100)])
def test_an_image_is_fitted_to_the_exact_size(
    mode: str, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert fit(Image.new("RGB", shape), *size, mode).size == size


def striped() -> Image.Image:
    """Red and blue ends, a lime middle as long as it is high."""
    image = Image.new("RGB", (60, 20), "lime")
    image.paste("red", (0, 0, 20, 20))
    image.paste("blue", (40, 0, 60, 20))
    return image


@pytest.mark.parametrize(
    ("mode", "left", "top"),
    [("crop", "lime", "lime"), ("pad", "red", "grey"), ("stretch", "red", "lime")],
)
def test_crop_keeps_the_centre_and_pad_the_whole(mode: str, left: str, top: str) -> None:
    colours = {"lime": (0, 255, 0), "red": (255, 0, 0), "grey": GREY}
    image = fit(striped(), 60, 60, mode)

    assert image.getpixel((1, 30)) == pytest.approx(colours[left], abs=12)
    assert image.getpixel((30, 1)) == pytest.approx(colours[top], abs=12)


def test_an_image_of_the_right_size_is_the_same_in_every_mode() -> None:
    for mode in ("crop", "pad", "stretch"):
        assert fit(quarters(), 48, 32, mode).tobytes() == quarters().tobytes()
