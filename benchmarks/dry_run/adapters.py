"""What SDXL's weights may have beside them, at full size: a LoRA, and an IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks import architectures
from ourvidz_serverless.models.sdxl.ip_adapter import IpAdapter

#: The rank of the LoRA, which changes all projections of all attentions of the UNet.
RANK = 16

#: The tokens into which the IP-Adapter projects an image (h94/IP-Adapter,
#: sdxl_models/ip-adapter_sdxl_vit-h).
IMAGE_TOKENS = 4


def write_lora(folder: Path, unet: Any) -> Path:
    """A LoRA for this UNet as a file, in fp16. It changes nothing."""
    weights = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            shapes = {"A": (RANK, module.in_features), "B": (module.out_features, RANK)}
            for part, shape in shapes.items():
                zeros = torch.zeros(shape, dtype=torch.float16)
                weights[f"unet.{name}.lora_{part}.weight"] = zeros
    path = folder / "lora.safetensors"
    save_file(weights, path)
    return path


def add_ip_adapter(pipe: Any) -> IpAdapter:
    """Load an IP-Adapter with its image encoder into a pipeline, from memory instead of files."""
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**architectures.WAN_IMAGE_ENCODER))
    pipe.register_modules(
        image_encoder=encoder.requires_grad_(False).eval(),
        feature_extractor=CLIPImageProcessorPil(),
    )
    weights, load = _ip_adapter_weights(pipe.unet), pipe.load_ip_adapter

    def load_from_memory(*_: Any, **__: Any) -> None:
        load(weights, "", "", image_encoder_folder=None, low_cpu_mem_usage=False)

    with patch.object(pipe, "load_ip_adapter", load_from_memory):
        return IpAdapter(pipe, Path("ip-adapter.safetensors"))


def _ip_adapter_weights(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights under the names of the published file, which counts self-attentions too."""
    dim = unet.config.cross_attention_dim
    image_dim = architectures.WAN_IMAGE_ENCODER["projection_dim"]
    projection = {
        "proj.weight": torch.zeros(IMAGE_TOKENS * dim, image_dim),
        "proj.bias": torch.zeros(IMAGE_TOKENS * dim),
        "norm.weight": torch.zeros(dim),
        "norm.bias": torch.zeros(dim),
    }
    attentions = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("to_k", "to_v"):
                shape = getattr(attention, part).weight.shape
                attentions[f"{index}.{part}_ip.weight"] = torch.zeros(shape)
    return {"image_proj": projection, "ip_adapter": attentions}
