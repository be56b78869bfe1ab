"""SDXL's prompt encoder: prompts of any length, with weights, through both text encoders.

CLIP reads 77 tokens. A longer text is read in chunks of at most 75, each with its own start and
end token, and the chunks' hidden states are concatenated. As in Compel, a chunk ends after a
sentence, else after a phrase, else after a word, and no token is left out. As in diffusers, the
pooled embedding is that of the first 75 tokens, without weights.

Weights are applied by Compel's arithmetic (https://github.com/damian0815/compel). A weight other
than 1 scales the distance of a word's hidden states from those of an empty prompt. A weight below
1 also blends in the prompt in which the word is masked. Compel's own code is not used: it reads
every chunk again for each masked word, cannot be stopped, and fails where a text holds the token
that fills a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.models.sdxl.prompt_weighting import Prompt, plain

#: The most rows of 77 tokens in one forward: enough to fill a device, and a stop acts soon.
MAX_ROWS = 16

#: A weight of 0 would blend in the masked prompt with an infinite factor.
MIN_WEIGHT = 1e-5

#: Where a chunk may end, best first: after a sentence, a phrase, a word.
BOUNDARIES: tuple[Callable[[str], bool], ...] = (
    lambda token: token == ".</w>",
    lambda token: token in (".</w>", ",</w>", ";</w>", ":</w>"),
    lambda token: token.endswith("</w>"),
)


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt's embedding for the UNet: `hidden` (1, 77 n, dim) and `pooled` (1, dim)."""

    hidden: torch.Tensor
    pooled: torch.Tensor

    def zeros(self) -> Embedding:
        """SDXL's unconditional embedding, with which it was trained where a prompt is absent."""
        return Embedding(torch.zeros_like(self.hidden), torch.zeros_like(self.pooled))

    def extended(self, filler: torch.Tensor, tokens: int) -> Embedding:
        """The same embedding, extended to `tokens` with chunks of an empty prompt (`filler`)."""
        missing = (tokens - self.hidden.shape[1]) // filler.shape[1]
        return Embedding(torch.cat([self.hidden, *[filler] * missing], dim=1), self.pooled)


