"""Weighted prompts: A1111's and Compel's own cases, and everything that only looks like a weight.

A1111's cases are the doctests of `parse_prompt_attention`, Compel's those of its
`test_prompt_parser.py`; Compel's own parser is asked, too.
"""

import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from compel.prompt_parser import PromptParser
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ourvidz_serverless.models.sdxl import prompt_weighting
from ourvidz_serverless.models.sdxl.prompt_weighting import MAX_WEIGHTED, parse
from tests.fakes.regex_steps import CountedPattern
from tests.files import ROOT

CALLING = ROOT / "docs/calling.md"


def read(text: str) -> list[tuple[str, float]]:
    return [(fragment.text, fragment.weight) for fragment in parse(text)]


# --- oracles ---


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_a1111s_doctests_hold(text: str, fragments: list[tuple[str, float]]) -> None:
    assert read(text) == fragments


COMPELS = [
    "",
    "fire flames",
    "fire, flames",
    "fire, flames , fire",
    "cat hot-dog eating",
    "Dalí",
    "(flames)0.5",
    "(flames).attend(0.5)",
    "flames.attend(0.5)",
    '"flames".attend(0.5)',
    "(fire flames)0.5",
    "(fire flames).attend(0.5)",
    "(flames)+",
    "flames+",
    '"flames"+',
    "flames.attend(+)",
    "(flames).attend(+)",
    '"flames".attend(+)',
    "(flames)-",
    "flames-",
    '"flames"-',
    "fire (flames)0.5",
    "fire flames.attend(0.5)",
    "fire (flames).attend(0.5)",
    'fire "flames".attend(0.5)',
    "(flames)++",
    "(flames)--",
    "(flowers)--- flames+++",
    "(pretty flowers)+",
    "(pretty flowers)+, the flames are too hot",
    "(a text.)0.7. (a second text.)0.8",
    '"a text."0.7. "a second text."0.8',
    "fire flames++",
    "fire flames--",
    "flowers fire++ flames",
    "flowers fire-- flames",
    "a test prompt",
    "a badly formed +test prompt",
    "fire (flames (trees)1.5)2.0",
    r"mountain \(man\)",
    r"mountain (\(man\))+",
    r"mountain (\(man\))1.1",
    r"hairy (mountain (\(man\))+)+",
    'hairy ("mountain, man")+',
    r"(mountain, \"man w\(ith a (beard)2.0)+ hairy",
    "(red dress)1.3.",
    "red,blue++",
    "middle age,fantasy++ style",
]


@pytest.mark.parametrize("text", COMPELS)
def test_compels_weights_are_those_that_its_own_parser_reads(text: str) -> None:
    (prompt,) = PromptParser().parse_conjunction(text).prompts
    expected = "".join(_spelled(part.text, part.weight) for part in prompt.children)

    assert "".join(_spelled(*fragment) for fragment in read(text)) == expected


def _spelled(text: str, weight: float) -> str:
    """The characters that are no spaces, each with its weight: Compel moves spaces about.

    It also drops quotes from quotations, and keeps some of its own escapes.
    """
    characters = _weighted_characters([(text, weight)])
    return "".join(f"{character}{round(weight, 4)} " for character, weight in characters)


