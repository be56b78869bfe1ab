"""What every benchmark reports: the machine, its tables, and the same as JSON.

A benchmark is a module with a `main(argv)`:

    def main(argv: Sequence[str] | None = None) -> None:
        options = report.parser(__doc__).parse_args(argv)          # --quick and --json FILE
        table = report.table("PNG", ["picture", "times as fast"], [["soft", 19.8], ["sharp", 8.2]])
        report.finish("png", [table], options.json)
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The text of a cell that needs another machine, such as one with a GPU.
NOT_MEASURED = "not measured yet"

#: A control ratio may differ from 1 by this factor. Beyond it the report has no figure.
CONTROL = 1.1

#: A ratio that differs from 1 by less than this factor claims nothing.
NOTHING_UNDER = 1.05

#: The text instead of such a ratio.
ABOUT_ONE = "about 1"

#: The text instead of a figure whose control is further from 1, or is missing.
UNSTEADY = "control off, no figure"

PACKAGES = ("torch", "diffusers", "transformers", "runpod")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of figures; `str` gives it as Markdown. `note` is a sentence below it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        body = "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> Table:
    """A table. Raises ValueError if a row does not have one cell for each header."""
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"{title}: {len(row)} cells under {len(headers)} headers")
    return Table(title, headers, rows, note)


def unmeasured(what: object, headers: Sequence[str]) -> list[object]:
    """The row of something that this machine cannot measure."""
    return [str(what), NOT_MEASURED, *[None] * (len(headers) - 2)]


def trusted(figure: float, *controls: float | None) -> float | str:
    """The figure if all its controls are near 1, else `UNSTEADY`."""
    is_steady = all(each is not None and 1 / CONTROL <= each <= CONTROL for each in controls)
    return figure if is_steady else UNSTEADY


def trusted_ratio(ratio: float, *controls: float | None) -> float | str:
    """`trusted`, and `ABOUT_ONE` for a ratio that is so near 1 that it claims nothing."""
    is_about_one = 1 / NOTHING_UNDER < ratio < NOTHING_UNDER
    found = trusted(ratio, *controls)
    return ABOUT_ONE if is_about_one and found != UNSTEADY else found


def cell(value: object) -> str:
    """The text of a cell: a float has three digits, None is empty."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of all benchmarks."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    options.add_argument(
        "--tiny",
        action="store_true",
        help="smallest sizes, to test that it runs; the figures mean nothing",
    )
    options.add_argument("--json", type=Path, help="a file to write the tables to, as JSON")
    return options


def finish(
    name: str, tables: Sequence[Table], json_path: Path | None = None, **facts: object
) -> None:
    """Print the machine and the tables; if `json_path` is given, write both and `facts` there."""
    print(f"\n{name}, on {machine_line(machine())}\n", flush=True)
    for each in tables:
        print(each, flush=True)
    if json_path:
        document = {
            "benchmark": name,
            "machine": machine(),
            "tables": [as_dict(each) for each in tables],
            **facts,
        }
        json_path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def as_dict(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "headers": list(table.headers),
        "rows": [list(row) for row in table.rows],
        "note": table.note,
    }


def from_dict(fields: Mapping[str, Any]) -> Table:
    return table(fields["title"], fields["headers"], fields["rows"], fields["note"])


@functools.cache
def machine() -> dict[str, Any]:
    """The hardware and the versions that the figures are valid for."""
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """A machine in one line."""
    gpu = machine["gpu"] or "no GPU"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES))
    cores, threads = machine["cores"], machine["threads"]
    return f"{machine['cpu']}, {cores} cores, {threads} thread(s), {gpu}; {versions}"


def write(path: Path, section: str, text: str) -> None:
    """Put a text between a document's markers of a section. Raises ValueError if it has none."""
    document = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    marked = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not marked.search(document):
        raise ValueError(f"{path.name} has no {begin}")
    written = f"{begin}\n\n{text}\n{end}"
    path.write_text(marked.sub(lambda _: written, document), encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
