"""From logits to tokens. Each request has its own parameters and its own random generator.

No work on the device grows with the number of requests, except in the size of its tensors: the
changes that all requests make to their logits are one tensor, and so are the draws.

The tokens that a row may draw are those at or above a threshold, so equally likely tokens are kept
or left out together, as transformers' top_k does. They are drawn in the order of their ids, not of
their probabilities. So the draw stays the same if the last bits of two logits change their order,
and it needs no sorted vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ourvidz_serverless.models.chat.grammar import Matcher
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import select_rows, to_device_async

#: The likeliest tokens, which are sorted first. They are nearly always enough, and it takes less
#: time to find and sort them than to read the whole vocabulary several times.
CANDIDATES = 1024

#: In place of a token id: the candidates were not enough.
NOT_A_CANDIDATE = -1

#: Random numbers have so many bits. With 53 the product of a number and a sum of probabilities may
#: round to the sum itself.
NUMBER_BITS = 52

#: The largest of these random numbers.
LARGEST_NUMBER = 1 - 2.0**-NUMBER_BITS

#: The number of probabilities that are added up first, when one of a whole vocabulary is drawn.
BLOCK = 512

#: Probabilities are added as whole numbers, so that the sum is the same in any order.
UNITS = 2.0**52

#: A float32 without its sign is a number of 31 bits, which has the order of the absolute values.
MAGNITUDE = 0x7FFF_FFFF
HIGH_BITS, LOW_BITS = 15, 16


class Sampler:
    """The sampling state of one request: its generator, its grammar, the tokens of its reply."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], grammar: Matcher | None = None
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.changes = LogitChanges(params, prompt) if params.changes_logits else None
        self._random = random.Random(params.seed)
        self._number: float | None = None

    def accept(self, token: int) -> None:
        """Count a token that was sampled. Raises JobError if its grammar cannot go on."""
        self._number = None
        if self.changes and self.params.has_penalties:
            self.changes.count(token)
        if self.grammar:
            self.grammar.accept(token)

    def draw(self) -> Draw:
        """How to draw the next token, with the next number of this request's generator.

        It is the same number until a token is accepted, so that a draw that ran out of memory can
        be repeated.
        """
        if self._number is None:
            self._number = self._random.getrandbits(NUMBER_BITS) / 2**NUMBER_BITS
        params = self.params
        least = math.log(params.min_p) if params.min_p else -math.inf
        return Draw(params.temperature, params.top_k, params.top_p, least, self._number)


class LogitChanges:
    """What one request changes in the logits of some tokens, in the host's memory.

    These are the tokens with a bias, those of the reply, and, with a repetition penalty, those of
    the prompt. A logit gets its bias, then the repetition penalty, then the other two: the order of
    vLLM.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        repeated = prompt if params.repetition_penalty != 1 else ()
        self._params = params
        self._index = {token: i for i, token in enumerate({*params.logit_bias, *repeated})}
        room = len(self._index) + params.max_tokens
        self._tokens = np.zeros(room, np.int32)
        # For each token: a summand, a divisor, and what is subtracted after that.
        self._values = np.tile(np.array([[0], [1], [0]], np.float32), room)
        self._counts = np.zeros(room, np.int32)
        for token, index in self._index.items():
            self._tokens[index] = token
            self._values[0, index] = params.logit_bias.get(token, 0)
        for token in set(repeated):
            self._values[1, self._index[token]] = params.repetition_penalty

    def count(self, token: int) -> None:
        """Count a token of the reply."""
        index = self._index.setdefault(token, len(self._index))
        self._tokens[index] = token
        self._counts[index] += 1
        penalty = self._params.frequency_penalty * self._counts[index]
        self._values[1, index] = self._params.repetition_penalty
        self._values[2, index] = self._params.presence_penalty + penalty

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The ids of the tokens that change, (tokens), int32."""
        return self._tokens[: len(self._index)]

    @property
    def values(self) -> NDArray[np.float32]:
        """How each of them changes, (3, tokens), float32: summand, divisor, penalty."""
        return self._values[:, : len(self._index)]


def change_logits(logits: torch.Tensor, samplers: Sequence[Sampler]) -> None:
    """Apply biases, penalties and grammars to the rows of logits (rows, vocabulary), in place."""
    changes = {row: each.changes for row, each in enumerate(samplers) if each.changes}
    if changes:
        _change_tokens(logits, changes)
    grammars = {row: each.grammar for row, each in enumerate(samplers) if each.grammar}
    if grammars:
        _forbid_tokens(logits, grammars)


