"""What a fake device has counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from benchmarks.cards import CARDS, Precision


@dataclass(slots=True)
class Copies:
    """Copies between the host and the device in one direction, and how many were from pinned memory
    or into it."""

    num: int = 0
    num_bytes: int = 0
    num_pinned: int = 0

    def note(self, num_bytes: int, is_pinned: bool) -> None:
        self.num += 1
        self.num_bytes += num_bytes
        self.num_pinned += is_pinned

    def __add__(self, other: Copies) -> Copies:
        return Copies(
            self.num + other.num,
            self.num_bytes + other.num_bytes,
            self.num_pinned + other.num_pinned,
        )


@dataclass(slots=True)
class Counts:
    """The counts of one stage of a job.

    `kernels`: operations that wrote on the device. `num_bytes`: what they read and wrote there.
    `flops`: those of products and attention, by precision. `waits`: how often the host waited for
    the device, by the line that made it wait. `attention`: attention kernels with their shapes.
    `mixed`: operations whose tensors have different dtypes, and which CUDA would refuse.
    `floor_s` and `memory_bound_s`: by card, the sum over the operations of their least seconds,
    and the part of it that memory decides. `peak_bytes`: the most that tensors took on the device.
    """

    kernels: int = 0
    num_bytes: int = 0
    flops: Counter[Precision] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    up: Copies = field(default_factory=Copies)
    down: Copies = field(default_factory=Copies)
    attention: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    floor_s: Counter[str] = field(default_factory=Counter)
    memory_bound_s: Counter[str] = field(default_factory=Counter)
    bytes_of: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    def note_kernel(self, name: str, num_bytes: int, flops: int, precision: Precision) -> None:
        self.kernels += 1
        self.num_bytes += num_bytes
        self.bytes_of[name] += num_bytes
        self.flops[precision] += flops
        for card_name, card in CARDS.items():
            seconds = card.floor_s(flops, num_bytes, precision)
            self.floor_s[card_name] += seconds
            if card.is_memory_bound(flops, num_bytes, precision):
                self.memory_bound_s[card_name] += seconds

    def __add__(self, other: Counts) -> Counts:
        """Both stages as one. Its peak is the higher one."""
        total = Counts()
        for each in fields(Counts):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            is_peak = each.name == "peak_bytes"
            setattr(total, each.name, max(mine, theirs) if is_peak else mine + theirs)
        return total
