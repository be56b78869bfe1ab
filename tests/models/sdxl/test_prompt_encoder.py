"""The prompt encoder against Compel's own on the pocket model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compel import CompelForSDXL
from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.sdxl.prompt_encoder import MAX_ROWS, Encoder, PromptEncoder, chunks
from ourvidz_serverless.models.sdxl.prompt_weighting import (
    MAX_WEIGHTED,
    Fragment,
    Prompt,
    parse,
    plain,
)
from tests.examples import examples

#: fp32 sums in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}

LONG = "a red sun, over a blue sea. " * 12


@pytest.fixture(params=["first", "second"])
def encoder(request: pytest.FixtureRequest, sdxl: Any) -> Encoder:
    pipe = sdxl.networks.pipe
    if request.param == "first":
        return Encoder(pipe.tokenizer, pipe.text_encoder)
    return Encoder(pipe.tokenizer_2, pipe.text_encoder_2)


def compels(encoder: Encoder, prompt: Prompt) -> torch.Tensor:
    provider = EmbeddingsProvider(
        encoder.tokenizer,
        encoder.model,
        truncate=False,
        split_long_text_mode=SplitLongTextMode.SENTENCES,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    )
    with torch.inference_mode():
        return provider.get_embeddings_for_weighted_prompt_fragments(
            [[fragment.text for fragment in prompt]], [[fragment.weight for fragment in prompt]]
        )


# --- long prompts ---

TEXTS = {
    "one chunk": "a red sun",
    "sentences": LONG,
    "phrases": "a red sun; a blue sea, a green tree: " * 12,
    "words": "xylophone " * 60,
    "no boundary": "x" * 400,
    "a sentence, then phrases": "a sun. " + "blue, " * 100,
    "exactly full": "red " * 75,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_prompt_is_read_as_compel_reads_it(encoder: Encoder, text: str) -> None:
    hidden, _ = encoder.read(plain(text))

    torch.testing.assert_close(hidden, compels(encoder, plain(text)), **ROUNDING)


def test_a_chunk_never_ends_within_a_word(sdxl: Any) -> None:
    tokenizer = sdxl.networks.pipe.tokenizer
    ids = tokenizer("xylophone " * 60, add_special_tokens=False).input_ids

    parts = chunks(tokenizer, ids)

    assert [each for part in parts for each in part] == ids
    assert len(parts) > 4
    for part in parts:
        assert len(part) <= 75
        assert tokenizer.convert_ids_to_tokens(part[-1]).endswith("</w>")


def test_a_chunk_ends_with_a_sentence_where_it_can(sdxl: Any) -> None:
    tokenizer = sdxl.networks.pipe.tokenizer
    parts = chunks(tokenizer, tokenizer(LONG, add_special_tokens=False).input_ids)

    assert len(parts) > 1
    assert all(tokenizer.decode(part).rstrip().endswith(".") for part in parts)


def test_the_pooled_embedding_is_diffusers_for_a_long_prompt_too(sdxl: Any) -> None:
    ours = PromptEncoder(sdxl.networks.pipe).encode(plain(LONG))
    _, _, pooled, _ = sdxl.networks.pipe.encode_prompt(LONG, do_classifier_free_guidance=False)

    torch.testing.assert_close(ours.pooled, pooled, **ROUNDING)


@pytest.mark.parametrize("text", ["(red:{}) " + LONG, "xylophone " * 30 + "(red:{})"])
def test_a_weight_that_is_nearly_one_changes_nearly_nothing(sdxl: Any, text: str) -> None:
    encoder = PromptEncoder(sdxl.networks.pipe)

    one, nearly = (encoder.encode(parse(text.format(weight))) for weight in (1, 1.0001))

    torch.testing.assert_close(nearly.hidden, one.hidden, rtol=1e-3, atol=1e-3)


# --- weights ---

WORDS = ["red", "blue", "sun", "sea", ",", ".", ";", "xylophone"]
FRAGMENTS = st.lists(
    st.builds(
        Fragment,
        st.lists(
            st.sampled_from(["red", "blue", "sun", "sea", ",", ".", ";", "xylophone"]),
            min_size=1,
        )
        .map(" ".join)
        .map(lambda text: f" {text} "),
        st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0, 1.1, 1.5, 3.0]),
    ),
    min_size=1,
    max_size=12,
).map(tuple)


@examples(25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=FRAGMENTS)
def test_weights_act_as_compels_do(encoder: Encoder, prompt: Prompt) -> None:
    hidden, _ = encoder.read(prompt)

    torch.testing.assert_close(hidden, compels(encoder, prompt), **ROUNDING)


@pytest.mark.parametrize(
    "text",
    [
        "a red sun",
        "a (red)1.4 sun",
        "a (red)0.3 (blue)0.6 sun++",
        "(red sun)0.5 " + LONG,
    ],
)
def test_a_weighted_text_has_compels_embedding(sdxl: Any, text: str) -> None:
    ours = PromptEncoder(sdxl.networks.pipe).encode(parse(text))

    with torch.inference_mode():
        theirs = CompelForSDXL(sdxl.networks.pipe)(text)

    torch.testing.assert_close(ours.hidden, theirs.embeds, **ROUNDING)


def test_the_padding_token_as_a_word_may_have_a_weight(sdxl: Any) -> None:
    encoder = PromptEncoder(sdxl.networks.pipe)

    with_mark, without = (encoder.encode(parse(f"a sun (!:{w})")).hidden for w in (0.5, 1))

    assert torch.isfinite(with_mark).all()
    assert not torch.equal(with_mark, without)


def test_blank_space_of_a_low_weight_changes_nothing(encoder: Encoder) -> None:
    prompt = parse("((red:0.8) (sun:0.7):0.9)")
    red, space, sun = prompt
    assert space == Fragment(" ", 0.9)

    assert torch.equal(encoder.read(prompt)[0], encoder.read((red, sun))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weighs_as_full_precision_does(encoder: Encoder, dtype: torch.dtype) -> None:
    half = Encoder(encoder.tokenizer, copy.deepcopy(encoder.model).to(dtype))
    prompt = parse("a (red:0) sun, [blue] (green:0) (sea:3) " + LONG)

    found, expected = half.read(prompt)[0], encoder.read(prompt)[0]

    assert found.dtype == dtype
    # bfloat16 rounds by 0.4 % at each layer.
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


# --- cost ---


def rows_read(encoder: Encoder, prompt: Prompt) -> list[int]:
    """How many rows each forward of an encoder had."""
    rows: list[int] = []
    hook = encoder.model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    try:
        encoder.read(prompt)
    finally:
        hook.remove()
    return rows


@pytest.mark.parametrize("rest", ["", "red " * 600], ids=["short", "long"])
def test_a_lowered_word_costs_one_row_however_long_the_prompt(encoder: Encoder, rest: str) -> None:
    prompt = parse("a-- , " * 40 + rest)
    unweighted = plain("".join(part.text for part in prompt))

    # And one for the empty prompt, from which the weights are measured.
    assert sum(rows_read(encoder, prompt)) == sum(rows_read(encoder, unweighted)) + 40 + 1


def test_the_most_weights_that_a_prompt_may_have_take_a_bounded_number_of_forwards(
    encoder: Encoder,
) -> None:
    rows = rows_read(encoder, parse("a-- , " * MAX_WEIGHTED))

    assert max(rows) <= MAX_ROWS
    assert len(rows) <= MAX_WEIGHTED / MAX_ROWS + 3


def test_a_stopped_job_reads_no_further_row(encoder: Encoder) -> None:
    forwards: list[int] = []
    hook = encoder.model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def check() -> None:
        if len(forwards) == 3:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        encoder.read(parse("a-- , " * MAX_WEIGHTED), check)
    hook.remove()

    assert len(forwards) == 3
