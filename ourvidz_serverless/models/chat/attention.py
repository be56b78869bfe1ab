"""Attention over the pages of the cache, in two ways that compute the same.

`GatheredAttention` runs everywhere. It copies the pages of a few texts at a time, so few that the
copy stays in the processor's cache, and lets `scaled_dot_product_attention` read that copy. Pages
of one text that lie side by side are read where they are.

`VarlenAttention` is torch's flash kernel for packed texts and pages, on NVIDIA GPUs since Ampere in
16 bits: no copy, no mask, and keys and values are read once for all heads that share them.

transformers calls `attend` in place of its own attention for the forwards of the engine. All other
forwards of the same network compute attention as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ourvidz_serverless.models.chat.kv_cache import Batch, KVCache, Span, head_shape
from ourvidz_serverless.models.memory.device import Device

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

#: The name of this attention in transformers.
NAME = "ourvidz_pages"

#: Tokens of a page. A copy of a text has up to one page of padding, so its pages are small.
GATHERED_PAGE = 32

#: flash-attention's kernel for pages takes multiples of 256 ("Paged KV cache block size must be
#: divisible by 256", csrc/flash_attn/flash_api.cpp), heads of multiples of 8 and up to 256.
VARLEN_PAGE, VARLEN_HEAD, MAX_VARLEN_HEAD = 256, 8, 256

#: The compute capability of the first GPUs that the kernel runs on, Ampere.
VARLEN_CAPABILITY = (8, 0)

#: The most bytes of keys and values that are copied at a time: by a CPU, for each thread, what its
#: cache holds; by a GPU, what keeps it busy.
CPU_COPY_BYTES, GPU_COPY_BYTES = 2 << 20, 256 << 20

#: Texts are copied together if the longest is at most so many times as long as the shortest.
MAX_PADDING = 1.5


#: Keys and values.
Pair = tuple[torch.Tensor, torch.Tensor]


class PagedAttention(Protocol):
    """One way to compute attention over pages."""

    page_tokens: int
    #: Whether the cost of a text depends on its own length only, and not on the tables' width.
    reads_only_used: bool

    def plan(self, batch: Batch) -> Any:
        """What all layers of one forward have in common."""

    def attend(
        self,
        query: torch.Tensor,
        new: Pair,
        cached: Pair,
        plan: Any,
        scale: float,
    ) -> torch.Tensor:
        """Causal attention, (tokens, heads, dim), of the queries (tokens, heads, dim) of a batch.

        `new` are the batch's own keys and values, `cached` those of all pages, to which the new
        ones are written already.
        """

    def clear(self) -> None:
        """Free the memory that it keeps for later forwards."""


def choose(config: Any, device: Device) -> PagedAttention:
    """The attention for one network on one device."""
    dim = head_shape(config)[1]
    runs = (
        device.is_cuda
        and device.dtype in (torch.float16, torch.bfloat16)
        and dim % VARLEN_HEAD == 0
        and dim <= MAX_VARLEN_HEAD
        and torch.cuda.get_device_capability(device.name) >= VARLEN_CAPABILITY
        and has_kernel_for_pages()
    )
    return VarlenAttention() if runs else GatheredAttention(config, device)


def has_kernel_for_pages() -> bool:
    """Whether this torch's flash kernel reads pages; that of torch 2.10 does not."""
    return varlen_attn is not None and "block_table" in inspect.signature(varlen_attn).parameters


def gathered_bytes_per_token(config: Any, device: Device) -> int:
    """The bytes that attention needs beside the cache to read one token, in one layer."""
    if isinstance(choose(config, device), VarlenAttention):
        return 0
    heads, dim = head_shape(config)
    # A prompt's keys and values are repeated for all heads, other texts' are padded.
    most = max(int(config.num_attention_heads), int(MAX_PADDING * heads + 1))
    return 2 * most * dim * device.dtype.itemsize


