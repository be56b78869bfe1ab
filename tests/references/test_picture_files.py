"""A reference looks as Chromium shows its file: transparency, depth, profile, and how it stands."""

import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from playwright.sync_api import Browser

from ourvidz_serverless.references.decode import decode
from ourvidz_serverless.references.policy import ReferencePolicy
from tests.fakes.png_files import (
    BEFORE_END,
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    chunk,
    png,
    with_chunks,
)

#: The pixels of a picture over white, as its bytes in RGBA.
PIXELS = """async (url) => {
  const shown = new Image();
  shown.src = url;
  await shown.decode();
  const size = { width: shown.naturalWidth, height: shown.naturalHeight };
  const ink = Object.assign(document.createElement("canvas"), size).getContext("2d");
  ink.fillStyle = "white";
  ink.fillRect(0, 0, size.width, size.height);
  ink.drawImage(shown, 0, 0);
  const { data } = ink.getImageData(0, 0, size.width, size.height);
  return { ...size, data: [...data] };
}"""
MIME = {b"\x89P": "image/png", b"\xff\xd8": "image/jpeg", b"RI": "image/webp"}

Shown = Callable[[bytes], np.ndarray]


@pytest.fixture(scope="module")
def shown(chromium: Browser) -> Iterator[Shown]:
    """Gives what Chromium shows of a file, as RGB."""
    tab = chromium.new_page()

    def show(data: bytes) -> np.ndarray:
        url = f"data:{MIME[data[:2]]};base64,{base64.b64encode(data).decode()}"
        said: Any = tab.evaluate(PIXELS, url)
        rgba = np.array(said["data"], np.uint8).reshape(said["height"], said["width"], 4)
        return rgba[..., :3]

    yield show
    tab.close()


def quarters() -> Image.Image:
    """A picture that looks different from every side."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste("lime", (24, 0, 48, 16))
    image.paste("blue", (0, 16, 24, 32))
    return image


def encoded(format: str = "PNG", **options: object) -> bytes:
    exact: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    file = io.BytesIO()
    quarters().save(file, format, **{**exact.get(format, {}), **options})
    return file.getvalue()


def profile(extra: int = 0) -> bytes:
    """An ICC profile that means green where it says red, with zeros behind it."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace(b"rXYZ", b"temp", 1).replace(b"gXYZ", b"rXYZ", 1)
    data = data.replace(b"temp", b"gXYZ", 1) + bytes(extra)
    return struct.pack(">I", len(data)) + data[4:]


def iccp(icc: bytes, method: int = 0, **options: Any) -> bytes:
    return chunk(b"iCCP", b"icc\x00" + bytes([method]) + zlib.compress(icc), **options)


def turned(value: int, kind: int = 3) -> bytes:
    """EXIF with an orientation, as a short number (3) or a long one (4)."""
    number = struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value)
    return (
        b"II*\x00\x08\x00\x00\x00\x01\x00"
        + struct.pack("<HHI", 0x0112, kind, 1)
        + number
        + bytes(4)
    )


SIDEWAYS = turned(6)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
XMP_CHUNK = chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + XMP)
OLD_EXIF = b"\nexif\n%8d\n%s\n" % (len(SIDEWAYS) + 6, (b"Exif\x00\x00" + SIDEWAYS).hex().encode())
LONG = b"x" * 2_000_000

GREYS16 = [0, 9362, 18725, 28087, 37449, 46811, 56173, 65535]
COLOURS16 = [sample for grey in GREYS16 for sample in (grey, 65535 - grey, 30_000)]
RAMP = list(range(8))


def samples(*key: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))


TRANSPARENT = {
    "16 bits of grey": png(16, GREY, GREYS16),
    "16 bits of grey, one transparent": png(16, GREY, GREYS16, samples(28087)),
    "16 bits of grey, none transparent": png(16, GREY, GREYS16, samples(28088)),
    "16 bits of grey and alpha": png(16, GREY_ALPHA, [0, 65535, 9362, 30_000, 65535, 0, 9, 9]),
    "16 bits of colour": png(16, RGB, COLOURS16),
    "16 bits of colour, one transparent": png(16, RGB, COLOURS16, samples(28087, 37448, 30_000)),
    "16 bits of colour, off by one": png(16, RGB, COLOURS16, samples(28088, 37448, 30_000)),
    "16 bits of colour and alpha": png(16, RGBA, [0, 65535, 9362, 30_000, 65535, 0, 9, 9]),
    **{
        f"{depth} bits of grey, one transparent": png(
            depth, GREY, [each % 2**depth for each in RAMP], samples(1)
        )
        for depth in (1, 2, 4, 8)
    },
    "bits beyond the depth": png(8, GREY, RAMP, samples(0x0102)),
    "8 bits of colour": png(8, RGB, [*range(24)], samples(3, 4, 5)),
    "a palette": png(
        8, PALETTE, [0, 1] * 4, chunk(b"PLTE", b"\xff\0\0\0\xff\0"), chunk(b"tRNS", b"\0\x80")
    ),
    "a key that is cut off": png(8, GREY, RAMP, chunk(b"tRNS", b"\x02")),
    "a key whose checksum fails": png(8, GREY, RAMP, chunk(b"tRNS", b"\0\x02", is_damaged=True)),
    "two keys": png(8, GREY, RAMP, samples(2), samples(3)),
    "a key behind the pixels": png(8, GREY, RAMP, after=samples(2)),
}

