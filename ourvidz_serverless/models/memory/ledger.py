"""The ledger: what every model of this worker takes, where it is, who uses it, and what must leave.

A model is registered once, as a `Movable`, and from then on only the ledger moves it: up from disk
to the host's memory to the device, before a job computes, and down again when another needs the
room. The least recently used leaves first, a pinned one last, one in use never.

Whoever asks for a model that is away waits for room, and whoever comes later waits behind, so mixed
traffic takes turns in the order of its arrival. Models move one at a time and outside the lock:
requests for one that is there go on meanwhile, and `report` never waits.

No deadlock, by one rule: who uses a model waits for no other before giving it back.

Nothing here knows torch, so that a worker can tell of its memory wherever it runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ourvidz_serverless.errors import JobError, ModelLoadError, OutOfMemory

#: How soon a request that waits for its model hears that it was stopped.
POLL_S = 0.05

#: Shapes of jobs whose working memory is remembered, of one model.
MAX_SHAPES = 64

#: The share of the device, as one in so many, that a job of an unknown shape is taken to need.
UNMEASURED = 5

State = Literal["absent", "disk", "host", "device"]
Pressure = Literal["low", "medium", "high", "critical"]
Check = Callable[[], None]

log = logging.getLogger("ourvidz")


class Movable(Protocol):
    """A model that can be in three places. Each verb moves it by one, up or down.

    The ledger calls one verb at a time, never on a model in use, and a model that fails on its way
    stays where it was. `models.tensors.Tensors` is one for any torch modules.
    """

    @property
    def num_bytes(self) -> int:
        """What it takes on the device: the sum of its tensors."""

    @property
    def is_on_disk(self) -> bool:
        """Whether `load` can bring it back after `drop`."""

    def load(self) -> None:
        """From disk to the host's memory. Raises ModelLoadError."""

    def arrive(self) -> None:
        """From the host's memory to the device. Raises OutOfMemory."""

    def leave(self) -> None:
        """From the device to the host's memory."""

    def drop(self) -> None:
        """From the host's memory, or straight from the device, to nowhere but the disk."""


class Memory(Protocol):
    """The device's memory and the host's, as they really are."""

    @property
    def name(self) -> str:
        """The device, as in `cuda:0`."""

    @property
    def is_host(self) -> bool:
        """Whether the device has no memory of its own, so that only the disk frees any."""

    @property
    def total_bytes(self) -> int:
        """What the device has, or may use."""

    def free_bytes(self) -> int:
        """What nobody holds of it now."""

    def host_free_bytes(self) -> int:
        """What models that have left the device may take of the host's memory."""


@dataclass(frozen=True, slots=True)
class Levels:
    """From which used share of the device on the pressure has each name."""

    medium: float = 0.7
    high: float = 0.85
    critical: float = 0.95

    def name(self, used: float) -> Pressure:
        if used >= self.critical:
            return "critical"
        return "high" if used >= self.high else "medium" if used >= self.medium else "low"


@dataclass(frozen=True, slots=True)
class Holding:
    """A row of the ledger, as it was when somebody asked.

    It came to the device `num_loads` times and left it `num_evictions` times; `num_parked` of those
    to the host's memory. It was dropped from either `num_drops` times, and read from the disk anew
    `num_reads` times.
    """

    name: str
    family: str
    source: str
    state: State
    num_bytes: int
    room_bytes: int
    num_users: int
    is_pinned: bool
    num_loads: int
    num_evictions: int
    num_parked: int
    num_drops: int
    num_reads: int
    working_bytes: Mapping[str, int]


@dataclass(eq=False, slots=True)
class Use:
    """One user of a model: `measured` is what the job took beside the weights, once it is known."""

    shape: Hashable = None
    promised: int = 0
    measured: int | None = None
    swap_s: float = 0.0


