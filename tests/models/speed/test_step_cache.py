"""First-block caching with VACE, ours and diffusers'."""

import copy
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig

from ourvidz_serverless.models.speed.step_cache import FirstBlockCache
from ourvidz_serverless.models.wan.pipeline import WanModel
from tests.models.speed.rendering import (
    transformer_call,
)


def test_vace_hints_are_not_added_twice_when_blocks_are_skipped(
    wan: WanModel,
) -> None:
    network = wan.networks["vace"].transformer
    call = transformer_call(network)
    cache = FirstBlockCache(network, threshold=0.5)

    with torch.inference_mode(), cache.enabled():
        cache.begin_forward("positive")
        full = network(**call)[0]
        skipped = network(**call)[0]

    # The second call has the same input, so the cache holds what would be computed.
    assert not cache.is_full
    torch.testing.assert_close(skipped, full, atol=1e-4, rtol=0)


def test_diffusers_own_cache_adds_vace_hints_twice(
    wan: WanModel,
) -> None:
    # When this fails, diffusers has fixed it, and its cache can replace ours.
    network = copy.deepcopy(wan.networks["vace"].transformer)
    for block in (*network.blocks, *network.vace_blocks):
        block.__class__ = type(block).__base__  # its cache knows diffusers' own blocks alone
    call, before_end, hints = transformer_call(network), list[Any](), list[Any]()
    network.norm_out.register_forward_hook(lambda _, given, __: before_end.append(given[0]))
    for block in network.vace_blocks:
        block.register_forward_hook(lambda _, __, made: hints.append(made[0]))
    network.enable_cache(FirstBlockCacheConfig(threshold=0.5))

    with torch.inference_mode(), network.cache_context("positive"):
        network(**call)
        made = dict(zip(network.config.vace_layers, hints, strict=True))
        network(**call)

    full, skipped = before_end
    # The hint after the last block is in no block's output, and is added once.
    between = sum(hint for layer, hint in made.items() if layer < len(network.blocks) - 1)
    assert between.abs().max() > 1
    torch.testing.assert_close(skipped - full, between, atol=1e-3, rtol=0)
