"""A pocket IP-Adapter: the real file layout and the real CLIP encoder, with random weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

TOKENS = 4
IMAGE_DIM = 24


def write_ip_adapter(folder: Path, unet: Any) -> Path:
    """An adapter for this UNet, as `ip-adapter.safetensors` with `image_encoder/` beside it."""
    torch.manual_seed(0)
    encoder = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=IMAGE_DIM,
    )
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder")
    path = folder / "ip-adapter.safetensors"
    save_file({**_projection(unet), **_attention(unet)}, path)
    return path


def _projection(unet: Any) -> dict[str, torch.Tensor]:
    dim = unet.config.cross_attention_dim
    return {
        "image_proj.proj.weight": 0.1 * torch.randn(TOKENS * dim, IMAGE_DIM),
        "image_proj.proj.bias": torch.zeros(TOKENS * dim),
        "image_proj.norm.weight": torch.ones(dim),
        "image_proj.norm.bias": torch.zeros(dim),
    }


def _attention(unet: Any) -> dict[str, torch.Tensor]:
    """Keys and values of every cross-attention; the file counts processors, self ones included."""
    weights = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k", "to_v"):
                shape = getattr(attention, part).weight.shape
                weights[f"ip_adapter.{index}.{part}_ip.weight"] = 0.1 * torch.randn(shape)
    return weights
