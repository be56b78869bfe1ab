"""A picture file is exact, small, marked as made by a model, and holds nothing more."""

import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from benchmarks.png import soft
from ourvidz_serverless.delivery.images import Format, encode_image, thumbnail
from ourvidz_serverless.delivery.provenance import COMPOSITE, TRAINED, digital_source_type
from tests.delivery.pictures import noise, opened, seen

FORMATS: tuple[Format, ...] = get_args(Format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_has_the_format_the_mime_type_and_the_extension_that_it_names(
    format: Format,
) -> None:
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


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_holds_no_text_but_the_mark(format: Format) -> None:
    info = opened(encode_image(noise(8, 8), format).data).info

    jfif = {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    animation = {"loop", "background", "timestamp", "duration"}
    assert set(info) - jfif - animation <= {"xmp", "XML:com.adobe.xmp"}


@pytest.mark.parametrize("composite", [False, True])
def test_a_thumbnail_bears_the_mark(composite: bool) -> None:
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
def test_a_higher_quality_gives_a_smaller_error(format: Format) -> None:
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
def test_an_array_of_another_type_or_shape_is_refused_with_both_named(pixels: Any) -> None:
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
