"""Pocket IP-Adapters: the real file layouts and the real CLIP encoder, with random weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

TOKENS = 4
IMAGE_DIM = 24
#: The size of the encoder's hidden states, which an IP-Adapter Plus reads.
HIDDEN_DIM = 32


def write_ip_adapter(folder: Path, unet: Any, is_plus: bool = False) -> Path:
    """An adapter for this UNet, as `ip-adapter.safetensors` with `image_encoder/` beside it."""
    torch.manual_seed(0)
    encoder = CLIPVisionConfig(
        hidden_size=HIDDEN_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=IMAGE_DIM,
    )
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder")
    path = folder / "ip-adapter.safetensors"
    projection = _resampler(unet) if is_plus else _projection(unet)
    save_file({**projection, **_attention(unet)}, path)
    return path


def _projection(unet: Any) -> dict[str, torch.Tensor]:
    dim = unet.config.cross_attention_dim
    return {
        "image_proj.proj.weight": 0.1 * torch.randn(TOKENS * dim, IMAGE_DIM),
        "image_proj.proj.bias": torch.zeros(TOKENS * dim),
        "image_proj.norm.weight": torch.ones(dim),
        "image_proj.norm.bias": torch.zeros(dim),
    }


def _resampler(unet: Any) -> dict[str, torch.Tensor]:
    """The resampler of an IP-Adapter Plus: four layers, under the names of the published files."""
    dim, inner, wide = HIDDEN_DIM, 64, 4 * HIDDEN_DIM
    out = unet.config.cross_attention_dim
    sizes: dict[str, tuple[int, ...]] = {
        "latents": (1, TOKENS, dim),
        "proj_in.weight": (dim, dim),
        "proj_in.bias": (dim,),
        "proj_out.weight": (out, dim),
        "proj_out.bias": (out,),
        "norm_out.weight": (out,),
        "norm_out.bias": (out,),
    }
    for index in range(4):
        sizes |= {
            f"layers.{index}.0.norm1.weight": (dim,),
            f"layers.{index}.0.norm1.bias": (dim,),
            f"layers.{index}.0.norm2.weight": (dim,),
            f"layers.{index}.0.norm2.bias": (dim,),
            f"layers.{index}.0.to_q.weight": (inner, dim),
            f"layers.{index}.0.to_kv.weight": (2 * inner, dim),
            f"layers.{index}.0.to_out.weight": (dim, inner),
            f"layers.{index}.1.0.weight": (dim,),
            f"layers.{index}.1.0.bias": (dim,),
            f"layers.{index}.1.1.weight": (wide, dim),
            f"layers.{index}.1.3.weight": (dim, wide),
        }
    return {f"image_proj.{name}": 0.3 * torch.randn(size) for name, size in sizes.items()}


def _attention(unet: Any) -> dict[str, torch.Tensor]:
    """Keys and values of every cross-attention.

    The file's indices count all attention processors, those of self-attention included.
    """
    weights = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k", "to_v"):
                shape = getattr(attention, part).weight.shape
                weights[f"ip_adapter.{index}.{part}_ip.weight"] = 0.1 * torch.randn(shape)
    return weights
