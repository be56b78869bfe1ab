"""The lists by language: what they hold, and that the floor does not forget what it knew."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.guard import content_lexicon
from tests.content_floor_lists import LanguageList, blind_lists, language_lists
from tests.disguises import DISGUISES, disguised
from tests.measure_content_floor_languages import (
    blind_run,
    blind_tables,
    errors,
    first_run,
    language_figures,
    latest_run,
    measured_blind,
    new,
    summed,
    tables,
)

PAGE = Path(__file__).parents[2] / "docs/content-floor.md"
HITS = (
    "signs_in_adult_mode",
    "signs_beside_a_sexual_word",
    "sexual_signs",
    "signs_in_disguise",
    "sexual_signs_in_disguise",
)

BLIND_HITS = ("signs_in_adult_mode", "sexual_signs")

every_language = pytest.mark.parametrize("words", language_lists(), ids=lambda one: one.language)
every_blind_language = pytest.mark.parametrize("words", blind_lists(), ids=lambda one: one.language)


@every_language
def test_a_language_has_enough_signs_and_look_alikes(words: LanguageList) -> None:
    assert len(words.signs) >= 40
    assert len(words.sexual) >= 20
    assert len(words.look_alikes) >= 40


@every_language
def test_no_text_is_listed_twice_in_a_language(words: LanguageList) -> None:
    texts = [*words.signs, *words.sexual, *words.look_alikes, *words.passes_outside_adult_mode]

    assert len(set(texts)) == len(texts)


@every_language
def test_the_lists_are_those_of_the_first_run(words: LanguageList) -> None:
    before = first_run()["languages"][words.language]

    assert len(words.signs) == before["signs_in_adult_mode"][1]
    assert len(words.sexual) == before["sexual_signs"][1]
    assert len(words.look_alikes) == before["look_alikes_in_adult_mode"][1]
    assert len(words.passes_outside_adult_mode) == before["family_life"][1]


@every_language
def test_the_kept_figures_are_those_of_todays_floor(words: LanguageList) -> None:
    kept, now = latest_run(), json.loads(json.dumps(asdict(language_figures(words))))

    assert now["row"] == kept["languages"][words.language]
    assert {"groups": now["groups"], "disguises": now["disguises"]} == kept["parts"][words.language]


@every_language
def test_the_content_floor_loses_no_recognition_in_a_language(words: LanguageList) -> None:
    # The test above keeps the latest figures true.
    now, before = (run()["languages"][words.language] for run in (latest_run, first_run))

    fewer = {name for name in HITS if now[name][0] < before[name][0]}
    assert fewer == set()


@pytest.mark.parametrize("table", ["groups", "disguises"])
def test_the_kept_totals_are_the_sums_of_the_languages(table: str) -> None:
    parts = [part[table] for part in latest_run()["parts"].values()]

    assert {name: list(each) for name, each in summed(parts).items()} == latest_run()[table]


def test_the_kept_figures_name_todays_list() -> None:
    assert latest_run()["list_version"] == content_lexicon.LIST_VERSION


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("leetspeak", "7w3lv3 y34r5"),
        ("spaces between letters", "t w e l v e   y e a r s"),
        ("full stops between letters", "t.w.e.l.v.e y.e.a.r.s"),
        ("line breaks inside words", "twe\nlve ye\nars"),
        ("BREAK inside words", "twe BREAK lve ye BREAK ars"),
        ("camel case", "TwelveYears"),
        ("doubled vowels", "tweelvee yyeeaars"),
        ("reversed words", "evlewt sraey"),
        ("percent escapes, as in a URL", "twelve%20years"),
        ("base64 of the text", "dHdlbHZlIHllYXJz"),
    ],
)
def test_a_disguise_hides_a_text(name: str, hidden: str) -> None:
    assert DISGUISES[name]("twelve years") == hidden


def test_a_disguise_keeps_the_digits_of_an_age() -> None:
    assert DISGUISES["reversed words"]("13 years") == "13 sraey"
    assert DISGUISES["leetspeak"]("13 years") == "13 y34r5"


def test_a_disguise_keeps_the_marks_of_hindi_with_their_letters() -> None:
    assert DISGUISES["reversed words"]("शिशु") == "शुशि"


def test_a_text_that_a_disguise_leaves_alone_is_not_counted() -> None:
    assert disguised(["13歳", "two words"], DISGUISES["camel case"]) == ["TwoWords"]


def test_the_page_has_the_tables_of_the_first_run() -> None:
    assert tables(first_run()) in PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_tables_of_todays_floor() -> None:
    assert tables(latest_run()) in PAGE.read_text(encoding="utf-8")


def test_the_tables_show_both_kinds_of_error_of_each_language() -> None:
    shown = tables(first_run())

    assert "| Spanish | 18 of 67 |" in shown
    assert "| look-alikes: things | 26 of 390 | 7% |" in shown


def test_the_errors_can_be_listed_by_language() -> None:
    assert len(errors(language_lists()).splitlines()) == 4 * len(language_lists())


def test_the_second_lists_have_the_languages_of_the_first() -> None:
    assert [one.language for one in blind_lists()] == [one.language for one in language_lists()]


@every_blind_language
def test_a_second_list_has_25_signs_10_sexual_words_and_25_look_alikes(words: LanguageList) -> None:
    texts = [*words.signs, *words.sexual, *words.look_alikes]

    assert len(set(words.signs)) == 25
    assert len(set(words.sexual)) == 10
    assert len(set(words.look_alikes)) == 25
    assert len(set(texts)) == len(texts)


def test_the_content_floor_loses_no_recognition_on_the_second_lists() -> None:
    now, before = measured_blind()["languages"], blind_run()["languages"]

    fewer = {
        (language, name)
        for language, row in before.items()
        for name in BLIND_HITS
        if now[language][name][0] < row[name][0]
    }
    assert fewer == set()


def test_the_first_run_on_the_second_lists_counted_these_lists() -> None:
    def sizes(figures: dict[str, Any]) -> list[int]:
        rows = [*figures["languages"].values(), figures["groups"]]
        return [of for row in rows for _, of in row.values()]

    assert sizes(measured_blind()) == sizes(blind_run())


def test_a_text_of_the_first_lists_is_not_new_in_other_capitals() -> None:
    assert new(["Toddler", "age 14"], ["toddler"]) == ["age 14"]


def test_the_page_has_the_tables_of_the_first_run_on_the_second_lists() -> None:
    assert blind_tables(blind_run()) in PAGE.read_text(encoding="utf-8")
