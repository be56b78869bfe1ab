"""A language model's RMSNorms, each as one operation.

transformers computes one in six, eight in half precision, and there are two in a layer: small ones,
of which a GPU's token has hundreds. torch's own multiplies by the weight before it rounds to the
model's dtype, not after: the same bits in float32 on a CPU, the last ones may differ in bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

#: What transformers calls them, in the architectures that chat serves.
NORMS = ("Qwen2RMSNorm", "LlamaRMSNorm")


def fuse(model: Any) -> None:
    """Have a model's norms computed so from now on."""
    for module in model.modules():
        if type(module).__name__ in NORMS:
            module.forward = functools.partial(_normed, module)


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    weight = norm.weight
    return functional.rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)
