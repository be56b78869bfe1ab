"""How the cache grows: how much more it takes than is needed, and how often it moves."""

import pytest
import torch
from transformers import Qwen2Config

from benchmarks import architectures
from ourvidz_serverless.models.chat.kv_cache import GROWTH, GROWTH_BYTES, KVCache

PAGE = 256
QWEN_7B = Qwen2Config(**architectures.QWEN_7B)


def new_cache() -> KVCache:
    """A cache whose tensors have sizes and no memory."""
    return KVCache(QWEN_7B, torch.device("meta"), torch.bfloat16, PAGE)


def num_bytes(cache: KVCache) -> int:
    return sum(each.nbytes for layer in cache.layers for each in layer)


@pytest.mark.parametrize("num_pages", [1, 2, 5, 33, 257, 513, 2049])
def test_a_cache_takes_little_more_memory_than_its_pages_need(num_pages: int) -> None:
    cache = new_cache()

    cache.reserve(num_pages, most=10_000)

    needed = num_pages * PAGE * 56 * 1024
    assert needed <= num_bytes(cache) <= needed + max(2 * needed // GROWTH, GROWTH_BYTES)


def test_a_cache_that_grows_page_by_page_moves_seldom() -> None:
    cache = new_cache()

    for num_pages in range(2, 1025):
        cache.reserve(num_pages, most=1024)

    assert cache.num_pages == 1024
    assert cache.version < 100


def test_a_cache_takes_no_more_pages_than_it_may_have() -> None:
    cache = new_cache()

    cache.reserve(270, most=271)

    assert cache.num_pages == 271
