"""The command. See the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import dry_run, report
from benchmarks.dry_run import chat, guard, memory, sdxl, tables, wan
from benchmarks.dry_run.depth import shallow
from benchmarks.dry_run.stages import Run

DOCS = Path(__file__).parents[2] / "docs"

#: Each job, with the worker's way to compute it and its peers'.
Work = tuple[Any, Any]

QUICK: tuple[Work, ...] = (
    (sdxl, sdxl.Job()),
    (wan, wan.Job()),
    (chat, chat.Job(1, 1000)),
)
TINY: tuple[Work, ...] = (
    (sdxl, sdxl.Job(side=256, steps=2)),
    (wan, wan.Job(frames=1, size=(96, 64), steps=2)),
    (chat, chat.Job(1, 16)),
)
FULL: tuple[Work, ...] = (
    *((sdxl, sdxl.Job(count)) for count in (1, 3, 6)),
    (sdxl, sdxl.Job(strength=0.75, steps=4)),
    (sdxl, sdxl.Job(strength=0.75, steps=4, is_masked=True)),
    (wan, wan.Job("t2v")),
    (wan, wan.Job("vace")),
    (wan, wan.Job("i2v")),
    *((chat, chat.Job(rows, tokens)) for tokens in (1000, 8000) for rows in (1, 16, 64)),
)

#: What no peer has, or has in the same way.
ALONE: tuple[Work, ...] = (
    *((sdxl, sdxl.Job(steps=13, speed=name)) for name in ("balanced", "fast")),
    (sdxl, sdxl.Job(is_low_vram=True)),
    *((sdxl, sdxl.Job(scheduler=name)) for name in sdxl.SCHEDULERS if name != "euler"),
    (wan, wan.Job(speed="fast", steps=4)),
    *((wan, wan.Job(solver=name)) for name in ("dpm++", "euler")),
    *((chat, chat.Job(1, tokens, is_chunked=True)) for tokens in (1000, 8000)),
    *((chat, chat.Job(rows, 1000, penalty=1.1)) for rows in (1, 16)),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(dry_run.__doc__)
    parser.add_argument("--docs", action="store_true", help="write the tables to docs/")
    options = parser.parse_args(argv)
    if why := guard.missing():
        parser.exit(1, f"no fake CUDA device: {why}\n")
    if options.tiny:
        with shallow():
            made = all_tables(TINY, (), ())
    elif options.quick:
        made = all_tables(QUICK, (), memory.JOBS[:1])
    else:
        made = all_tables(FULL, ALONE, memory.JOBS)
    report.finish("dry_run", made, options.json)
    if options.docs:
        write(made)


def all_tables(
    both: Sequence[Work], alone: Sequence[Work], fitted: Sequence[Any]
) -> list[report.Table]:
    runs = [told(each, job) for family, job in both for each in (family.ours, family.theirs)]
    runs += [told(family.ours, job) for family, job in alone]
    return [*tables.of_runs(runs), tables.moves([sdxl.moves()]), memory.table(fitted)]


def told(compute: Callable[[Any], Run], job: Any) -> Run:
    began = time.monotonic()
    run = compute(job)
    print(f"{run.work}, by {run.who}: {time.monotonic() - began:.0f} s", flush=True)
    return run


def write(made: Sequence[report.Table]) -> None:
    """Put the tables into the documents, between their markers."""
    *counted, fitting = map(str, made)
    report.write(DOCS / "benchmarks.md", "counts", "\n".join(counted))
    report.write(DOCS / "deploying.md", "memory", fitting)


if __name__ == "__main__":
    main()
