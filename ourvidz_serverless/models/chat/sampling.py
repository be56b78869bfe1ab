"""From logits to tokens, each request by its own rules and its own chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ourvidz_serverless.models.chat.grammar import Matcher
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import select_rows, to_device_async

#: Tokens that are ranked before the whole vocabulary is.
CANDIDATES = 1024

#: Stands for a token that is not among them.
BEYOND = -1


class Sampler:
    """One request's choice of tokens: its rules, its generator, what it has said."""

    def __init__(
        self, sampling: SamplingParams, prompt: Sequence[int], grammar: Matcher | None = None
    ) -> None:
        self.sampling = sampling
        self._grammar = grammar
        self._random = random.Random(sampling.seed)
        self._chance: float | None = None
        self._prompt = list(set(prompt))
        # The reply's tokens, those that are not counted on the device yet, and the counts there.
        self._said: list[int] = []
        self._fresh: list[int] = []
        self._times: torch.Tensor | None = None
        self._is_seen: torch.Tensor | None = None

    def note(self, token: int) -> None:
        """Count a token that was chosen. Raises JobError where its grammar cannot go on."""
        self._chance = None
        if self.sampling.has_penalties:
            self._said.append(token)
            self._fresh.append(token)
        if self._grammar:
            self._grammar.note(token)

    def restart(self) -> None:
        """Count all tokens anew: an out-of-memory may have left any part of the counts behind."""
        self._fresh = list(self._said)
        self._times = self._is_seen = None

    def draw(self) -> Draw:
        """The rules of the next token, with the next number of this request's own generator.

        The same number until the token is noted: what ran out of memory is drawn once more.
        """
        rules = self.sampling
        if self._chance is None:
            self._chance = self._random.random()
        return Draw(rules.temperature, rules.top_k, rules.top_p, self._chance)

    @property
    def adjusts(self) -> bool:
        return self.sampling.has_penalties or self._grammar is not None

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply penalties and grammar to one row of logits, in place."""
        if self.sampling.has_penalties:
            self._penalise(logits)
        if self._grammar:
            self._grammar.forbid(logits)

    def _penalise(self, logits: torch.Tensor) -> None:
        # Kept where the logits are: a reply's tokens are not sent again with each new one.
        if self._times is None or self._is_seen is None:
            self._times = torch.zeros_like(logits)
            self._is_seen = torch.zeros_like(logits, dtype=torch.bool)
            self._is_seen.index_fill_(
                0, to_device_async(self._prompt, logits.device, torch.long), True
            )
        if self._fresh:
            fresh, self._fresh = to_device_async(self._fresh, logits.device), []
            self._is_seen.index_fill_(0, fresh, True)
            self._times.index_add_(0, fresh, torch.ones_like(fresh, dtype=logits.dtype))
        rules, times = self.sampling, self._times
        if (penalty := rules.repetition_penalty) != 1:
            repelled = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._is_seen, repelled, logits))
        penalties = rules.presence_penalty + rules.frequency_penalty * times
        logits.sub_(torch.where(times > 0, penalties, 0))


class Draw(NamedTuple):
    """How one token is drawn; `chance` is from 0 to 1."""

    temperature: float
    top_k: int
    top_p: float
    chance: float

    def is_among(self, width: int, vocabulary: int) -> bool:
        """Whether what may be drawn can be among the likeliest `width` tokens."""
        top_k = self.top_k or vocabulary
        return top_k <= width or (top_k >= vocabulary and self.top_p < 1)


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of logits (rows, vocabulary).

    A row's choice depends on its own logits and generator alone, so a seed repeats in any batch
    as far as the logits do. The host waits for the device once, for the tokens.
    """
    logits = logits.float()
    for row, sampler in enumerate(samplers):
        if sampler.adjusts:
            sampler.adjust(logits[row])
    vocabulary = logits.shape[-1]
    width = min(CANDIDATES, vocabulary)
    draws = {i: each.draw() for i, each in enumerate(samplers) if not each.sampling.is_greedy}
    greedy = [row for row in range(len(samplers)) if row not in draws]
    # Nearly always what may be drawn is among the first thousand, and to sort a whole vocabulary
    # takes longer than a small model takes to think.
    narrow = [row for row, each in draws.items() if each.is_among(width, vocabulary)]
    wide = [row for row in draws if row not in narrow]
    found = [select_rows(logits, greedy).argmax(-1)] if greedy else []
    for rows, upto in ((narrow, width), (wide, vocabulary)):
        if rows:
            found.append(_draw(select_rows(logits, rows), [draws[row] for row in rows], upto))
    tokens = dict(zip([*greedy, *narrow, *wide], torch.cat(found).tolist(), strict=True))
    if beyond := [row for row, token in tokens.items() if token == BEYOND]:
        again = _draw(select_rows(logits, beyond), [draws[row] for row in beyond], vocabulary)
        tokens.update(zip(beyond, again.tolist(), strict=True))
    return [tokens[row] for row in range(len(samplers))]


def _draw(logits: torch.Tensor, draws: Sequence[Draw], width: int) -> torch.Tensor:
    """One token a row: the likeliest first, as far as top_k and top_p go, by inverse CDF.

    Of the likeliest `width` only, and BEYOND where that may be too few.
    """
    vocabulary = logits.shape[-1]
    rules = to_device_async([each[:] for each in draws], logits.device, torch.float64)
    temperature, top_k, top_p, chance = rules.split(1, dim=-1)
    top_k = torch.where(top_k == 0, vocabulary, top_k.clamp(max=vocabulary))
    # Below the likeliest token, so that no quotient overflows but towards a probability of 0.
    below = logits - logits.amax(-1, keepdim=True)
    heated = below / temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
    everything = heated.logsumexp(-1, keepdim=True)

    ranked, order = heated.topk(width)
    ranks = torch.arange(width, device=logits.device)
    probabilities = (ranked - everything).double().exp() * (ranks < top_k)
    upto = probabilities.cumsum(-1)
    mass = torch.where(top_k <= width, upto[:, -1:], 1.0)
    is_enough = (top_k <= width) | (upto[:, -1:] >= top_p) & (top_k == vocabulary)
    # The likeliest token always stays, however small top_p is.
    kept = (upto - probabilities < top_p * mass) & (probabilities > 0) | (ranks == 0)
    upto = (probabilities * kept).cumsum(-1)
    wanted = torch.searchsorted(upto, chance * upto[:, -1:], right=True)
    wanted = torch.minimum(wanted, kept.sum(-1, keepdim=True) - 1)
    return torch.where(is_enough, order.gather(-1, wanted), BEYOND)[:, 0]
