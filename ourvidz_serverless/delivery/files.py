"""An output becomes a file: encoded, signed, and described as the document describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote

from ourvidz_serverless.delivery import images
from ourvidz_serverless.delivery.png import Pixels
from ourvidz_serverless.document import Asset
from ourvidz_serverless.output import Output, Text, Video

#: Signs a file, given its bytes, its MIME type, and whether a picture from the caller is part of
#: it. Returns the bytes to deliver.
Sign = Callable[[bytes, str, bool], bytes]


@dataclass(frozen=True, slots=True)
class File:
    """One file of a job, and the metadata of its asset.

    `index` is its output's. `poster` is the first frame of a video.
    """

    index: int
    type: Literal["image", "video"]
    data: bytes = field(repr=False)
    mime: str
    extension: str
    metadata: Mapping[str, Any]
    poster: Pixels | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.index}.{self.extension}"

    def asset(self, url: str, thumbnail_url: str | None = None) -> Asset:
        """The file as an asset of the document, which is found at this URL."""
        return Asset(self.type, url, thumbnail_url, self.metadata)


def picture(output: Output, sign: Sign) -> File:
    """The file of a picture, in the output's format."""
    image = images.encode_image(output.pixels, output.format, output.quality, output.composite)
    data = sign(image.data, image.mime, output.composite)
    facts = {"format": image.format, "file_size_bytes": len(data)}
    metadata = {**output.metadata, **facts}
    return File(output.index, "image", data, image.mime, image.extension, metadata)


def thumbnail(output: Output | Video, pixels: Pixels) -> File:
    """The thumbnail of an output that has these pixels. It is not signed."""
    small = images.thumbnail(pixels, composite=output.composite)
    return File(output.index, "image", small.data, small.mime, f"thumb.{small.extension}", {})


def video(output: Video, sign: Sign) -> File:
    """The file of a video, whose frames are encoded as they arrive."""
    # Imported here, since most families make no videos.
    from ourvidz_serverless.delivery import video as encoder

    try:
        encoded = encoder.encode_video(
            output.frames, output.width, output.height, output.fps, output.composite
        )
    finally:
        output.frames.close()
    data = sign(encoded.data, "video/mp4", output.composite)
    facts: dict[str, Any] = {
        "format": "mp4",
        "frame_num": encoded.num_frames,
        "fps": output.fps,
        "duration_seconds": round(encoded.num_frames / output.fps, 3),
        "file_size_bytes": len(data),
    }
    metadata = {**output.metadata, **facts}
    return File(output.index, "video", data, "video/mp4", "mp4", metadata, encoded.poster)


def smaller_video(output: Video, file: File, rate_factor: int, sign: Sign) -> File:
    """The file of a video again, at a lower quality: `rate_factor` is x264's, from 0 to 51."""
    from ourvidz_serverless.delivery import video as encoder

    encoded = encoder.encode_again(file.data, rate_factor, output.composite)
    data = sign(encoded.data, file.mime, output.composite)
    return replace(file, data=data, metadata={**file.metadata, "file_size_bytes": len(data)})


def text_asset(output: Text) -> Asset:
    """A text as an asset. It is no file: a bucket for pictures may refuse text."""
    facts: dict[str, Any] = {"format": "txt", "file_size_bytes": len(output.text.encode())}
    url = f"data:text/plain;charset=utf-8,{quote(output.text)}"
    return Asset("text", url, None, {**output.metadata, **facts})
