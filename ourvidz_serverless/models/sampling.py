"""From logits to tokens, each request by its own rules and its own chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ourvidz_serverless.models.grammar import Matcher

#: Tokens that are ranked before the whole vocabulary is.
CANDIDATES = 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a reply is drawn. A temperature of 0 is greedy, a `top_k` of 0 is off.

    Presence and frequency penalties count the reply's tokens, the repetition penalty also the
    prompt's; `stop` strings end the reply and are no part of it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        neutral = (0.0, 0.0, 1.0)
        return neutral != (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)


class Sampler:
    """One request's choice of tokens: its rules, its generator, what it has said."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], grammar: Matcher | None = None
    ) -> None:
        self.sampling = sampling
        self._grammar = grammar
        self._random = random.Random(sampling.seed)
        self._prompt = set(prompt)
        self._counts: dict[int, int] = {}

    def note(self, token: int) -> None:
        """Count a token that was chosen."""
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._grammar:
            self._grammar.note(token)

    def draw(self) -> float:
        """The next number of this request's own generator, from 0 to 1."""
        return self._random.random()

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties and grammar to one row of logits, in place."""
        if self.sampling.has_penalties:
            self._penalise(logits)
        if self._grammar:
            self._grammar.forbid(logits)

    def _penalise(self, logits: torch.Tensor) -> None:
        rules = self.sampling
        if rules.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._counts.keys()), device=logits.device)
            values, penalty = logits[seen], rules.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts:
            said = torch.tensor(list(self._counts), device=logits.device)
            times = torch.tensor(list(self._counts.values()), device=logits.device)
            logits[said] -= rules.presence_penalty + rules.frequency_penalty * times


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of logits (rows, vocabulary).

    A row's choice depends on its own logits and generator alone, so a seed repeats in any batch
    as far as the logits do.
    """
    logits = logits.float()
    for row, sampler in zip(logits, samplers, strict=True):
        sampler.adjust(row)
    tokens = logits.argmax(-1)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.sampling.is_greedy]
    if drawing:
        tokens[drawing] = _draw(logits[drawing], [samplers[row] for row in drawing])
    return tokens.tolist()


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """One token a row: the likeliest first, as far as top_k and top_p go, by inverse CDF."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    rules = [sampler.sampling for sampler in samplers]
    vocabulary = logits.shape[-1]
    top_k = column([rule.top_k or vocabulary for rule in rules])
    top_p = column([rule.top_p for rule in rules])
    chance = column([sampler.draw() for sampler in samplers])
    heated = logits / column([rule.temperature for rule in rules]).float()
    everything = heated.logsumexp(-1, keepdim=True)

    # Nearly always what may be drawn is among the first thousand, and to sort a whole vocabulary
    # takes longer than a small model takes to think.
    for width in (min(CANDIDATES, vocabulary), vocabulary):
        ranked, order = heated.topk(width)
        ranks = torch.arange(width, device=logits.device)
        probabilities = (ranked - everything).double().exp() * (ranks < top_k)
        upto = probabilities.cumsum(-1)
        mass = torch.where(top_k <= width, upto[:, -1:], 1.0)
        if ((top_k <= width) | (upto[:, -1:] >= top_p) & (top_k == vocabulary)).all():
            break
    # The likeliest token always stays, however small top_p is.
    kept = (upto - probabilities < top_p * mass) & (probabilities > 0) | (ranks == 0)
    upto = (probabilities * kept).cumsum(-1)
    picked = torch.searchsorted(upto, chance * upto[:, -1:], right=True)
    picked = torch.minimum(picked, kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, picked)[:, 0]
