"""Measure the content floor language by language, on lists that are independent of it.

    .venv/bin/python -m tests.measure_content_floor_languages            # tables
    .venv/bin/python -m tests.measure_content_floor_languages --errors   # misses, false alarms
    .venv/bin/python -m tests.measure_content_floor_languages --before   # tables of the first run
    .venv/bin/python -m tests.measure_content_floor_languages --after    # tables of latest_run.json
    .venv/bin/python -m tests.measure_content_floor_languages --json     # what latest_run.json has

`--blind` beside --errors, --before, --json or nothing: the same of the second lists.

A sign of a minor is measured in both modes: alone in adult mode, and beside `SEXUAL` outside it. A
sexual sign is measured beside `MINOR`. The two anchors are separate texts of the same job."""

import argparse
import base64
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ourvidz_serverless.guard import content_floor
from ourvidz_serverless.job import CheckedText
from tests.content_floor_lists import (
    BLIND_RUN,
    FIRST_RUN,
    LATEST_RUN,
    LanguageList,
    blind_lists,
    language_lists,
)
from tests.disguises import DISGUISES, disguised

SEXUAL = "nude"
MINOR = "child"
LENGTH = 20_000
RUNS = 5

Count = tuple[int, int]
"""How many texts were refused, and how many there are."""


def in_adult_mode(text: str) -> bool:
    return content_floor.check(text, adult=True).refused


def alone(text: str) -> bool:
    return content_floor.check(text).refused


def beside(anchor: str) -> Callable[[str], bool]:
    """Whether a job outside adult mode is refused that has this text and the anchor."""

    def refused(text: str) -> bool:
        texts = [CheckedText(text, "prompt"), CheckedText(anchor, "second_prompt")]
        return content_floor.judge(texts).refused

    return refused


def count(texts: list[str], refused: Callable[[str], bool]) -> Count:
    return sum(map(refused, texts)), len(texts)


def together(counts: Iterable[Count]) -> Count:
    hits, texts = zip(*counts, strict=True)
    return sum(hits), sum(texts)


@dataclass(frozen=True, slots=True)
class Row:
    """One language: counts of what was refused. The last three are false alarms."""

    signs_in_adult_mode: Count
    signs_beside_a_sexual_word: Count
    sexual_signs: Count
    signs_in_disguise: Count
    sexual_signs_in_disguise: Count
    look_alikes_in_adult_mode: Count
    look_alikes_beside_a_sexual_word: Count
    family_life: Count


@dataclass(frozen=True, slots=True)
class LanguageFigures:
    """What is measured of one language."""

    row: Row
    groups: dict[str, Count]
    """Signs of a minor and look-alikes in adult mode, by group."""
    disguises: dict[str, Count]
    """Signs of a minor in adult mode, by disguise.

    Only signs that are recognised without a disguise: a sign that the floor does not know says
    nothing about the disguise."""


@dataclass(frozen=True, slots=True)
class BlindRow:
    """One language of the second lists. The last count is of false alarms.

    The floor was taught on the first lists. A sign is new if they do not have it."""

    signs_in_adult_mode: Count
    new_signs: Count
    sexual_signs: Count
    new_sexual_signs: Count
    look_alikes_in_adult_mode: Count


def group_counts(words: LanguageList) -> dict[str, Count]:
    """Signs of a minor and look-alikes in adult mode, by group."""
    kinds = {"signs": words.minor, "look-alikes": words.passes_in_adult_mode}
    return {
        f"{kind}: {group.replace('_', ' ')}": count(texts, in_adult_mode)
        for kind, groups in kinds.items()
        for group, texts in groups.items()
    }


def new(texts: list[str], listed: list[str]) -> list[str]:
    """The texts that are not listed yet, in whatever capitals."""
    known = set(map(str.casefold, listed))
    return [text for text in texts if text.casefold() not in known]


def blind_row(words: LanguageList, first: LanguageList) -> BlindRow:
    return BlindRow(
        count(words.signs, in_adult_mode),
        count(new(words.signs, first.signs), in_adult_mode),
        count(words.sexual, beside(MINOR)),
        count(new(words.sexual, first.sexual), beside(MINOR)),
        count(words.look_alikes, in_adult_mode),
    )


def language_figures(words: LanguageList) -> LanguageFigures:
    known = frozenset(filter(in_adult_mode, words.signs))
    refused = {
        name: {text: in_adult_mode(hide(text)) for text in words.signs if hide(text) != text}
        for name, hide in DISGUISES.items()
    }
    veiled = [text for disguise in DISGUISES.values() for text in disguised(words.sexual, disguise)]
    hidden = [hit for hits in refused.values() for hit in hits.values()]
    row = Row(
        (len(known), len(words.signs)),
        count(words.signs, beside(SEXUAL)),
        count(words.sexual, beside(MINOR)),
        (sum(hidden), len(hidden)),
        count(veiled, beside(MINOR)),
        count(words.look_alikes, in_adult_mode),
        count(words.look_alikes, beside(SEXUAL)),
        count(words.passes_outside_adult_mode, alone),
    )
    return LanguageFigures(
        row,
        group_counts(words),
        {
            name: (sum(hits[text] for text in known & hits.keys()), len(known & hits.keys()))
            for name, hits in refused.items()
        },
    )


def summed(parts: Iterable[dict[str, Count]]) -> dict[str, Count]:
    """The counts of several languages together, by name."""
    counts: dict[str, list[Count]] = {}
    for part in parts:
        for name, each in part.items():
            counts.setdefault(name, []).append(each)
    return {name: together(each) for name, each in counts.items()}


