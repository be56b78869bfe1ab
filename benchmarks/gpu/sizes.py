"""The jobs that are benchmarked: the published sizes, or small ones to try the command on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from benchmarks.dry_run import chat, sdxl, wan
from benchmarks.dry_run.depth import small


@dataclass(frozen=True, slots=True)
class Size:
    """Jobs of each family, tokens of a reply, and rounds of interleaved timing."""

    sdxl: tuple[sdxl.Job, ...]
    wan: tuple[wan.Job, ...]
    chat: tuple[chat.Job, ...]
    reply: int
    rounds: int
    is_small: bool = False

    def networks(self) -> AbstractContextManager[None]:
        """A context in which `architectures` makes networks of this size."""
        return small() if self.is_small else nullcontext()


SIZES = {
    "full": Size(
        sdxl=(sdxl.Job(1, steps=10), sdxl.Job(6, steps=10)),
        wan=(wan.Job(frames=17), wan.Job(frames=81)),
        chat=(chat.Job(1, 1000), chat.Job(64, 1000)),
        reply=33,
        rounds=2,
    ),
    "pocket": Size(
        sdxl=(sdxl.Job(1, side=64), sdxl.Job(2, side=64)),
        wan=(wan.Job(size=(64, 48), frames=5), wan.Job(size=(64, 48), frames=9)),
        chat=(chat.Job(1, 16), chat.Job(4, 16)),
        reply=5,
        rounds=1,
        is_small=True,
    ),
}
