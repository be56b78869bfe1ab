"""What a part finds: it is written line by line, so that a part that is stopped keeps it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a job, by `who`: the median of its seconds and how many runs that has.

    `control` is the median of the earlier runs over that of the later ones. `peak_bytes` are the
    most that tensors took, the weights included. `waits`: how often the host waited for the device.
    What could not be found out is None.
    """

    work: str
    who: str
    stage: str
    seconds: float | None = None
    runs: int = 0
    control: float | None = None
    peak_bytes: int | None = None
    waits: int | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """Something else that was measured, such as a speed of copies."""

    what: str
    value: object
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Kernels:
    """A job's kernels: how many, and the longest ones as (name, calls, milliseconds)."""

    work: str
    who: str
    count: int
    longest: list[tuple[str, int, float]] = field(default_factory=list)


#: The fact that is the name of the device. Each part reports it.
CARD = "card"

Finding = Stage | Fact | Kernels
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Stage, Fact, Kernels)}


class Findings:
    """The file of one part, and the moment at which the part should have ended."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds

    def add(self, finding: Finding) -> None:
        line = json.dumps({"kind": type(finding).__name__, **asdict(finding)}, ensure_ascii=False)
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()


def read(path: Path) -> Iterator[Finding]:
    """The findings in a file. A line that was cut off is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        yield from_dict(fields)


def from_dict(fields: Mapping[str, Any]) -> Finding:
    values = dict(fields)
    made: Finding = KINDS[values.pop("kind")](**values)
    return made
