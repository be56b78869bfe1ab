"""Small SDXL jobs on the pocket model, a LoRA for it, and a VAE that no pocket model has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ourvidz_serverless.models.progress import NoProgress, Progress
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.prompt_weighting import Prompt, plain
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.settings import Settings

PICTURE = ImageRequest(
    prompt=plain("a red sun"), seeds=(3,), size=(64, 64), steps=10, guidance_scale=6.0
)


def image_request(prompt: str | Prompt = PICTURE.prompt, **changes: Any) -> ImageRequest:
    """`PICTURE` with these changes."""
    return replace(PICTURE, prompt=plain(prompt) if isinstance(prompt, str) else prompt, **changes)


def render(
    model: SdxlModel,
    prompt: str | Prompt = PICTURE.prompt,
    progress: Progress | None = None,
    **changes: Any,
) -> list[np.ndarray]:
    """The images of `PICTURE` with these changes, each uint8 (height, width, 3)."""
    return list(model.generate(image_request(prompt, **changes), progress or NoProgress()))


def through_diffusers(pipe: Any, request: ImageRequest = PICTURE, **options: Any) -> np.ndarray:
    """The first image of the same request by a pipeline of diffusers, with its further options."""
    pipe.set_progress_bar_config(disable=True)
    width, height = request.size
    # An image-to-image pipeline takes the size from the image.
    size = {} if "strength" in options else {"width": width, "height": height}
    images = pipe(
        prompt=_text(request.prompt),
        negative_prompt=request.negative and _text(request.negative),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seeds[0]),
        output_type="np",
        **size,
        **options,
    ).images
    return (images[0] * 255).round().astype(np.uint8)


def _text(prompt: Prompt) -> str:
    return "".join(fragment.text for fragment in prompt)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two images, in grey levels."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def write_lora(path: Path, *layers: str) -> None:
    """A LoRA of these layers that PEFT made for the pocket UNet."""
    unet = loader.load(Settings()).networks.unet
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False))
    weights = get_peft_model_state_dict(unet)
    save_file({f"unet.{key}": each for key, each in weights.items()}, path)


def narrow_vae() -> AutoencoderKL:
    """A VAE with SDXL's own layers, its attention in the middle included, a few channels wide."""
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
