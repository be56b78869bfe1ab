"""Which models are on the device. The others wait in the host's memory until they are asked for.

A model is swapped between requests, never in the middle of one: whoever asks for a model that is
away waits until one that is there has no users, and whoever comes later waits behind. So mixed
traffic on one place takes turns, in the order of its arrival.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from ourvidz_serverless.models.device import out_of_memory_is_ours

#: How soon a request that waits for its model hears that it was stopped.
POLL_S = 0.05


class Movable(Protocol):
    """A model that can be on the device or not."""

    def arrive(self) -> None: ...

    def leave(self) -> None: ...


class Residency:
    """Who is there, at most `places` at once, and who uses it."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._news = threading.Condition()
        self._line: list[object] = []
        # The one whose turn was longest ago comes first.
        self._users: dict[Movable, int] = {}

    def take(self, model: Movable, check: Callable[[], None] = lambda: None) -> float:
        """Have a model on the device until `give_back`; the seconds that it took to swap it in.

        Waits for its turn; what `check` raises meanwhile ends that.
        """
        ticket = object()
        with self._news:
            self._line.append(ticket)
            try:
                while self._line[0] is not ticket or not self._has_place(model):
                    self._news.wait(POLL_S)
                    check()
                return self._bring(model)
            finally:
                self._line.remove(ticket)
                self._news.notify_all()

    def give_back(self, model: Movable) -> None:
        """Say that one user of a model is done with it."""
        with self._news:
            self._users[model] -= 1
            self._news.notify_all()

    def _has_place(self, model: Movable) -> bool:
        return model in self._users or len(self._users) < self._places or 0 in self._users.values()

    def _bring(self, model: Movable) -> float:
        began = time.monotonic()
        users = self._users.pop(model, None)
        if users is None:
            self._make_place()
            with out_of_memory_is_ours():
                model.arrive()
        self._users[model] = (users or 0) + 1
        return 0.0 if users is not None else time.monotonic() - began

    def _make_place(self) -> None:
        if len(self._users) == self._places:
            idle = next(model for model, users in self._users.items() if not users)
            del self._users[idle]
            idle.leave()
