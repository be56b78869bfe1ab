"""The queue of frames between a model and the encoder."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from ourvidz_serverless.errors import Cancelled, InternalError
from ourvidz_serverless.output import FrameQueue


def frame(index: int) -> np.ndarray:
    return np.full((2, 2, 3), index, np.uint8)


def pieces(count: int) -> Iterator[np.ndarray]:
    """So many frames in pieces as a model decodes them: one, then four each."""
    frames = np.stack([frame(index) for index in range(count)])
    yield frames[:1]
    yield from (frames[start : start + 4] for start in range(1, count, 4))


def keep_going() -> None:
    """A check that lets everything go on."""


def test_a_frame_queue_gives_every_frame_in_order_and_ends() -> None:
    queue = FrameQueue(depth=2)
    maker = threading.Thread(
        target=lambda: ([queue.put(piece, keep_going) for piece in pieces(33)], queue.end())
    )
    maker.start()

    shown = np.concatenate(list(queue))
    maker.join()

    assert np.array_equal(shown, np.concatenate(list(pieces(33))))


def test_a_put_into_a_full_frame_queue_waits_until_its_check_raises() -> None:
    queue = FrameQueue(depth=2)
    for piece in list(pieces(5)):
        queue.put(piece, keep_going)

    def stop() -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        queue.put(frame(0)[None], stop)


def test_a_frame_queue_that_is_closed_ends_its_reader_with_an_error() -> None:
    queue = FrameQueue()
    queue.put(frame(0)[None], keep_going)
    shown = iter(queue)
    next(shown)
    queue.close()

    with pytest.raises(InternalError):
        next(shown)


def test_a_put_into_a_closed_frame_queue_does_not_wait() -> None:
    queue = FrameQueue(depth=1)
    queue.put(frame(0)[None], keep_going)
    queue.close()

    queue.put(frame(1)[None], keep_going)
