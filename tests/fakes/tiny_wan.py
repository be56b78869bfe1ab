"""A WAN 2.1 of random weights, and diffusers' pipelines of the same weights.

With its VACE network every reference changes every pixel.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from builder import pocket_wan
from ourvidz_serverless.models.progress import NoProgress, Progress
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.settings import Settings

#: A request that takes a fraction of a second.
SMALL = VideoRequest(
    prompt="a red circle", seed=3, size=(48, 32), num_frames=9, steps=4, guidance_scale=5.0
)
#: In bytes. A safetensors header grows in steps of 8.
CACHE_LINE, HEADER_STEP = 64, 8
VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)


def write_wan(folder: Path, seed: int = 1) -> Settings:
    """A text-to-video folder and a VACE folder with the same weights, and the settings for them."""
    pipe = pocket_wan.assemble(seed)
    pipe.save_pretrained(folder / "wan")
    vace = pocket_wan.with_references(pipe.transformer)
    torch.manual_seed(seed)
    for name, weight in vace.named_parameters():
        # An untrained VACE adds nothing to the network. These weights make it add much.
        if name.startswith("vace_blocks") and ".proj_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    vace.save_pretrained(folder / "vace" / "transformer")
    for weights in folder.rglob("*.safetensors"):
        align(weights)
    return Settings(
        families=("wan",), wan_model=str(folder / "wan"), wan_vace_model=str(folder / "vace")
    )


def align(weights: Path) -> None:
    """Align a file's tensors to cache lines, as torch aligns its own memory.

    A mapped weight has the alignment that its file has, and on some processors the last bits of a
    matrix product depend on it. We hold the weights that T2V and VACE share once, from T2V's file;
    diffusers reads the same weights from VACE's file.
    """
    tensors = load_file(weights)
    for filler in range(CACHE_LINE // HEADER_STEP):
        save_file(tensors, weights, {"format": "pt", "filler": " " * HEADER_STEP * filler})
        if _header_size(weights) % CACHE_LINE == 0:
            return


def _header_size(weights: Path) -> int:
    with weights.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def write_i2v(folder: Path, two_frames: bool = False) -> Path:
    """The parts of a 14B image-to-video folder: 36 input channels, and a CLIP image encoder."""
    torch.manual_seed(int(two_frames))
    channels = {"in_channels": 36, "image_dim": VISION.hidden_size}
    # FLF2V reads two images, and adds a position to each of their patches.
    patches = {"pos_embed_seq_len": 2 * 17} if two_frames else {}
    WanTransformer3DModel(**{**pocket_wan.TRANSFORMER, **channels, **patches}).save_pretrained(
        folder / "transformer"
    )
    CLIPVisionModel(VISION).save_pretrained(folder / "image_encoder")
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder / "image_processor")
    return folder


def render(
    model: WanModel,
    prompt: str = SMALL.prompt,
    progress: Progress | None = None,
    **changes: Any,
) -> np.ndarray:
    """All frames of `SMALL` with these changes, uint8 (frames, height, width, 3)."""
    request = replace(SMALL, prompt=prompt, **changes)
    return np.concatenate(list(model.generate(request, progress or NoProgress())))


@contextmanager
def out_of_memory(wan: WanModel, times: int) -> Iterator[None]:
    """The text-to-video network raises out-of-memory errors for `times` forwards, then works."""
    left = times

    def fail(*call: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = wan.networks["t2v"].transformer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def through_diffusers(pipe: Any, request: VideoRequest = SMALL, **options: Any) -> np.ndarray:
    """The same request through a pipeline of diffusers, with further options of the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    width, height = request.size
    frames = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative,
        width=width,
        height=height,
        num_frames=request.num_frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **options,
    ).frames
    return (frames[0] * 255).round().astype(np.uint8)


def diffusers_t2v(settings: Settings) -> Any:
    """diffusers' text-to-video pipeline of the same weights."""
    return WanPipeline.from_pretrained(settings.wan_model)


def diffusers_vace(settings: Settings) -> Any:
    """diffusers' VACE pipeline of the same weights."""
    parts = diffusers_t2v(settings).components
    parts["transformer"] = WanVACETransformer3DModel.from_pretrained(
        f"{settings.wan_vace_model}/transformer"
    )
    return WanVACEPipeline(**parts)


def flow_match(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    """An image of coarse noise that depends on the seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def data_uri(image: Image.Image) -> str:
    """An image as a reference that needs no download."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 (frames, height, width, 3)."""
    with av.open(str(path)) as file:
        return np.stack([each.to_ndarray(format="rgb24") for each in file.decode(video=0)])
