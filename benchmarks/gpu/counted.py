"""The counted floors of the benchmarked jobs, kept in `counted.json`.

    .venv/bin/python -m benchmarks.gpu.counted        counts all jobs anew, in about five minutes

The counts are the same on every machine, so a card's minutes are not spent on them. `is_current`
says whether the worker's code or a library has changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("counted.json")

#: What decides the counts.
SOURCES = ("ourvidz_serverless/models", "benchmarks/dry_run", "benchmarks/gpu/sizes.py")
PINS = "requirements.txt"


def main(argv: Sequence[str] | None = None) -> None:
    from benchmarks.gpu.sizes import SIZES  # imports torch and diffusers, which a reader needs not

    counted = {str(run.work): as_dict(run) for size in SIZES.values() for run in count(size)}
    document = {"of": digest(), "jobs": counted}
    FILE.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def count(size: Any) -> Iterator[Any]:
    """What the worker would do for each job of a size, as a `Run`."""
    from benchmarks.dry_run import chat, sdxl, wan

    with size.networks():
        for module, jobs in ((sdxl, size.sdxl), (wan, size.wan), (chat, size.chat)):
            for job in jobs:
                print(job, flush=True)
                yield module.ours(job)


def as_dict(run: Any) -> dict[str, Any]:
    """The stages of a run that are long enough to be timed."""
    from benchmarks.dry_run.stages import FIRST_STEP, WEIGHTS

    return {
        name: fields(counts)
        for name, counts in run.stages.items()
        if name not in (WEIGHTS, FIRST_STEP)
    }


def fields(counts: Any) -> dict[str, Any]:
    return {
        "operations": counts.kernels,
        "waits": counts.num_waits,
        "bytes": counts.num_bytes,
        "peak_bytes": counts.peak_bytes,
        "floor_s": {card: round(seconds, 6) for card, seconds in counts.floor_s.items()},
    }


def read() -> Mapping[str, Any]:
    """The counts by job and stage."""
    jobs: Mapping[str, Any] = json.loads(FILE.read_text())["jobs"]
    return jobs


def is_current() -> bool:
    """Whether the counts are those of the code that is here."""
    return bool(json.loads(FILE.read_text())["of"] == digest())


def digest() -> str:
    """A short name for the code and the versions that decide the counts."""
    made = hashlib.sha256()
    for place in (*SOURCES, PINS):
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            made.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return made.hexdigest()[:16]


if __name__ == "__main__":
    main()
