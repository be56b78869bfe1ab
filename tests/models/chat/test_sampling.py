"""Tokens are sampled by the parameters of their own request."""

from typing import Any

import pytest
import torch

from ourvidz_serverless.models.chat import sampling
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler, sample
from tests.fakes.tiny_chat import (
    generate_text,
    tiny_chat_model,
    tiny_network,
)


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return tiny_chat_model()


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


def penalised(reply: list[int], prompt: list[int], **params: float) -> list[float]:
    sampler = Sampler(SamplingParams(max_tokens=9, **params), prompt)
    for token in reply:
        sampler.accept(token)
    logits = torch.tensor([1.0, 1.0, -1.0])
    sampler.change_logits(logits)
    return logits.tolist()


def test_presence_and_frequency_count_the_reply_and_repetition_counts_the_prompt_too() -> None:
    assert penalised([0, 0, 1], [2], presence_penalty=0.5) == [0.5, 0.5, -1]
    assert penalised([0, 0, 1], [2], frequency_penalty=0.25) == [0.5, 0.75, -1]
    assert penalised([0], [2], repetition_penalty=2.0) == [0.5, 1, -2]
