"""Weighted prompts: both syntaxes, and everything that only looks like one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.weights import parse


def read(text: str) -> list[tuple[str, float]]:
    return [(fragment.text, fragment.weight) for fragment in parse(text)]


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("(sharp:1.3)", [("sharp", 1.3)]),
        ("(sharp)1.3", [("sharp", 1.3)]),
        ("(sharp)+", [("sharp", 1.1)]),
        ("(sharp)--", [("sharp", 0.81)]),
        ("sharp++", [("sharp", 1.21)]),
        ("a (red:1.5) circle", [("a ", 1), ("red", 1.5), (" circle", 1)]),
        ("(masterpiece:1.3), (sharp:1.2)", [("masterpiece", 1.3), (", ", 1), ("sharp", 1.2)]),
        ("(red (very:1.2) big)1.5", [("red ", 1.5), ("very", 1.8), (" big", 1.5)]),
        ("(blur:0)", [("blur", 0.0)]),
    ],
)
def test_both_syntaxes_give_words_their_weight(
    text: str, fragments: list[tuple[str, float]]
) -> None:
    assert read(text) == fragments


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red circle", "a red circle"),
        ("a (red) circle", "a red circle"),
        (r"\(red\)", "(red)"),
        ("smile :) and (: ((", "smile :) and (: (("),
        ("a well-known cat, C-3", "a well-known cat, C-3"),
        ("(born 1990) in 2 days", "born 1990 in 2 days"),
        ("", ""),
    ],
)
def test_all_else_keeps_its_words_and_a_weight_of_one(text: str, words: str) -> None:
    assert read(text) == [(words, 1.0)]


def test_a_weight_beyond_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="Weights should be less than or equal to 3"):
        parse("(sharp:9)")


def test_parentheses_beyond_reason_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 deep"):
        parse("(" * 50)


@given(st.text(alphabet="ab :().+-123\\,", max_size=60))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    try:
        fragments = parse(text)
    except ValueError as refused:
        assert "should be" in str(refused)
    else:
        assert fragments
        assert all(0 <= fragment.weight <= 3 for fragment in fragments)


@given(st.text(alphabet="abc de,.", max_size=60))
def test_plain_text_is_left_as_it_is(text: str) -> None:
    assert "".join(fragment.text for fragment in parse(text)) == text
