"""The content floor refuses what it must and passes what it can, in every disguise."""

import ast
import re
import re._constants as sre
import re._parser as parser
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.guard import (
    content_floor,
    content_folding,
    content_languages,
    content_lexicon,
)
from ourvidz_serverless.job import CheckedText, Signs
from tests import measure_content_floor
from tests.files import ROOT

MODULES = (content_floor, content_folding, content_languages, content_lexicon)

DOCUMENT = ROOT / "docs/content-floor.md"


REFUSED = "nude, 13 years old"
KNOWN_DISGUISES = {"cut in two", "reversed"}
UNCHANGED = {"capitals", "words on lines"}  # of a sentence that forbids
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


def is_table(value: object) -> bool:
    # By type: the cache of folded characters is a dict of its own class, and no table.
    return type(value) in (dict, set, frozenset)


def groups(*, known: bool) -> list[Any]:
    return [
        pytest.param(group, id=group["name"])
        for group in measure_content_floor.groups()
        if group.get("known", False) is known
    ]


def decided(group: dict[str, Any], refused: bool) -> list[str]:
    verdicts = dict(zip(group["texts"], measure_content_floor.verdicts(group), strict=True))
    return [text for text, verdict in verdicts.items() if verdict.refused is refused]


def judge(*texts: str, adult: bool = False) -> content_floor.Verdict:
    return content_floor.judge([CheckedText(text, "prompt") for text in texts], adult=adult)


@pytest.mark.parametrize("group", groups(known=False))
def test_the_floor_decides_each_listed_case_correctly(group):
    assert decided(group, not group["refuse"]) == []


@pytest.mark.parametrize("group", groups(known=True))
def test_the_floor_still_errs_on_each_known_error(group):
    assert decided(group, group["refuse"]) == []


def test_each_case_is_listed_once():
    listed = [
        (text, group["adult"], group.get("role"))
        for group in measure_content_floor.groups()
        for text in group["texts"]
    ]

    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "disguise", sorted(measure_content_floor.DISGUISES.keys() - KNOWN_DISGUISES)
)
def test_a_disguised_phrase_is_refused(disguise):
    disguised = map(measure_content_floor.DISGUISES[disguise], measure_content_floor.PHRASES)

    assert [text for text in disguised if not content_floor.check(text).refused] == []


def single_words(table: str) -> set[str]:
    entries = map(str.split, content_lexicon._words(table))
    return {words[0] for words in entries if len(words) == 1 and words[0].isascii()}


@pytest.mark.parametrize(
    "disguise", sorted(measure_content_floor.DISGUISES.keys() - KNOWN_DISGUISES)
)
@pytest.mark.parametrize(
    ("table", "sign"), [(content_lexicon.MINOR, "minor"), (content_lexicon.SEXUAL, "sexual")]
)
def test_each_word_that_is_a_sign_is_recognised_in_each_disguise(table, sign, disguise):
    disguised = map(measure_content_floor.DISGUISES[disguise], sorted(single_words(table)))
    # "455" is a number.
    words = [word for word in disguised if not re.fullmatch("[0-9@$!]+", word)]

    assert len(words) > 100
    assert [w for w in words if not getattr(content_floor.check(w).signs, sign)] == []


@pytest.mark.parametrize("emoji", "👶🧒👧👦")
def test_the_face_of_a_child_is_the_sign_of_a_minor(emoji):
    assert content_floor.check(f"a park{emoji}").signs == Signs(True, False)


def test_the_emoji_for_adults_only_is_a_sexual_sign():
    assert content_floor.check("a park🔞").signs == Signs(False, True)


def test_only_the_known_disguises_hide_a_phrase():
    caught = {
        name: n for name, _, n in measure_content_floor.disguised() if name in KNOWN_DISGUISES
    }

    assert caught == {"cut in two": 10, "reversed": 5}


def test_only_a_minor_and_a_sexual_sign_together_are_refused():
    version = content_lexicon.LIST_VERSION
    assert content_floor.check("nude child") == content_floor.Verdict(
        True, "minor+sexual", version, Signs(True, True)
    )
    assert content_floor.check("child") == content_floor.Verdict(
        False, None, version, Signs(True, False)
    )
    assert content_floor.check("nude") == content_floor.Verdict(
        False, None, version, Signs(False, True)
    )


def test_in_adult_mode_the_sign_of_a_minor_is_enough():
    assert content_floor.check("child", adult=True).rule == "minor+adult-mode"