def _change_tokens(logits: torch.Tensor, changes: Mapping[int, LogitChanges]) -> None:
    vocabulary = logits.shape[-1]
    where = np.concatenate([row * vocabulary + each.tokens for row, each in changes.items()])
    values = np.concatenate([each.values for each in changes.values()], axis=1)
    # As one tensor, which takes one copy to the device.
    packed = np.concatenate([where[None].astype(np.int32), values.view(np.int32)])
    sent = to_device_async(torch.from_numpy(packed), logits.device)
    index, (summand, divisor, penalty) = sent[0], sent[1:].view(torch.float32)
    flat = logits.view(-1)
    chosen = flat[index] + summand
    flat[index] = torch.where(chosen > 0, chosen / divisor, chosen * divisor) - penalty


def _forbid_tokens(logits: torch.Tensor, grammars: Mapping[int, Matcher]) -> None:
    vocabulary = logits.shape[-1]
    forbidden = torch.stack([each.forbidden(vocabulary) for each in grammars.values()])
    rows = to_device_async(list(grammars), logits.device)
    masked = logits.index_select(0, rows)
    masked.masked_fill_(to_device_async(forbidden, logits.device), -torch.inf)
    logits.index_copy_(0, rows, masked)


class Draw(NamedTuple):
    """How one token is drawn; `number` is a random number from 0 to 1.

    `least` is the lowest logit, relative to the highest, that min_p allows.
    """

    temperature: float
    top_k: int
    top_p: float
    least: float
    number: float

    @property
    def is_limited(self) -> bool:
        """Whether only some of the likeliest tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.least > -math.inf


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of logits (rows, vocabulary).

    Only a row's own logits and generator decide: with equal logits, a seed gives the same tokens
    in any batch. The host waits for the device once, for the tokens; a second time if a row may
    draw more tokens than the candidates.
    """
    logits = logits.float()
    change_logits(logits, samplers)
    draws = {i: each.draw() for i, each in enumerate(samplers) if not each.params.is_greedy}
    greedy = [row for row in range(len(samplers)) if row not in draws]
    limited = [row for row, each in draws.items() if each.is_limited]
    free = [row for row in draws if row not in limited]
    found = [select_rows(logits, greedy).argmax(-1)] if greedy else []
    for rows, draw in ((limited, draw_candidates), (free, draw_tokens)):
        if rows:
            found.append(draw(select_rows(logits, rows), [draws[row] for row in rows]))
    tokens = dict(zip([*greedy, *limited, *free], torch.cat(found).tolist(), strict=True))
    if missing := [row for row, token in tokens.items() if token == NOT_A_CANDIDATE]:
        again = draw_tokens(select_rows(logits, missing), [draws[row] for row in missing])
        tokens.update(zip(missing, again.tolist(), strict=True))
    return [tokens[row] for row in range(len(samplers))]