@dataclass(frozen=True, slots=True)
class Rows:
    """A prompt as rows of 77 tokens for one encoder, one row for each chunk.

    `ids` and `weights` are (n, 77). `spans` are the fragments with a weight below 1: the weight,
    and the first and last position, counted over all rows.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    spans: tuple[tuple[float, int, int], ...]

    @property
    def is_weighted(self) -> bool:
        return bool((self.weights != 1).any())

    def masked(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows that a span covers: the index of each, and its mask (77,) without the span."""
        width = self.ids.shape[1]
        for index in range(first // width, last // width + 1):
            mask = torch.ones_like(self.ids[0])
            # A row's start and end token are never masked.
            mask[max(first - index * width, 1) : min(last + 1 - index * width, width - 1)] = 0
            yield index, mask


@dataclass(frozen=True, slots=True)
class Encoder:
    """One text encoder with its tokenizer. Its last layer and `clip_skip` more are left out."""

    tokenizer: Any
    model: Any
    clip_skip: int = 0

    @torch.inference_mode()
    def read(
        self, prompt: Prompt, check: Check = lambda: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (1, 77 n, dim) of a prompt's n chunks, and the first chunk's first output.

        The hidden states are weighted by the prompt's weights. `check` is called before each
        forward.
        """
        rows = self._rows(prompt)
        hidden, first = self._forward(rows.ids, None, check)
        if rows.is_weighted:
            hidden = self._weigh(rows, hidden, check)
        return hidden.flatten(0, 1)[None], first

    @torch.inference_mode()
    def pool(self, prompt: Prompt, check: Check) -> torch.Tensor:
        """The first output (1, dim) for a prompt's first 75 tokens, without weights."""
        ids = [each for each, _ in self._tokens(prompt)]
        return self._forward(self._row(ids[: self._max_tokens])[None], None, check)[1]

    @property
    def _max_tokens(self) -> int:
        return int(self.tokenizer.model_max_length) - 2

    def _tokens(self, prompt: Prompt) -> list[tuple[int, int]]:
        """A prompt's tokens, each with the index of its fragment."""
        texts = [fragment.text for fragment in prompt]
        options = {"add_special_tokens": False, "truncation": False, "verbose": False}
        read = self.tokenizer(texts, **options).input_ids
        return [(each, index) for index, ids in enumerate(read) for each in ids]

    def _rows(self, prompt: Prompt) -> Rows:
        tokens = self._tokens(prompt)
        parts = chunks(self.tokenizer, [each for each, _ in tokens])
        ids = torch.stack([self._row(part) for part in parts])
        weights = torch.ones(ids.shape)
        spans: dict[int, tuple[float, int, int]] = {}
        for (_, index), place in zip(tokens, _places(parts, ids.shape[1]), strict=True):
            weight = weights.view(-1)[place] = prompt[index].weight
            if weight < 1:
                spans[index] = (weight, spans.get(index, (weight, place))[1], place)
        return Rows(ids, weights.to(ids.device), tuple(spans.values()))

    def _row(self, ids: list[int]) -> torch.Tensor:
        """Start, up to 75 tokens, end, and padding."""
        tokenizer = self.tokenizer
        padding = [tokenizer.pad_token_id] * (self._max_tokens - len(ids))
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]
        return torch.tensor(row, device=self.model.device)

    def _forward(
        self, ids: torch.Tensor, masks: torch.Tensor | None, check: Check
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (n, 77, dim) of n rows, and the first output (1, dim) of the first."""
        outputs = []
        for start in range(0, len(ids), MAX_ROWS):
            check()
            part = slice(start, start + MAX_ROWS)
            mask = None if masks is None else masks[part]
            output = self.model(ids[part], mask, output_hidden_states=True)
            # SDXL conditions on the layer before the last of both (arXiv:2307.01952, 2.1).
            outputs.append((output.hidden_states[-2 - self.clip_skip], output[0][:1]))
        return torch.cat([hidden for hidden, _ in outputs]), outputs[0][1]

    def _weigh(self, rows: Rows, hidden: torch.Tensor, check: Check) -> torch.Tensor:
        empty = self._forward(self._row([])[None], None, check)[0].float()
        base = _scaled(hidden.float(), empty, rows.weights)
        mask_shares = [_mask_share(weight) for weight, _, _ in rows.spans]
        total = 1 + sum(mask_shares)
        masked = [
            (share / total, index, mask)
            for share, (_, first, last) in zip(mask_shares, rows.spans, strict=True)
            for index, mask in rows.masked(first, last)
        ]
        mixed = base.clone()
        for start in range(0, len(masked), MAX_ROWS):
            shares, places, masks = zip(*masked[start : start + MAX_ROWS], strict=True)
            index = torch.tensor(places, device=base.device)
            without = self._forward(rows.ids[index], torch.stack(masks), check)[0].float()
            without = _scaled(without, empty, rows.weights[index])
            # One by one: `index_add_` on a GPU adds in any order.
            for share, place, each in zip(shares, places, without, strict=True):
                mixed[place] += share * (each - base[place])
        return mixed.to(hidden.dtype)


def _places(parts: Sequence[Sequence[int]], width: int) -> Iterator[int]:
    """The position of each token in the concatenated rows."""
    for index, part in enumerate(parts):
        yield from range(index * width + 1, index * width + 1 + len(part))


def _scaled(hidden: torch.Tensor, empty: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each token's hidden state, its distance from the empty prompt's scaled by its weight."""
    factors = weights[..., None]
    return torch.where(factors == 1, hidden, empty + (hidden - empty) * factors)


def _mask_share(weight: float) -> float:
    """The masked prompt's share for one share of the prompt: 0 at a weight of 1, 1 at 0.5."""
    return math.tan((1 - max(weight, MIN_WEIGHT)) * math.pi / 2)


def same_length(embeddings: Sequence[Embedding], empty: Callable[[], Embedding]) -> list[Embedding]:
    """The embeddings at the longest one's length, so that they fit in one batch.

    Shorter ones are extended with chunks of the embedding of an empty prompt, which `empty` makes.
    """
    longest = max(embedding.hidden.shape[1] for embedding in embeddings)
    if all(embedding.hidden.shape[1] == longest for embedding in embeddings):
        return list(embeddings)
    filler = empty().hidden
    return [embedding.extended(filler, longest) for embedding in embeddings]


class PromptEncoder:
    """SDXL's two text encoders, whose outputs are joined."""

    def __init__(self, pipe: Any) -> None:
        self._first = Encoder(pipe.tokenizer, pipe.text_encoder)
        self._second = Encoder(pipe.tokenizer_2, pipe.text_encoder_2)

    @property
    def max_clip_skip(self) -> int:
        """How many layers can be left out beside the last one, so that one is left."""
        models = self._first.model, self._second.model
        return min(int(each.config.num_hidden_layers) for each in models) - 1

    def encode(self, prompt: Prompt, check: Check = lambda: None, clip_skip: int = 0) -> Embedding:
        """The embedding of a prompt. For a short one without weights it is diffusers' own.

        `check` is called between forwards; an error that it raises ends the encoding.
        """
        first, second = (replace(each, clip_skip=clip_skip) for each in (self._first, self._second))
        one, _ = first.read(prompt, check)
        two, pooled = second.read(prompt, check)
        if two.shape[1] > self._second.tokenizer.model_max_length:
            pooled = self._second.pool(prompt, check)
        # Two vocabularies may need different numbers of chunks for the same words.
        longest = max(one.shape[1], two.shape[1])
        one, two = self._filled(first, one, longest), self._filled(second, two, longest)
        return Embedding(torch.cat([one, two], dim=-1), pooled)

    @staticmethod
    def _filled(encoder: Encoder, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
        if hidden.shape[1] == tokens:
            return hidden
        filler, _ = encoder.read(plain(""))
        return torch.cat([hidden, *[filler] * ((tokens - hidden.shape[1]) // filler.shape[1])], 1)


def chunks(tokenizer: Any, ids: list[int]) -> list[list[int]]:
    """Token ids in parts of at most 75. Each part ends at the best boundary in it."""
    max_tokens = tokenizer.model_max_length - 2
    parts, start = [], 0
    while len(ids) - start > max_tokens:
        size = _size(tokenizer.convert_ids_to_tokens(ids[start : start + max_tokens]))
        parts.append(ids[start : start + size])
        start += size
    return [*parts, ids[start:]]


def _size(tokens: Sequence[str]) -> int:
    """How many of these tokens one chunk takes; all of them if there is no boundary."""
    for is_boundary in BOUNDARIES:
        for index in reversed(range(len(tokens))):
            if is_boundary(tokens[index]):
                return index + 1
    return len(tokens)