class VarlenAttention:
    """`torch.nn.attention.varlen`: flash attention over packed texts and their pages.

    With one split, a text's result has the same bits whatever else is in the batch.
    """

    page_tokens, reads_only_used = VARLEN_PAGE, True

    def plan(self, batch: Batch) -> dict[str, Any]:
        """The arguments that are the same in all layers; the kernel takes 32-bit numbers."""
        lengths = batch.lengths.int()
        width = batch.tables.shape[1] * self.page_tokens
        return {
            "cu_seq_q": batch.ends.int(),
            "cu_seq_k": F.pad(lengths.cumsum(0, dtype=torch.int), (1, 0)),
            "max_q": max(batch.counts),
            "max_k": max((each.length for each in batch.spans), default=width),
            "seqused_k": lengths,
            "block_table": batch.tables.int(),
        }

    def attend(
        self,
        query: torch.Tensor,
        new: Pair,
        cached: Pair,
        plan: dict[str, Any],
        scale: float,
    ) -> torch.Tensor:
        made = varlen_attn(
            query,
            *cached,
            **plan,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=True,
            num_splits=1,
        )
        assert isinstance(made, torch.Tensor)
        return made

    def clear(self) -> None:
        """It keeps none."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Texts that are read together: so many tokens of the batch from `first` on.

    `pages` are those of all texts, one text after another; a slice where they lie side by side;
    None for the beginning of one text, which needs no page.
    """

    first: int
    texts: int
    tokens: int
    length: int
    pages: torch.Tensor | slice | None
    mask: torch.Tensor | None
    #: Whether a CUDA graph computes it, which copies to memory of its own.
    is_captured: bool = False

    @property
    def rows(self) -> slice:
        """The part's tokens in the batch."""
        return slice(self.first, self.first + self.texts * self.tokens)