def test_a_verdict_says_whether_any_text_is_sexual():
    assert judge("a street", "a nude", "rain").signs.sexual
    assert judge("a street", adult=True).signs.sexual
    assert not judge("a street", "rain").signs.sexual


def test_the_signs_in_all_texts_of_a_job_count_together():
    assert judge("a child", "in a park", "nude").refused
    assert not judge("a child", "in a park").refused
    assert not judge().refused


def test_a_refusal_says_content_policy_and_quotes_no_text():
    refusal = content_floor.refusal(content_floor.check("toddler, topless"))

    assert "content policy" in refusal.message
    assert not re.search("toddler|topless|inf|nan", refusal.message)


def audit_hash(*texts: str) -> str:
    return content_floor.audit_hash([CheckedText(text, "prompt") for text in texts])


def test_the_audit_hash_depends_on_the_texts_and_where_each_ends():
    hashes = {audit_hash(*texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], [], ["", "abc"])}

    assert len(hashes) == 5
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
    assert audit_hash("\ud800") == audit_hash("\ud800")


def test_a_reference_with_too_many_digits_for_python_hides_no_sign():
    assert content_floor.check(f"&#{'9' * 5000}; {REFUSED}").refused
    assert content_floor.check(f"&#{'0' * 5000}110;ude child").refused


@given(st.text(), st.text(), st.booleans())
def test_a_refused_text_is_refused_inside_any_other_text(before, after, adult):
    assert content_floor.check(f"{before}\n{REFUSED}\n{after}", adult=adult).refused


@given(st.lists(st.sampled_from(INVISIBLE), min_size=len(REFUSED), max_size=len(REFUSED)))
def test_invisible_characters_hide_no_sign(signs):
    woven = "".join(f"{char}{sign}" for char, sign in zip(REFUSED, signs, strict=True))

    assert content_floor.check(woven).refused


@given(st.lists(st.sampled_from(EVERYDAY)))
def test_everyday_words_pass_in_any_order_in_adult_mode(words):
    assert not content_floor.check(", ".join(words), adult=True).refused


@given(st.lists(st.text()), st.booleans())
def test_a_job_with_a_refused_text_is_refused(texts, adult):
    if any(content_floor.check(text, adult=adult).refused for text in texts):
        assert judge(*texts, adult=adult).refused


@given(st.lists(st.sampled_from(["a child", "nude", "rain", "a minor key"])), st.booleans())
def test_texts_judged_one_by_one_get_the_verdict_of_all_together(texts, adult):
    found = Signs()
    refused = []
    for text in texts:
        verdict = content_floor.judge([CheckedText(text, "prompt")], adult=adult, found=found)
        refused.append(verdict.refused)
        found = verdict.signs

    assert any(refused) == judge(*texts, adult=adult).refused


def test_the_cache_of_folded_characters_has_a_bound(monkeypatch):
    monkeypatch.setattr(content_folding, "MAX_CACHED_FOLDS", 3)
    folds = content_folding._Folds()

    assert "ÀÉÎÕÜÝ".translate(folds) == "aeiouy"
    assert len(folds) == 3


# --- ages ---


@pytest.mark.parametrize("age", ["4", "17", "four", "five", "seventeen"])
def test_a_number_from_four_to_seventeen_at_the_end_of_a_clause_is_an_age(age):
    assert content_floor.check(f"She is {age}.").signs.minor


@pytest.mark.parametrize("number", ["3", "18", "three", "eighteen"])
def test_another_number_at_the_end_of_a_clause_is_no_minors_age(number):
    assert not content_floor.check(f"She is {number}.").signs.minor


@pytest.mark.parametrize("start", ["13", "thirteen"])
@pytest.mark.parametrize("end", ["16", "19", "sixteen", "nineteen", "thirty"])
def test_a_span_that_begins_below_eighteen_is_an_age_where_a_number_is_one(start, end):
    assert content_floor.check(f"from {start} to {end} years old").signs.minor
    assert content_floor.check(f"a girl, {start} to {end}").signs.minor


def test_a_number_and_a_word_are_no_span():
    assert not content_floor.check("a girl, 13 to go").signs.minor


@pytest.mark.parametrize("text", ["loll on a sofa", "Kiddle Street", "the giri of Edo"])
def test_a_word_without_signs_is_not_read_with_other_strokes(text):
    assert content_floor.check(text).signs == Signs(False, False)


def test_an_age_may_have_a_zero_before_it():
    assert content_floor.check("a girl, 08 years old").signs.minor


