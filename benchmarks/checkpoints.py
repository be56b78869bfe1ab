"""Checkpoints to load: an SDXL of random weights, as one file and as a folder, of either size.

Random weights have the size, the shapes and the names of trained ones, and need no hub. The single
file lies beside the folder, which is its configuration too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.architectures import SDXL_TEXT, SDXL_TEXT_2, SDXL_UNET, SDXL_VAE
from builder import pocket_sdxl

Size = Literal["pocket", "full"]

#: As those who serve it in fp16 take it (madebyollin/sdxl-vae-fp16-fix).
VAE_IN_HALF = {**SDXL_VAE, "force_upcast": False}

#: How many random numbers are drawn; tensors repeat them.
DRAWN = 1 << 20


def write_sdxl(folder: Path, size: Size) -> Path:
    """Write `sdxl.safetensors` and `sdxl/` into a folder, in fp16, once; returns the file's path.

    6.9 GB each at full size.
    """
    path = folder / "sdxl.safetensors"
    if not path.exists():
        pipe = pocket_sdxl.assemble() if size == "pocket" else _full()
        pipe.to(dtype=torch.float16)
        pipe.save_pretrained(folder / "sdxl")
        for name in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(pipe, name)
            pocket_sdxl.write_tokenizer(folder / "sdxl" / name, tokenizer.pad_token)
        scratch = path.with_suffix(".part")
        tensors = pocket_sdxl.original_layout(pipe)
        save_file({name: each.contiguous() for name, each in tensors.items()}, scratch)
        scratch.rename(path)
    return path


def _full() -> Any:
    tokenizers = [pocket_sdxl.tokenizer(pad) for pad in (pocket_sdxl.EOS, "!")]
    with init_empty_weights():
        networks = {
            "unet": UNet2DConditionModel(**SDXL_UNET),
            "vae": AutoencoderKL(**VAE_IN_HALF),
            "text_encoder": CLIPTextModel(_text_config(SDXL_TEXT, tokenizers[0])),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(SDXL_TEXT_2, tokenizers[1])),
        }
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    for network in networks.values():
        _fill(network, drawn)
    return StableDiffusionXLPipeline(
        **networks,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=EulerDiscreteScheduler(**pocket_sdxl.SCHEDULER),
        add_watermarker=False,
    )


def _text_config(width: dict[str, Any], tokenizer: Any) -> CLIPTextConfig:
    # The vocabulary's size is CLIP's, of which the little tokenizer knows a part.
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextConfig(**width, **ends, vocab_size=49408, max_position_embeddings=77)


def _fill(network: Any, drawn: torch.Tensor) -> None:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                count = parameter.numel()
                values = drawn.repeat(-(-count // DRAWN))[:count].view(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
