"""Attention over pages equals attention over each text alone, in each way to compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config

from ourvidz_serverless.models.chat import attention
from ourvidz_serverless.models.chat.attention import (
    Forward,
    GatheredAttention,
    PagedAttention,
    VarlenAttention,
)
from ourvidz_serverless.models.chat.kv_cache import KVCache, Span, one_token_each, packed
from ourvidz_serverless.models.memory.device import Device
from tests.fakes.tiny_chat import CPU, tiny_network

HEADS, DIM = (6, 2), 16
CONFIG = Qwen2Config(
    hidden_size=HEADS[0] * DIM,
    num_attention_heads=HEADS[0],
    num_key_value_heads=HEADS[1],
    num_hidden_layers=1,
)

#: By name: each text's computed tokens, and the tokens of this forward.
TEXTS = {
    "prompts": [(0, 5), (0, 70), (0, 33)],
    "second chunks": [(32, 40), (7, 9), (0, 3)],
    "replies": [(5, 1), (90, 1), (31, 1), (32, 1), (600, 1), (0, 1)],
    "replies of one length": [(40, 1)] * 9,
    "first tokens": [(0, 1)] * 3,
    "both": [(0, 20), (64, 1), (3, 1), (33, 50)],
}

#: Those that a graph can compute, which has one token of each text.
REPLIES = ("replies", "replies of one length")


@dataclass(frozen=True)
class Case:
    """Texts with random queries, keys and values for all their tokens, and the pages of each."""

    texts: list[tuple[int, int]]
    device: Device
    page_tokens: int

    def tensors(self) -> list[tuple[torch.Tensor, ...]]:
        """Queries, keys and values (tokens, heads, dim) of each text, the same each time."""
        torch.manual_seed(0)
        made = {"device": self.device.name, "dtype": self.device.dtype}
        return [
            tuple(
                torch.randn(start + count, heads, DIM, **made)
                for heads in (HEADS[0], HEADS[1], HEADS[1])
            )
            for start, count in self.texts
        ]

    def spans(self) -> list[Span]:
        """The texts' pages lie in an order of their own, those of the first text side by side."""
        counts = [-(-(start + count) // self.page_tokens) for start, count in self.texts]
        free = torch.randperm(sum(counts[1:])).add(1 + counts[0]).tolist()
        tables = [list(range(1, 1 + counts[0]))]
        for count in counts[1:]:
            tables.append([free.pop() for _ in range(count)])
        return [
            Span([1] * count, start, pages)
            for (start, count), pages in zip(self.texts, tables, strict=True)
        ]


def by_pages(case: Case, way: PagedAttention, is_captured: bool = False) -> list[torch.Tensor]:
    """The results of each text, in the order of the texts."""
    tensors, spans = case.tensors(), case.spans()
    cache = KVCache(CONFIG, case.device.name, case.device.dtype, case.page_tokens)
    cache.reserve(1 + max(max(each.pages) for each in spans), most=1000)
    for (_, keys, values), span in zip(tensors, spans, strict=True):
        for at in range(span.start):
            page, place = span.pages[at // case.page_tokens], at % case.page_tokens
            cache.layers[0][0][page, place] = keys[at]
            cache.layers[0][1][page, place] = values[at]
    batch = packed(spans, case.page_tokens, case.device.name)
    order = [spans.index(each) for each in batch.spans]
    if is_captured:
        width = max(len(each.pages) for each in spans)
        rows = [[1, each.start, *each.pages, *[0] * (width - len(each.pages))] for each in spans]
        batch = one_token_each(torch.tensor(rows, device=case.device.name), case.page_tokens)
        order = list(range(len(spans)))
    new = [
        torch.cat([tensors[at][i][spans[at].start :] for at in order]).transpose(0, 1)[None]
        for i in range(3)
    ]
    made = Forward(way, cache, batch).attend(0, *new, scale=DIM**-0.5)[0]
    parts = made.split([len(spans[at].ids) for at in order])
    return [parts[order.index(at)] for at in range(len(spans))]


def alone(case: Case) -> list[torch.Tensor]:
    """The same by attention over each text alone, in float32 and with a mask."""
    results = []
    for (start, _), tensors in zip(case.texts, case.tensors(), strict=True):
        query, keys, values = (each.float().transpose(0, 1)[None] for each in tensors)
        made = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=True, scale=DIM**-0.5
        )
        results.append(made[0].transpose(0, 1)[start:])
    return results


@pytest.mark.parametrize("name", TEXTS)
def test_gathered_pages_give_the_attention_of_each_text_alone(name: str) -> None:
    case = Case(TEXTS[name], CPU, page_tokens=32)

    made = by_pages(case, GatheredAttention(CONFIG, CPU))

    for ours, theirs in zip(made, alone(case), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", REPLIES)
def test_a_step_for_a_graph_gives_the_attention_of_each_text_alone(name: str) -> None:
    case = Case(TEXTS[name], CPU, page_tokens=32)

    made = by_pages(case, GatheredAttention(CONFIG, CPU), is_captured=True)

    for ours, theirs in zip(made, alone(case), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TEXTS)
def test_both_ways_give_the_same_attention_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    device = Device(torch.device("cuda"), dtype)
    case = Case(TEXTS[name], device, page_tokens=256)

    ways = [VarlenAttention(), GatheredAttention(CONFIG, device)]
    flash, gathered = (by_pages(case, way) for way in ways)

    for ours, theirs, exact in zip(flash, gathered, alone(case), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-2)
        assert torch.allclose(ours.float(), exact, atol=2e-2)


def flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> torch.Tensor:
    """`varlen_attn` as torch documents it, one text at a time, and what its kernel refuses."""
    scale, tables, lengths = (options.pop(key) for key in ("scale", "block_table", "seqused_k"))
    assert options == {"window_size": (-1, 0), "enable_gqa": True, "num_splits": 1}
    assert all(each.dtype == torch.int32 for each in (cu_seq_q, cu_seq_k, tables, lengths))
    assert keys.shape[1] % 256 == 0 and tables.stride(-1) == 1
    assert cu_seq_k.diff().tolist() == lengths.tolist()
    assert (max_q, max_k) >= (cu_seq_q.diff().max(), lengths.max())
    parts = []
    for table, length, part in zip(
        tables, lengths, query.split(cu_seq_q.diff().tolist()), strict=True
    ):
        k, v = (each[table].flatten(0, 1)[:length].transpose(0, 1) for each in (keys, values))
        is_seen = torch.ones(len(part), int(length), dtype=torch.bool).tril(int(length) - len(part))
        made = F.scaled_dot_product_attention(
            part.transpose(0, 1)[None],
            k[None],
            v[None],
            attn_mask=is_seen,
            enable_gqa=True,
            scale=scale,
        )
        parts.append(made[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("name", "is_captured"),
    [*((name, False) for name in TEXTS), *((name, True) for name in REPLIES)],
)
def test_what_the_kernel_for_pages_is_given_describes_the_same_attention(
    name: str, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(TEXTS[name], CPU, page_tokens=256)
    monkeypatch.setattr(attention, "varlen_attn", flash)

    made = by_pages(case, VarlenAttention(), is_captured)

    for ours, theirs in zip(made, alone(case), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_pages_are_gathered_where_torchs_kernel_does_not_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_an_older_torch(query: Any, key: Any, value: Any) -> None:
        raise AssertionError

    assert attention.has_kernel_for_pages()
    for kernel in (None, of_an_older_torch):
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        assert not attention.has_kernel_for_pages()


def test_a_cpu_gathers_pages() -> None:
    assert isinstance(attention.choose(CONFIG, CPU), GatheredAttention)


def test_a_network_with_an_engine_still_generates_as_before() -> None:
    network, plain = tiny_network(), tiny_network()
    attention.install(network)
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 9, "do_sample": False}

    assert network.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()
