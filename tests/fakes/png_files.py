"""PNG files of kinds that no library writes, and damaged PNG files."""

import struct
import zlib
from collections.abc import Sequence

SIGNATURE = b"\x89PNG\r\n\x1a\n"

#: The offset at which a PNG's first chunk, its header, ends.
AFTER_HEADER = 33

#: The offset of a PNG's last chunk, counted from the end of the file.
BEFORE_END = -12

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def chunk(kind: bytes, body: bytes = b"", is_damaged: bool = False) -> bytes:
    """A chunk. The checksum of a damaged chunk is wrong."""
    checksum = zlib.crc32(kind + body) ^ is_damaged
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(
    depth: int,
    colour: int,
    row: Sequence[int],
    *chunks: bytes,
    height: int = 4,
    after: bytes = b"",
) -> bytes:
    """A PNG of equal rows of these samples, with chunks before its pixels and after them."""
    bits = "".join(format(sample, f"0{depth}b") for sample in row)
    line = b"\x00" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    samples_a_pixel = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}[colour]
    header = struct.pack(">IIBBBBB", len(row) // samples_a_pixel, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(line * height))
    return b"".join([SIGNATURE, chunk(b"IHDR", header), *chunks, pixels, after, chunk(b"IEND")])


def with_chunks(data: bytes, *chunks: bytes, at: int = AFTER_HEADER) -> bytes:
    """A PNG with more chunks in it, at this offset."""
    return data[:at] + b"".join(chunks) + data[at:]
