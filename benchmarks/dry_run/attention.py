"""Which attention kernel torch chooses on CUDA.

`scaled_dot_product_attention` asks its CUDA code, which a build for CPUs does not have. So its
rules are written here again, after torch 2.13's ATen/native/transformers/cuda/sdp_utils.cpp: flash
takes 16 bits, heads of at most 256, and no mask; the memory-efficient kernel takes a mask and fp32,
and no grouped heads; the rest is computed by formula. On Hopper and later torch may take cuDNN's
kernel instead of flash. It reads and writes the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

#: The operations whose FLOPs are those of attention.
KERNELS = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")

#: The operation of `torch.nn.attention.varlen`, which is one kernel.
PAGED = "_varlen_attn"

#: The efficient kernel reads a mask whose rows begin at multiples of so many elements.
MASK_ALIGNMENT = 16


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by the kernel that torch would choose on CUDA."""
    rest: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    kernel = chosen(query, key, value, attn_mask)
    if kernel == "flash":
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, **rest)[0]
    if kernel == "efficient":
        bias = None if attn_mask is None else _aligned(attn_mask, query, key)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, False, **rest
        )[0]
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, **rest, enable_gqa=enable_gqa
    )[0]


def chosen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> str:
    """`flash`, `efficient` or `math`. Raises RuntimeError, as CUDA does, for mixed dtypes."""
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"attention of {query.dtype} with a mask of {mask.dtype}")
    is_half, size = query.dtype.itemsize == 2, query.shape[-1]
    is_dense = all(each.stride(-1) == 1 for each in (query, key, value))
    is_grouped = query.shape[1] != key.shape[1]
    if is_half and mask is None and is_dense and size <= 256 and size == value.shape[-1]:
        return "flash"
    if is_dense and not is_grouped and size % (8 if is_half else 4) == 0:
        return "efficient"
    return "math"


def flops(query: Any, key: Any, value: Any) -> int:
    """Two products: of queries and keys, and of their weights and the values."""
    rows, heads, tokens, size = query.shape
    return int(2 * rows * heads * tokens * key.shape[2] * (size + value.shape[-1]))


def paged_flops(call: Any) -> int:
    """Two products for each query, as if every text were as long as the longest."""
    query, longest = call.args[0], call.args[6]
    tokens, heads, size = query.shape
    return int(4 * tokens * heads * longest * size)


def paged_bytes(call: Any, written: int) -> int:
    """The queries, the result, and keys and values of the pages in the tables, once."""
    query, keys = call.args[:2]
    tables = next(each for each in reversed(call.args) if isinstance(each, torch.Tensor))
    return int(query.nbytes + written + 2 * tables.numel() * keys[0].nbytes)


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as the efficient kernel takes it: numbers, aligned, and expanded to all heads."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    length = mask.shape[-1]
    if missing := -length % MASK_ALIGNMENT:
        mask = F.pad(mask, (0, missing))[..., :length]
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def described(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> str:
    """The chosen kernel with its shapes, for the arguments of `attend`."""
    kernel, dtype = chosen(query, key, value, attn_mask), str(query.dtype).removeprefix("torch.")
    with_mask = "" if attn_mask is None else ", with a mask"
    return f"{kernel}: {_by(query)} queries, {_by(key)} keys, {dtype}{with_mask}"


def _by(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
