"""A real WAN 2.1 of random weights, whose references tell in every pixel; and its peers."""

from __future__ import annotations

import base64
import io
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
from ourvidz_serverless.models.wan import pipeline as models
from ourvidz_serverless.settings import Settings

#: Small enough for a fraction of a second.
SMALL: dict[str, Any] = {
    "width": 64,
    "height": 48,
    "num_frames": 9,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
}
#: In bytes; a safetensors header grows by steps of 8.
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
    """A text-to-video folder and a VACE one around its weights, and the settings that name them."""
    pipe = pocket_wan.assemble(seed)
    pipe.save_pretrained(folder / "wan")
    vace = pocket_wan.with_references(pipe.transformer)
    torch.manual_seed(seed)
    for name, weight in vace.named_parameters():
        # A VACE begins by adding nothing; this one adds much.
        if name.startswith("vace_blocks") and ".proj_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    vace.save_pretrained(folder / "vace" / "transformer")
    for weights in folder.rglob("*.safetensors"):
        align(weights)
    return Settings(
        families=("wan",), wan_model=str(folder / "wan"), wan_vace_model=str(folder / "vace")
    )


def align(weights: Path) -> None:
    """Let a file's tensors begin on cache lines, as those of torch's own memory do.

    A mapped weight lies where its file has it, and on some processors a matrix product's last
    bits hang on that. Ours holds what T2V and VACE share once, from T2V's file; its peer reads
    the same weights from VACE's.
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
    """A 14B image-to-video folder's parts: 36 channels, and a CLIP encoder that looks."""
    torch.manual_seed(int(two_frames))
    channels = {"in_channels": 36, "image_dim": VISION.hidden_size}
    # Where two pictures are looked at, FLF2V adds a position to each of their patches.
    patches = {"pos_embed_seq_len": 2 * 17} if two_frames else {}
    WanTransformer3DModel(**{**pocket_wan.TRANSFORMER, **channels, **patches}).save_pretrained(
        folder / "transformer"
    )
    CLIPVisionModel(VISION).save_pretrained(folder / "image_encoder")
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder / "image_processor")
    return folder


def render(model: models.Wan, prompt: str = "a red circle", **options: Any) -> np.ndarray:
    """All frames of a small video at once, uint8 (frames, height, width, 3)."""
    options = {"negative_prompt": None, "seed": 3, **SMALL, **options}
    return np.concatenate(list(model.generate(prompt=prompt, **options)))


def through_diffusers(pipe: Any, prompt: str = "a red circle", **options: Any) -> np.ndarray:
    """The same by a pipeline of diffusers."""
    pipe.set_progress_bar_config(disable=True)
    options = {"negative_prompt": None, **SMALL, **options}
    generator = torch.Generator().manual_seed(3)
    frames = pipe(prompt=prompt, generator=generator, output_type="np", **options).frames
    return (frames[0] * 255).round().astype(np.uint8)


def t2v_peer(settings: Settings) -> Any:
    return WanPipeline.from_pretrained(settings.wan_model)


def vace_peer(settings: Settings) -> Any:
    parts = t2v_peer(settings).components
    parts["transformer"] = WanVACETransformer3DModel.from_pretrained(
        f"{settings.wan_vace_model}/transformer"
    )
    return WanVACEPipeline(**parts)


def flow_match(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    """A picture of coarse noise, like no other seed's."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def data_uri(image: Image.Image) -> str:
    """A picture as a reference that needs no network."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 (frames, height, width, 3)."""
    with av.open(str(path)) as file:
        return np.stack([each.to_ndarray(format="rgb24") for each in file.decode(video=0)])
