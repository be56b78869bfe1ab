"""From logits to tokens. Each request has its own parameters and its own random generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ourvidz_serverless.models.chat.grammar import Matcher
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import select_rows, to_device_async

#: The likeliest tokens, which are sorted first; the whole vocabulary is sorted only if necessary.
CANDIDATES = 1024

#: In place of a token id: the token is not among the candidates.
NOT_A_CANDIDATE = -1


class Sampler:
    """The sampling state of one request: its generator, its grammar, the tokens of its reply."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], grammar: Matcher | None = None
    ) -> None:
        self.params = params
        self._grammar = grammar
        self._random = random.Random(params.seed)
        self._number: float | None = None
        self._prompt = list(set(prompt))
        # The tokens of the reply, those of them that the device has not counted yet, and on the
        # device: how often the reply has each token, and whether prompt or reply have it.
        self._reply: list[int] = []
        self._uncounted: list[int] = []
        self._counts: torch.Tensor | None = None
        self._is_seen: torch.Tensor | None = None

    def accept(self, token: int) -> None:
        """Count a token that was sampled. Raises JobError if its grammar cannot go on."""
        self._number = None
        if self.params.has_penalties:
            self._reply.append(token)
            self._uncounted.append(token)
        if self._grammar:
            self._grammar.accept(token)

    def recount(self) -> None:
        """Count all tokens again: after an out-of-memory the counts may be incomplete."""
        self._uncounted = list(self._reply)
        self._counts = self._is_seen = None

    def draw(self) -> Draw:
        """How to draw the next token, with the next number of this request's generator.

        It is the same number until a token is accepted, so that a draw that ran out of memory can
        be repeated.
        """
        if self._number is None:
            self._number = self._random.random()
        return Draw(self.params.temperature, self.params.top_k, self.params.top_p, self._number)

    @property
    def changes_logits(self) -> bool:
        return self.params.has_penalties or self._grammar is not None

    def change_logits(self, logits: torch.Tensor) -> None:
        """Apply penalties and grammar to one row of logits, in place."""
        if self.params.has_penalties:
            self._penalise(logits)
        if self._grammar:
            self._grammar.mask(logits)

    def _penalise(self, logits: torch.Tensor) -> None:
        # The counts stay on the device: each step sends the newest token, not the whole reply.
        if self._counts is None or self._is_seen is None:
            self._counts = torch.zeros_like(logits)
            self._is_seen = torch.zeros_like(logits, dtype=torch.bool)
            self._is_seen.index_fill_(
                0, to_device_async(self._prompt, logits.device, torch.long), True
            )
        if self._uncounted:
            tokens, self._uncounted = to_device_async(self._uncounted, logits.device), []
            self._is_seen.index_fill_(0, tokens, True)
            self._counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=logits.dtype))
        params, counts = self.params, self._counts
        if (penalty := params.repetition_penalty) != 1:
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._is_seen, penalised, logits))
        penalties = params.presence_penalty + params.frequency_penalty * counts
        logits.sub_(torch.where(counts > 0, penalties, 0))


class Draw(NamedTuple):
    """How one token is drawn; `number` is a random number from 0 to 1."""

    temperature: float
    top_k: int
    top_p: float
    number: float

    def needs_only(self, width: int, vocabulary: int) -> bool:
        """Whether the likeliest `width` tokens may be enough to draw from."""
        top_k = self.top_k or vocabulary
        return top_k <= width or (top_k >= vocabulary and self.top_p < 1)


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of logits (rows, vocabulary).

    Only a row's own logits and generator decide: with equal logits, a seed gives the same tokens
    in any batch. The host waits for the device once, for the tokens.
    """
    logits = logits.float()
    for row, sampler in enumerate(samplers):
        if sampler.changes_logits:
            sampler.change_logits(logits[row])
    vocabulary = logits.shape[-1]
    width = min(CANDIDATES, vocabulary)
    draws = {i: each.draw() for i, each in enumerate(samplers) if not each.params.is_greedy}
    greedy = [row for row in range(len(samplers)) if row not in draws]
    # The candidates are nearly always enough, and sorting a whole vocabulary takes longer than a
    # forward of a small model.
    narrow = [row for row, each in draws.items() if each.needs_only(width, vocabulary)]
    wide = [row for row in draws if row not in narrow]
    found = [select_rows(logits, greedy).argmax(-1)] if greedy else []
    for rows, count in ((narrow, width), (wide, vocabulary)):
        if rows:
            found.append(
                draw_tokens(select_rows(logits, rows), [draws[row] for row in rows], count)
            )
    tokens = dict(zip([*greedy, *narrow, *wide], torch.cat(found).tolist(), strict=True))
    if missing := [row for row, token in tokens.items() if token == NOT_A_CANDIDATE]:
        again = draw_tokens(
            select_rows(logits, missing), [draws[row] for row in missing], vocabulary
        )
        tokens.update(zip(missing, again.tolist(), strict=True))
    return [tokens[row] for row in range(len(samplers))]


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw], width: int) -> torch.Tensor:
    """One token for each row of logits, from its likeliest `width` tokens, by inverse CDF.

    NOT_A_CANDIDATE where top_k and top_p may allow more tokens than these.
    """
    vocabulary = logits.shape[-1]
    params = to_device_async([each[:] for each in draws], logits.device, torch.float64)
    temperature, top_k, top_p, number = params.split(1, dim=-1)
    top_k = torch.where(top_k == 0, vocabulary, top_k.clamp(max=vocabulary))
    # Relative to the likeliest token: a quotient can overflow only towards a probability of 0.
    below = logits - logits.amax(-1, keepdim=True)
    scaled = below / temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
    log_total = scaled.logsumexp(-1, keepdim=True)

    ranked, order = scaled.topk(width)
    ranks = torch.arange(width, device=logits.device)
    probabilities = (ranked - log_total).double().exp() * (ranks < top_k)
    cumulative = probabilities.cumsum(-1)
    mass = torch.where(top_k <= width, cumulative[:, -1:], 1.0)
    is_enough = (top_k <= width) | (cumulative[:, -1:] >= top_p) & (top_k == vocabulary)
    # The likeliest token always stays, however small top_p is.
    kept = (cumulative - probabilities < top_p * mass) & (probabilities > 0) | (ranks == 0)
    cumulative = (probabilities * kept).cumsum(-1)
    drawn = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
    drawn = torch.minimum(drawn, kept.sum(-1, keepdim=True) - 1)
    return torch.where(is_enough, order.gather(-1, drawn), NOT_A_CANDIDATE)[:, 0]
