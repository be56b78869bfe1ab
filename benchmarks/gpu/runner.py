"""Runs parts, each in a process of its own, until the time is over.

A part that takes longer than its budget is killed with all processes that it has started. So it
takes nothing from the parts after it, except its budget.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

#: A part with less time than this is not begun: the imports alone take some of it.
LEAST_S = 15.0

#: A killed process that waits for the driver may stay. It is waited for so long.
KILLED_S = 10.0

State = Literal["ended", "failed", "stopped", "not reached"]


@dataclass(frozen=True, slots=True)
class Part:
    """`command` are Python's arguments; `seconds` the most that it gets. `what` is for people.

    In the arguments `{seconds}` is the time that the part has.
    """

    name: str
    what: str
    seconds: float
    command: Sequence[str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended. `why` is for people, and empty if it ended by itself and well."""

    name: str
    what: str
    state: State
    seconds: float
    why: str = ""


#: Runs Python with arguments for at most so many seconds, and writes what it prints to a file.
#: Returns its exit code, or None if its time was over.
Start = Callable[[Sequence[str], float, IO[bytes]], int | None]


def start(
    command: Sequence[str], seconds: float, log: IO[bytes], env: Mapping[str, str] | None = None
) -> int | None:
    """Run a process, and kill it and all of its children when its time is over."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILLED_S)


def run_all(
    parts: Sequence[Part], seconds: float, log_path: Path, start: Start = start
) -> Iterator[Outcome]:
    """Run the parts in this order, and give out how each ended; those for which no time is left
    were not reached."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if left < min(LEAST_S, part.seconds):
            why = f"{max(left, 0):.0f} s were left"
            yield Outcome(part.name, part.what, "not reached", 0.0, why)
            continue
        yield _run(part, min(part.seconds, left), log_path, start)


def _run(part: Part, seconds: float, log_path: Path, start: Start) -> Outcome:
    print(f"{part.name}: {part.what} (at most {seconds:.0f} s)", flush=True)
    began = time.monotonic()
    command = [each.replace("{seconds}", f"{seconds:.0f}") for each in part.command]
    with log_path.open("ab") as log:
        log.write(f"\n=== {part.name}\n".encode())
        log.flush()
        code = start(command, seconds, log)
    took = time.monotonic() - began
    if code is None:
        why = f"it was stopped after {seconds:.0f} s"
        return Outcome(part.name, part.what, "stopped", took, why)
    if code:
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        return Outcome(part.name, part.what, "failed", took, f"it ended {how}; see log.txt")
    return Outcome(part.name, part.what, "ended", took)
