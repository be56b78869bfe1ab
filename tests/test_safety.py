"""The content floor refuses what it must, passes what it can, and cannot be talked out of it."""

import ast
import re
import re._constants as sre
import re._parser as parser
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ourvidz_serverless import safety
from ourvidz_serverless.errors import ContentRefused
from tests import measure_safety

DOCUMENT = Path(__file__).parents[1] / "docs" / "content-floor.md"

UNHURRIED = settings(deadline=None)

REFUSED = "nude, 13 years old"
KNOWN_DISGUISES = {"cut in two", "reversed"}
INVISIBLE = ["\u200b", "\u200d", "\u00ad", "\ufeff", "\u0336", "\u2060", "\U000e0061", "\x00"]
EVERYDAY = [
    *("woman", "man", "girl", "1girl", "nude", "sexual", "street", "rain", "35mm", "f/1.8", "8k"),
    *("kidney", "Essex", "minority", "17th", "century", "eighteen", "21", "years", "solo", "elf"),
    *("canteen", "infantry", "schoolhouse", "(masterpiece:1.3)", "student", "office"),
]
HOSTILE = {
    "one long word": "a",
    "one long number": "9",
    "small numbers": "13, ",
    "spans": "12-",
    "letters apart": "t e ",
    "half a phrase": "high ",
    "half a set phrase": "minor ",
    "negations": "not a ",
    "ampersands": "&amp;",
    "half a reference": "&#",
    "marks out of order": "a\u0323\u0301",
    "invisible": "\u200b",
    "leet": "l0",
    "half a weight": ":1 ",
    "links": "girl, de ",
    "numerals of ten": "十",
    "ligatures": "\ufdfa",
    "tildes": "ñ",
}


def groups(*, known: bool) -> list[Any]:
    return [
        pytest.param(group, id=group["name"])
        for group in measure_safety.groups()
        if group.get("known", False) is known
    ]


def decided(group: dict[str, Any], refused: bool) -> list[str]:
    verdicts = {text: safety.check(text, adult=group["adult"]) for text in group["texts"]}
    return [text for text, verdict in verdicts.items() if verdict.refused is refused]


@pytest.mark.parametrize("group", groups(known=False))
def test_the_floor_decides_each_case_as_it_should(group):
    assert decided(group, not group["refuse"]) == []


@pytest.mark.parametrize("group", groups(known=True))
def test_a_known_error_is_one_still(group):
    assert decided(group, group["refuse"]) == []


def test_each_case_is_listed_once():
    listed = [
        (text, group["adult"]) for group in measure_safety.groups() for text in group["texts"]
    ]

    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("disguise", sorted(measure_safety.DISGUISES.keys() - KNOWN_DISGUISES))
def test_a_disguise_does_not_help(disguise):
    disguised = map(measure_safety.DISGUISES[disguise], measure_safety.PHRASES)

    assert [text for text in disguised if not safety.check(text).refused] == []


def test_only_the_known_disguises_help():
    caught = {name: n for name, _, n in measure_safety.disguised() if name in KNOWN_DISGUISES}

    assert caught == {"cut in two": 9, "reversed": 0}


def test_a_minor_and_a_sexual_sign_are_refused_together_only():
    assert safety.check("nude child") == safety.Verdict(True, "minor+sexual", safety.LIST_VERSION)
    assert safety.check("child") == safety.Verdict(False, None, safety.LIST_VERSION)
    assert safety.check("nude") == safety.Verdict(False, None, safety.LIST_VERSION)


def test_in_adult_mode_the_sign_of_a_minor_is_enough():
    assert safety.check("child", adult=True).rule == "minor+adult-mode"


def test_the_signs_of_a_job_add_up_over_its_texts():
    with pytest.raises(ContentRefused):
        safety.check_all(iter(["a child", "in a park", "nude"]))

    safety.check_all(["a child", "in a park"])
    safety.check_all([])


def test_the_refusal_says_content_policy_and_nothing_of_the_text():
    with pytest.raises(ContentRefused) as refusal:
        safety.check_all(["toddler, topless"])

    assert "content policy" in refusal.value.message
    assert not re.search("toddler|topless|inf|nan", refusal.value.message)


