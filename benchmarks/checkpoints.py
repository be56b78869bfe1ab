"""SDXL checkpoints with random weights, as a single file and as a folder, pocket or full size.

Random weights have the sizes, shapes and names of trained ones, and need no download. The single
file is beside the folder, which also holds its configuration.
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

#: The VAE that runs in fp16 (madebyollin/sdxl-vae-fp16-fix).
VAE_FP16 = {**SDXL_VAE, "force_upcast": False}

#: How many random numbers are drawn. All tensors repeat these.
NUM_RANDOM = 1 << 20


def write_sdxl(folder: Path, size: Size) -> Path:
    """The path of `sdxl.safetensors` in a folder, in fp16, with `sdxl/` beside it.

    Both are written unless they are there already. At full size each has 6.9 GB.
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
            "vae": AutoencoderKL(**VAE_FP16),
            "text_encoder": CLIPTextModel(_text_config(SDXL_TEXT, tokenizers[0])),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(SDXL_TEXT_2, tokenizers[1])),
        }
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(NUM_RANDOM, generator=generator).mul_(0.02).half()
    for network in networks.values():
        _fill(network, values)
    return StableDiffusionXLPipeline(
        **networks,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=EulerDiscreteScheduler(**pocket_sdxl.SCHEDULER),
        add_watermarker=False,
    )


def _text_config(sizes: dict[str, Any], tokenizer: Any) -> CLIPTextConfig:
    # The vocabulary has CLIP's size. The pocket tokenizer has only a part of these tokens.
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextConfig(**sizes, **ids, vocab_size=49408, max_position_embeddings=77)


def _fill(network: Any, values: torch.Tensor) -> None:
    """Replace each parameter by the values, repeated in its shape."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            count = parameter.numel()
            filled = values.repeat(-(-count // NUM_RANDOM))[:count].view(parameter.shape)
            setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
