"""What a model makes: pictures, texts and videos, before they are encoded and stored."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ourvidz_serverless.errors import InternalError


@dataclass(frozen=True, slots=True)
class Output:
    """One picture that a model made, before it is encoded.

    `pixels` is uint8, shape (height, width, 3). `metadata` holds the asset's own facts (seed,
    steps, ...), under the keys of the document. A WebP with the `quality` None is lossless.
    `composite`: a picture from the caller is part of this one.
    """

    index: int
    pixels: np.ndarray
    metadata: Mapping[str, Any]
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int | None = 95
    composite: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One text that a model wrote; `metadata` as in `Output`."""

    index: int
    text: str
    metadata: Mapping[str, Any]


class Inspector(Protocol):
    """Sees the frames of a video on their way to the encoder."""

    def see(self, piece: np.ndarray) -> None:
        """Called with each piece, uint8 (frames, height, width, 3)."""

    def end(self) -> None:
        """Called after the last piece. If it raises, the video has no end, and is never a file."""


class FrameQueue:
    """A bounded queue of frames, from the model that decodes them to the encoder.

    The model puts pieces, uint8 (frames, height, width, 3), and waits while `depth` pieces are
    unread. So the memory does not grow with the length of the video. The encoder iterates.
    """

    #: How often a `put` that waits calls `check`, in seconds.
    POLL_S = 0.05

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._changed = threading.Condition()
        self._pieces: deque[np.ndarray] = deque()
        self._has_ended = self._is_closed = False
        #: Set before the first piece, if somebody has to see the frames.
        self.inspector: Inspector | None = None

    def put(self, piece: np.ndarray, check: Callable[[], None]) -> None:
        """Add a piece. While the queue is full, wait and call `check`, which may raise.

        A closed queue drops the piece.
        """
        if self.inspector:
            self.inspector.see(piece)
        with self._changed:
            while len(self._pieces) == self._depth and not self._is_closed:
                self._changed.wait(self.POLL_S)
                check()
            if not self._is_closed:
                self._pieces.append(piece)
                self._changed.notify_all()

    def end(self) -> None:
        """Mark the end: no further piece will be put. Raises what the inspector raises."""
        if self.inspector:
            self.inspector.end()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up: a reader that waits gets InternalError, and further pieces are dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[np.ndarray]:
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> np.ndarray | None:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._has_ended or self._is_closed)
            if self._is_closed:
                raise InternalError("the video ended before its last frame")
            piece = self._pieces.popleft() if self._pieces else None
            self._changed.notify_all()
            return piece


@dataclass(frozen=True, slots=True)
class Video:
    """A video, submitted before its first frame is decoded. `metadata` as in `Output`."""

    index: int
    frames: FrameQueue
    width: int
    height: int
    fps: int
    metadata: Mapping[str, Any]
    composite: bool = False
