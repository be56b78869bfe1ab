"""The text of a reply grows by complete characters, and ends before a stop string."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.models.chat.text_stream import TextStream
from ourvidz_serverless.models.chat.tokenizer import Thoughts
from tests.examples import examples
from tests.fakes.tiny_chat import tiny_tokenizer

TOKENIZER = tiny_tokenizer().backend_tokenizer


def streamed(text: str, stop: list[str]) -> list[str]:
    stream = TextStream(TOKENIZER.decode, stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()]


@given(st.text(st.sampled_from("aé下\U0001f600\ufffd"), max_size=9), st.integers(0, 9))
def test_the_pieces_of_a_text_add_up_to_what_transformers_decodes(text: str, num_cut: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: max(len(ids) - num_cut, 0)]
    stream = TextStream(TOKENIZER.decode)

    pieces = [stream.push(token) for token in ids]

    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)


def test_a_character_is_held_back_until_it_is_complete() -> None:
    assert streamed("下a", []) == ["", "", "下", "a", ""]


@examples(50)
@given(st.text(max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_has_complete_characters_up_to_the_first_stop_string(
    text: str, stop: list[str]
) -> None:
    text = text.replace("\ufffd", "")

    pieces = streamed(text, stop)

    # The stop string that ends first counts, not the one that begins first.
    found = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    _, end = min(found, default=(0, len(text)))
    assert "".join(pieces) == text[:end]
    assert all("\ufffd" not in piece for piece in pieces)


def test_letters_that_may_begin_a_stop_string_are_held_back() -> None:
    assert streamed("ab-abc", ["abc"]) == ["", "", "ab-", "", "", "", ""]
    assert streamed("ab", ["abc"]) == ["", "", "ab"]


# --- thoughts ---

THINK, END = -1, -2


def reply_with_thoughts(*tokens: int | str, is_open: bool = False, **options: Any) -> str:
    """The text of a reply; a string stands for its letters' tokens."""
    stream = TextStream(
        lambda ids: "".join(map(chr, ids)), thoughts=Thoughts(THINK, END, is_open), **options
    )
    ids = [
        token for each in tokens for token in ([each] if isinstance(each, int) else map(ord, each))
    ]
    return "".join(map(stream.push, ids)) + stream.finish()


def test_thoughts_and_the_white_space_after_them_are_no_part_of_a_reply() -> None:
    assert reply_with_thoughts(THINK, "\nhm\n", END, "\n\nWater. ") == "Water. "


def test_a_reply_may_begin_inside_its_thoughts() -> None:
    assert reply_with_thoughts("hm", END, "Water.", is_open=True) == "Water."


def test_a_reply_that_ends_inside_its_thoughts_has_no_text() -> None:
    assert reply_with_thoughts(THINK, "hm") == ""


def test_a_stop_text_does_not_count_in_thoughts() -> None:
    assert reply_with_thoughts(THINK, "a.b", END, "c.d", stop=["."]) == "c"
