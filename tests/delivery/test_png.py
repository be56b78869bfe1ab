"""The PNG writer is exact, follows the specification, and writes small files."""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.png import drawing, grainy, pillow_png, sharp, soft
from ourvidz_serverless.delivery import png
from ourvidz_serverless.delivery.images import encode_image
from ourvidz_serverless.delivery.png import Pixels
from tests.delivery.pictures import noise, opened, seen

SUBJECTS = (soft, grainy, sharp, drawing)


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
    assert len(png) < 1.1 * len(pillow_png(pixels))


def test_every_recipe_is_the_best_for_some_picture() -> None:
    used = {
        row[0] for subject in SUBJECTS for row in filtered_rows(encode_image(subject(512)).data)
    }

    assert used == {recipe.filter for recipe in png.RECIPES}


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1))
def test_the_filters_predict_as_the_png_specification_says(
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
