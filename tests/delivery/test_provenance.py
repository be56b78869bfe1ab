"""The mark of generated media is IPTC's, and is read again from any file."""

import io
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from benchmarks.png import pillow_png
from ourvidz_serverless.delivery.provenance import (
    COMPOSITE,
    TRAINED,
    digital_source_type,
    mp4_boxes,
    xmp_box,
    xmp_packet,
)
from tests.delivery.pictures import noise


def test_the_marks_are_the_uris_of_iptc() -> None:
    codes = "http://cv.iptc.org/newscodes/digitalsourcetype/"

    assert f"{codes}trainedAlgorithmicMedia" == TRAINED
    assert f"{codes}compositeWithTrainedAlgorithmicMedia" == COMPOSITE


@pytest.mark.parametrize(("composite", "uri"), [(False, TRAINED), (True, COMPOSITE)])
def test_a_composite_bears_another_mark_than_a_picture_of_a_prompt_alone(
    composite: bool, uri: str
) -> None:
    video = b"\0\0\0\x08ftyp" + xmp_box(composite)

    assert uri.encode() in xmp_packet(composite)
    assert digital_source_type(video) == uri


def test_an_unmarked_picture_has_no_source_type() -> None:
    assert digital_source_type(pillow_png(noise(4, 4))) is None


@pytest.mark.parametrize(
    "property",
    [
        f'Iptc4xmpExt:DigitalSourceType="{TRAINED}"/>',
        f"Iptc4xmpExt:DigitalSourceType='{TRAINED}'/>",
        f"><Iptc4xmpExt:DigitalSourceType>\n{TRAINED}\n</Iptc4xmpExt:DigitalSourceType>",
    ],
)
def test_the_mark_is_read_in_every_spelling_of_xmp(property: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG", xmp=f"<rdf:Description {property}".encode())

    assert digital_source_type(file.getvalue()) == TRAINED


def test_reading_the_mark_of_another_kind_of_file_is_an_error() -> None:
    with pytest.raises(UnidentifiedImageError):
        digital_source_type(b"<svg/>")


@given(st.binary(max_size=200))
@example(b"\0\0\0\x01free")
def test_any_bytes_after_the_head_of_an_mp4_have_no_mark_and_raise_nothing(tail: bytes) -> None:
    assert digital_source_type(b"\0\0\0\x08ftyp" + tail) is None


@pytest.mark.parametrize(
    "box", [b"\0\0\0\x07free", b"\0\0\0\x01free" + bytes(7) + b"\x0f"], ids=["32 bits", "64 bits"]
)
def test_no_box_is_read_behind_one_that_is_shorter_than_its_own_head(box: bytes) -> None:
    data = b"\0\0\0\x08ftyp" + box + bytes(32)

    boxes = list(itertools.islice(mp4_boxes(data), 9))

    assert boxes == [(b"ftyp", b"")]


@pytest.mark.parametrize(
    "box", [b"\0\0\0\x08free", b"\0\0\0\x01free" + bytes(7) + b"\x10"], ids=["32 bits", "64 bits"]
)
def test_a_box_of_nothing_but_its_head_is_empty(box: bytes) -> None:
    assert next(mp4_boxes(box + xmp_box(True))) == (b"free", b"")
    assert digital_source_type(b"\0\0\0\x08ftyp" + box + xmp_box(True)) == COMPOSITE


def test_a_box_of_size_zero_reaches_to_the_end_of_the_file() -> None:
    assert list(mp4_boxes(b"\0\0\0\0mdatwords")) == [(b"mdat", b"words")]
