"""What is small enough to be quick: jobs, a LoRA, and a VAE that no pocket model has."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ourvidz_serverless.models.sdxl import pipeline as sdxl
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from ourvidz_serverless.settings import Settings

PICTURE: dict[str, Any] = {
    "prompt": plain("a red circle"),
    "negative_prompt": None,
    "seeds": [3],
    "width": 64,
    "height": 64,
    "num_inference_steps": 10,
    "guidance_scale": 6.0,
}


def write_lora(path: Path, *layers: str) -> None:
    """A LoRA of these layers that PEFT made for the pocket UNet."""
    unet = sdxl.load(Settings())._pipe.unet
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False))
    weights = get_peft_model_state_dict(unet)
    save_file({f"unet.{key}": each for key, each in weights.items()}, path)


def narrow_vae() -> AutoencoderKL:
    """SDXL's own layers, attention in the middle included, a few channels wide."""
    torch.manual_seed(0)
    made = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )
    return made.eval().requires_grad_(False)
