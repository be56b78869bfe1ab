"""The types of the ledger: what it moves, where to, for whom, and what it reports.

Nothing here imports torch, so a process that loads no model can use these types.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

State = Literal["absent", "disk", "host", "device"]
Pressure = Literal["low", "medium", "high", "critical"]

#: Raises an error if the job was stopped. It is called again and again while a job waits.
Check = Callable[[], None]


class Movable(Protocol):
    """A model that the ledger can move between the disk, the host's memory and the device.

    The ledger calls one method at a time, and never while the model is in use. A model whose move
    fails stays where it was. `MovableTensors` implements this for any torch modules.
    """

    @property
    def num_bytes(self) -> int:
        """Bytes that the model takes on the device: the sum of its tensors."""

    @property
    def is_on_disk(self) -> bool:
        """Whether `load` can read the model again after `drop`."""

    def load(self) -> None:
        """Move it from the disk to the host's memory. Raises ModelLoadError."""

    def to_device(self) -> None:
        """Move it from the host's memory to the device. Raises OutOfMemory."""

    def to_host(self) -> None:
        """Move it from the device to the host's memory."""

    def drop(self) -> None:
        """Free its memory, on the device or the host. Only the files on the disk remain."""


class Memory(Protocol):
    """How much memory the device and the host really have."""

    @property
    def name(self) -> str:
        """The device's name, such as `cuda:0`."""

    @property
    def is_host(self) -> bool:
        """Whether the device has no memory of its own. Then only `drop` frees memory."""

    @property
    def total_bytes(self) -> int:
        """The device's memory, or the part of it that this worker may use."""

    def free_bytes(self) -> int:
        """Free memory of the device, whoever holds the rest."""

    def host_free_bytes(self) -> int:
        """Host memory that evicted models may take."""


@dataclass(frozen=True, slots=True)
class PressureLevels:
    """The used share of the device at which each level of pressure begins."""

    medium: float = 0.7
    high: float = 0.85
    critical: float = 0.95

    def name(self, used: float) -> Pressure:
        if used >= self.critical:
            return "critical"
        return "high" if used >= self.high else "medium" if used >= self.medium else "low"


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One model in the ledger's report: a snapshot.

    The model came to the device `num_loads` times and left it `num_evictions` times, `num_parked`
    of those times to the host's memory. It was dropped `num_drops` times, and read from the disk
    again `num_reads` times. `reserved_bytes` is what it may grow to beside its weights;
    `working_bytes` is what jobs of each shape took beside the weights.
    """

    name: str
    family: str
    source: str
    state: State
    num_bytes: int
    reserved_bytes: int
    num_users: int
    is_pinned: bool
    num_loads: int
    num_evictions: int
    num_parked: int
    num_drops: int
    num_reads: int
    working_bytes: Mapping[str, int]


@dataclass(eq=False, slots=True)
class Lease:
    """One job's use of a model, from `Ledger.acquire` to `Ledger.release`.

    `reserved_bytes` of the device are set aside for the job beside the weights. The job sets
    `measured_bytes` to what it really took. `expected_bytes` is what it expects to take, which
    counts until a job of its shape was measured. `swap_s` is the time that moving the model took.
    """

    shape: Hashable = None
    expected_bytes: int | None = None
    reserved_bytes: int = 0
    measured_bytes: int | None = None
    swap_s: float = 0.0


@dataclass(eq=False, slots=True)
class LedgerEntry:
    """What the ledger knows of one model. It is read and changed under the ledger's lock."""

    model: Movable
    name: str
    family: str
    source: str
    is_pinned: bool
    state: State
    #: What the model may grow to beside its weights while it is on the device.
    reserved_bytes: int = 0
    #: Where the model is being moved to.
    moving_to: State | None = None
    loads: int = 0
    evictions: int = 0
    parked: int = 0
    drops: int = 0
    reads: int = 0
    #: What jobs of each shape took beside the weights.
    working: dict[Hashable, int] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)

    @property
    def is_on_device(self) -> bool:
        return self.state == "device" and self.moving_to is None

    @property
    def is_idle(self) -> bool:
        return not self.leases and self.moving_to is None

    @property
    def size(self) -> int:
        return self.model.num_bytes + self.reserved_bytes

    @property
    def claimed_bytes(self) -> int:
        """What the model and its jobs take of the device now, or will take after its move."""
        is_counted = "device" in (self.state, self.moving_to)
        leased = sum(lease.reserved_bytes for lease in self.leases)
        return leased + (self.size if is_counted else 0)

    def row(self) -> LedgerRow:
        return LedgerRow(
            name=self.name,
            family=self.family,
            source=self.source,
            state=self.state,
            num_bytes=self.model.num_bytes,
            reserved_bytes=self.reserved_bytes,
            num_users=len(self.leases),
            is_pinned=self.is_pinned,
            num_loads=self.loads,
            num_evictions=self.evictions,
            num_parked=self.parked,
            num_drops=self.drops,
            num_reads=self.reads,
            working_bytes={str(shape): size for shape, size in self.working.items()},
        )


#: A model, and where to move it.
Move = tuple[LedgerEntry, State]


@dataclass(eq=False, slots=True)
class MoveRequest:
    """A request to move a model as soon as possible. `is_done` is set when it is over.

    `error` says why the model was not moved. Without `may_evict` no other model is evicted for it.
    A `is_prefetch` request is replaced by the next prefetch.
    """

    entry: LedgerEntry
    to: State
    may_evict: bool = True
    is_prefetch: bool = False
    is_done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