class GatheredAttention:
    """Copies pages to where `scaled_dot_product_attention` can read them."""

    page_tokens, reads_only_used = GATHERED_PAGE, False

    def __init__(self, config: Any, device: Device) -> None:
        self._dtype = device.dtype
        heads, dim = head_shape(config)
        self._scratch: Pair | None = None
        copied = GPU_COPY_BYTES if device.is_cuda else CPU_COPY_BYTES * torch.get_num_threads()
        self._most_tokens = copied // (2 * heads * dim * device.dtype.itemsize)

    def plan(self, batch: Batch) -> list[_Part]:
        """The parts of a batch, with their masks."""
        if not batch.spans:
            return [self._whole(batch)]
        parts, first, at = [], 0, 0
        for texts in self._groups(batch.spans):
            spans = batch.spans[at : at + texts]
            parts.append(self._part(batch, spans, first, at))
            first, at = first + texts * len(spans[0].ids), at + texts
        return parts

    def _whole(self, batch: Batch) -> _Part:
        """All of a batch of one token each, whose lengths the host does not know."""
        texts, width = batch.tables.shape
        length = width * self.page_tokens
        mask = self._mask(batch.lengths[:, None, None, None], length)
        return _Part(0, texts, 1, length, batch.tables.reshape(-1), mask, is_captured=True)

    def _groups(self, spans: Sequence[Span]) -> list[int]:
        """How many texts each part has, in the order of the batch."""
        groups: list[int] = []
        shortest = most = 0
        for span in spans:
            length = len(span.pages) * self.page_tokens
            joins = (
                groups
                and len(span.ids) == 1
                and length <= max(MAX_PADDING * shortest, self.page_tokens)
                and (groups[-1] + 1) * length <= most
            )
            if joins:
                groups[-1] += 1
                continue
            groups.append(1)
            shortest, most = length, self._most_tokens
        return groups

    def _part(self, batch: Batch, spans: Sequence[Span], first: int, at: int) -> _Part:
        texts, tokens, length = len(spans), len(spans[0].ids), spans[-1].length
        if texts == 1 and tokens == length:
            return _Part(first, texts, tokens, length, None, None)
        width = self._count(length)
        pages: torch.Tensor | slice
        if texts == 1 and _are_side_by_side(spans[0].pages):
            start = spans[0].pages[0]
            pages = slice(start, start + width)
        else:
            pages = batch.tables[at : at + texts, :width].reshape(-1)
        mask = None
        if tokens > 1:
            positions = batch.positions[0, first : first + tokens]
            mask = self._mask(positions[None, None, :, None] + 1, length)
        elif spans[0].length < length:
            mask = self._mask(batch.lengths[at : at + texts, None, None, None], length)
        return _Part(first, texts, tokens, length, pages, mask)

    def _count(self, length: int) -> int:
        return -(-length // self.page_tokens)

    def _mask(self, lengths: torch.Tensor, length: int) -> torch.Tensor:
        """What is added to the scores: minus infinity from each text's length on.

        Not as booleans: every layer would convert them again.
        """
        is_later = torch.arange(length, device=lengths.device) >= lengths
        return torch.zeros_like(is_later, dtype=self._dtype).masked_fill_(is_later, -torch.inf)

    def attend(
        self,
        query: torch.Tensor,
        new: Pair,
        cached: Pair,
        plan: list[_Part],
        scale: float,
    ) -> torch.Tensor:
        if len(plan) == 1:
            return self._attend(query, new, cached, plan[0], scale)
        made = torch.empty_like(query, memory_format=torch.contiguous_format)
        for part in plan:
            made[part.rows] = self._attend(query, new, cached, part, scale)
        return made

    def _attend(
        self,
        query: torch.Tensor,
        new: Pair,
        cached: Pair,
        part: _Part,
        scale: float,
    ) -> torch.Tensor:
        """Attention of one part: (its tokens, heads, dim)."""
        query = query[part.rows]
        _, heads, dim = query.shape
        if part.pages is None:
            keys, values = (each[part.rows].transpose(0, 1)[None] for each in new)
        else:
            keys, values = self._read(cached, part)
        if part.tokens == 1:
            # The heads that share keys and values, as if they were tokens.
            query = query.view(part.texts, keys.shape[1], -1, dim)
            made = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=part.mask, scale=scale
            )
            return made.reshape(part.texts, heads, dim)
        made = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=part.mask,
            is_causal=part.mask is None,
            scale=scale,
            enable_gqa=keys.shape[1] != heads,
        )
        return made[0].transpose(0, 1)

    def _read(self, cached: Pair, part: _Part) -> Pair:
        """Keys and values of a part's texts, (texts, heads, length, dim)."""
        heads, dim = cached[0].shape[2:]
        read = self._copied(cached, part)
        keys, values = (
            each.view(part.texts, -1, heads, dim)[:, : part.length].transpose(1, 2) for each in read
        )
        return keys, values

    def _copied(self, cached: Pair, part: _Part) -> Pair:
        """The pages of a part: where they are, or a copy in memory that the next part uses again.

        Memory that is used again stays in a CPU's cache.
        """
        keys, values = cached
        assert part.pages is not None
        if part.is_captured or isinstance(part.pages, slice):
            return keys[part.pages], values[part.pages]
        num_pages, shape = len(part.pages), keys.shape[1:]
        if self._scratch is None or len(self._scratch[0]) < num_pages:
            self._scratch = None
            size = max(num_pages, min(2 * num_pages, self._most_tokens // self.page_tokens))
            self._scratch = keys.new_empty((size, *shape)), keys.new_empty((size, *shape))
        into = self._scratch
        return (
            torch.index_select(keys, 0, part.pages, out=into[0][:num_pages]),
            torch.index_select(values, 0, part.pages, out=into[1][:num_pages]),
        )

    def clear(self) -> None:
        self._scratch = None


def _are_side_by_side(pages: Sequence[int]) -> bool:
    return list(pages) == list(range(pages[0], pages[0] + len(pages)))


class Forward:
    """One forward over the pages: what transformers' attention layers get as `pages`."""

    def __init__(self, attention: PagedAttention, cache: KVCache, batch: Batch) -> None:
        self.batch, self._attention, self._layers = batch, attention, cache.layers
        self._plan = attention.plan(batch)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Write the keys and values of (1, heads, tokens, dim) to their pages, and attend.

        The result is (1, tokens, heads, dim).
        """
        new = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        cached = self._layers[layer]
        for pages, each in zip(cached, new, strict=True):
            pages.flatten(0, 1).index_copy_(0, self.batch.slots, each)
        query = query[0].transpose(0, 1)
        return self._attention.attend(query, new, cached, self._plan, scale)[None]


def install(network: Any) -> None:
    """Let a network's attention use the `pages` that a forward is given, if it is given any."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    network.config._attn_implementation = NAME


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    pages: Forward | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (1, tokens, heads, dim) for (1, heads, tokens, dim)."""
    if pages is None:
        made: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return made
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return pages.attend(module.layer_idx, query, key, value, scale), None
