"""Tokens are sampled by the parameters of their own request."""

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from ourvidz_serverless.models.chat import sampling
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.chat.sampling import (
    Sampler,
    change_logits,
    find_top_p_threshold,
    sample,
)
from tests.fakes.fake_cuda_graph import OperationLog
from tests.fakes.tiny_chat import (
    generate_text,
    tiny_chat_model,
    tiny_network,
)


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return tiny_chat_model()


#: Parameters of requests in one batch.
MIXED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "temperature": 0.8},
    {"temperature": 0},
    {"top_p": 0.9},
    {"temperature": 0, "frequency_penalty": 0.5, "logit_bias": {5: 1.5}},
    {"top_k": 20, "min_p": 0.02},
    {},
    {"min_p": 0.3, "presence_penalty": 1.0},
    {"top_p": 0.2, "temperature": 2.0},
]


def samplers(params: list[dict[str, Any]]) -> list[Sampler]:
    """Samplers of requests that have written three tokens."""
    made = [
        Sampler(SamplingParams(max_tokens=9, **{"seed": i, **each}), [1, 2])
        for i, each in enumerate(params)
    ]
    for sampler in made:
        for token in (1, 3, 3):
            sampler.accept(token)
    return made


def chosen(logits: list[float], **params: Any) -> list[int]:
    prompt = params.pop("prompt", [])
    samplers = [
        Sampler(SamplingParams(max_tokens=9, **{"seed": seed, **params}), prompt)
        for seed in range(400)
    ]
    return sample(torch.tensor([logits] * 400), samplers)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    tokens = chosen(torch.tensor([0.5, 0.1, 0.4]).log().tolist())

    shares = [tokens.count(token) / 400 for token in range(3)]
    assert shares == pytest.approx([0.5, 0.1, 0.4], abs=0.08)


@pytest.mark.parametrize(
    ("params", "drawn"),
    [
        ({"top_k": 2}, {0, 2}),
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 0.4}, {0}),
        ({"top_k": 2, "top_p": 0.55}, {0}),
        ({"temperature": 0}, {0}),
    ],
)
def test_top_k_and_top_p_allow_the_likeliest_tokens_only(
    params: dict[str, Any], drawn: set[int]
) -> None:
    assert set(chosen(torch.tensor([0.5, 0.1, 0.4]).log().tolist(), **params)) == drawn


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-39, 1e-45, 5e-324])
def test_very_low_temperatures_draw_the_likeliest_token_as_transformers_does(
    model: ChatModel, temperature: float
) -> None:
    ids = model.tokenizer.encode("once upon")
    theirs = tiny_network().generate(
        # Below this temperature the quotients of transformers are not finite.
        torch.tensor([ids]),
        max_new_tokens=12,
        do_sample=True,
        temperature=max(temperature, 1e-30),
        top_k=0,
    )

    reply = generate_text(model, "once upon", temperature=temperature, seed=1)

    assert reply == model.tokenizer.decode(theirs[0, len(ids) :].tolist())


def test_equally_likely_tokens_are_both_drawn_at_the_lowest_temperature() -> None:
    assert set(chosen([-3.0, 2.0, 2.0], temperature=5e-324)) == {1, 2}


def test_a_draw_does_not_depend_on_the_number_of_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    params = [{"top_p": p, "top_k": k} for p in (0.3, 1.0) for k in (0, 5, 100)]

    def drawn() -> list[list[int]]:
        samplers = [Sampler(SamplingParams(max_tokens=9, seed=1, **each), []) for each in params]
        return [sample(logits, samplers) for _ in range(20)]

    expected = drawn()
    monkeypatch.setattr(sampling, "CANDIDATES", 20)

    assert drawn() == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 30.0])