@dataclass(eq=False, slots=True)
class Entry:
    """One model's own lines."""

    model: Movable
    name: str
    family: str
    source: str
    is_pinned: bool
    state: State
    #: What it may grow to beside its weights, for as long as it is there.
    room: int = 0
    #: Where it is on its way to.
    heading: State | None = None
    loads: int = 0
    evictions: int = 0
    parked: int = 0
    drops: int = 0
    reads: int = 0
    #: What jobs of each shape were measured to need beside the weights.
    working: dict[Hashable, int] = field(default_factory=dict)
    #: What its present users were promised of that.
    users: list[Use] = field(default_factory=list)

    @property
    def is_there(self) -> bool:
        return self.state == "device" and self.heading is None

    @property
    def is_idle(self) -> bool:
        return not self.users and self.heading is None

    @property
    def size(self) -> int:
        return self.model.num_bytes + self.room

    @property
    def claim(self) -> int:
        """What it takes of the device now, or is about to."""
        is_counted = "device" in (self.state, self.heading)
        promised = sum(use.promised for use in self.users)
        return promised + (self.size if is_counted else 0)


@dataclass(frozen=True, slots=True)
class Home:
    """One model's own door to the ledger, which is all that its family needs of it."""

    ledger: Ledger
    model: Movable

    def using(
        self, check: Check = lambda: None, shape: Hashable = None
    ) -> AbstractContextManager[Use]:
        """See `Ledger.using`."""
        return self.ledger.using(self.model, check, shape)

    def expect(self) -> None:
        """See `Ledger.expect`."""
        self.ledger.expect(self.model)

    def shed(self) -> int:
        """See `Ledger.shed`."""
        return self.ledger.shed(keep=self.model)


#: A model, and the place that it shall be in.
Move = tuple[Entry, State]


@dataclass(eq=False, slots=True)
class Wish:
    """A move that somebody wants when it can be had. `error` is why it was not."""

    entry: Entry
    to: State
    may_evict: bool = True
    is_guess: bool = False
    is_done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None


