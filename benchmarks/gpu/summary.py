"""What the parts found, as one document: tables, what disagrees with the counts, and what is not
there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from xml.etree import ElementTree

from benchmarks import report
from benchmarks.cards import CARDS
from benchmarks.gpu.findings import CARD, Fact, Finding, Kernels, Stage
from benchmarks.gpu.runner import Outcome

MEASURED, FACTS, PARTS = TITLES = ("Stages", "What else was measured", "Parts")

#: A measured peak may differ from the counted one by this share, and by so many bytes beside it:
#: libraries take workspaces that no count has.
PEAK_SHARE, PEAK_BYTES = 0.10, 512 << 20

#: A stage that takes so many times its floor is named.
FAR = 4.0


@dataclass(frozen=True, slots=True)
class Test:
    """One test on the device. `why` is the first line of its failure, or why it was skipped."""

    __test__ = False  # pytest takes it for a class of tests otherwise

    name: str
    result: str
    seconds: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """`card` is the device's name; `counted` the counts by job and stage.

    `notes` are sentences that stand first, such as that the counts are older than the code.
    """

    card: str
    outcomes: Sequence[Outcome]
    findings: Sequence[Finding]
    tests: Sequence[Test]
    counted: Mapping[str, Any]
    notes: Sequence[str] = ()

    @property
    def stages(self) -> list[Stage]:
        return [each for each in self.findings if isinstance(each, Stage)]

    def disagreements(self) -> Iterator[str]:
        """A sentence for each thing that is not as it was counted, and for each failed test."""
        for test in self.tests:
            if test.result in ("failed", "error"):
                yield f"The test {test.name} failed: {test.why}"
        for stage in self.stages:
            if stage.who.startswith("worker"):
                yield from self._of_stage(stage)

    def _of_stage(self, stage: Stage) -> Iterator[str]:
        what, found = f"{stage.work}, {stage.stage}, by {stage.who}", self.count_of(stage)
        floor_s = self.floor_s(stage)
        if floor_s and stage.seconds and stage.seconds < floor_s:
            yield f"{what}: faster than its floor ({_ms(stage.seconds)}, and {_ms(floor_s)})"
        if floor_s and stage.seconds and stage.seconds > FAR * floor_s:
            times = stage.seconds / floor_s
            yield f"{what}: {times:.1f} times its floor ({_ms(stage.seconds)}, {_ms(floor_s)})"
        if not found:
            return
        peak, counted = stage.peak_bytes, found["peak_bytes"]
        if peak and abs(peak - counted) > PEAK_SHARE * counted + PEAK_BYTES:
            yield f"{what}: a peak of {_gib(peak)} GiB, and {_gib(counted)} were counted"
        if stage.waits is not None and stage.waits != found["waits"]:
            yield f"{what}: the host waited {stage.waits} times, and {found['waits']} were counted"

    def count_of(self, stage: Stage) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.counted.get(stage.work, {}).get(stage.stage)
        return found

    def floor_s(self, stage: Stage) -> float | None:
        """The counted floor of a stage on this card; None if it is unknown."""
        found, card = self.count_of(stage), card_of(self.card)
        floor: float | None = found["floor_s"].get(card) if found and card else None
        return floor

    def tables(self) -> list[report.Table]:
        return [self._measured(), self._facts(), self._parts()]

    def _measured(self) -> report.Table:
        headers = [
            "work",
            "stage",
            "by",
            "ms",
            "times the worker's",
            "control",
            "floor, ms",
            "share of the floor",
            "peak GiB",
            "counted",
            "waits",
            "counted ",
        ]
        workers = {
            (each.work, each.stage): each.seconds
            for each in reversed(self.stages)
            if each.who.startswith("worker")
        }
        rows = [self._row(each, workers.get((each.work, each.stage))) for each in self.stages]
        note = (
            "The median of the runs; the control is the earlier ones over the later ones. A floor "
            "is counted by `benchmarks.dry_run` for the worker, as the second figures of the peak "
            "and of the waits are."
        )
        return report.table(MEASURED, headers, rows, note)

    def _row(self, stage: Stage, worker_s: float | None) -> list[object]:
        floor_s, found = self.floor_s(stage), self.count_of(stage)
        is_ours, seconds = stage.who.startswith("worker"), stage.seconds
        counted = found if is_ours and found else {}
        peak = counted.get("peak_bytes")
        return [
            stage.work,
            stage.stage,
            stage.who,
            seconds and 1000 * seconds,
            seconds / worker_s if seconds and worker_s else None,
            stage.control,
            1000 * floor_s if floor_s and is_ours else None,
            f"{100 * floor_s / seconds:.0f} %" if floor_s and seconds and is_ours else None,
            _gib(stage.peak_bytes) if stage.peak_bytes else None,
            _gib(peak) if peak else None,
            stage.waits,
            counted.get("waits"),
        ]

    def _facts(self) -> report.Table:
        facts = [each for each in self.findings if isinstance(each, Fact) and each.what != CARD]
        rows = [[each.what, each.value, each.unit] for each in facts]
        return report.table(FACTS, ["what", "value", "unit"], rows)

    def _parts(self) -> report.Table:
        rows = [
            [each.name, each.what, each.state, round(each.seconds), each.why]
            for each in self.outcomes
        ]
        return report.table(PARTS, ["part", "what", "state", "s", "why"], rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "card": self.card,
            "notes": list(self.notes),
            "tests": [asdict(each) for each in self.tests],
            "disagreements": list(self.disagreements()),
            "not_reached": [each.name for each in self.outcomes if each.state == "not reached"],
            "parts": [asdict(each) for each in self.outcomes],
            "findings": [{"kind": type(each).__name__, **asdict(each)} for each in self.findings],
            "tables": [report.as_dict(each) for each in self.tables()],
        }

    def __str__(self) -> str:
        parts = [f"# Measured on {self.card}\n", *(f"{each}\n" for each in self.notes)]
        parts += [self._of_tests(), self._of_disagreements()]
        missing = [each for each in self.outcomes if each.state != "ended"]
        lines = [f"- {each.name} ({each.what}): {each.state}, {each.why}" for each in missing]
        parts.append(_section("Not reached, stopped or failed", lines))
        parts += [str(each) for each in self.tables()]
        parts += [_longest(each) for each in self.findings if isinstance(each, Kernels)]
        return "\n".join(parts)

    def _of_tests(self) -> str:
        results = [each.result for each in self.tests]
        counts = [f"{results.count(name)} {name}" for name in sorted(set(results))]
        lines = [f"- {each.name}: {each.why}" for each in self.tests if each.result != "passed"]
        return _section("Tests on the device", [f"{', '.join(counts) or 'none'}.", *lines])

    def _of_disagreements(self) -> str:
        return _section("What disagreed", [f"- {each}" for each in self.disagreements()])


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}\n", *(lines or ["Nothing."]), ""])


def _longest(kernels: Kernels) -> str:
    title = f"{kernels.work}, by {kernels.who}: the longest of {kernels.count} kernels"
    rows = [[name, calls, ms] for name, calls, ms in kernels.longest]
    return str(report.table(title, ["kernel", "calls", "ms"], rows))


def _ms(seconds: float) -> str:
    return f"{report.cell(1000 * seconds)} ms"


def _gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 2)


def card_of(name: str) -> str | None:
    """The data sheet's name of a card; None if it is not among the `CARDS`."""
    return next((known for known in CARDS if known in name), None)


def file_name(card: str) -> str:
    """A card's name as the name of a file: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def read_tests(xml: str) -> Iterator[Test]:
    """The tests in a JUnit report of pytest's."""
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        seconds = float(case.get("time", 0))
        for kind, result in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            if (found := case.find(kind)) is not None:
                why = (found.get("message") or "").strip().splitlines()
                yield Test(name, result, seconds, why[0][:300] if why else "")
                break
        else:
            yield Test(name, "passed", seconds)
