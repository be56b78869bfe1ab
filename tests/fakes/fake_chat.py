"""Fake chat models: one replies with the given texts, one never stops."""

import threading
import time
from collections.abc import Callable, Iterator

from ourvidz_serverless.models.chat.request import ChatReply, ChatRequest, ReplyStats
from tests.fakes.clock import Clock
from tests.fakes.fake_sdxl import NoDevice

STATS = ReplyStats(
    num_prompt=7,
    num_completion=5,
    num_reused=0,
    num_dropped=2,
    finish_reason="stop",
    time_to_first_token_s=0.01,
    tokens_per_second=50.0,
    swap_s=0.0,
)


class FakeReply:
    """A reply of given pieces."""

    stats = STATS

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self._pieces


class FakeChat:
    """Replies with the given pieces. A piece takes `piece_s` seconds of its clock."""

    def __init__(self, *pieces: str, piece_s: float = 0.0, clock: Clock | None = None) -> None:
        self.device = NoDevice()
        self.pieces = list(pieces)
        self.piece_s, self.clock = piece_s, clock or Clock()
        self.calls: list[ChatRequest] = []

    def generate(self, request: ChatRequest, check: Callable[[], None]) -> ChatReply:
        self.calls.append(request)
        return FakeReply(self._write(check))

    def _write(self, check: Callable[[], None]) -> Iterator[str]:
        for piece in self.pieces:
            check()
            self.clock.advance(self.piece_s)
            yield piece


class EndlessChat:
    """A model that never stops by itself."""

    def __init__(self) -> None:
        self.device = NoDevice()
        self.begun = 0
        self.is_writing = threading.Event()
        self.stopped = threading.Event()

    def generate(self, request: ChatRequest, check: Callable[[], None]) -> ChatReply:
        self.begun += 1
        return FakeReply(self._write(check))

    def _write(self, check: Callable[[], None]) -> Iterator[str]:
        try:
            while True:
                check()
                self.is_writing.set()
                yield "word "
                time.sleep(0.01)
        finally:
            self.stopped.set()
