"""The mark of generated media is IPTC's, and is read again from any file."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from benchmarks.png import pillow_png
from ourvidz_serverless.delivery.provenance import COMPOSITE, TRAINED, digital_source_type
from tests.delivery.pictures import noise


def test_the_marks_are_the_uris_of_iptc() -> None:
    codes = "http://cv.iptc.org/newscodes/digitalsourcetype/"

    assert f"{codes}trainedAlgorithmicMedia" == TRAINED
    assert f"{codes}compositeWithTrainedAlgorithmicMedia" == COMPOSITE


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
def test_any_bytes_after_the_head_of_an_mp4_have_no_mark_and_raise_nothing(tail: bytes) -> None:
    assert digital_source_type(b"\0\0\0\x08ftyp" + tail) is None
