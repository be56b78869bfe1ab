"""What the runs counted, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from benchmarks import report
from benchmarks.cards import CARDS
from benchmarks.dry_run import chat
from benchmarks.dry_run.counts import Copies, Counts
from benchmarks.dry_run.stages import DECODING, FIRST_STEP, REFERENCES, STEP, WEIGHTS, Run

TITLES = (COUNTS, FLOORS, WAITS, ATTENTION, FUSED, MOVES, MEMORY) = (
    "Operations, waits, bytes and memory by stage",
    "Floors of the worker's stages, ms",
    "Where the host waits for the device",
    "Attention kernels",
    "Repeated blocks as the compiler fuses them",
    "Copies of weights",
    "Which card fits what",
)

#: The stages in which the time goes. Of an image-to-image job and of VACE the references are one.
LONG_STAGES = (REFERENCES, STEP, DECODING, chat.PREFILL, chat.DECODE)

#: Fewer operations than these prepare a stage.
FEW_OPERATIONS = 100


def of_runs(runs: Sequence[Run]) -> list[report.Table]:
    return [counts(runs), floors(runs), waits(runs), attention(runs)]


def counts(runs: Sequence[Run]) -> report.Table:
    headers = [
        "work",
        "by",
        "stage",
        "operations",
        "waits",
        "GB",
        "TFLOP in 16 bits",
        "in TF32",
        "in fp32",
        "copies up",
        "copies down",
        "peak GiB",
        "mixed dtypes",
    ]
    rows = [
        [
            *each,
            found.kernels,
            found.num_waits,
            round(found.num_bytes / 1e9, 1),
            *(round(found.flops[name] / 1e12, 2) or None for name in ("half", "tf32", "fp32")),
            copies(found.up),
            copies(found.down),
            round(found.peak_bytes / 2**30, 2),
            found.mixed.total(),
        ]
        for each, found in long_stages(runs)
    ]
    note = (
        "Copies: their number and MB, and how many are pinned. A peak includes the weights. "
        "A stage that is not here has the counts of the same stage further up."
    )
    return report.table(COUNTS, headers, rows, note)


def floors(runs: Sequence[Run]) -> report.Table:
    headers = ["work", "stage", *CARDS, "memory's share, H200", "memory's share, L40S"]
    rows: list[list[object]] = []
    for (work, who, stage), found in long_stages(runs):
        if who == "worker":
            floors_ms = [1000 * found.floor_s[card] for card in CARDS]
            shares = [memory_share(found, card) for card in ("H200", "L40S")]
            rows.append([work, stage, *floors_ms, *shares])
    note = "Memory's share: the operations that take longer to read and write than to compute."
    return report.table(FLOORS, headers, rows, note)


def memory_share(found: Counts, card: str) -> str:
    return f"{100 * found.memory_bound_s[card] / found.floor_s[card]:.0f} %"


def waits(runs: Sequence[Run]) -> report.Table:
    """Each wait once: a job that waits as an earlier one did has no row for it."""
    rows: dict[object, list[object]] = {}
    for (work, who, stage), found in stages(runs):
        for line, times in found.waits.most_common():
            rows.setdefault((who, stage, line, times), [work, who, stage, times, line])
    headers = ["first in", "by", "stage", "times", "what, and the line"]
    return report.table(WAITS, headers, list(rows.values()))


def attention(runs: Sequence[Run]) -> report.Table:
    """Each kernel with its shapes once."""
    rows: dict[object, list[object]] = {}
    for run in runs:
        total: Counter[str] = sum((each.attention for each in run.stages.values()), Counter())
        for kernel, times in total.most_common():
            rows.setdefault((run.who, kernel), [run.work, run.who, times, kernel])
    note = "flash is flash or cuDNN's, whichever torch prefers on the card."
    headers = ["first in", "by", "times", "kernel and shapes"]
    return report.table(ATTENTION, headers, list(rows.values()), note)


def moves(runs: Sequence[Run]) -> report.Table:
    headers = ["what", "move", "copies up", "copies down", "waits"]
    rows = [
        [run.work, name, copies(found.up), copies(found.down), found.num_waits]
        for run in runs
        for name, found in run.stages.items()
    ]
    note = "Copies: their number and MB, and how many are pinned."
    return report.table(MOVES, headers, rows, note)


#: The names of a stage's work, of who computes it, and its own.
Names = tuple[str, str, str]


def stages(runs: Sequence[Run]) -> Iterator[tuple[Names, Counts]]:
    """The stages of jobs. All steps but the first are alike."""
    for run in runs:
        for name, found in run.stages.items():
            if name not in (WEIGHTS, FIRST_STEP):
                yield (run.work, run.who, name), found


def long_stages(runs: Sequence[Run]) -> Iterator[tuple[Names, Counts]]:
    """Without the stages whose counts equal those of an earlier job."""
    seen: set[object] = set()
    for (work, who, stage), found in stages(runs):
        facts = who, stage, found.kernels, found.num_bytes, found.num_waits, found.peak_bytes >> 24
        if stage in LONG_STAGES and found.kernels >= FEW_OPERATIONS and facts not in seen:
            seen.add(facts)
            yield (work, who, stage), found


def copies(found: Copies) -> str | None:
    if not found.num:
        return None
    pinned = f", {found.num_pinned} pinned" if found.num_pinned else ""
    return f"{found.num}: {report.cell(found.num_bytes / 1e6)}{pinned}"


def merged(new: report.Table, document: str, families: Sequence[str], family: str) -> report.Table:
    """A table of one family with the rows that a document has for the others, in their order.

    The first cell of a row begins with the name of its family.
    """
    rows: dict[str, list[Sequence[object]]] = {each: [] for each in families}
    _, _, behind = document.partition(f"**{new.title}**\n\n")
    for line in behind.partition("\n\n")[0].splitlines()[2:]:
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        rows[next(each for each in families if cells[0].startswith(each))].append(cells)
    rows[family] = list(new.rows)
    return report.table(new.title, new.headers, list(chain(*rows.values())), new.note)