def _weighted_characters(parts: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Each character that is no space, quote or backslash, with its weight."""
    return [
        (character, weight) for text, weight in parts for character in re.sub(r'[\s\\"]', "", text)
    ]


@pytest.mark.parametrize(
    ("text", "ours", "compels"),
    [
        ("fire (flames)", [("fire ", 1.0), ("flames", 1.1)], "fire flames"),
        ("a badly (formed", [("a badly ", 1.0), ("formed", 1.1)], "a badly (formed"),
        ("(happy camper:0.3)", [("happy camper", 0.3)], "happy camper:0 . 3"),
    ],
    ids=["plain parentheses", "an open parenthesis", "a number inside"],
)
def test_what_compel_reads_as_text_is_read_as_in_a1111(
    text: str, ours: list[tuple[str, float]], compels: str
) -> None:
    (prompt,) = PromptParser().parse_conjunction(text).prompts

    assert [(part.text, part.weight) for part in prompt.children] == [(compels, 1.0)]
    assert read(text) == ours


def test_a_hyphen_after_parentheses_is_not_a_weight_unlike_in_compel() -> None:
    text = "(semi)-transparent"
    (prompt,) = PromptParser().parse_conjunction(text).prompts

    assert prompt.children[0].weight == 0.9
    assert read(text) == [("semi", 1.1), ("-transparent", 1.0)]


# --- both languages at once ---


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("(sharp:1.3)", [("sharp", 1.3)]),
        ("(sharp : 1.3 )", [("sharp ", 1.3)]),
        ("(sharp:+.5)", [("sharp", 0.5)]),
        ("[sharp]", [("sharp", 0.9091)]),
        ("a (red:1.5) sun", [("a ", 1), ("red", 1.5), (" sun", 1)]),
        ("(masterpiece:1.3), (sharp:1.2)", [("masterpiece", 1.3), (", ", 1), ("sharp", 1.2)]),
        ("(red (very:1.2) big)1.5", [("red ", 1.5), ("very", 1.8), (" big", 1.5)]),
        ("((red:0.8) (sun:0.7):0.9)", [("red", 0.72), (" ", 0.9), ("sun", 0.63)]),
        ("(2girls:1.2)", [("2girls", 1.2)]),
        ("(score_9:2), (f1.4:1)", [("score_9", 2.0), (", f1.4", 1)]),
        ("(the year 1920:1.2)", [("the year 1920", 1.2)]),
        ("(blur:0)", [("blur", 0.0)]),
        ("[(sharp)]", [("sharp", 1.0)]),
        ("(very blue++)1.1", [("very ", 1.1), ("blue", 1.331)]),
    ],
)
def test_both_languages_give_words_their_weight(
    text: str, fragments: list[tuple[str, float]]
) -> None:
    assert read(text) == fragments


@pytest.mark.parametrize(
    "text", ["(time 10:30)", "(at 10:30:02)", "(aspect 16:9)", "(film 4:3)", "(T10:30)"]
)
def test_a_time_or_a_ratio_is_not_a_weight(text: str) -> None:
    assert read(text) == [(text[1:-1], 1.1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red sun", "a red sun"),
        (r"\(red\)", "(red)"),
        (r"C\+\+", "C++"),
        (r"a \:3", "a :3"),
        ("smile :) and :3)", "smile :) and :3)"),
        ('a sign that says "stop" in red', 'a sign that says "stop" in red'),
        ("a well-known cat, C-3, 1+1=2", "a well-known cat, C-3, 1+1=2"),
        ("a -- b <- c, x+-", "a -- b <- c, x+-"),
        ("", ""),
    ],
)
def test_text_without_weight_syntax_keeps_its_characters_and_a_weight_of_one(
    text: str, words: str
) -> None:
    assert read(text) == [(words, 1.0)]


def test_words_of_one_weight_are_one_fragment_whatever_space_is_between() -> None:
    assert read("(red:0.8) (sun:0.8)") == [("red sun", 0.8)]


ROWS = re.findall(r"^\| (`.*`) \| (`.* × .*) \| .* \|$", CALLING.read_text(), re.MULTILINE)
EXAMPLES = [(text, row) for texts, row in ROWS for text in re.findall("`([^`]+)`", texts)]


@pytest.mark.parametrize(("text", "row"), EXAMPLES)
def test_the_calling_guides_weighted_prompts_are_read_as_it_says(text: str, row: str) -> None:
    documented = re.findall(r"`([^`]+)` × ([0-9.]+)", row)

    spoken = [(words.strip(), weight) for words, weight in read(text) if words.strip()]
    assert spoken == [(words, float(weight)) for words, weight in documented]


def test_the_calling_guide_has_examples_of_weighted_prompts() -> None:
    assert len(EXAMPLES) > 15


# --- bounds ---


@pytest.mark.parametrize(
    "text",
    [
        "(sharp:9)",
        "(sharp)9",
        "sharp" + "+" * 8000,
        "(sharp)" + "+" * 8000,
        f"(sharp:{'9' * 400})",
        f"((sharp:0):{'9' * 400})",
        "((sharp:2):2)",
        "(" * 16 + "sharp",
    ],
    ids=lambda text: text[:12],
)
def test_a_weight_above_three_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Weights should be less than or equal to 3"):
        parse(text)


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="Weights should be greater than or equal to 0"):
        parse("(sharp:-1)")


def test_any_number_of_minus_signs_is_a_weight() -> None:
    assert read("sharp" + "-" * 8000) == [("sharp", 0.0)]


@pytest.mark.parametrize("bracket", ["(", "["])
def test_too_many_levels_of_parentheses_are_refused(bracket: str) -> None:
    with pytest.raises(ValueError, match="at most 16 deep"):
        parse(bracket * 17)


def test_a_text_has_a_bounded_number_of_weighted_parts() -> None:
    assert len(parse("a-- , " * MAX_WEIGHTED)) == 2 * MAX_WEIGHTED

    with pytest.raises(ValueError, match="Weighted parts should be at most 256"):
        parse("a-- , " * (MAX_WEIGHTED + 1))


def test_a_product_of_three_is_three_whatever_floats_make_of_it() -> None:
    assert 1.1 * 1.5 * 1.81818182 > 3

    assert read("(((sharp:1.81818182):1.5))") == [("sharp", 3.0)]


# --- properties ---

#: What a group is written in, and what its words are multiplied by.
GROUPS = {
    "({})": 1.1,
    "[{}]": 1 / 1.1,
    "({}:1.2)": 1.2,
    "({}: 0.5 )": 0.5,
    "({})1.2": 1.2,
    "({})--": 0.81,
    "({}).attend(0.9)": 0.9,
}

#: A text, and its characters with the weights that they should have.
TREES = st.recursive(
    st.sampled_from([("red", [("red", 1.0)]), ("blue++", [("blue", 1.21)])]),
    lambda inner: st.builds(
        lambda group, parts: (
            group.format(" ".join(text for text, _ in parts)),
            [(word, weight * GROUPS[group]) for _, read in parts for word, weight in read],
        ),
        st.sampled_from(list(GROUPS)),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


@given(st.lists(TREES, min_size=1, max_size=3))
def test_nested_groups_of_both_languages_multiply(
    trees: list[tuple[str, list[tuple[str, float]]]],
) -> None:
    expected = [part for _, parts in trees for part in parts]
    assume(all(weight <= 3 for _, weight in expected))

    read_as = read(", ".join(text for text, _ in trees))

    wanted = _weighted_characters(expected)
    found = [part for part in _weighted_characters(read_as) if part[0] != ","]
    assert [character for character, _ in found] == [character for character, _ in wanted]
    # A weight has four decimals, and the floats of half of the fifth differ.
    assert [weight for _, weight in found] == pytest.approx(
        [weight for _, weight in wanted], abs=0.51e-4
    )


SYNTAX = r"""a a-- a++b + - -- ( ) () (a) (a)1 [ ] [(a]) : :1) :9 .5 . , \ " \" "a" "a"+ .attend("""
PARTS = SYNTAX.split()

