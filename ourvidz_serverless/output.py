"""What a model makes, on its way from the family that made it to the delivery."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ourvidz_serverless.errors import InternalError


@dataclass(frozen=True, slots=True)
class Output:
    """One thing a model made, before it is encoded.

    `pixels` is uint8, shape (height, width, 3). `metadata` holds the asset's own facts (seed,
    steps, ...), in the document's words.
    """

    index: int
    pixels: np.ndarray
    metadata: Mapping[str, Any]
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 95
    composite: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One text a model wrote; `metadata` as in `Output`."""

    index: int
    text: str
    metadata: Mapping[str, Any]


class FrameQueue:
    """Frames between the model that decodes them and the encoder that waits for them.

    The model's side puts pieces in, uint8 (frames, height, width, 3), and waits while a few are
    unread, so that memory stays flat however long the video is. The encoder's side iterates.
    """

    #: How soon a model's side that waits hears that its job was stopped.
    POLL_S = 0.05

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._news = threading.Condition()
        self._pieces: deque[np.ndarray] = deque()
        self._is_whole = self._is_closed = False

    def put(self, piece: np.ndarray, check: Callable[[], None]) -> None:
        """Hand over a piece; what `check` raises while there is no room ends the wait.

        A queue that nobody reads any more takes everything.
        """
        with self._news:
            while len(self._pieces) == self._depth and not self._is_closed:
                self._news.wait(self.POLL_S)
                check()
            if not self._is_closed:
                self._pieces.append(piece)
                self._news.notify_all()

    def end(self) -> None:
        """That was the last piece."""
        with self._news:
            self._is_whole = True
            self._news.notify_all()

    def close(self) -> None:
        """One of the sides has gone: no further piece is put in or read."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()

    def __iter__(self) -> Iterator[np.ndarray]:
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> np.ndarray | None:
        with self._news:
            self._news.wait_for(lambda: self._pieces or self._is_whole or self._is_closed)
            if self._is_closed:
                raise InternalError("the video ended before its last frame")
            piece = self._pieces.popleft() if self._pieces else None
            self._news.notify_all()
            return piece


@dataclass(frozen=True, slots=True)
class Video:
    """A video on its way: sent before its first frame is there. `metadata` as in `Output`."""

    index: int
    frames: FrameQueue
    width: int
    height: int
    fps: int
    metadata: Mapping[str, Any]
    composite: bool = False
