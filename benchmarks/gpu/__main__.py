"""The command. See the package."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import benchmarks.gpu as package
from benchmarks import report
from benchmarks.gpu import counted, findings, runner
from benchmarks.gpu.findings import CARD, Fact, Finding
from benchmarks.gpu.runner import Outcome, Part
from benchmarks.gpu.summary import Summary, Test, file_name, read_tests

ROOT = Path(__file__).parents[2]
DOCUMENT, MEASURED = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "measured"
TESTS = "tests/gpu"

#: Seconds that are kept to write the summary and to kill what does not end.
SPARE_S = 12.0

#: The name, the seconds and what it does; the most valuable ones first.
TABLE: tuple[tuple[str, float, str], ...] = (
    ("machine", 45, "versions, and what the device reaches"),
    ("tests memory", 60, "weights move bit for bit, the host's memory, an out-of-memory"),
    ("tests sdxl", 75, "SDXL's pictures against the CPU's, LOW_VRAM, several pictures"),
    ("tests chat", 75, "chat with and without graphs, long contexts, sampling"),
    ("tests wan", 75, "WAN and VACE against the CPU, LOW_VRAM, tiles"),
    ("sdxl", 90, "SDXL at full size against diffusers"),
    ("chat", 100, "Qwen2.5-7B at full size against transformers"),
    ("wan", 130, "WAN 1.3B at full size against diffusers"),
    ("levers", 45, "which levers an SDXL forward gains by"),
    ("tests compile", 120, "compiled blocks against eager ones"),
    ("tests quantized", 75, "chat in int8, fp8 and int4"),
    ("compiled", 150, "compiled blocks at full size"),
)


def main(argv: Sequence[str] | None = None, start: runner.Start | None = None) -> None:
    """Run the parts. `start` runs a Python process, as `runner.start` does."""
    options = _parser().parse_args(argv)
    folder: Path = options.out
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = options.only.split(",") if options.only else [name for name, *_ in TABLE]
    before = signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory() as scratch:
        parts = [part_of(name, options.device, Path(scratch)) for name in names]
        outcomes: list[Outcome] = []
        write = partial(_write, folder, Path(scratch), parts, outcomes)
        seconds = 60 * options.minutes - SPARE_S
        start = start or partial(runner.start, env=_environment(options.device))
        try:
            for outcome in runner.run_all(parts, seconds, folder / "log.txt", start):
                outcomes.append(outcome)
                print(f"  {outcome.state} after {outcome.seconds:.0f} s {outcome.why}", flush=True)
                write()
        finally:
            summary = write()
            signal.signal(signal.SIGTERM, before)
    print(f"\n{summary}\n{folder}/summary.md", flush=True)
    if options.docs:
        _write_docs(folder, summary)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try it")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", help="names of parts, separated by commas, in their order")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu")
    parser.add_argument("--docs", action="store_true", help="write docs/measured/ and the tables")
    return parser


def part_of(name: str, device: str, scratch: Path) -> Part:
    """A part by its name. What it finds goes to files in `scratch`."""
    seconds, what = next((seconds, what) for known, seconds, what in TABLE if known == name)
    if name.startswith("tests "):
        file = f"{TESTS}/test_{name.removeprefix('tests ')}.py"
        return Part(name, what, seconds, [*_pytest(scratch / f"{name}.xml"), file])
    size = "pocket" if device == "cpu" else "full"
    arguments = [name, "--device", device, "--size", size, "--seconds", "{seconds}"]
    command = [
        "-m",
        "benchmarks.gpu.part",
        *arguments,
        "--findings",
        str(scratch / f"{name}.jsonl"),
    ]
    return Part(name, what, seconds, command)


def _pytest(xml: Path) -> list[str]:
    """pytest without this project's conftest.py, whose servers a foreign machine does not have, and
    with warnings that are no errors, since its libraries may be others."""
    return [
        *("-m", "pytest", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-W", "default"),
        *("-rfE", "--tb=short", f"--junitxml={xml}"),
    ]


def _environment(device: str) -> dict[str, str]:
    on_cpu = {"GPU_TESTS_DEVICE": "cpu"} if device == "cpu" else {}
    return {"PYTHONUNBUFFERED": "1", **on_cpu}


def _end(*_: object) -> None:
    raise SystemExit("it was asked to end")


def _write(
    folder: Path, scratch: Path, parts: Sequence[Part], outcomes: Sequence[Outcome]
) -> Summary:
    """Write the summary of what there is so far."""
    done = {each.name for each in outcomes}
    rest = [
        Outcome(each.name, each.what, "not reached", 0.0, "it ended before")
        for each in parts
        if each.name not in done
    ]
    found = [each for part in parts for each in findings.read(scratch / f"{part.name}.jsonl")]
    summary = Summary(
        card=_card(found),
        outcomes=[*outcomes, *rest],
        findings=found,
        tests=_tests(parts, scratch),
        counted=counted.read(),
        notes=_notes(),
    )
    (folder / "summary.md").write_text(str(summary), encoding="utf-8")
    text = json.dumps(summary.as_dict(), indent=1, ensure_ascii=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


def _tests(parts: Sequence[Part], scratch: Path) -> list[Test]:
    files = [scratch / f"{part.name}.xml" for part in parts]
    return [test for file in files if file.exists() for test in read_tests(file.read_text())]


def _notes() -> list[str]:
    if counted.is_current():
        return []
    return ["The counts are older than the code: `python -m benchmarks.gpu.counted` renews them."]


def _card(found: Sequence[Finding]) -> str:
    """The device's name, by the first part that could ask it."""
    names = (each.value for each in found if isinstance(each, Fact) and each.what == CARD)
    return str(next(names, "an unknown device"))


def _write_docs(folder: Path, summary: Summary) -> None:
    MEASURED.mkdir(exist_ok=True)
    shutil.copy(folder / "summary.json", MEASURED / f"{file_name(summary.card)}.json")
    report.write(DOCUMENT, "measured", "\n".join(map(str, summary.tables())))


if __name__ == "__main__":
    main()