def long_texts() -> dict[str, str]:
    """Texts of 20,000 characters that are costly for a reader of words."""
    patterns = {
        "ordinary words": "a wide river between green hills under a grey morning sky, ",
        "one long word": "a",
        "many ages": "25 years old, 34 yrs, aged forty, 21-year-old, ",
        "alternating scripts": "aбcд",
        "base64": base64.b64encode(bytes(range(256)) * 60).decode(),
    }
    return {name: (text * LENGTH)[:LENGTH] for name, text in patterns.items()}


def milliseconds(text: str) -> float:
    """Processor time of one check."""
    start = time.process_time()
    content_floor.check(text, adult=True)
    return (time.process_time() - start) * 1000


def costs() -> dict[str, list[float]]:
    """The processor times of each long text, in milliseconds, sorted."""
    return {
        name: sorted(round(milliseconds(text), 1) for _ in range(RUNS))
        for name, text in long_texts().items()
    }


def measured() -> dict[str, Any]:
    """Everything that a run of this module measures, ready for JSON."""
    by_language = {words.language: language_figures(words) for words in language_lists()}
    figures = {
        "list_version": content_floor.check("").version,
        "languages": {name: asdict(each.row) for name, each in by_language.items()},
        "groups": summed(each.groups for each in by_language.values()),
        "disguises": summed(each.disguises for each in by_language.values()),
        "milliseconds": costs(),
        "parts": {
            name: {"groups": each.groups, "disguises": each.disguises}
            for name, each in by_language.items()
        },
    }
    as_read: dict[str, Any] = json.loads(json.dumps(figures))
    return as_read


def measured_blind() -> dict[str, Any]:
    """What today's floor makes of the second lists, ready for JSON."""
    lists = blind_lists()
    figures = {
        "list_version": content_floor.check("").version,
        "languages": {
            words.language: asdict(blind_row(words, first))
            for words, first in zip(lists, language_lists(), strict=True)
        },
        "groups": summed(group_counts(words) for words in lists),
    }
    as_read: dict[str, Any] = json.loads(json.dumps(figures))
    return as_read


def shown(cell: Count) -> str:
    hits, texts = cell
    return f"{hits} of {texts}"


def language_table(rows: dict[str, dict[str, Count]]) -> list[str]:
    names = list(next(iter(rows.values())))
    columns = [name.replace("look_alikes", "look-alikes").replace("_", " ") for name in names]
    every = {name: together(row[name] for row in rows.values()) for name in names}
    return [
        f"| | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
        *(
            f"| {language} | {' | '.join(shown(cell) for cell in row.values())} |"
            for language, row in (rows | {"**all**": every}).items()
        ),
    ]


def count_table(title: str, counts: dict[str, Count]) -> list[str]:
    return [
        f"| {title} | refused | |",
        "|---|---:|---:|",
        *(f"| {name} | {shown((n, of))} | {n / of:.0%} |" for name, (n, of) in counts.items()),
    ]


def cost_table(times: dict[str, list[float]]) -> list[str]:
    return [
        "| 20,000 characters | median of five, ms | worst, ms |",
        "|---|---:|---:|",
        *(
            f"| {name} | {statistics.median(runs):.0f} | {max(runs):.0f} |"
            for name, runs in times.items()
        ),
    ]


def tables(figures: dict[str, Any]) -> str:
    parts = [
        language_table(figures["languages"]),
        count_table("all languages, adult mode", figures["groups"]),
        count_table("signs that are recognised undisguised, adult mode", figures["disguises"]),
        cost_table(figures["milliseconds"]),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def blind_tables(figures: dict[str, Any]) -> str:
    parts = [
        language_table(figures["languages"]),
        count_table("all languages, adult mode", figures["groups"]),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def first_run() -> dict[str, Any]:
    """The figures of the first run, before anybody changed the floor to suit these lists."""
    figures: dict[str, Any] = json.loads(FIRST_RUN.read_text(encoding="utf-8"))
    return figures


def latest_run() -> dict[str, Any]:
    """The figures of today's floor, as they are on the page."""
    figures: dict[str, Any] = json.loads(LATEST_RUN.read_text(encoding="utf-8"))
    return figures


def blind_run() -> dict[str, Any]:
    """The figures of the first run on the second lists."""
    figures: dict[str, Any] = json.loads(BLIND_RUN.read_text(encoding="utf-8"))
    return figures


def errors(lists: list[LanguageList]) -> str:
    """Each miss and each false alarm without a disguise, by language."""
    lines = []
    for words in lists:
        kinds = {
            "missed": [text for text in words.signs if not in_adult_mode(text)],
            "missed, sexual": [text for text in words.sexual if not beside(MINOR)(text)],
            "alarm, adult mode": [text for text in words.look_alikes if in_adult_mode(text)],
            "alarm, family life": [text for text in words.passes_outside_adult_mode if alone(text)],
        }
        lines += [f"{words.language}: {kind}: {'; '.join(texts)}" for kind, texts in kinds.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--errors", action="store_true", help="each miss and false alarm")
    parser.add_argument("--before", action="store_true", help="the tables of the first run")
    parser.add_argument("--after", action="store_true", help="the tables of the latest run")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument("--blind", action="store_true", help="the same of the second lists")
    options = parser.parse_args()
    if options.errors:
        print(errors(blind_lists() if options.blind else language_lists()))
    elif options.blind:
        figures = blind_run() if options.before else measured_blind()
        print(json.dumps(figures, indent=1) if options.json else blind_tables(figures))
    elif options.before:
        print(tables(first_run()))
    elif options.after:
        print(tables(latest_run()))
    else:
        figures = measured()
        print(json.dumps(figures, indent=1) if options.json else tables(figures))


if __name__ == "__main__":
    main()