PASSED_OVER = {
    "a long text": with_chunks(encoded(), chunk(b"tEXt", b"Comment\0" + LONG)),
    "a text that inflates": with_chunks(
        encoded(), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG))
    ),
    "a text of Unicode that inflates": with_chunks(
        encoded(), chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG))
    ),
    "a text packed in another way": with_chunks(encoded(), chunk(b"zTXt", b"Comment\0\7?")),
    "a text whose checksum fails": with_chunks(encoded(), chunk(b"tEXt", b"a\0b", is_damaged=True)),
    "an unknown chunk": with_chunks(encoded(), chunk(b"abCd", b"?")),
}

STANDING = {
    "PNG by EXIF": with_chunks(encoded(), chunk(b"eXIf", SIDEWAYS)),
    "JPEG by EXIF": encoded("JPEG", exif=b"Exif\0\0" + SIDEWAYS),
    "PNG by EXIF behind its pixels": with_chunks(
        encoded(), chunk(b"eXIf", SIDEWAYS), at=BEFORE_END
    ),
    "PNG by EXIF whose checksum fails": with_chunks(
        encoded(), chunk(b"eXIf", SIDEWAYS, is_damaged=True)
    ),
    "PNG by EXIF with JPEG's prefix": with_chunks(
        encoded(), chunk(b"eXIf", b"Exif\0\0" + SIDEWAYS)
    ),
    "PNG by the first of two": with_chunks(
        encoded(), chunk(b"eXIf", turned(3)), chunk(b"eXIf", SIDEWAYS)
    ),
    "PNG by EXIF in a text": with_chunks(
        encoded(), chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(OLD_EXIF))
    ),
    "PNG by XMP": with_chunks(encoded(), XMP_CHUNK),
    "JPEG by XMP": encoded("JPEG", xmp=XMP),
    "WebP by XMP": encoded("WEBP", xmp=XMP),
    "PNG by EXIF against XMP": with_chunks(encoded(), chunk(b"eXIf", turned(3)), XMP_CHUNK),
    **{
        f"{format} by {name}": (
            with_chunks(encoded(), chunk(b"eXIf", exif))
            if format == "PNG"
            else encoded(format, exif=exif if format == "WEBP" else b"Exif\0\0" + exif)
        )
        for format in ("PNG", "JPEG", "WEBP")
        for name, exif in {
            "EXIF that is no TIFF": b"no TIFF at all",
            "EXIF that is empty": b"",
            "EXIF whose directory lies elsewhere": b"MM\0*\xff\xff\xff\xff",
            "EXIF that is cut off": SIDEWAYS[:-8],
            "an orientation of nine": turned(9),
            "an orientation of zero": turned(0),
        }.items()
    },
    "PNG by a long number": with_chunks(encoded(), chunk(b"eXIf", turned(6, kind=4))),
    "JPEG by a long number": encoded("JPEG", exif=b"Exif\0\0" + turned(6, kind=4)),
}

COLOURED = {
    "a profile": with_chunks(encoded(), iccp(profile())),
    "a long profile": with_chunks(encoded(), iccp(profile(2_000_000))),
    "a profile of almost 10 MiB": with_chunks(encoded(), iccp(profile(10_480_000))),
    "a profile of more than 10 MiB": with_chunks(encoded(), iccp(profile(10_490_000))),
    "a JPEG's long profile": encoded("JPEG", icc_profile=profile(2_000_000)),
    "a WebP's long profile": encoded("WEBP", icc_profile=profile(2_000_000)),
    "a profile whose checksum fails": with_chunks(encoded(), iccp(profile(), is_damaged=True)),
    "a profile packed in another way": with_chunks(encoded(), iccp(profile(), method=1)),
    "a profile that is cut off": with_chunks(
        encoded(), chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile())[:-200])
    ),
    "a profile that is not packed": with_chunks(encoded(), chunk(b"iCCP", b"icc\0\0" + profile())),
    "the first of two profiles": with_chunks(encoded(), iccp(profile()), iccp(b"another")),
    "a profile behind the pixels": with_chunks(encoded(), iccp(profile()), at=BEFORE_END),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's, of a JPEG
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data, id=name)
        for files in (TRANSPARENT, PASSED_OVER, STANDING, COLOURED)
        for name, data in files.items()
    ],
)
def test_a_reference_is_what_chromium_shows(shown: Shown, data: bytes) -> None:
    ours, theirs = np.array(decode(data, ReferencePolicy())), shown(data)

    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1