@pytest.mark.parametrize("text", ["a k1d!", "a k1d!!", "|k1d|"])
def test_punctuation_around_a_disguised_word_does_not_hide_it(text):
    assert content_floor.check(text).signs.minor


@pytest.mark.parametrize("text", ["kidgirl", "girlkid"])
def test_a_word_of_three_letters_is_read_at_both_ends_of_a_glued_one(text):
    assert content_floor.check(text).signs.minor


def test_numbers_alone_are_no_words():
    assert content_floor.check("455 of 717, 5008").signs == Signs(False, False)


@pytest.mark.parametrize("start", ["13,", "13 years,", "of 13,", "of 13 years,"])
def test_a_number_at_the_start_of_a_text_is_no_age_of_a_person_at_its_end(start):
    assert not content_floor.check(f"{start} a street, a woman").signs.minor


@pytest.mark.parametrize("start", ["13", "and 13"])
def test_a_number_at_the_end_of_a_text_changes_no_age_at_its_start(start):
    assert content_floor.check(f"{start} years old, one of twenty").signs.minor


# --- clauses that forbid ---


@pytest.mark.parametrize("noun", sorted(content_lexicon.MATERIAL_WORDS))
def test_a_clause_that_forbids_sexual_material_has_no_sexual_sign(noun):
    assert not content_floor.check(f"A forecast with no sexual {noun}.").signs.sexual


@pytest.mark.parametrize("noun", sorted(content_lexicon.MATERIAL_WORDS))
def test_a_clause_hides_no_other_sign_before_the_name_of_a_material(noun):
    assert content_floor.check(f"A forecast with no erotic {noun}.").signs.sexual


def test_two_denials_forbid_as_one_does():
    assert not content_floor.check("cannot and never depict minors", adult=True).refused


def test_a_negation_before_another_sexual_thing_hides_no_sexual_sign():
    assert content_floor.check("A forecast with no sexual forecast.").signs.sexual
    assert content_floor.check("A forecast that is not sexual.").signs.sexual


@pytest.mark.parametrize("filler", ["depict ", "any of the "])
def test_a_negation_forbids_only_what_stands_a_few_words_after_it(filler):
    def is_refused(num_fillers: int) -> bool:
        words = (filler * num_fillers).split()[:num_fillers]
        return content_floor.check(f"never {' '.join(words)} minors", adult=True).refused

    most = content_lexicon.MAX_FILLERS - 1
    assert [is_refused(n) for n in (0, 1, most, most + 1, 100)] == [False] * 3 + [True] * 2


# --- sentences that forbid, in a system message ---

FORBIDS = "No school or minor context applies."


@given(st.text(), st.text(), st.booleans())
def test_a_prohibition_hides_no_sign_beside_it(before, after, adult):
    beside = f"{before}\n{FORBIDS} {REFUSED}\n{FORBIDS}\n{after}"

    assert content_floor.check(beside, adult=adult, role="system").refused


WORDS_OF_A_PROHIBITION = sorted(
    {
        word
        for table in (
            content_lexicon.PROHIBITIONS,
            content_lexicon.PROHIBITED,
            content_lexicon.KINDS,
        )
        for word in (*table.replace(",", " ").split(), "or", "and", "applies", "is", "allowed")
    }
)
OTHER_WORDS = ["a", "to", "rule", "child", "girl", "13", "not", "except", "refused", "nude"]


@given(st.lists(st.sampled_from([*WORDS_OF_A_PROHIBITION, *OTHER_WORDS, ",", ".", "\n"])))
def test_a_system_message_hides_only_the_nouns_that_it_forbids(words):
    text = " ".join(words)
    freed = re.sub(r"\b(?:minors?|underaged?)\b", "thing", text)

    if content_floor.check(freed, adult=True).refused:
        assert content_floor.check(text, adult=True, role="system").refused


@given(st.lists(st.sampled_from([*WORDS_OF_A_PROHIBITION, ",", ".", "\n"])))
def test_a_system_message_is_refused_only_if_a_users_would_be(words):
    text = " ".join(words)

    if not content_floor.check(text, adult=True).refused:
        assert not content_floor.check(text, adult=True, role="system").refused


@pytest.mark.parametrize(
    "text",
    [
        f"a minor\n{FORBIDS}\nkey",
        f"a minor. {FORBIDS} Key",
        f"a child's\n{FORBIDS}\npose",
        f"never\n{FORBIDS}\na minor",
    ],
)
def test_texts_around_a_prohibition_do_not_join_to_a_benign_phrase(text):
    assert content_floor.check(text, adult=True, role="system").refused


