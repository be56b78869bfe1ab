"""The command. See the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import dry_run, report
from benchmarks.dry_run import chat, fused, guard, memory, sdxl, tables, wan
from benchmarks.dry_run.depth import shallow
from benchmarks.dry_run.stages import Run

DOCS = Path(__file__).parents[2] / "docs"

#: Each job, with the worker's way to compute it and its peers'.
Work = tuple[Any, Any]

BOTH: tuple[Work, ...] = (
    *((sdxl, sdxl.Job(count)) for count in (1, 3, 6)),
    (sdxl, sdxl.Job(strength=0.75, steps=4)),
    (sdxl, sdxl.Job(strength=0.75, steps=4, is_masked=True)),
    (sdxl, sdxl.Job(has_lora=True)),
    (sdxl, sdxl.Job(keeps="character")),
    (wan, wan.Job("t2v")),
    (wan, wan.Job("vace")),
    (wan, wan.Job("i2v")),
    (wan, wan.Job("flf2v")),
    *((chat, chat.Job(rows, tokens)) for tokens in (1000, 8000) for rows in (1, 16, 64)),
)

#: What VACE may be given, beside a first and a last frame.
VACE_MODES: tuple[wan.Given, ...] = ("first", "last", "subject")

#: What no peer has, or has in the same way.
ALONE: tuple[Work, ...] = (
    *((sdxl, sdxl.Job(steps=13, speed=name)) for name in ("balanced", "fast")),
    (sdxl, sdxl.Job(is_low_vram=True)),
    *((sdxl, sdxl.Job(keeps=name)) for name in ("style", "composition")),
    *((sdxl, sdxl.Job(scheduler=name)) for name in sdxl.SCHEDULERS if name != "euler"),
    (wan, wan.Job(speed="fast", steps=4)),
    *((wan, wan.Job("vace", given=(name,))) for name in VACE_MODES),
    *((wan, wan.Job(solver=name)) for name in ("dpm++", "euler")),
    *((chat, chat.Job(1, tokens, is_chunked=True)) for tokens in (1000, 8000)),
    *((chat, chat.Job(rows, 1000, penalty=1.1)) for rows in (1, 16)),
    *((chat, chat.Job(1, 1000, quantization=name)) for name in ("int8", "fp8", "int4")),
)

#: What is computed by both, by the worker alone, and on cards of several sizes.
FULL = BOTH, ALONE, memory.JOBS
QUICK = ((sdxl, sdxl.Job()), (wan, wan.Job()), (chat, chat.Job(1, 1000))), (), memory.JOBS[:1]
TINY = (
    (
        (sdxl, sdxl.Job(side=256, steps=2)),
        (wan, wan.Job(frames=1, size=(96, 64), steps=2)),
        (chat, chat.Job(1, 16)),
    ),
    (),
    (),
)

#: How the names of each family's jobs begin.
NAMES = {"sdxl": "SDXL", "wan": "WAN", "chat": "Qwen2.5-7B"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(dry_run.__doc__)
    parser.add_argument("--docs", action="store_true", help="write the tables to docs/")
    parser.add_argument(
        "--only", choices=NAMES, help="one family; --docs leaves the rows of the others as they are"
    )
    options = parser.parse_args(argv)
    if why := guard.missing():
        parser.exit(1, f"no fake CUDA device: {why}\n")
    with shallow() if options.tiny else nullcontext():
        made = all_tables(*(TINY if options.tiny else QUICK if options.quick else FULL), options)
    report.finish("dry_run", made, options.json)
    if options.docs:
        write(made, options.only)


def all_tables(
    both: Sequence[Work], alone: Sequence[Work], fitted: Sequence[Any], options: Any
) -> list[report.Table]:
    def is_asked(job: Any) -> bool:
        return not options.only or str(job).startswith(NAMES[options.only])

    runs = [
        told(compute, job)
        for family, job in both
        if is_asked(job)
        for compute in (family.ours, family.theirs)
    ]
    runs += [told(family.ours, job) for family, job in alone if is_asked(job)]
    moves = [sdxl.moves()] if options.only in (None, "sdxl") else []
    blocks = [each for each in fused.BLOCKS if is_asked(each)]
    return [
        *tables.of_runs(runs),
        fused.table(blocks),
        tables.moves(moves),
        memory.table([job for job in fitted if is_asked(job)]),
    ]


def told(compute: Callable[[Any], Run], job: Any) -> Run:
    began = time.monotonic()
    run = compute(job)
    print(f"{run.work}, by {run.who}: {time.monotonic() - began:.0f} s", flush=True)
    return run


def write(made: Sequence[report.Table], only: str | None = None) -> None:
    """Put the tables into the documents, between their markers; of one family, its rows alone."""
    *counted, fitting = made
    for name, section, those in (
        ("benchmarks", "counts", counted),
        ("deploying", "memory", [fitting]),
    ):
        path = DOCS / f"{name}.md"
        if only:
            text = path.read_text(encoding="utf-8")
            those = [tables.merged(each, text, list(NAMES.values()), NAMES[only]) for each in those]
        report.write(path, section, "\n".join(map(str, those)))


if __name__ == "__main__":
    main()
