"""PNG files by hand: what no library writes, and what a damaged file has."""

import struct
import zlib
from collections.abc import Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"

#: Where a PNG's first chunk, its header, ends.
AFTER_HEADER = 33

#: Where its last one begins, counted from the end.
BEFORE_END = -12

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def chunk(kind: bytes, body: bytes = b"", is_damaged: bool = False) -> bytes:
    """A chunk; the checksum of a damaged one does not hold."""
    checksum = zlib.crc32(kind + body) ^ is_damaged
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(
    depth: int,
    colour: int,
    row: Sequence[int],
    *chunks: bytes,
    height: int = 4,
    behind: bytes = b"",
) -> bytes:
    """A PNG of equal rows, given by their samples, with chunks before its pixels and behind."""
    bits = "".join(format(sample, f"0{depth}b") for sample in row)
    line = b"\x00" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    samples_a_pixel = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}[colour]
    header = struct.pack(">IIBBBBB", len(row) // samples_a_pixel, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(line * height))
    return b"".join([SIGNATURE, chunk(b"IHDR", header), *chunks, pixels, behind, chunk(b"IEND")])


def with_chunks(data: bytes, *chunks: bytes, at: int = AFTER_HEADER) -> bytes:
    """A PNG with more chunks in it."""
    return data[:at] + b"".join(chunks) + data[at:]
