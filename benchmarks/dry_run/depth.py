"""The full-size networks made smaller: shallow ones to count, and small ones to compute on a CPU.

A shallow network has a block of each kind instead of all, and is as wide as the published one.
Widths and sizes decide which kernels run, in which dtype, and most of the peak of memory. So tests
hold the counts of shallow networks, which take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks import architectures

SHALLOW: dict[str, dict[str, Any]] = {
    "SDXL_UNET": {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]},
    "SDXL_TEXT": {"num_hidden_layers": 2},
    "SDXL_TEXT_2": {"num_hidden_layers": 2},
    "WAN_TRANSFORMER": {"num_layers": 2},
    "WAN_I2V_14B": {"num_layers": 1},
    "WAN_FLF2V_14B": {"num_layers": 1},
    "WAN_IMAGE_ENCODER": {"num_hidden_layers": 2},
    "WAN_TEXT": {"num_layers": 1},
    "QWEN_7B": {"num_hidden_layers": 2},
}

#: About a thousandth of the published sizes. Their figures mean nothing.
SMALL: dict[str, dict[str, Any]] = {
    "SDXL_UNET": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 96,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    },
    "SDXL_VAE": {"block_out_channels": (32,) * 4, "layers_per_block": 1},
    "SDXL_TEXT": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "SDXL_TEXT_2": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 64,
    },
    "WAN_TRANSFORMER": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
    },
    "WAN_VAE": {"base_dim": 8, "num_res_blocks": 1},
    "WAN_TEXT": {
        "vocab_size": 2000,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 4,
    },
    "QWEN_7B": {
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def shallow() -> AbstractContextManager[None]:
    """A context in which `architectures` makes shallow networks."""
    return _changed(SHALLOW)


def small() -> AbstractContextManager[None]:
    """A context in which `architectures` makes small networks."""
    return _changed(SMALL)


@contextmanager
def _changed(sizes: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, changes in sizes.items():
            stack.enter_context(patch.dict(getattr(architectures, name), changes))
        yield