def test_texts_around_a_prohibition_do_not_join_to_a_sign():
    text = f"a little\n{FORBIDS}\ngirl's\n{FORBIDS}\nnight"

    assert not content_floor.check(text, adult=True, role="system").refused


@pytest.mark.parametrize("disguise", sorted(measure_content_floor.DISGUISES.keys() - UNCHANGED))
def test_a_disguised_prohibition_is_not_recognised(disguise):
    disguised = measure_content_floor.DISGUISES[disguise](FORBIDS)

    user, system = (content_floor.check(disguised, adult=True, role=r) for r in ("user", "system"))

    assert disguised != FORBIDS
    assert system == user


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_only_a_system_message_can_forbid(role):
    assert content_floor.check(FORBIDS, adult=True, role=role).refused


def test_the_word_that_replaces_a_forbidden_noun_is_no_sign():
    assert not content_floor.check(f"{content_lexicon.NEUTRAL}, nude", adult=True).refused
    assert all(
        content_lexicon.NEUTRAL not in table
        for module in MODULES
        for table in vars(module).values()
        if is_table(table)
    )


@given(st.text(st.sampled_from("a1 .,-&#;x:()[]'13yo\n!@十歳ñ\u0301\ud800"), max_size=80))
def test_any_text_gets_a_verdict(text):
    assert content_floor.check(text, adult=True).rule in (None, "minor+adult-mode")


# --- the cost ---


class StopRequested(Exception):
    pass


def test_a_stop_ends_the_judgement_at_the_next_reading_of_a_text():
    read: list[CheckedText] = []
    readings = 0

    def texts():
        for _ in range(100):
            read.append(CheckedText("a street in the rain", "messages"))
            yield read[-1]

    def check_stop():
        nonlocal readings
        readings += 1
        if readings == 12:
            raise StopRequested

    with pytest.raises(StopRequested):
        content_floor.judge(texts(), check_stop=check_stop)

    assert readings == 12
    assert len(read) <= 12


def test_the_floor_checks_for_a_stop_at_least_once_a_text():
    asked: list[None] = []

    content_floor.judge([CheckedText("", "messages")] * 7, check_stop=lambda: asked.append(None))

    assert len(asked) >= 7


def steps(text: str) -> int:
    """How many lines of Python the floor runs for a text."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if any(frame.f_globals is vars(each) for each in MODULES) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        content_floor.check(text)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_twice_the_text_takes_at_most_twice_the_steps(piece):
    steps(piece * 500)  # caches the folded characters

    assert steps(piece * 1000) <= 2.1 * steps(piece * 500) + 100


@pytest.mark.parametrize(("word", "most"), [("rain, ", 35), ("ch!p ", 50)])
def test_a_word_that_is_repeated_is_looked_up_once(word, most):
    assert steps(word * 400) - steps(word * 200) <= 200 * most


def unbounded(pattern: Any) -> list[Any]:
    """The parts of a parsed pattern that repeat without a bound."""
    found = []
    for op, argument in pattern:
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT) and argument[1] is sre.MAXREPEAT:
            found.append(argument[2])
        for part in argument if isinstance(argument, tuple | list) else ():
            parts = part if isinstance(part, list) else [part]
            found += [x for p in parts if isinstance(p, parser.SubPattern) for x in unbounded(p)]
    return found


@pytest.mark.parametrize(
    "pattern",
    dict.fromkeys(
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, re.Pattern)
    ),
    ids=str,
)
def test_no_pattern_repeats_a_repetition(pattern):
    outer = unbounded(parser.parse(pattern.pattern, pattern.flags))

    assert len(outer) <= 3
    assert not any(unbounded(inner) for inner in outer)


@pytest.mark.parametrize("piece", ["a", "9", "&#", "a\u0323\u0301", "\u200b", "十", "t e ", "ñ"])
def test_half_a_megabyte_of_hostile_text_gets_a_verdict(piece):
    text = piece * (500_000 // len(piece))

    assert content_floor.check(f"{text}\n{REFUSED}").refused


def test_the_floor_imports_nothing_that_reads_or_writes():
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in MODULES]
    imported = {
        module.split(".")[0]
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }

    allowed = "__future__ binascii collections dataclasses hashlib html itertools re typing"
    assert imported == {*allowed.split(), "ourvidz_serverless", "unicodedata"}


def test_the_document_has_the_measured_numbers():
    assert measure_content_floor.report() in DOCUMENT.read_text(encoding="utf-8")
