"""The ledger of all models: their sizes, where they are, who uses them, and which one is evicted.

A model is registered once, as a `Movable`. From then on only the ledger moves it: from the disk to
the host's memory to the device before a job computes, and back when another model needs the space.
The least recently used model is evicted first, a pinned one last, and one in use never.

A job whose model is not on the device waits in a queue, first come, first served. Models move one
at a time and outside the lock: jobs whose model is on the device go on meanwhile, and `report`
never waits.

One rule prevents deadlocks: a job that holds a lease never waits for another model.

Nothing here imports torch, so that a process that loads no model can report an empty ledger.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.models.memory.mover import Mover
from ourvidz_serverless.models.memory.types import (
    Check,
    Lease,
    LedgerEntry,
    LedgerRow,
    Memory,
    Movable,
    Move,
    MoveRequest,
    Pressure,
    PressureLevels,
    State,
)

#: Seconds between two calls of `check` while a job waits for its model.
POLL_S = 0.05

#: For how many shapes of jobs a model's working memory is remembered.
MAX_SHAPES = 64

#: A job that was never measured, and that expects nothing, is assumed to need one part in so many
#: of the device.
UNKNOWN_SHAPE_DIVISOR = 5


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """One registered model: all of the ledger that its family needs."""

    ledger: Ledger
    model: Movable

    def using(
        self,
        check: Check = lambda: None,
        shape: Hashable = None,
        expected_bytes: int | None = None,
    ) -> AbstractContextManager[Lease]:
        """See `Ledger.using`."""
        return self.ledger.using(self.model, check, shape, expected_bytes)

    def using_where_it_is(self) -> AbstractContextManager[bool]:
        """See `Ledger.using_where_it_is`."""
        return self.ledger.using_where_it_is(self.model)

    def prefetch(self) -> None:
        """See `Ledger.prefetch`."""
        self.ledger.prefetch(self.model)

    def evict_idle(self) -> int:
        """See `Ledger.evict_idle`."""
        return self.ledger.evict_idle(keep=self.model)


class Ledger:
    """All models of one worker, on one device. Safe to call from any thread."""

    def __init__(
        self, memory: Memory, levels: PressureLevels | None = None, has_mover_thread: bool = True
    ) -> None:
        """Without a mover thread somebody calls `grant_one_request`, as tests do."""
        self.memory = memory
        self._levels = levels or PressureLevels()
        self._changed = threading.Condition()
        self._waiting: list[Lease] = []
        # The least recently used comes first.
        self._entries: dict[Movable, LedgerEntry] = {}
        self._mover = Mover(
            memory, self._entries, self._changed, self._plan, has_thread=has_mover_thread
        )
        #: Returns when the weights' files are in the page cache, if a thread reads them ahead.
        self.wait_for_files: Callable[[], None] = lambda: None

    # --- for a family ---

    def register(
        self,
        model: Movable,
        name: str,
        family: str,
        *,
        source: str = "",
        state: State = "host",
        is_pinned: bool = False,
        reserved_bytes: int = 0,
    ) -> ModelHandle:
        """Add a model. `source` is the name of its weights for people, never a path.

        `reserved_bytes` is what it may grow to beside its weights: a cache that outlives jobs.
        """
        with self._changed:
            entry = LedgerEntry(model, name, family, source, is_pinned, state, reserved_bytes)
            self._entries[model] = entry
        return ModelHandle(self, model)

    def preload(self, *models: Movable) -> None:
        """Bring models to the device at start, in this order, as many as fit side by side."""
        # So far the weights are only mapped; the first access would read them page by page.
        self.wait_for_files()
        for model in models:
            entry = self._entries[model]
            with self._changed:
                fits = entry.is_on_device or self._shortage(entry, 0) <= 0
            if fits:
                self.release(model, self.acquire(model))

    def acquire(
        self,
        model: Movable,
        check: Check = lambda: None,
        shape: Hashable = None,
        expected_bytes: int | None = None,
    ) -> Lease:
        """Have a model on the device until `release`.

        The device then has room for what earlier jobs of this `shape` took beside the weights, or,
        if there was none, for `expected_bytes`.

        Waits in the queue; an error that `check` raises ends the waiting. Raises OutOfMemory for a
        model that is larger than the device, and ModelLoadError for one that does not load at the
        second try.
        """
        lease = Lease(shape, expected_bytes)
        with self._changed:
            entry = self._entries[model]
            self._waiting.append(lease)
            try:
                while (moves := self._moves_before(lease, entry)) is None:
                    check()
                    self._changed.wait(POLL_S)
            finally:
                self._waiting.remove(lease)
                self._changed.notify_all()
            lease.reserved_bytes = self._expected_working_bytes(entry, lease)
            entry.leases.append(lease)
        try:
            lease.swap_s = self._mover.carry_out(moves)
        except BaseException:
            self.release(model, lease)
            raise
        return lease

    def release(self, model: Movable, lease: Lease) -> None:
        """End a lease. `measured_bytes` is remembered if no other job used the model meanwhile."""
        with self._changed:
            entry = self._entries.pop(model)
            self._entries[model] = entry
            is_alone = entry.leases == [lease]
            entry.leases.remove(lease)
            if lease.measured_bytes is not None and is_alone:
                self._remember(entry, lease.shape, lease.measured_bytes)
            self._changed.notify_all()

    @contextmanager
    def using(
        self,
        model: Movable,
        check: Check = lambda: None,
        shape: Hashable = None,
        expected_bytes: int | None = None,
    ) -> Iterator[Lease]:
        """`acquire` a model, and `release` it when the block ends."""
        lease = self.acquire(model, check, shape, expected_bytes)
        try:
            yield lease
        finally:
            self.release(model, lease)

    @contextmanager
    def using_where_it_is(self, model: Movable) -> Iterator[bool]:
        """Keep a model on the device while the block runs, if it is there and no job waits.

        It moves nothing and waits for nothing. The block gets False if it must do without.
        """
        lease = Lease()
        with self._changed:
            entry = self._entries[model]
            is_there = entry.is_on_device and not self._mover.is_leaving(entry)
            if is_used := is_there and not self._waiting:
                entry.leases.append(lease)
        try:
            yield is_used
        finally:
            if is_used:
                self.release(model, lease)

    def prefetch(self, model: Movable) -> None:
        """Start to bring a model that a waiting job will need, as far up as there is room now.

        The newest prefetch replaces the one before it. None starts while the pressure is high.
        """
        with self._changed:
            entry = self._entries[model]
            if not entry.is_on_device and self.pressure in ("low", "medium"):
                self._mover.request(MoveRequest(entry, "device", is_prefetch=True))

    def evict_idle(self, keep: Movable) -> int:
        """Take every idle model but one off the device, after an out-of-memory error.

        Returns the bytes that this freed.
        """
        with self._changed:
            while self._mover.is_moving:
                self._changed.wait(POLL_S)
            idle = [each for each in self._idle() if each.model is not keep]
            moves = self._mover.begin(self._evictions(idle))
        self._mover.carry_out(moves)
        return sum(each.model.num_bytes for each in idle)

    # --- for an administrator ---

    @property
    def pressure(self) -> Pressure:
        """How full the device really is."""
        return self._levels.name(1 - self.memory.free_bytes() / max(self.memory.total_bytes, 1))

    @property
    def num_waiting(self) -> int:
        """How many jobs wait for a model."""
        with self._changed:
            return len(self._waiting)

    def free_bytes(self) -> int:
        """Device memory that no model claims, and that no other process holds."""
        with self._changed:
            claimed = sum(each.claimed_bytes for each in self._entries.values())
        return min(self.memory.total_bytes - claimed, self.memory.free_bytes())

    @property
    def max_model_bytes(self) -> int:
        """Device memory for one model if all others were evicted."""
        if self.memory.is_host:
            return self.memory.total_bytes
        with self._changed:
            loaded = [each for each in self._entries.values() if each.state == "device"]
            held = sum(each.model.num_bytes for each in loaded)
        return min(self.memory.total_bytes, self.memory.free_bytes() + held)

    def report(self) -> list[LedgerRow]:
        """A row for every model, the least recently used first."""
        with self._changed:
            return [each.row() for each in self._entries.values()]

    def request_move(self, name: str, to: State, *, force: bool = False) -> MoveRequest:
        """Move a model, by its name, as soon as possible.

        Without `force` a model comes to the device only if there is free room, and one in use is
        refused. With it idle models are evicted, and a model in use leaves after its last job.
        """
        with self._changed:
            entry = next(each for each in self._entries.values() if each.name == name)
            request = MoveRequest(entry, to, may_evict=force)
            if to != "device" and entry.leases and not force:
                return self._mover.refuse(request, "it is in use")
            if to == "device" and entry.size > self.memory.total_bytes:
                return self._mover.refuse(request, "it is larger than the device")
            return self._mover.request(request)

    def grant_one_request(self) -> bool:
        """Carry out one move request that can be granted now; returns whether there was one."""
        return self._mover.grant_one()

    # --- planning; all of it under the lock ---

    def _moves_before(self, lease: Lease, entry: LedgerEntry) -> list[Move] | None:
        """The moves, already announced, after which a job may have its model; None is "wait"."""
        is_next = self._waiting[0] is lease
        if not is_next or entry.moving_to or self._mover.is_leaving(entry):
            return None
        self._check_size(entry)
        victims = self._victims(entry, self._expected_working_bytes(entry, lease))
        if victims is None:
            return None
        moves = self._evictions(victims)
        if not entry.is_on_device:
            moves.append((entry, "device"))
        if moves and self._mover.is_moving:
            return None
        return self._mover.begin(moves)

    def _plan(self, request: MoveRequest) -> list[Move] | None:
        """The moves that grant a request now; None if it must wait. Waiting jobs go first."""
        entry = request.entry
        if entry.moving_to or (request.to != "device" and entry.leases):
            return None
        if request.to == "host" and entry.state == "device":
            # Not earlier: the host may have become full while the request waited.
            request.to = self._eviction_target(entry)
        if request.to != "device":
            return [(entry, request.to)] if _is_above(entry.state, request.to) else []
        if entry.is_on_device:
            return []
        if not request.may_evict and self._shortage(entry, 0) > 0:
            self._mover.refuse(request, "there is no room for it")
            return None
        victims = None if self._waiting else self._victims(entry, 0)
        if victims is not None:
            return [*self._evictions(victims), (entry, "device")]
        # The device has no room yet. Bring the model to the host, if there is room.
        has_room = (
            not self.memory.is_host and self.memory.host_free_bytes() >= entry.model.num_bytes
        )
        return [(entry, "host")] if entry.state == "disk" and has_room else None

    def _victims(self, entry: LedgerEntry, working: int) -> list[LedgerEntry] | None:
        """The models to evict so that a model and its job fit; None is "wait"."""
        missing = self._shortage(entry, working)
        if missing <= 0:
            return []
        victims: list[LedgerEntry] = []
        for idle in self._idle():
            if missing > 0 and idle is not entry:
                victims.append(idle)
                missing -= idle.size
        if missing <= 0:
            return victims
        if self._mover.is_moving or any(each.leases for each in self._entries.values()):
            return None
        # Another process holds the rest. Try anyway: the allocator raises if it fails.
        return victims

    def _check_size(self, entry: LedgerEntry) -> None:
        """Raise OutOfMemory for a model that is larger than the device."""
        if entry.size > self.memory.total_bytes:
            takes, has = entry.size >> 20, self.memory.total_bytes >> 20
            raise OutOfMemory(f"{entry.name} takes {takes} MiB, and the device has {has}")

    def _shortage(self, entry: LedgerEntry, working: int) -> int:
        """The bytes that a model and its job lack beside everything on the device."""
        need = working + (0 if entry.is_on_device else entry.size)
        claimed = sum(each.claimed_bytes for each in self._entries.values())
        if self.memory.is_host and entry.state == "host":
            # On a CPU a move from the host to the device takes no more memory.
            need = working
        return max(claimed + need - self.memory.total_bytes, need - self.memory.free_bytes())

    def _idle(self) -> list[LedgerEntry]:
        """The models that can be evicted, in the order of eviction."""
        idle = [each for each in self._entries.values() if each.is_on_device and each.is_idle]
        return sorted(idle, key=lambda each: each.is_pinned)

    def _evictions(self, entries: Sequence[LedgerEntry]) -> list[Move]:
        """The moves that evict models together. Room in the host is counted once for all."""
        moves: list[Move] = []
        for each in entries:
            taken = sum(other.model.num_bytes for other, to in moves if to == "host")
            moves.append((each, self._eviction_target(each, taken)))
        return moves

    def _eviction_target(self, entry: LedgerEntry, taken: int = 0) -> State:
        """Where an evicted model goes, if others take so many bytes of the host."""
        if not entry.model.is_on_disk:
            return "host"
        fits = self.memory.host_free_bytes() - taken >= entry.model.num_bytes
        return "host" if fits and not self.memory.is_host else "disk"

    def _expected_working_bytes(self, entry: LedgerEntry, lease: Lease) -> int:
        """What a job needs beside the weights, at most what is left of the device.

        It is what the last job of its shape took. Before there was one it is what the job expects,
        or a share of the device. On a CPU nothing is measured, and nothing is set aside.
        """
        if self.memory.is_host or lease.shape is None:
            expected = 0
        elif lease.expected_bytes is None:
            expected = self.memory.total_bytes // UNKNOWN_SHAPE_DIVISOR
        else:
            expected = lease.expected_bytes
        left = self.memory.total_bytes - entry.size
        return min(entry.working.get(lease.shape, expected), max(left, 0))

    @staticmethod
    def _remember(entry: LedgerEntry, shape: Hashable, measured: int) -> None:
        entry.working.pop(shape, None)
        entry.working[shape] = measured
        if len(entry.working) > MAX_SHAPES:
            entry.working.pop(next(iter(entry.working)))


def _is_above(state: State, other: State) -> bool:
    order = ("absent", "disk", "host", "device")
    return order.index(state) > order.index(other)
