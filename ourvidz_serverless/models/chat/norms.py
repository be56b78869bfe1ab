"""Computes the RMSNorms of a language model as one operation each.

transformers computes one in six operations, or eight in half precision, and a layer has two. These
are small operations, and on a GPU a token has hundreds of them. torch's own operation multiplies by
the weight before it rounds to the model's dtype, not after: the same bits in float32 on a CPU, and
in bfloat16 the last bits may differ.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

#: The class names of norms in transformers that are computed so. Others stay as they are.
NORMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm", "MistralRMSNorm")


def fuse(network: Any) -> None:
    """Replace the forward of every norm."""
    for module in network.modules():
        if type(module).__name__ in NORMS:
            module.forward = functools.partial(_forward, module)


def _forward(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    weight = norm.weight
    return functional.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)