class Ledger:
    """All models of one worker, on one device. Safe to call from any thread."""

    def __init__(
        self, memory: Memory, levels: Levels | None = None, has_porter: bool = True
    ) -> None:
        """Without a porter's thread somebody calls `carry_one`, as tests do."""
        self.memory = memory
        self._has_porter = has_porter
        self._levels = levels or Levels()
        self._news = threading.Condition()
        self._line: list[Use] = []
        # The one whose use was longest ago comes first.
        self._entries: dict[Movable, Entry] = {}
        self._is_moving = False
        self._wishes: deque[Wish] = deque()
        self._porter: threading.Thread | None = None
        #: Returns when the files of the weights are in the page cache, if somebody reads them.
        self.wait_for_files: Callable[[], None] = lambda: None

    # --- a family's side ---

    def register(
        self,
        model: Movable,
        name: str,
        family: str,
        *,
        source: str = "",
        state: State = "host",
        is_pinned: bool = False,
        room_bytes: int = 0,
    ) -> Home:
        """Take a model in. `source` is the name of its weights, for people; never a path.

        `room_bytes` is what it may grow to beside its weights, such as a cache that outlives jobs.
        """
        with self._news:
            entry = Entry(model, name, family, source, is_pinned, state, room_bytes)
            self._entries[model] = entry
        return Home(self, model)

    def settle(self, *models: Movable) -> None:
        """Bring models to the device at start, in that order, as many as fit beside one another."""
        # Until here they were mapped, and nothing touched them.
        self.wait_for_files()
        for model in models:
            entry = self._entries[model]
            with self._news:
                fits = entry.is_there or self._shortage(entry, 0) <= 0
            if fits:
                self.give_back(model, self.take(model))

    def take(self, model: Movable, check: Check = lambda: None, shape: Hashable = None) -> Use:
        """Have a model on the device until `give_back`; `swap_s` is what moving it there took.

        There is then room for what a job of that `shape` was measured to need. Waits for its
        turn; what `check` raises meanwhile ends that. Raises OutOfMemory for a model that is
        larger than the device, ModelLoadError for one that does not load, at the second try.
        """
        use = Use(shape)
        with self._news:
            entry = self._entries[model]
            self._line.append(use)
            try:
                while (moves := self._turn(use, entry)) is None:
                    check()
                    self._news.wait(POLL_S)
            finally:
                self._line.remove(use)
                self._news.notify_all()
            use.promised = self._working(entry, shape)
            entry.users.append(use)
        try:
            use.swap_s = self._carry_out(moves)
        except BaseException:
            self.give_back(model, use)
            raise
        return use

    def give_back(self, model: Movable, use: Use) -> None:
        """Say that a user of a model is done with it."""
        with self._news:
            entry = self._entries.pop(model)
            self._entries[model] = entry
            is_alone = entry.users == [use]
            entry.users.remove(use)
            if use.measured is not None and is_alone:
                self._note(entry, use.shape, use.measured)
            self._news.notify_all()

    @contextmanager
    def using(
        self, model: Movable, check: Check = lambda: None, shape: Hashable = None
    ) -> Iterator[Use]:
        """The same for as long as a block lasts."""
        use = self.take(model, check, shape)
        try:
            yield use
        finally:
            self.give_back(model, use)

    def expect(self, model: Movable) -> None:
        """Begin to bring a model that a waiting job will take; as far up as room allows now.

        Only one is expected at a time, the newest, and none while the pressure is high.
        """
        with self._news:
            entry = self._entries[model]
            if not entry.is_there and self.pressure in ("low", "medium"):
                self._wish(Wish(entry, "device", is_guess=True))

    def shed(self, keep: Movable) -> int:
        """After an out-of-memory: take every idle model but one off the device; the bytes freed."""
        with self._news:
            while self._is_moving:
                self._news.wait(POLL_S)
            idle = [each for each in self._idle() if each.model is not keep]
            moves = self._begin(self._leaving(idle))
        self._carry_out(moves)
        return sum(each.model.num_bytes for each in idle)

    # --- an administrator's side ---

    @property
    def pressure(self) -> Pressure:
        """How full the device really is."""
        return self._levels.name(1 - self.memory.free_bytes() / max(self.memory.total_bytes, 1))

    def free_bytes(self) -> int:
        """What no model claims of the device, nor anybody else holds."""
        with self._news:
            claimed = sum(each.claim for each in self._entries.values())
        return min(self.memory.total_bytes - claimed, self.memory.free_bytes())

    @property
    def most_bytes(self) -> int:
        """What one model could have of the device, if all others left it."""
        if self.memory.is_host:
            return self.memory.total_bytes
        with self._news:
            there = [each for each in self._entries.values() if each.state == "device"]
            held = sum(each.model.num_bytes for each in there)
        return min(self.memory.total_bytes, self.memory.free_bytes() + held)

    def report(self) -> list[Holding]:
        """Every row, least recently used first."""
        with self._news:
            return [
                Holding(
                    each.name,
                    each.family,
                    each.source,
                    each.state,
                    each.model.num_bytes,
                    each.room,
                    len(each.users),
                    each.is_pinned,
                    each.loads,
                    each.evictions,
                    each.parked,
                    each.drops,
                    each.reads,
                    {str(shape): size for shape, size in each.working.items()},
                )
                for each in self._entries.values()
            ]

    def wish(self, name: str, to: State, *, force: bool = False) -> Wish:
        """Move a model, by its name, as soon as it can be; `is_done` is set when it is over.

        Without `force` a model comes only into room that is free, and one in use does not go;
        with it idle ones make room, and one in use goes when its last user has left.
        """
        with self._news:
            entry = next(each for each in self._entries.values() if each.name == name)
            wish = Wish(entry, to, may_evict=force)
            if to != "device" and entry.users and not force:
                return self._refuse(wish, "it is in use")
            if to == "device" and entry.size > self.memory.total_bytes:
                return self._refuse(wish, "it is larger than the device")
            if to == "host" and entry.state == "device":
                wish.to = self._below(entry)
            return self._wish(wish)

    # --- inside; all of it under the lock, but for `_carry_out` ---

    def _turn(self, use: Use, entry: Entry) -> list[Move] | None:
        """What moves before a request may have its model: nothing, perhaps; None is "wait"."""
        if self._line[0] is not use or entry.heading or self._is_unwanted(entry):
            return None
        self._check_size(entry)
        victims = self._victims(entry, self._working(entry, use.shape))
        if victims is None:
            return None
        moves = self._leaving(victims)
        if not entry.is_there:
            moves.append((entry, "device"))
        if moves and self._is_moving:
            return None
        return self._begin(moves)

    def _victims(self, entry: Entry, working: int) -> list[Entry] | None:
        """Whom to take off the device, so that a model and its work fit; None is "too early"."""
        missing = self._shortage(entry, working)
        if missing <= 0:
            return []
        victims: list[Entry] = []
        for idle in self._idle():
            if missing > 0 and idle is not entry:
                victims.append(idle)
                missing -= idle.size
        if missing <= 0:
            return victims
        if self._is_moving or any(each.users for each in self._entries.values()):
            return None
        # What is missing now is held by strangers. The allocator has the last word.
        return victims

    def _check_size(self, entry: Entry) -> None:
        """Raise OutOfMemory for a model that no eviction makes room for."""
        if entry.size > self.memory.total_bytes:
            takes, has = entry.size >> 20, self.memory.total_bytes >> 20
            raise OutOfMemory(f"{entry.name} takes {takes} MiB, and the device has {has}")

    def _shortage(self, entry: Entry, working: int) -> int:
        """The bytes by which a model and its work do not fit beside all that is there."""
        need = working + (0 if entry.is_there else entry.size)
        claimed = sum(each.claim for each in self._entries.values())
        if self.memory.is_host and entry.state == "host":
            # It takes no more there than where it is.
            need = working
        return max(claimed + need - self.memory.total_bytes, need - self.memory.free_bytes())

    def _idle(self) -> list[Entry]:
        """Models that could leave the device, the first to go first."""
        there = [each for each in self._entries.values() if each.is_there and each.is_idle]
        return sorted(there, key=lambda each: each.is_pinned)

    def _leaving(self, entries: Sequence[Entry]) -> list[Move]:
        """Where models go that leave the device together: the host has room for each once."""
        moves: list[Move] = []
        for each in entries:
            taken = sum(other.model.num_bytes for other, to in moves if to == "host")
            moves.append((each, self._below(each, taken)))
        return moves

    def _below(self, entry: Entry, taken: int = 0) -> State:
        """Where a model goes that leaves the device, when others take so much of the host."""
        if not entry.model.is_on_disk:
            return "host"
        fits = self.memory.host_free_bytes() - taken >= entry.model.num_bytes
        return "host" if fits and not self.memory.is_host else "disk"

    def _working(self, entry: Entry, shape: Hashable) -> int:
        """What a job of a shape was measured to need beside the weights, if there is that much.

        Of a shape that nobody has measured, a share of the device is assumed.
        """
        is_measured = shape is None or shape in entry.working or self.memory.is_host
        guess = 0 if is_measured else self.memory.total_bytes // UNMEASURED
        room = self.memory.total_bytes - entry.size
        return min(entry.working.get(shape, guess), max(room, 0))

    @staticmethod
    def _note(entry: Entry, shape: Hashable, measured: int) -> None:
        entry.working.pop(shape, None)
        entry.working[shape] = measured
        if len(entry.working) > MAX_SHAPES:
            entry.working.pop(next(iter(entry.working)))

    def _begin(self, moves: Sequence[Move]) -> list[Move]:
        for entry, to in moves:
            entry.heading = to
        self._is_moving = self._is_moving or bool(moves)
        return list(moves)

    def _carry_out(self, moves: Sequence[Move]) -> float:
        """Move models, without the lock; the seconds that it took."""
        began = time.monotonic()
        if not moves:
            return 0.0
        try:
            for entry, to in moves:
                self._move(entry, to)
        finally:
            with self._news:
                for entry, _ in moves:
                    entry.heading = None
                self._is_moving = False
                self._news.notify_all()
        return time.monotonic() - began

    def _move(self, entry: Entry, to: State) -> None:
        if to == "disk":
            entry.model.drop()
        elif to == "host" and entry.state == "device":
            entry.model.leave()
        else:
            self._raise(entry, to)
        with self._news:
            entry.evictions += entry.state == "device"
            entry.loads += to == "device"
            entry.drops += to == "disk"
            entry.parked += (entry.state, to) == ("device", "host")
            entry.state = to

    def _raise(self, entry: Entry, to: State) -> None:
        """Bring a model up, from wherever it is."""
        if entry.state in ("disk", "absent"):
            self._make_host_room(entry)
            self._load(entry)
            entry.state = "host"
            entry.reads += 1
        if to == "device":
            entry.model.arrive()

    def _load(self, entry: Entry) -> None:
        try:
            entry.model.load()
        except ModelLoadError as exc:
            log.warning("%s did not load, and is read once more: %s", entry.name, exc.message)
            try:
                entry.model.load()
            except ModelLoadError:
                entry.state = "absent"
                raise

    def _make_host_room(self, newcomer: Entry) -> None:
        """Drop models that wait in the host's memory, the least recently used first."""
        for entry in list(self._entries.values()):
            if self.memory.host_free_bytes() >= newcomer.model.num_bytes:
                return
            if entry.state == "host" and entry is not newcomer and entry.model.is_on_disk:
                # Nobody else moves it meanwhile: models move one at a time.
                entry.model.drop()
                entry.state = "disk"
                entry.drops += 1

    # --- the porter: what nobody waits for ---

    def _is_unwanted(self, entry: Entry) -> bool:
        """Whether somebody wants a model away that is still in use: then nobody else may come."""
        return any(wish.entry is entry and wish.to != "device" for wish in self._wishes)

    def _wish(self, wish: Wish) -> Wish:
        # The newest wish about a model is the one that counts, and of guesses the newest of all.
        for other in list(self._wishes):
            if other.entry is wish.entry or (other.is_guess and wish.is_guess):
                self._wishes.remove(other)
                other.is_done.set()
        if wish.to == wish.entry.state and not wish.entry.heading:
            wish.is_done.set()
            return wish
        self._wishes.append(wish)
        if self._porter is None and self._has_porter:
            self._porter = threading.Thread(target=self._carry, name="porter", daemon=True)
            self._porter.start()
        self._news.notify_all()
        return wish

    def _carry(self) -> None:
        while True:
            with self._news:
                while self._next_wish() is None:
                    self._news.wait()
            self.carry_one()

    def carry_one(self) -> bool:
        """Grant one wish that can be granted now; whether there was one."""
        with self._news:
            chosen = self._next_wish()
            if chosen is None:
                return False
            wish, moves = chosen
            is_last = not moves or moves[-1] == (wish.entry, wish.to)
            if is_last:
                self._wishes.remove(wish)
            self._begin(moves)
        try:
            self._carry_out(moves)
        except JobError as exc:
            self._end(wish, exc.message)
        except Exception as exc:
            # The porter outlives what nobody foresaw, as the worker does.
            self._end(wish, type(exc).__name__)
        if is_last:
            wish.is_done.set()
        return True

    def _end(self, wish: Wish, why: str) -> None:
        log.warning("%s could not be moved: %s", wish.entry.name, why)
        with self._news:
            self._refuse(wish, why)

    def _refuse(self, wish: Wish, why: str) -> Wish:
        if wish in self._wishes:
            self._wishes.remove(wish)
        wish.error = why
        wish.is_done.set()
        return wish

    def _next_wish(self) -> tuple[Wish, list[Move]] | None:
        """A wish that can be granted now. Whoever waits in line for a model goes first."""
        if self._is_moving:
            return None
        for wish in list(self._wishes):
            if (moves := self._moves_for(wish)) is not None:
                return wish, moves
        return None

    def _moves_for(self, wish: Wish) -> list[Move] | None:
        entry = wish.entry
        if entry.heading or (wish.to != "device" and entry.users):
            return None
        if wish.to != "device":
            return [(entry, wish.to)] if _is_above(entry.state, wish.to) else []
        if entry.is_there:
            return []
        if not wish.may_evict and self._shortage(entry, 0) > 0:
            self._refuse(wish, "there is no room for it")
            return None
        victims = None if self._line else self._victims(entry, 0)
        if victims is not None:
            return [*self._leaving(victims), (entry, "device")]
        # Half of the way at least, where the host has room.
        has_room = (
            not self.memory.is_host and self.memory.host_free_bytes() >= entry.model.num_bytes
        )
        return [(entry, "host")] if entry.state == "disk" and has_room else None


def _is_above(state: State, other: State) -> bool:
    order = ("absent", "disk", "host", "device")
    return order.index(state) > order.index(other)