def test_the_audit_hash_tells_texts_apart_and_where_each_ends():
    hashes = {
        safety.audit_hash(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], [], ["", "abc"])
    }

    assert len(hashes) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
    assert safety.audit_hash(["\ud800"]) == safety.audit_hash(iter(["\ud800"]))


def test_a_number_too_long_for_python_is_no_way_out():
    assert safety.check(f"&#{'9' * 5000}; {REFUSED}").refused
    assert safety.check(f"&#{'0' * 5000}110;ude child").refused


@UNHURRIED
@given(st.text(), st.text(), st.booleans())
def test_a_refused_text_stays_refused_whatever_is_written_around_it(before, after, adult):
    assert safety.check(f"{before}\n{REFUSED}\n{after}", adult=adult).refused


@UNHURRIED
@given(st.lists(st.sampled_from(INVISIBLE), min_size=len(REFUSED), max_size=len(REFUSED)))
def test_what_cannot_be_seen_changes_nothing(signs):
    woven = "".join(f"{char}{sign}" for char, sign in zip(REFUSED, signs, strict=True))

    assert safety.check(woven).refused


@UNHURRIED
@given(st.lists(st.sampled_from(EVERYDAY)))
def test_everyday_words_pass_in_any_order_in_adult_mode(words):
    assert not safety.check(", ".join(words), adult=True).refused


@UNHURRIED
@given(st.lists(st.text()), st.booleans())
def test_a_job_is_never_safer_than_its_worst_text(texts, adult):
    if any(safety.check(text, adult=adult).refused for text in texts):
        assert safety.judge(texts, adult=adult).refused


@UNHURRIED
@given(st.text(st.sampled_from("a1 .,-&#;x:()[]'13yo\n!@十歳ñ\u0301\ud800"), max_size=80))
def test_any_text_gets_a_verdict(text):
    assert safety.check(text, adult=True).rule in (None, "minor+adult-mode")


def steps(text: str) -> int:
    """How many lines of Python the floor runs for a text."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_globals is vars(safety) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        safety.check(text)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_twice_the_text_takes_at_most_twice_the_steps(piece):
    steps(piece * 500)  # remembers how its characters fold

    assert steps(piece * 1000) <= 2.1 * steps(piece * 500) + 100


def unbounded(pattern: Any) -> list[Any]:
    """What repeats without bound in a parsed pattern."""
    found = []
    for op, argument in pattern:
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT) and argument[1] is sre.MAXREPEAT:
            found.append(argument[2])
        for part in argument if isinstance(argument, tuple | list) else ():
            parts = part if isinstance(part, list) else [part]
            found += [x for p in parts if isinstance(p, parser.SubPattern) for x in unbounded(p)]
    return found


@pytest.mark.parametrize(
    "pattern", [value for value in vars(safety).values() if isinstance(value, re.Pattern)], ids=str
)
def test_no_pattern_repeats_a_repetition(pattern):
    outer = unbounded(parser.parse(pattern.pattern, pattern.flags))

    assert len(outer) <= 3
    assert not any(unbounded(inner) for inner in outer)


@pytest.mark.parametrize("piece", ["a", "9", "&#", "a\u0323\u0301", "\u200b", "十", "t e ", "ñ"])
def test_half_a_megabyte_of_hostile_text_comes_to_an_end(piece):
    text = piece * (500_000 // len(piece))

    assert safety.check(f"{text}\n{REFUSED}").refused


def test_the_floor_imports_nothing_that_reads_or_writes():
    tree = ast.parse(Path(safety.__file__).read_text(encoding="utf-8"))
    imported = {
        module.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }

    allowed = "__future__ collections dataclasses hashlib html itertools ourvidz_serverless re"
    assert imported == {*allowed.split(), "unicodedata"}


def test_the_document_holds_the_measured_numbers():
    assert measure_safety.report() in DOCUMENT.read_text(encoding="utf-8")
