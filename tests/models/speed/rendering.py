"""Small jobs and single forwards for the tests of speed presets, caches and kernels."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from tests.fakes import tiny_sdxl, tiny_wan

CPU = Device(torch.device("cpu"), torch.float32)
#: The number of steps of these jobs.
STEPS = 10


def render_image(model: Any, prompt: str = "a red sun", **changes: Any) -> np.ndarray:
    """The image of a small job with these changes, uint8 (height, width, 3)."""
    small = {"negative": plain("blurry"), "size": (128, 64), "steps": STEPS}
    (picture,) = tiny_sdxl.render(model, prompt, **{**small, **changes})
    return picture


def render_video(model: Any, **options: Any) -> np.ndarray:
    """All frames of a small job with these options, uint8 (frames, height, width, 3)."""
    return tiny_wan.render(model, steps=STEPS, negative="blurry", **options)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two images, in grey levels."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@contextmanager
def counting(*modules: Any) -> Iterator[Counter[Any]]:
    """Count the forwards of each module."""
    calls: Counter[Any] = Counter()
    hooks = [
        each.register_forward_hook(lambda module, *call: calls.update([module])) for each in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def unet_call(unet: Any) -> dict[str, Any]:
    """The arguments of one forward of a UNet."""
    width = unet.config.projection_class_embeddings_input_dim
    width -= 6 * unet.config.addition_time_embed_dim
    torch.manual_seed(0)
    return {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, width), "time_ids": torch.ones(1, 6)},
        "return_dict": False,
    }


def transformer_call(transformer: Any) -> dict[str, Any]:
    """The arguments of one forward of a WAN network."""
    torch.manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 16, 3, 6, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, transformer.config.text_dim),
        "return_dict": False,
    }
    if hasattr(transformer, "vace_blocks"):
        channels = transformer.config.vace_in_channels
        call["control_hidden_states"] = torch.randn(1, channels, 3, 6, 8)
    return call
