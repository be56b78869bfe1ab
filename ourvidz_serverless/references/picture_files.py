"""An image file's metadata, read as browsers read it.

A browser ignores metadata that it cannot read, such as a damaged EXIF block or a comment of many
megabytes. Pillow refuses the whole image for some of these. So Pillow gets a PNG without its
metadata, and a PNG's colour profile, transparent colour and EXIF are read here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

PNG = b"\x89PNG\r\n\x1a\n"

#: A longer profile in a PNG is ignored, as in Chromium.
MAX_PROFILE_BYTES = 10 << 20

#: The number of samples of the transparent colour, by a PNG's colour type: grey, and RGB.
KEY_SAMPLES = {0: 1, 2: 3}
PALETTE = 3

#: The optional chunks that Pillow gets: the frames of an animation, which is then refused, and a
#: palette's alpha.
KEPT = (b"acTL", b"fcTL", b"fdAT")
KEPT_OF_PALETTE = (*KEPT, b"tRNS")

#: The chunks of a PNG that are read here, if they come before the pixels.
READ = (b"tRNS", b"iCCP", b"eXIf")

#: The EXIF tag of an image's orientation, and the type of its value: an unsigned short.
ORIENTATION, SHORT = 0x0112, 3


@dataclass(frozen=True, slots=True)
class Png:
    """A PNG: the file from which Pillow reads the pixels, and the metadata that is read here."""

    file: bytes
    #: Bits of a sample.
    depth: int
    #: The samples of the one colour that is transparent.
    key: tuple[int, ...] | None = None
    profile: bytes | None = None
    exif: bytes = b""


def read_png(data: bytes) -> Png:
    """The parts of a PNG. A damaged file is read up to the damage. Never raises."""
    depth, colour = (data[24], data[25]) if len(data) > 25 else (8, PALETTE)
    kept = KEPT_OF_PALETTE if colour == PALETTE else KEPT
    file, found, is_before_pixels = bytearray(PNG), dict[bytes, bytes](), True
    for kind, body, chunk in _chunks(memoryview(data)):
        is_before_pixels = is_before_pixels and kind != b"IDAT"
        if not _is_optional(kind) or kind in kept:
            file += chunk
        elif kind in READ and is_before_pixels:
            found.setdefault(kind, bytes(body))
    return Png(
        bytes(file),
        depth,
        _key(found.get(b"tRNS", b""), depth, KEY_SAMPLES.get(colour)),
        _inflated(found.get(b"iCCP", b"")),
        found.get(b"eXIf", b""),
    )


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Kind, body and bytes of each chunk, without optional chunks whose checksum is wrong.

    The last chunk may be cut off; Pillow decides whether the pixels suffice.
    """
    at, kind = len(PNG), b""
    while kind != b"IEND" and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        body, checksum = chunk[8:-4], bytes(chunk[-4:])
        at += 12 + length
        if not _is_optional(kind) or struct.pack(">I", zlib.crc32(chunk[4:-4])) == checksum:
            yield kind, body, chunk


def _is_optional(kind: bytes) -> bool:
    return bool(kind[0] & 0x20)


def _key(body: bytes, depth: int, num_samples: int | None) -> tuple[int, ...] | None:
    """The samples in a tRNS chunk, without the bits beyond the image's depth."""
    if not num_samples or len(body) < 2 * num_samples:
        return None
    samples = struct.unpack_from(f">{num_samples}H", body)
    return tuple(sample & (2**depth - 1) for sample in samples)


def _inflated(body: bytes) -> bytes | None:
    """The profile in an iCCP chunk; None for one that is damaged or too long."""
    _, _, compressed = body.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(compressed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if compressed[:1] == b"\0" and inflate.eof else None


def orientation(tiff: bytes) -> int:
    """An image's orientation in its EXIF, 1 to 8; 1, which is upright, if there is none.

    Never raises, whatever the bytes are.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, at)
            if (tag, kind) == (ORIENTATION, SHORT):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # the EXIF block ends before its entries
    return 1
