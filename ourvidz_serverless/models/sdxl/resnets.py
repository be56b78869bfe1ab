"""SDXL's residual blocks without a pass over memory that changes nothing.

diffusers divides each block's sum by `output_scale_factor`, which is 1 in all of SDXL's networks:
a kernel that reads and writes the whole picture and changes no bit. What only the next kernel reads
is overwritten by it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D


def move_fewer_bytes(network: Any) -> None:
    """Have a UNet's or a VAE's residual blocks compute as this module says."""
    for block in network.modules():
        if type(block) is ResnetBlock2D and _is_plain(block):
            block.__class__ = LeanResnet


def _is_plain(block: Any) -> bool:
    """Whether it neither scales, resizes nor normalises by the time, as SDXL's blocks do not."""
    return (
        isinstance(block.nonlinearity, torch.nn.SiLU)
        and block.output_scale_factor == 1
        and block.upsample is None
        and block.downsample is None
        # A VAE's have another name for it, and no time.
        and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
        and not block.skip_time_act
    )


class LeanResnet(ResnetBlock2D):
    """A plain block of SDXL. `temb` is the embedded time; a VAE has none."""

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))
        if self.time_emb_proj is not None and temb is not None:
            hidden += self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=True))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        hidden += input_tensor
        return hidden
