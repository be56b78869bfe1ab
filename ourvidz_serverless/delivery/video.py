"""Frames become an MP4 that plays everywhere, while the next frames are still being decoded.

H.264 in yuv420p, its index before its pictures so that a player can start at once, and the same
machine-readable mark as our pictures.
"""

from __future__ import annotations

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

#: Near the point at which nobody sees a difference. The preset is the one that keeps up with a
#: decoder; what a slower one saves is a few per cent of a small file.
X264 = {"preset": "veryfast", "crf": "18"}


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """An MP4 file, how many frames it has, and the first of them."""

    data: bytes
    num_frames: int
    poster: Frames


def encode_video(
    pieces: Iterable[Frames], width: int, height: int, fps: int, composite: bool = False
) -> EncodedVideo:
    """An MP4 of uint8 pieces (frames, height, width, 3), sRGB, each encoded as it comes.

    Sides are even, as yuv420p has it. `composite` says that a given picture is part of the video.
    Raises ValueError for pieces of another shape, or none.
    """
    with tempfile.TemporaryDirectory(prefix="ourvidz-") as folder:
        # A file and no buffer: the muxer reads back what it wrote, to put the index first.
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
            num_frames, poster = _write(file, pieces, width, height, fps)
        if poster is None:
            raise ValueError("a video has at least one frame")
        data = path.read_bytes()
    return EncodedVideo(data + xmp_box(composite), num_frames, poster)


def _write(
    file: Any, pieces: Iterable[Frames], width: int, height: int, fps: int
) -> tuple[int, Frames | None]:
    stream = file.add_stream("libx264", rate=fps, options=X264)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.time_base = Fraction(1, fps)
    _say_colours(stream.codec_context)
    count, poster = 0, None
    for piece in pieces:
        _check(piece, width, height)
        for pixels in piece:
            poster = pixels if poster is None else poster
            file.mux(stream.encode(_frame(pixels, count, fps)))
            count += 1
    file.mux(stream.encode(None))
    return count, poster


def _check(piece: Frames, width: int, height: int) -> None:
    if piece.dtype != np.uint8 or piece.shape[1:] != (height, width, 3):
        raise ValueError(
            f"frames must be uint8 of shape (n, {height}, {width}, 3), "
            f"not {piece.dtype} of shape {piece.shape}"
        )


def _frame(pixels: Frames, index: int, fps: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame = frame.reformat(
        format="yuv420p",
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_colorspace=Colorspace.ITU709,
    )
    frame.pts, frame.time_base = index, Fraction(1, fps)
    return frame


def _say_colours(codec: Any) -> None:
    # Unsaid, players guess by the height of the picture, and some guess otherwise than we convert.
    codec.colorspace = Colorspace.ITU709
    codec.color_range = ColorRange.MPEG
    codec.color_primaries = ColorPrimaries.BT709
    codec.color_trc = ColorTrc.BT709
