"""A model that says what it was told to, in the pieces it was told."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.fakes.clock import Clock
from tests.fakes.fake_sdxl import NoDevice


class FakeReply:
    """A reply, and the facts that a real one has."""

    finish_reason = "stop"
    num_prompt, num_completion, num_reused, num_dropped = 7, 5, 0, 2
    time_to_first_token_s, tokens_per_second, swap_s = 0.01, 50.0, 0.0

    def __init__(
        self, pieces: list[str], check: Callable[[], None], take_time: Callable[[], None]
    ) -> None:
        self._pieces, self._check, self._take_time = pieces, check, take_time

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self._check()
            self._take_time()
            yield piece


class FakeChat:
    """Stands where the chat models stand. A piece takes `piece_s` seconds of its clock."""

    def __init__(self, *pieces: str, piece_s: float = 0.0, clock: Clock | None = None) -> None:
        self.device = NoDevice()
        self.pieces = list(pieces)
        self.piece_s, self.clock = piece_s, clock or Clock()
        self.calls: list[dict[str, Any]] = []

    def generate(self, *, check: Callable[[], None], **call: Any) -> FakeReply:
        self.calls.append(call)
        return FakeReply(self.pieces, check, lambda: self.clock.advance(self.piece_s))


class EndlessChat:
    """A model that never stops by itself."""

    def __init__(self) -> None:
        self.device = NoDevice()
        self.begun = 0
        self.speaks = threading.Event()
        self.stopped = threading.Event()

    def generate(self, *, check: Callable[[], None], **call: Any) -> Iterator[str]:
        self.begun += 1
        try:
            while True:
                check()
                self.speaks.set()
                yield "word "
                time.sleep(0.01)
        finally:
            self.stopped.set()
