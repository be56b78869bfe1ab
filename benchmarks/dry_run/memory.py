"""Which card fits what: jobs on fake cards of several sizes, by the worker's own memory management.

A card that is too small for the weights of all stages together has them moved out and in by the
ledger, and a stage that does not fit falls back to a smaller memory plan, as on a real card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import report
from benchmarks.cards import CARDS, Card
from benchmarks.dry_run import chat, sdxl, wan
from benchmarks.dry_run.fake_cuda import RESERVED_BYTES, FakeCuda
from benchmarks.dry_run.stages import Run
from benchmarks.dry_run.tables import MEMORY
from ourvidz_serverless.errors import OutOfMemory

#: The memory of cards that RunPod lends, in GiB as `nvidia-smi` shows it: of 16, 24, 32, 48 and
#: 80 GB. An L4 has ECC, which leaves 22.5 of its 24; an L40S and an A40 have it too.
SIZES = {"16 GB": 15.6, "24 GB": 22.5, "32 GB": 31.8, "48 GB": 45.0, "80 GB": 79.6}

JOBS: tuple[Any, ...] = (
    sdxl.Job(1, steps=2),
    sdxl.Job(6, steps=2),
    sdxl.Job(1, steps=2, is_low_vram=True),
    wan.Job("t2v", steps=2),
    wan.Job("vace", steps=2),
    wan.Job("i2v", steps=2),
    wan.Job("t2v", steps=2, is_low_vram=True),
    chat.Job(1, 8000, is_chunked=True),
)


def table(jobs: Sequence[Any] = JOBS) -> report.Table:
    headers = ["work", "weights, GiB", "peak, GiB", "stage of the peak", *SIZES]
    note = (
        f"GiB of tensors; for CUDA and its libraries {RESERVED_BYTES / 2**30:.2g} are assumed "
        "beside them. `yes`: all stays on the card. `moves`: the weights of some stages leave it "
        "for others. Else the memory plan that the worker falls back to."
    )
    return report.table(MEMORY, headers, [row(job) for job in jobs], note)


def row(job: Any) -> list[object]:
    ample = run_of(job)(job, FakeCuda())
    peak_stage = max(ample.stages, key=lambda name: ample.stages[name].peak_bytes)
    facts = [round(each / 2**30, 1) for each in (ample.weight_bytes, ample.peak_bytes)]
    return [ample.work, *facts, peak_stage, *fits(job, ample)]


def fits(job: Any, ample: Run) -> Iterable[str]:
    """For each size of card how the job fits."""
    for gib in SIZES.values():
        if ample.peak_bytes + RESERVED_BYTES <= gib * 2**30:
            yield "yes"
        else:
            yield fit(job, replace(CARDS["RTX 4090"], memory_gib=gib))


def fit(job: Any, card: Card) -> str:
    """How a job fits a card that is too small for all of it at once."""
    try:
        found = run_of(job)(job, FakeCuda(card))
    except OutOfMemory:
        return "no"
    smaller = found.plans[-1] if found.plans and not job.is_low_vram else {}
    names = ("tiled_decode", "offload")
    return " and ".join(name.replace("_", " ") for name in names if smaller.get(name)) or "moves"


def run_of(job: Any) -> Callable[..., Run]:
    return {sdxl.Job: sdxl.ours, wan.Job: wan.ours, chat.Job: chat.ours}[type(job)]
