"""Outputs are encoded and stored in threads, while the model makes the next output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait
from typing import Any, Self, TypeVar

from ourvidz_serverless.delivery import files
from ourvidz_serverless.delivery.files import File, Sign
from ourvidz_serverless.document import Asset
from ourvidz_serverless.output import Output, Text, Video

T = TypeVar("T")

#: Delivers one file. Returns how the caller finds it; raises UploadError after its tries.
Send = Callable[[File], str]

#: Raises the error of a job that must stop.
Check = Callable[[], None]


class Delivery(ABC):
    """The files of one job. As a context manager it ends only after all work on them has ended."""

    def __init__(self, pool: Executor, send: Send, sign: Sign = lambda data, *_: data) -> None:
        self._pool, self._send, self._sign = pool, send, sign
        self._begun: list[Future[Any]] = []

    @abstractmethod
    def submit(self, output: Output | Text | Video) -> None:
        """Start to encode an output."""

    @abstractmethod
    def assets(self, check: Check, poll_s: float = 0.1) -> tuple[Asset, ...]:
        """All assets in order, once they are delivered. `check` is called meanwhile."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Wait for all work that has begun: nothing may be stored after the job has ended.
        for future in self._begun:
            future.cancel()
        wait(self._begun)

    def _start(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Begin a call in a thread; the delivery does not end before it."""
        future = self._pool.submit(call, *args)
        self._begun.append(future)
        return future


class Uploads(Delivery):
    """Sends each file, and a small WebP of it as its thumbnail, as soon as it is encoded."""

    def __init__(
        self,
        pool: Executor,
        send: Send,
        sign: Sign = lambda data, *_: data,
        has_thumbnails: bool = True,
    ) -> None:
        super().__init__(pool, send, sign)
        self._has_thumbnails = has_thumbnails
        self._assets: list[Future[Asset]] = []

    def submit(self, output: Output | Text | Video) -> None:
        """Start to encode and send an output, and its thumbnail."""
        if isinstance(output, Text):
            # In this thread: a text is not stored, and must not wait for a thread that stores.
            self._assets.append(done(files.text_asset(output)))
        elif isinstance(output, Video):
            self._assets.append(self._start(self._video, output))
        elif self._has_thumbnails:
            # The thumbnail first: it has begun when the picture's thread waits for it. So the
            # threads never all wait for one another.
            thumbnail = self._start(self._thumbnail, output, output.pixels)
            self._assets.append(self._start(self._picture, output, thumbnail))
        else:
            self._assets.append(self._start(self._picture, output))

    def assets(self, check: Check, poll_s: float = 0.1) -> tuple[Asset, ...]:
        return tuple(results(self._assets, check, poll_s))

    def _picture(self, output: Output, thumbnail: Future[str] | None = None) -> Asset:
        file = files.picture(output, self._sign)
        url = self._send(file)
        return file.asset(url, thumbnail.result() if thumbnail else None)

    def _video(self, output: Video) -> Asset:
        file = files.video(output, self._sign)
        url = self._send(file)
        return file.asset(
            url, self._thumbnail(output, file.poster) if self._has_thumbnails else None
        )

    def _thumbnail(self, output: Output | Video, pixels: Any) -> str:
        return self._send(files.thumbnail(output, pixels))


def done(result: T) -> Future[T]:
    """A future that has this result already."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


def results(futures: Iterable[Future[T]], check: Check, poll_s: float) -> list[T]:
    """The results of all futures, in order. `check` is called meanwhile, and may raise."""
    all_futures = list(futures)
    waiting = set(all_futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=poll_s, return_when="FIRST_EXCEPTION")
        check()  # first: a stop makes uploads fail, and its error is the cause
        for future in ended:
            future.result()
    return [future.result() for future in all_futures]