def test_the_threshold_of_top_p_is_that_of_a_sorted_vocabulary(top_p: float, spread: float) -> None:
    logits = spread * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled[:, 7] = -torch.inf
    probabilities = scaled.softmax(-1)
    ranked, order = probabilities.double().sort(descending=True)
    # The first tokens that have the share together, and all that are as likely as the last of them.
    needed = (ranked.cumsum(-1) - ranked < top_p).sum(-1, keepdim=True)
    expected = scaled.gather(-1, order.gather(-1, needed - 1))

    found = find_top_p_threshold(scaled, probabilities, torch.full((4, 1), top_p).double())

    assert torch.equal(found, expected)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_flat_logits_are_drawn_evenly(top_p: float) -> None:
    tokens = chosen([0.0] * 3000, top_p=top_p)

    assert len(set(tokens)) > 350
    assert sum(token < 1500 for token in tokens) == pytest.approx(200, abs=40)


def test_no_token_without_probability_is_drawn_from_a_long_row() -> None:
    allowed = {3, 511, 512, 2999}
    logits = [0.0 if token in allowed else -math.inf for token in range(3000)]

    assert set(chosen(logits)) == allowed


@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_a_rows_token_does_not_depend_on_the_rows_beside_it(spread: float) -> None:
    logits = spread * torch.randn(len(MIXED), 3000, generator=torch.Generator().manual_seed(0))

    alone = [sample(logits[[row]], [each])[0] for row, each in enumerate(samplers(MIXED))]

    assert sample(logits.clone(), samplers(MIXED)) == alone


def test_the_work_for_a_token_does_not_grow_with_the_rows() -> None:
    def operations(rows: int) -> list[str]:
        logits = 0.1 * torch.randn(rows, 3000, generator=torch.Generator().manual_seed(0))
        with OperationLog() as operations:
            sample(logits, samplers(MIXED * (rows // len(MIXED))))
        return [str(done[0]) for done in operations.done]

    assert operations(32) == operations(8)


def changed(reply: list[int], prompt: list[int], **params: Any) -> list[float]:
    """The logits 1, 1 and -1 as a sampler changes them."""
    sampler = Sampler(SamplingParams(max_tokens=9, **params), prompt)
    for token in reply:
        sampler.accept(token)
    logits = torch.tensor([[1.0, 1.0, -1.0]])
    change_logits(logits, [sampler])
    row: list[float] = logits[0].tolist()
    return row


def test_presence_and_frequency_count_the_reply_and_repetition_counts_the_prompt_too() -> None:
    assert changed([0, 0, 1], [2], presence_penalty=0.5) == [0.5, 0.5, -1]
    assert changed([0, 0, 1], [2], frequency_penalty=0.25) == [0.5, 0.75, -1]
    assert changed([0], [2], repetition_penalty=2.0) == [0.5, 1, -2]


def test_a_bias_is_added_to_the_logit_of_its_token_before_the_penalties() -> None:
    assert changed([], [0], logit_bias={0: 0.5, 2: -2}) == [1.5, 1, -3]
    assert changed([0], [2], logit_bias={0: 1, 2: 3}, repetition_penalty=2.0) == [1, 1, 1]


def test_a_bias_of_100_draws_its_token_and_one_of_minus_100_never_does() -> None:
    assert set(chosen([0.0, 1.0, 2.0], logit_bias={0: 100})) == {0}
    assert set(chosen([0.0, 1.0, 2.0], logit_bias={1: -100})) == {0, 2}


@pytest.mark.parametrize("vocabulary", [300, 3000])
@pytest.mark.parametrize(
    "params",
    [
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.2, "temperature": 1.5},
        {"min_p": 0.3, "top_k": 40},
        {"min_p": 0.05, "top_p": 0.7},
    ],
)
def test_the_same_tokens_are_allowed_as_by_transformers(
    params: dict[str, Any], vocabulary: int
) -> None:
    logits = 0.5 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(do_sample=True, **{"top_k": 0, "temperature": 1.0, **params})
    processors = tiny_network()._get_logits_processor(config, logits_processor=[])
    theirs = processors(torch.zeros(1, 1, dtype=torch.long), logits)[0].isfinite().nonzero()[:, 0]

    ours = [sample(logits.clone(), samplers([{**params, "seed": seed}]))[0] for seed in range(60)]

    assert set(ours) <= set(theirs.tolist())
    assert len(set(ours)) > min(len(theirs), 30) / 2
