"""Moves models between disk, host and device: one batch of moves at a time, outside the lock.

Moves come from two sides. A job that needs its model carries its moves out in its own thread.
Requests that no job waits for (prefetches, an administrator's) are queued, and carried out in the
mover thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from ourvidz_serverless.errors import JobError, ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.memory.types import (
    LedgerEntry,
    Memory,
    Movable,
    Move,
    MoveRequest,
    State,
)


class Mover:
    """Carries moves out. All methods but `carry_out` and `grant_one` are called under the lock."""

    def __init__(
        self,
        memory: Memory,
        entries: Mapping[Movable, LedgerEntry],
        changed: threading.Condition,
        plan: Callable[[MoveRequest], list[Move] | None],
        *,
        has_thread: bool,
    ) -> None:
        """`plan` gives the moves that grant a request now, or None if it must wait.

        `changed` is the ledger's lock; it is notified after each change. Without a thread somebody
        calls `grant_one`, as tests do.
        """
        self.is_moving = False
        self._memory, self._entries, self._changed = memory, entries, changed
        self._plan, self._has_thread = plan, has_thread
        self._requests: deque[MoveRequest] = deque()
        self._thread: threading.Thread | None = None

    # --- moves ---

    def begin(self, moves: Sequence[Move]) -> list[Move]:
        """Announce moves. The caller carries them out afterwards, without the lock."""
        for entry, to in moves:
            entry.moving_to = to
        self.is_moving = self.is_moving or bool(moves)
        return list(moves)

    def carry_out(self, moves: Sequence[Move]) -> float:
        """Move models, without the lock; returns the seconds that it took."""
        began = time.monotonic()
        if not moves:
            return 0.0
        try:
            for entry, to in moves:
                self._move(entry, to)
        finally:
            with self._changed:
                for entry, _ in moves:
                    entry.moving_to = None
                self.is_moving = False
                self._changed.notify_all()
        return time.monotonic() - began

    def _move(self, entry: LedgerEntry, to: State) -> None:
        if to == "disk":
            entry.model.drop()
        elif to == "host" and entry.state == "device":
            entry.model.to_host()
        else:
            self._bring_up(entry, to)
        with self._changed:
            entry.evictions += entry.state == "device"
            entry.loads += to == "device"
            entry.drops += to == "disk"
            entry.parked += (entry.state, to) == ("device", "host")
            entry.state = to

    def _bring_up(self, entry: LedgerEntry, to: State) -> None:
        """Move a model to the host or the device, from wherever it is."""
        if entry.state in ("disk", "absent"):
            self._make_host_room(entry)
            self._load(entry)
            entry.state = "host"
            entry.reads += 1
        if to == "device":
            entry.model.to_device()

    def _load(self, entry: LedgerEntry) -> None:
        try:
            entry.model.load()
        except ModelLoadError as exc:
            log.warning("%s did not load, and is read once more: %s", entry.name, exc.message)
            try:
                entry.model.load()
            except ModelLoadError:
                entry.state = "absent"
                raise

    def _make_host_room(self, newcomer: LedgerEntry) -> None:
        """Drop models from the host's memory, the least recently used first."""
        for entry in list(self._entries.values()):
            if self._memory.host_free_bytes() >= newcomer.model.num_bytes:
                return
            if entry.state == "host" and entry is not newcomer and entry.model.is_on_disk:
                # Nobody else moves it meanwhile: models move one at a time.
                entry.model.drop()
                entry.state = "disk"
                entry.drops += 1

    # --- requests that no job waits for ---

    def request(self, request: MoveRequest) -> MoveRequest:
        """Queue a request. It replaces older ones for the model; a prefetch any older prefetch."""
        for other in list(self._requests):
            if other.entry is request.entry or (other.is_prefetch and request.is_prefetch):
                self._requests.remove(other)
                other.is_done.set()
        if request.to == request.entry.state and not request.entry.moving_to:
            request.is_done.set()
            return request
        self._requests.append(request)
        if self._thread is None and self._has_thread:
            self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        return request

    def refuse(self, request: MoveRequest, why: str) -> MoveRequest:
        """End a request with an error."""
        if request in self._requests:
            self._requests.remove(request)
        request.error = why
        request.is_done.set()
        return request

    def is_leaving(self, entry: LedgerEntry) -> bool:
        """Whether a request takes this model off the device. Until then no new job gets it."""
        return any(each.entry is entry and each.to != "device" for each in self._requests)

    def grant_one(self) -> bool:
        """Carry out one request that can be granted now; returns whether there was one."""
        with self._changed:
            chosen = self._next()
            if chosen is None:
                return False
            request, moves = chosen
            is_last = not moves or moves[-1] == (request.entry, request.to)
            if is_last:
                self._requests.remove(request)
            self.begin(moves)
        try:
            self.carry_out(moves)
        except JobError as exc:
            self._fail(request, exc.message)
        except Exception as exc:
            # The mover thread survives unforeseen errors, as the worker does.
            self._fail(request, type(exc).__name__)
        if is_last:
            request.is_done.set()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._next() is None:
                    self._changed.wait()
            self.grant_one()

    def _fail(self, request: MoveRequest, why: str) -> None:
        log.warning("%s could not be moved: %s", request.entry.name, why)
        with self._changed:
            self.refuse(request, why)

    def _next(self) -> tuple[MoveRequest, list[Move]] | None:
        if self.is_moving:
            return None
        for request in list(self._requests):
            if (moves := self._plan(request)) is not None:
                return request, moves
        return None