#: Texts made of what the language is made of, many times over.
HOSTILE = st.lists(
    st.tuples(
        st.sampled_from([*PARTS, " ", ": "]),
        st.integers(1, 60),
    ),
    max_size=6,
).map(lambda parts: "".join(part * times for part, times in parts))


@given(st.text(alphabet='ab :().+-123\\,[]"', max_size=60) | HOSTILE)
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        fragments = parse(text)
    except ValueError as refused:
        assert "should be" in str(refused)
    else:
        assert fragments
        assert all(0 <= fragment.weight <= 3 for fragment in fragments)


@given(st.text(alphabet="abc de,.", max_size=60))
def test_text_without_syntax_is_unchanged(text: str) -> None:
    assert "".join(fragment.text for fragment in parse(text)) == text


@given(st.text(alphabet=string.punctuation + "a1 ", max_size=60))
def test_a_text_with_every_mark_escaped_is_unchanged(text: str) -> None:
    escaped = re.sub(r'([()\[\]\\"+\-.,:=])', r"\\\1", text)

    assert read(escaped) == [(text, 1.0)]


@example("(:9:1)")
@given(HOSTILE)
def test_reading_takes_steps_in_proportion_to_the_text(text: str) -> None:
    assert steps_of(text) < 200 + 100 * len(text)


@pytest.mark.parametrize("part", ["-", "+a", "a--", "\\", '"', '\\"', "(a)", "[(a])", ": ", "()"])
def test_a_text_twice_as_long_takes_twice_as_many_steps(part: str) -> None:
    once, twice = (steps_of("a" + part * times + "b") for times in (200, 400))

    assert twice < 2.2 * once


def steps_of(text: str) -> int:
    """How many steps reading takes: of the patterns, and lines of the program."""
    with counted_steps() as steps, suppress(ValueError):
        parse(text)
    return steps()


@contextmanager
def counted_steps() -> Iterator[Callable[[], int]]:
    patterns = {
        name: CountedPattern(value)
        for name, value in vars(prompt_weighting).items()
        if isinstance(value, re.Pattern)
    }
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != prompt_weighting.__file__:
            return None
        lines += event == "line"
        return trace

    with pytest.MonkeyPatch.context() as patch:
        for name, pattern in patterns.items():
            patch.setattr(prompt_weighting, name, pattern)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            yield lambda: lines + sum(pattern.steps for pattern in patterns.values())
        finally:
            sys.settrace(before)
