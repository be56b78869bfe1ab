"""The full-size networks with random weights, and their counted FLOPs.

They have the speed and the memory of the published ones and need no download. The configurations
are the public ones of stabilityai/stable-diffusion-xl-base-1.0, Wan-AI/Wan2.1-T2V-1.3B-Diffusers
and Qwen/Qwen2.5-7B-Instruct. The tokenizers are the pocket models'.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.cards import CARDS

POCKET = Path(__file__).parents[1] / "pocket"

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {
    "sample_size": 1024,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SDXL_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
SDXL_TEXT_2: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
WAN_TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
#: Wan-AI/Wan2.1-I2V-14B-480P-Diffusers: its transformer, and its image encoder, which is OpenCLIP's
#: ViT-H/14.
WAN_I2V_14B: dict[str, Any] = {
    **WAN_TRANSFORMER,
    "num_attention_heads": 40,
    "in_channels": 36,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
#: Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers: it reads two images, of 257 patches each.
WAN_FLF2V_14B: dict[str, Any] = {**WAN_I2V_14B, "pos_embed_seq_len": 2 * 257}
WAN_IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
#: The defaults of the class are WAN 2.1's values.
WAN_VAE: dict[str, Any] = {}
WAN_TEXT: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
}
QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL base with random weights, on torch's default device and in its default dtype."""
    config = POCKET / "sdxl"
    with torch.device("cpu"):
        scheduler = EulerDiscreteScheduler.from_pretrained(
            config / "scheduler", prediction_type="epsilon"
        )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**SDXL_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SDXL_TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_TEXT_2)),
        tokenizer=CLIPTokenizer.from_pretrained(config / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(config / "tokenizer_2"),
        unet=UNet2DConditionModel(**SDXL_UNET),
        scheduler=scheduler,
        add_watermarker=False,
    )


def wan() -> WanPipeline:
    """WAN 2.1 T2V-1.3B with random weights, on torch's default device and in its default dtype."""
    folder = POCKET / "wan"
    with torch.device("cpu"):
        scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel(UMT5Config(**WAN_TEXT)),
        transformer=WanTransformer3DModel(**WAN_TRANSFORMER),
        vae=AutoencoderKLWan(**WAN_VAE),
        scheduler=scheduler,
    )


def chat() -> Qwen2ForCausalLM:
    """Qwen2.5-7B with random weights, on torch's default device and in its default dtype."""
    return Qwen2ForCausalLM(Qwen2Config(**QWEN_7B))


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Within this context networks are constructed on this device and in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def written(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Iterator[Path]:
    """A temporary folder with the checkpoint of the model that `make` returns."""
    with tempfile.TemporaryDirectory() as folder:
        with made_on(device, dtype):
            make().save_pretrained(folder)
        torch.cuda.empty_cache()
        yield Path(folder)


def count_flops(compute: Callable[[], object]) -> int:
    """The floating-point operations of a computation, which may run on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compute()
    return counter.get_total_flops()


def sdxl_flops(side: int, steps: int) -> int:
    """FLOPs of one square picture: guided steps, each with a batch of two, and the decoding."""
    with made_on("meta", torch.float32):
        unet, vae = UNet2DConditionModel(**SDXL_UNET), AutoencoderKL(**SDXL_VAE)
        latent = torch.empty(2, 4, side // 8, side // 8)
        text = torch.empty(2, 77, SDXL_UNET["cross_attention_dim"])
        added = {
            "text_embeds": torch.empty(2, SDXL_TEXT_2["projection_dim"]),
            "time_ids": torch.empty(2, 6),
        }
        step = count_flops(lambda: unet(latent, torch.empty(()), text, added_cond_kwargs=added))
        decode = count_flops(lambda: vae.decode(latent[:1]))
    return steps * step + decode


def wan_flops(width: int, height: int, frames: int, steps: int) -> int:
    """FLOPs of one video: guided steps of two forwards, without text encoding and decoding."""
    with made_on("meta", torch.float32):
        transformer = WanTransformer3DModel(**WAN_TRANSFORMER)
        latent = torch.empty(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        text = torch.empty(1, 512, WAN_TRANSFORMER["text_dim"])
        forward = count_flops(lambda: transformer(latent, torch.empty(1), text))
    return 2 * steps * forward


def gpu() -> tuple[float, float] | None:
    """FLOP/s in 16 bits and bytes/s of this machine's GPU; None if it is not among the `CARDS`."""
    name = torch.cuda.get_device_name()
    card = next((each for known, each in CARDS.items() if known in name), None)
    return card and (card.half, card.bytes_s)


def peak(tflops: float | None) -> float | None:
    """Peak FLOP/s of this machine's GPU: `tflops` if given, else by `CARDS`; None if unknown."""
    if tflops:
        return tflops * 1e12
    found = gpu()
    return found and found[0]


def peak_note(tflops: float | None) -> str:
    """The note below a table with floors: the peak that they assume."""
    found = peak(tflops)
    return f"Floors at {found / 1e12:.0f} TFLOP/s, by the data sheet." if found else ""
