"""What leaves the worker as a file: exact, small, marked as made by a model, and nothing more."""

import io
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from benchmarks.png import drawing, grainy, pillow, sharp, soft
from ourvidz_serverless.delivery import png
from ourvidz_serverless.delivery.images import Format, encode_image, thumbnail
from ourvidz_serverless.delivery.png import Pixels
from ourvidz_serverless.delivery.provenance import COMPOSITE, TRAINED, digital_source_type

FORMATS: tuple[Format, ...] = get_args(Format)
SUBJECTS = (soft, grainy, sharp, drawing)


def noise(height: int, width: int, colours: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, colours, (height, width, 3), dtype=np.uint8)


def opened(data: bytes) -> ImageFile:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def seen(data: bytes) -> NDArray[np.int64]:
    """The pixels as Pillow reads them, wide enough to subtract."""
    return np.array(opened(data), np.int64)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG file, read by nothing but the specification."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        found.append((kind, body))
        at += 12 + length
    return found


def filtered_rows(data: bytes) -> list[bytes]:
    """A PNG's rows as they were compressed, each with its filter in front."""
    inflate = zlib.decompressobj()
    rows = inflate.decompress(dict(chunks(data))[b"IDAT"])
    assert inflate.eof and not inflate.unused_data
    stride = opened(data).width * 3 + 1
    return [rows[at : at + stride] for at in range(0, len(rows), stride)]


LAYOUTS: dict[str, Callable[[Pixels], Pixels]] = {
    "as it is": lambda a: a,
    "upside down": lambda a: a[::-1],
    "BGR": lambda a: a[..., ::-1],
    "transposed": lambda a: a.transpose(1, 0, 2),
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "planes": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
    "Fortran": np.asfortranarray,
}


@settings(deadline=None)  # a shared machine pauses
@given(
    height=st.integers(1, 40) | st.integers(1, 700),
    width=st.integers(1, 40),
    colours=st.sampled_from([1, 2, 5, 256]),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_a_png_keeps_every_pixel_of_any_array(
    height: int, width: int, colours: int, seed: int, layout: str
) -> None:
    pixels = LAYOUTS[layout](noise(height, width, colours, seed))

    png = encode_image(pixels)

    assert np.array_equal(seen(png.data), pixels)
    assert len(filtered_rows(png.data)) == pixels.shape[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (1, 20_000)])
def test_a_png_may_be_a_single_row_or_column(shape: tuple[int, int]) -> None:
    pixels = noise(*shape)

    assert np.array_equal(seen(encode_image(pixels).data), pixels)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_png_is_exact_and_at_most_a_tenth_larger_than_pillows(subject: Any) -> None:
    pixels = subject(512)

    png = encode_image(pixels).data

    assert np.array_equal(seen(png), pixels)
    assert len(png) < 1.1 * len(pillow(pixels))


def test_every_recipe_is_the_best_for_some_picture() -> None:
    used = {
        row[0] for subject in SUBJECTS for row in filtered_rows(encode_image(subject(512)).data)
    }

    assert used == {recipe.filter for recipe in png.RECIPES}


@settings(deadline=None)  # a shared machine pauses
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1))
def test_the_filters_predict_what_the_png_specification_says(
    neighbours: list[tuple[int, int, int]],
) -> None:
    def paeth(a: int, b: int, c: int) -> int:
        return min((a, b, c), key=lambda value: abs(a + b - c - value))

    columns = np.array(neighbours, np.uint8).T

    assert png.up(*columns).tolist() == [b for _, b, _ in neighbours]
    assert png.average(*columns).tolist() == [(a + b) // 2 for a, b, _ in neighbours]
    assert png.paeth(*columns).tolist() == [paeth(*triple) for triple in neighbours]


def test_a_png_has_four_chunks_with_right_checksums() -> None:
    found = chunks(encode_image(noise(3, 5)).data)

    assert [kind for kind, _ in found] == [b"IHDR", b"iTXt", b"IDAT", b"IEND"]
    assert found[0][1] == struct.pack(">IIBBBBB", 5, 3, 8, 2, 0, 0, 0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_what_it_says_it_is(format: Format) -> None:
    file = encode_image(noise(24, 40), format)

    image = opened(file.data)

    assert (image.format, image.size, image.mode) == (format.upper(), (40, 24), "RGB")
    assert (file.format, file.mime) == (format, Image.MIME[file.format.upper()])
    assert Image.registered_extensions()[f".{file.extension}"] == image.format


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("composite", "mark"), [(False, TRAINED), (True, COMPOSITE)])
def test_every_format_bears_the_mark_in_its_xmp(format: Format, composite: bool, mark: str) -> None:
    data = encode_image(noise(8, 8), format, composite=composite).data

    (description,) = ET.fromstring(opened(data).info["xmp"].decode()).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )

    source_type = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert description.attrib[source_type] == mark
    assert digital_source_type(data) == mark


