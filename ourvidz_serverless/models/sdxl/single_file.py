"""An SDXL checkpoint in one file, with the names of the published file, as diffusers' networks.

diffusers converts the names. It also clones each third of OpenCLIP's joined projections; here they
stay views of the file's own memory.
"""

from __future__ import annotations

import re
from typing import Any

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from ourvidz_serverless.models.loading.weight_files import Tensors

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}


def convert(network: str, checkpoint: Tensors, config: Any) -> Tensors:
    """The tensors of one of SDXL's networks, with diffusers' names.

    Raises ValueError, with the reason, if the file does not have all tensors of the network.
    """
    try:
        return CONVERSIONS[network](checkpoint, config)
    except (LookupError, AttributeError, TypeError) as exc:
        raise ValueError(f"its {network} has not all tensors of SDXL's") from exc


def unet(checkpoint: Tensors, config: Any) -> Tensors:
    tensors: Tensors = convert_ldm_unet_checkpoint(_of(checkpoint, "unet"), config)
    return tensors


def vae(checkpoint: Tensors, config: Any) -> Tensors:
    tensors: Tensors = convert_ldm_vae_checkpoint(_of(checkpoint, "vae"), config)
    return tensors


def text_encoder(checkpoint: Tensors, config: Any) -> Tensors:
    tensors: Tensors = convert_ldm_clip_checkpoint(_of(checkpoint, "text_encoder"))
    return tensors


def text_encoder_2(checkpoint: Tensors, config: Any) -> Tensors:
    mine, prefix = _of(checkpoint, "text_encoder_2"), PREFIXES["text_encoder_2"]
    plain = {name: each for name, each in mine.items() if ".in_proj_" not in name}
    tensors: Tensors = convert_open_clip_checkpoint(_HasConfig(config), plain, prefix=prefix)
    for name, joined in mine.items():
        if match := re.search(r"resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", name):
            for letter, part in zip("qkv", joined.chunk(3), strict=True):
                layer = f"text_model.encoder.layers.{match[1]}.self_attn"
                tensors[f"{layer}.{letter}_proj.{match[2]}"] = part
    return tensors


def with_own_channels(config: dict[str, Any], checkpoint: Tensors) -> dict[str, Any]:
    """A UNet's configuration with the channels that the file's UNet takes: nine for inpainting.

    Files of both kinds are published without a configuration, beside the same one of SDXL's.
    """
    first = checkpoint.get(f"{PREFIXES['unet']}input_blocks.0.0.weight")
    return config if first is None else {**config, "in_channels": first.shape[1]}


class _HasConfig:
    """The only attribute that diffusers reads of a model whose weights it converts."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _of(checkpoint: Tensors, network: str) -> Tensors:
    prefix = PREFIXES[network]
    found = {name: each for name, each in checkpoint.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"no tensor of it begins with {prefix}, as SDXL's {network} does")
    return found


CONVERSIONS = {
    "unet": unet,
    "vae": vae,
    "text_encoder": text_encoder,
    "text_encoder_2": text_encoder_2,
}