def draw_candidates(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token for each row of logits, from its likeliest ones.

    NOT_A_CANDIDATE where less likely tokens may be drawn too.
    """
    scaled, limits = _scaled(logits, draws)
    vocabulary = logits.shape[-1]
    width = min(max(CANDIDATES, *(each.top_k for each in draws)), vocabulary)
    ranked, tokens = scaled.topk(width)
    probabilities = scaled.softmax(-1).gather(-1, tokens).double()

    top_k_threshold = limits.top_k_threshold(ranked)
    allowed = probabilities * (ranked >= top_k_threshold)
    up_to = allowed.cumsum(-1)
    mass = torch.where(limits.top_k > 0, up_to[:, -1:], 1.0)
    # Without top_p the sum of all probabilities, which is only about 1, must not decide.
    enough = torch.where(limits.top_p < 1, limits.top_p * mass, torch.inf)
    num_needed = (up_to - allowed < enough).sum(-1, keepdim=True)
    top_p_threshold = ranked.gather(-1, num_needed - 1)
    threshold = torch.maximum(limits.least, torch.maximum(top_k_threshold, top_p_threshold))

    tokens, order = tokens.sort()
    kept = (probabilities * (ranked >= threshold)).gather(-1, order)
    drawn = tokens.gather(-1, _draw_index(kept, limits.number))
    if width < vocabulary:
        drawn = torch.where(ranked[:, -1:] < threshold, drawn, NOT_A_CANDIDATE)
    return drawn[:, 0]


def draw_tokens(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """One token for each row of logits, from the whole vocabulary, which is not sorted."""
    scaled, limits = _scaled(logits, draws)
    probabilities = scaled.softmax(-1)
    if any(each.is_limited for each in draws):
        threshold = limits.least
        if width := max(each.top_k for each in draws):
            ranked = scaled.topk(min(width, logits.shape[-1])).values
            top_k_threshold = limits.top_k_threshold(ranked)
            threshold = torch.maximum(threshold, top_k_threshold)
            probabilities = probabilities * (scaled >= top_k_threshold)
        if any(each.top_p < 1 for each in draws):
            found = find_top_p_threshold(scaled, probabilities, limits.top_p)
            # A row without top_p must not lose its least likely tokens to rounding.
            top_p_threshold = torch.where(limits.top_p < 1, found, -torch.inf)
            threshold = torch.maximum(threshold, top_p_threshold)
        probabilities = probabilities * (scaled >= threshold)
    return _draw_from_blocks(probabilities, limits.number)[:, 0]


@dataclass(frozen=True, slots=True)
class _Limits:
    """The draws' parameters on the device, (rows, 1) each."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    least: torch.Tensor
    number: torch.Tensor

    def top_k_threshold(self, ranked: torch.Tensor) -> torch.Tensor:
        """The lowest of the `ranked` logits that top_k allows; minus infinity without top_k."""
        index = (self.top_k - 1).clamp(0, ranked.shape[-1] - 1).long()
        return torch.where(self.top_k > 0, ranked.gather(-1, index), -torch.inf)


def _scaled(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, _Limits]:
    """The logits, relative to their row's highest and divided by its temperature."""
    params = to_device_async([each[:] for each in draws], logits.device, torch.float64)
    temperature, top_k, top_p, least, number = params.split(1, dim=-1)
    # Relative to the likeliest token: a quotient can overflow only towards a probability of 0.
    below = logits - logits.amax(-1, keepdim=True)
    scaled = below / temperature.float().clamp(min=torch.finfo(torch.float32).tiny)
    return scaled, _Limits(top_k, top_p, least.float(), number)


def _draw_index(weights: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """An index of each row of weights (rows, n), by inverse CDF. Weights of 0 are never drawn."""
    up_to = weights.cumsum(-1)
    return torch.searchsorted(up_to, number * up_to[:, -1:], right=True)


def _draw_from_blocks(weights: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """`_draw_index` of a long row: first a block of it, then an index in the block.

    So only the sums of blocks and the weights of one block are added up in float64, which saves a
    CPU most of the time.
    """
    rows, length = weights.shape
    blocks = functional.pad(weights, (0, -length % BLOCK)).view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    up_to = sums.cumsum(-1)
    number = number * up_to[:, -1:]
    index = torch.searchsorted(up_to, number, right=True)
    chosen = blocks.gather(1, index[..., None].expand(-1, -1, BLOCK))[:, 0].double()
    before, share = (up_to - sums).gather(-1, index), sums.gather(-1, index)
    rest = ((number - before) / share).clamp(0, LARGEST_NUMBER)
    return index * BLOCK + _draw_index(chosen, rest)


def find_top_p_threshold(
    scaled: torch.Tensor, probabilities: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The lowest logit of the likeliest tokens that together have the share `top_p`, (rows, 1).

    `scaled` are logits relative to the highest. Instead of sorting them, this adds up the
    probabilities of logits with the same high bits, from the likeliest on, finds where the share is
    reached, and does the same with the low bits of the logits there: a radix select by weight.
    """
    keys = scaled.view(torch.int32) & MAGNITUDE
    mass = (probabilities * UNITS).long()
    wanted = (mass.sum(-1, keepdim=True) * top_p).ceil().long()
    high = _find_bucket(keys >> LOW_BITS, mass, wanted, 1 << HIGH_BITS).int() << LOW_BITS
    # The first bucket has all likelier logits, and the last one all that are less likely.
    below = (keys - high).clamp(-1, 1 << LOW_BITS) + 1
    low = _find_bucket(below, mass, wanted, (1 << LOW_BITS) + 2).int() - 1
    return -(high + low).view(torch.float32)


def _find_bucket(
    buckets: torch.Tensor, mass: torch.Tensor, wanted: torch.Tensor, num_buckets: int
) -> torch.Tensor:
    """The first bucket, (rows, 1), at which the mass that is wanted is reached."""
    sums = mass.new_zeros(len(mass), num_buckets).scatter_add_(-1, buckets.long(), mass)
    return torch.searchsorted(sums.cumsum(-1), wanted)
