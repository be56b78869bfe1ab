"""Keys and values of all requests, in pages: two tensors a layer, and the batches that use them.

A request has as many pages as its tokens need, anywhere in the tensors. So memory is the sum of the
requests' lengths, and no request is padded to the length of another one. `pages` decides which page
belongs to whom; here is what the pages hold.

A forward computes a packed batch: the next tokens of several requests, one request after another in
one row, without padding. The prompts of requests may have different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ourvidz_serverless.models.memory.device import is_out_of_memory, to_device_async

#: The lengths of CUDA graphs and the context are multiples of this; pages divide it.
BLOCK = 256

#: A cache grows by one part in so many, and by no less than so many bytes, since each time all of
#: it is copied. A 7B model's cache of 64 conversations is copied in the time of a third of a step
#: (by the data sheet of an H200), and grows every 64 steps.
GROWTH, GROWTH_BYTES = 32, 64 << 20


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not less than the number."""
    return 1 << (number - 1).bit_length()


def rounded(length: int) -> int:
    """The tokens of the whole blocks that a text of that length takes."""
    return -(-length // BLOCK) * BLOCK


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """The bytes of one token in the cache, in all layers."""
    heads, dim = head_shape(config)
    return 2 * config.num_hidden_layers * heads * dim * dtype.itemsize


def head_shape(config: Any) -> tuple[int, int]:
    """The number of heads that have keys and values, and the size of each."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, dim


class KVCache:
    """The pages' keys and values, (pages, tokens, heads, dim) each. `reserve` before writing.

    Its tensors keep their addresses as long as `version` is the same.
    """

    def __init__(
        self, config: Any, device: torch.device, dtype: torch.dtype, page_tokens: int
    ) -> None:
        self._options = {"device": device, "dtype": dtype}
        self._shape = (page_tokens, *head_shape(config))
        self._num_layers = config.num_hidden_layers
        self._page_bytes = page_tokens * bytes_per_token(config, dtype)
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self._resize(0)

    def reserve(self, num_pages: int, most: int, at_once: bool = False) -> None:
        """Allocate at least `num_pages`. What the cache holds stays.

        Some more are allocated, up to `most` pages, so that it moves seldom. With `at_once` all of
        these are allocated where there is room, so that it never moves.
        """
        if num_pages <= self.num_pages:
            return
        ample = most if at_once else min(self._ample(num_pages), most)
        if ample <= num_pages or not self._has_resized(ample):
            self._resize(num_pages)

    def copy_page(self, source: int, target: int) -> None:
        """Overwrite page `target` with page `source`."""
        for layer in self.layers:
            for each in layer:
                each[target].copy_(each[source])

    def _ample(self, num_pages: int) -> int:
        """So many pages and some more: a small cache doubles, a large one grows by a part."""
        doubled = next_power_of_two(num_pages)
        part = max(doubled // GROWTH, GROWTH_BYTES // self._page_bytes, 1)
        return min(doubled, -(-num_pages // part) * part)

    def _has_resized(self, num_pages: int) -> bool:
        try:
            self._resize(num_pages)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            return False
        return True

    def _resize(self, num_pages: int) -> None:
        self.version += 1
        if not num_pages:
            self.layers = [(self._empty(0), self._empty(0)) for _ in range(self._num_layers)]
        # One tensor at a time, so that the old and the new cache are never both there.
        for index, (keys, values) in enumerate(self.layers):
            keys = self._resized(keys, num_pages)
            self.layers[index] = (keys, values)
            self.layers[index] = (keys, self._resized(values, num_pages))
        self.num_pages = num_pages

    def _empty(self, num_pages: int) -> torch.Tensor:
        # Not `empty`: a masked token counts zero times its value, which must be a number.
        return torch.zeros((num_pages, *self._shape), **self._options)

    def _resized(self, old: torch.Tensor, num_pages: int) -> torch.Tensor:
        if len(old) == num_pages:
            return old
        new, both = self._empty(num_pages), min(num_pages, len(old))
        new[:both] = old[:both]
        return new


@dataclass(frozen=True, slots=True)
class Span:
    """The next `ids` of one text, of which `start` tokens are computed, and all its pages so far.

    The pages have room for these tokens too.
    """

    ids: Sequence[int]
    start: int
    pages: Sequence[int]

    @property
    def length(self) -> int:
        """The tokens of the text after the forward."""
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward, and where their keys and values are. All numbers are int64.

    `ids` and `positions` are (1, tokens). `slots` (tokens) are where each token is written: the
    tensors of the cache as one row of tokens. `tables` (texts, pages) are the pages of each text,
    0 behind its last one; `lengths` (texts) its tokens after the forward. The text's tokens in the
    batch are those from `ends[i]` to `ends[i + 1]` (texts + 1). `last` (texts) are the last tokens'
    indices in the batch, in the order of the spans that the batch was made of.

    `spans` are what the host knows of the texts, in the order of `tables` and `lengths`. A batch
    for a CUDA graph has none: it has one token of each text, and the tables have one width.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor
    last: torch.Tensor
    spans: Sequence[Span] = ()

    @property
    def counts(self) -> list[int]:
        """The tokens of each text in this forward."""
        return [len(each.ids) for each in self.spans] or [1] * len(self.lengths)


def packed(spans: Sequence[Span], page_tokens: int, device: torch.device) -> Batch:
    """The batch of these spans, those of one token first, and short texts before long ones.

    All numbers go to the device in one copy.
    """
    order = sorted(range(len(spans)), key=lambda at: (len(spans[at].ids) > 1, spans[at].length))
    ordered = [spans[at] for at in order]
    ends = dict(zip(order, accumulate(len(each.ids) for each in ordered), strict=True))
    positions = [at for each in ordered for at in range(each.start, each.length)]
    slots = [
        each.pages[at // page_tokens] * page_tokens + at % page_tokens
        for each in ordered
        for at in range(each.start, each.length)
    ]
    width = max(len(each.pages) for each in ordered)
    tables = [at for each in ordered for at in (*each.pages, *[0] * (width - len(each.pages)))]
    parts = [
        [token for each in ordered for token in each.ids],
        positions,
        slots,
        tables,
        [each.length for each in ordered],
        [0, *ends.values()],
        [ends[at] - 1 for at in range(len(spans))],
    ]
    numbers = to_device_async([number for part in parts for number in part], device, torch.long)
    ids, at, slot, pages, lengths, end, last = numbers.split([len(part) for part in parts])
    pages = pages.view(-1, width)
    return Batch(ids[None], at[None], slot, pages, lengths, end, last, ordered)


def one_token_each(inputs: torch.Tensor, page_tokens: int) -> Batch:
    """The batch of one token a text: `inputs` (texts, 2 + pages) are id, position and pages.

    The host needs no number from the device, so a CUDA graph can capture what it is used for.
    """
    ids, positions, tables = inputs[:, 0], inputs[:, 1], inputs[:, 2:]
    page = tables.gather(1, positions[:, None] // page_tokens)[:, 0]
    slots = page * page_tokens + positions % page_tokens
    ends = torch.arange(len(inputs) + 1, device=inputs.device)
    return Batch(ids[None], positions[None], slots, tables, positions + 1, ends, ends[:-1])
