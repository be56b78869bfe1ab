"""The SDXL baseline: diffusers' own pipeline on the worker's weights, called as documented."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from ourvidz_serverless.models.sdxl.loader import POCKET

PROMPT = "green hills under a blue sky, a yellow sun on the right"


def load_baseline_pipeline() -> Any:
    """The pocket SDXL as diffusers loads it: in fp16 on a GPU, without one in fp32 on the CPU."""
    has_gpu = torch.cuda.is_available()
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(POCKET),
        config=str(POCKET.with_suffix("")),
        local_files_only=True,
        add_watermarker=False,
        torch_dtype=torch.float16 if has_gpu else torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if has_gpu else "cpu")


def baseline_picture(pipe: Any, *, side: int, steps: int, seed: int) -> Image.Image:
    """One square picture by the pipeline's `__call__`, from the same noise as the worker's."""
    return pipe(
        prompt=PROMPT,
        width=side,
        height=side,
        num_inference_steps=steps,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