def test_the_marks_are_iptcs() -> None:
    codes = "http://cv.iptc.org/newscodes/digitalsourcetype/"

    assert f"{codes}trainedAlgorithmicMedia" == TRAINED
    assert f"{codes}compositeWithTrainedAlgorithmicMedia" == COMPOSITE


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_says_nothing_but_the_mark(format: Format) -> None:
    info = opened(encode_image(noise(8, 8), format).data).info

    jfif = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    animation = {"loop", "background", "timestamp", "duration"}
    assert set(info) - jfif - animation <= {"xmp", "XML:com.adobe.xmp"}


@pytest.mark.parametrize("composite", [False, True])
def test_a_thumbnail_bears_the_mark_too(composite: bool) -> None:
    mark = COMPOSITE if composite else TRAINED

    assert digital_source_type(thumbnail(noise(8, 8), composite=composite).data) == mark


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1024, 576), (144, 256)),
        ((576, 1024), (256, 144)),
        ((40, 30), (30, 40)),
        ((900, 1), (1, 256)),
    ],
)
def test_a_thumbnail_is_a_webp_of_256_pixels_at_most_and_never_larger(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    small = thumbnail(np.full((*shape, 3), 200, np.uint8))

    assert (small.format, small.extension, small.mime) == ("webp", "webp", "image/webp")
    assert opened(small.data).size == size
    assert abs(seen(small.data) - 200).max() <= 2


def test_a_jpeg_keeps_colour_at_full_resolution() -> None:
    image = opened(encode_image(noise(16, 16), "jpeg").data)

    assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_quality_buys_likeness(format: Format) -> None:
    pixels = soft(64)

    def error(quality: int) -> float:
        return float(abs(seen(encode_image(pixels, format, quality).data) - pixels).mean())

    assert error(95) < error(60) < error(10)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), np.int8),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_an_array_of_another_kind_is_refused_by_name(pixels: Any) -> None:
    for encode in (encode_image, thumbnail):
        with pytest.raises(ValueError) as refused:
            encode(pixels)

        assert "uint8 of shape (height, width, 3)" in str(refused.value)
        assert f"not {pixels.dtype} of shape {pixels.shape}" in str(refused.value)


def test_threads_may_encode_one_read_only_array_at_once() -> None:
    pixels = noise(64, 64)
    pixels.flags.writeable = False
    ways = [
        *(partial(encode_image, pixels, format) for format in FORMATS),
        partial(thumbnail, pixels),
    ]

    alone = [way() for way in ways]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda way: way(), ways * 8))

    assert together == alone * 8


def test_an_unmarked_picture_has_no_source_type() -> None:
    assert digital_source_type(pillow(noise(4, 4))) is None


@pytest.mark.parametrize(
    "property",
    [
        f'Iptc4xmpExt:DigitalSourceType="{TRAINED}"/>',
        f"Iptc4xmpExt:DigitalSourceType='{TRAINED}'/>",
        f"><Iptc4xmpExt:DigitalSourceType>\n{TRAINED}\n</Iptc4xmpExt:DigitalSourceType>",
    ],
)
def test_the_mark_is_read_however_xmp_spells_it(property: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG", xmp=f"<rdf:Description {property}".encode())

    assert digital_source_type(file.getvalue()) == TRAINED


def test_what_is_no_picture_has_no_mark_to_read() -> None:
    with pytest.raises(UnidentifiedImageError):
        digital_source_type(b"<svg/>")
