"""The machine-readable mark that a file was made by a model: IPTC's digital source type, in XMP.

Every picture and video bears the mark, and no other text. Content Credentials, where a worker has
them, state the same source type.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

from PIL import Image

#: IPTC NewsCodes, https://cv.iptc.org/newscodes/digitalsourcetype/
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
#: The same, if a picture from the caller is part of the result (image-to-image).
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
#: Marks the box of an MP4 file that holds XMP (ISO 16684-3).
XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")


def source_type(composite: bool) -> str:
    """The URI of the source type. `composite`: a picture from the caller is part of the result."""
    return COMPOSITE if composite else TRAINED


def xmp_packet(composite: bool) -> bytes:
    """An XMP packet (ISO 16684-1) that states the source type, and nothing else."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' Iptc4xmpExt:DigitalSourceType="{source_type(composite)}"/>'
        "</rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    ).encode()


def xmp_box(composite: bool) -> bytes:
    """The same packet as a box that is appended to an MP4 file."""
    body = XMP_UUID + xmp_packet(composite)
    return struct.pack(">I4s", 8 + len(body), b"uuid") + body


def digital_source_type(data: bytes) -> str | None:
    """The URI that marks a PNG, JPEG, WebP or MP4 file, or None if the file bears no mark.

    Raises PIL.UnidentifiedImageError for a file of another kind.
    """
    packet = _mp4_xmp(data) if data[4:8] == b"ftyp" else _image_xmp(data)
    # RDF allows a property as an attribute and as an element. No XML parser: the bytes may be
    # anybody's.
    found = re.search(rb'Iptc4xmpExt:DigitalSourceType(?:\s*=\s*["\']|>)\s*([^"\'<\s]+)', packet)
    return found[1].decode() if found else None


def _image_xmp(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        packet: bytes = image.info.get("xmp", b"")
    return packet


def mp4_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kind and body of each top-level box of an MP4 file, in order (ISO 14496-12, 4.2)."""
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        head = 8
        if size == 1:
            if place + 16 > len(data):
                return
            (size,), head = struct.unpack_from(">Q", data, place + 8), 16
        end = place + size if size else len(data)
        if end < place + head:
            return
        yield kind, data[place + head : end]
        place = end


def _mp4_xmp(data: bytes) -> bytes:
    bodies = (body for kind, body in mp4_boxes(data) if kind == b"uuid")
    return next((body[16:] for body in bodies if body.startswith(XMP_UUID)), b"")
