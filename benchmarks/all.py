"""Run every benchmark, one after another, each in its own process, and print all tables last.

    python -m benchmarks.all --quick             fewer rounds, for two idle cores
    python -m benchmarks.all --quick --docs      and write the tables to docs/benchmarks.md

`--json FILE` writes all results, `--only overhead,delivery` runs only these. If a benchmark fails,
its name is printed at the end, the exit code is 1, and the document stays as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

#: In this order.
NAMES = (
    "overhead",
    "cold_start",
    "delivery",
    "sdxl",
    "presets",
    "wan",
    "chat",
    "memory",
)
DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def start(command: Sequence[str]) -> int:
    """Run `python COMMAND` to its end, and return its exit code."""
    return subprocess.run([sys.executable, *command], check=False).returncode


def main(argv: Sequence[str] | None = None, start: Callable[[Sequence[str]], int] = start) -> None:
    """Run the benchmarks. `start` runs a Python process and returns its exit code."""
    parser = report.parser(__doc__)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--docs", action="store_true", help="write the tables into the document")
    options = parser.parse_args(argv)
    began, load = time.monotonic(), os.getloadavg()[0]
    size = [name for name in ("quick", "tiny") if getattr(options, name)]
    names = options.only.split(",") if options.only else NAMES
    found = {name: run(name, [f"--{each}" for each in size], start) for name in names}
    spent = time.monotonic() - began
    failed = [name for name, document in found.items() if document is None]
    documents = [document for document in found.values() if document is not None]
    print(f"\n\n{tables_of(documents)}\n{len(names)} benchmarks in {spent:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(documents, indent=2, ensure_ascii=False) + "\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if options.docs:
        command = " ".join(["python -m benchmarks.all", *(f"--{each}" for each in size)])
        machine = report.machine_line(documents[0]["machine"])
        head = f"By `{command}`, on {machine}; the load before it began was {load:.1f}."
        report.write(DOCUMENT, "tables", f"{head}\n\n{tables_of(documents)}")


def run(
    name: str, arguments: Sequence[str], start: Callable[[Sequence[str]], int]
) -> dict[str, Any] | None:
    """The JSON that one benchmark wrote; None if it failed."""
    print(f"\n=== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = ["-m", f"benchmarks.{name}", *arguments, "--json", str(path)]
        if start(command) or not path.exists():
            return None
        document: dict[str, Any] = json.loads(path.read_text())
        return document


def tables_of(documents: Sequence[dict[str, Any]]) -> str:
    """All tables as Markdown, each benchmark's under its name."""
    parts = []
    for document in documents:
        parts.append(f"### `python -m benchmarks.{document['benchmark']}`\n")
        parts += [str(report.from_dict(table)) for table in document["tables"]]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
