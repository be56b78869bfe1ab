"""Frames become an MP4 that plays everywhere, while the model decodes the next frames.

The file is H.264 in yuv420p. Its index stands before its frames, so that a player can start at
once. It bears the same machine-readable mark as a picture.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray

from ourvidz_serverless.delivery.provenance import xmp_box

Frames = NDArray[np.uint8]

#: x264's constant rate factor, at which hardly anybody sees a difference. 51 is the worst.
RATE_FACTOR = 18

#: As fast as a decoder. A slower preset would save a few per cent of a small file.
PRESET = "veryfast"


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """An MP4 file, the number of its frames, and its first frame."""

    data: bytes
    num_frames: int
    poster: Frames


@dataclass(frozen=True, slots=True)
class Shape:
    """What all frames of a video have in common: its size in pixels, its rate and its quality."""

    width: int
    height: int
    fps: int
    rate_factor: int = RATE_FACTOR


def encode_video(
    pieces: Iterable[Frames], width: int, height: int, fps: int, composite: bool = False
) -> EncodedVideo:
    """An MP4 of uint8 pieces (frames, height, width, 3), sRGB. Each is encoded when it arrives.

    Width and height are even, as yuv420p needs. `composite`: a picture from the caller is part of
    the video. Raises ValueError for pieces of another shape, or if there are none.
    """
    return _encode(pieces, Shape(width, height, fps), composite)


def encode_again(data: bytes, rate_factor: int, composite: bool = False) -> EncodedVideo:
    """A video of `encode_video` at another quality: `rate_factor` is x264's, from 0 to 51."""
    with av.open(io.BytesIO(data), "r") as file:
        stream = file.streams.video[0]
        fps = int(stream.average_rate or 1)
        shape = Shape(stream.codec_context.width, stream.codec_context.height, fps, rate_factor)
        return _encode(map(_pixels, file.decode(stream)), shape, composite)


def _pixels(frame: av.VideoFrame) -> Frames:
    pixels: Frames = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return pixels[None]


def _encode(pieces: Iterable[Frames], shape: Shape, composite: bool) -> EncodedVideo:
    with tempfile.TemporaryDirectory(prefix="ourvidz-") as folder:
        # A file instead of a buffer: the muxer reads the file again to put the index first.
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
            num_frames, poster = _write(file, pieces, shape)
        if poster is None:
            raise ValueError("a video has at least one frame")
        data = path.read_bytes()
    return EncodedVideo(data + xmp_box(composite), num_frames, poster)


def _write(file: Any, pieces: Iterable[Frames], shape: Shape) -> tuple[int, Frames | None]:
    options = {"preset": PRESET, "crf": str(shape.rate_factor)}
    stream = file.add_stream("libx264", rate=shape.fps, options=options)
    stream.width, stream.height, stream.pix_fmt = shape.width, shape.height, "yuv420p"
    stream.codec_context.time_base = Fraction(1, shape.fps)
    _set_colours(stream.codec_context)
    count, poster = 0, None
    for piece in pieces:
        _check(piece, shape.width, shape.height)
        for pixels in piece:
            poster = pixels if poster is None else poster
            file.mux(stream.encode(to_video_frame(pixels, count, shape.fps)))
            count += 1
    file.mux(stream.encode(None))
    return count, poster


def _check(piece: Frames, width: int, height: int) -> None:
    if piece.dtype != np.uint8 or piece.shape[1:] != (height, width, 3):
        raise ValueError(
            f"frames must be uint8 of shape (n, {height}, {width}, 3), "
            f"not {piece.dtype} of shape {piece.shape}"
        )


def to_video_frame(pixels: Frames, index: int, fps: int) -> av.VideoFrame:
    """The frame in the colours and the pixel format of the video, at its time."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709,
    )
    frame.pts, frame.time_base = index, Fraction(1, fps)
    return frame


def _set_colours(codec: Any) -> None:
    # Without these, players guess from the height of the picture, and some guess wrong.
    codec.colorspace = Colorspace.ITU709
    codec.color_range = ColorRange.MPEG
    codec.color_primaries = ColorPrimaries.BT709
    codec.color_trc = ColorTrc.BT709
