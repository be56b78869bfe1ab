"""A PNG writer: exact, and several times as fast as Pillow's at about the same size.

Each byte of a row is predicted from those before it, and the differences are compressed. In a
model's pictures the differences are noise: a Huffman code suits them, and a search for repetitions
finds next to none. In flat drawings the search finds nearly everything. So the writer tries each
recipe on a sample of the picture.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

Pixels = NDArray[np.uint8]


def up(left: Pixels, above: Pixels, corner: Pixels) -> Pixels:
    """Filter 2: the byte above. Flat areas become runs of zeros."""
    return above


def average(left: Pixels, above: Pixels, corner: Pixels) -> Pixels:
    """Filter 3: the mean of left and above, rounded down. Best on smooth, grainy areas."""
    return (left & above) + ((left ^ above) >> 1)  # nothing overflows a byte


def paeth(left: Pixels, above: Pixels, corner: Pixels) -> Pixels:
    """Filter 4: the neighbour nearest to left + above - corner. Best on sharp edges.

    The sum is nearest to the higher of left and above if the corner lies in the lower third between
    them, and nearest to the lower one if it lies in the upper third. This gives the same bytes as
    the three distances of the specification. The idea is from stb_image, here without branches.
    """
    low, high = np.minimum(left, above), np.maximum(left, above)
    corner = np.maximum(np.minimum(corner, high), low)
    rise, fall = corner - low, high - corner
    return _where(rise <= fall >> 1, high, _where(fall <= rise >> 1, low, corner))


def _where(mask: NDArray[np.bool_], yes: Pixels, no: Pixels) -> Pixels:
    """`np.where` without a branch for each byte, which is slow on noise."""
    return no ^ ((yes ^ no) & -mask.view(np.uint8))


class Recipe(NamedTuple):
    """One way to compress a picture: a filter for all rows, and deflate's level and strategy."""

    filter: int
    predict: Callable[[Pixels, Pixels, Pixels], Pixels]
    level: int
    strategy: int


#: The fastest first.
RECIPES = (
    Recipe(3, average, 1, zlib_ng.Z_HUFFMAN_ONLY),
    Recipe(4, paeth, 1, zlib_ng.Z_HUFFMAN_ONLY),
    Recipe(2, up, 6, zlib_ng.Z_DEFAULT_STRATEGY),
)
#: The fastest recipe is taken whose result is at most this many times the smallest.
TOLERANCE = 1.05
#: Rows are filtered in bands of this size, which fit the cache of a core.
BAND_BYTES = 32 * 1024
#: Every recipe is tried on this many bands.
SAMPLES = 4


def encode_png(pixels: Pixels, xmp: bytes) -> bytes:
    """A PNG file of uint8 pixels (height, width, 3), with an XMP packet."""
    height, width, _ = pixels.shape
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
            _chunk(b"IDAT", _deflate(pixels)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib_ng.crc32(body, zlib_ng.crc32(kind))
    return b"".join((struct.pack(">I", len(body)), kind, body, struct.pack(">I", crc)))


def _deflate(pixels: Pixels) -> bytes:
    """The pixels as one zlib stream of filtered rows, by the best recipe for a sample of them.

    Against Pillow's default, in one run of `python -m benchmarks.delivery` (1024x1024, one thread):
    clouds 20 times as fast and 0.96 of the size, with grain 9 times and 0.95, sharp edges 8 times
    and 1.00, a flat drawing 5 times and 1.08.
    """
    height, width, _ = pixels.shape
    # A black pixel before each row and a black row before the first, as the filters assume.
    rows = np.zeros((height + 1, (width + 1) * 3), np.uint8)
    rows[1:, 3:] = pixels.reshape(height, width * 3)
    count = max(1, BAND_BYTES // (width * 3))
    bands = [rows[start : start + count + 1] for start in range(0, height, count)]
    stride = -(-len(bands) // SAMPLES)
    sample = bands[stride // 2 :: stride]
    sizes = [len(_compress(sample, recipe)) for recipe in RECIPES]
    best = next(r for r, size in zip(RECIPES, sizes, strict=True) if size <= TOLERANCE * min(sizes))
    return _compress(bands, best)


def _compress(bands: Sequence[Pixels], recipe: Recipe) -> bytes:
    """Filter and compress bands of rows; each begins with the row above it and a pixel to the left.

    A band's shape is (rows + 1, (width + 1) * 3).
    """
    deflate = zlib_ng.compressobj(recipe.level, strategy=recipe.strategy)
    parts = []
    for band in bands:
        here, left, above, corner = band[1:, 3:], band[1:, :-3], band[:-1, 3:], band[:-1, :-3]
        rows = np.empty((here.shape[0], here.shape[1] + 1), np.uint8)
        rows[:, 0] = recipe.filter
        np.subtract(here, recipe.predict(left, above, corner), out=rows[:, 1:])
        parts.append(deflate.compress(rows))
    return b"".join((*parts, deflate.flush()))
