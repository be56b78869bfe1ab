"""SDXL's networks, and whether a checkpoint's fit together as SDXL's do (arXiv:2307.01952).

A UNet for inpainting takes nine channels: the latents, the mask, and the latents of what the mask
leaves of the picture. Networks of other kinds have SDXL's classes too: UNets for editing (8
channels), and the refiner. They would load, and then fail in every job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ourvidz_serverless.models.sdxl.ip_adapter import IpAdapter
from ourvidz_serverless.models.sdxl.vae import TinyVae


@dataclass(frozen=True, slots=True)
class SdxlNetworks:
    """The networks of one SDXL checkpoint, and of what the deployer adds to it.

    `pipe` is diffusers' StableDiffusionXLPipeline. It also has the tokenizers and the scheduler.
    """

    pipe: Any
    ip_adapter: IpAdapter | None = None
    tiny_vae: TinyVae | None = None

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the UNet takes a mask and a masked picture beside the latents."""
        return bool(self.unet.config.in_channels != self.vae.config.latent_channels)

    def parts(self) -> dict[str, list[Any]]:
        """The networks, set to evaluation, by the stage of a job that needs them.

        `text` and `image` are the encoders of prompts and of an IP-Adapter's image.
        """
        parts: dict[str, list[Any]] = {name: [] for name in ("text", "image", "unet", "vae")}
        parts["tiny"] = [self.tiny_vae.network] if self.tiny_vae else []
        for name, component in self.pipe.components.items():
            if isinstance(component, torch.nn.Module):
                parts[name.split("_")[0]].append(component.eval())
        return parts


#: The original size, the crop and the target size, two numbers each.
SIZES = 6


def check_networks(unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any) -> None:
    """Raise ValueError, with the reason, if these configurations do not form an SDXL."""
    _check_channels(unet, vae)
    _check_conditions(unet)
    _check_width(
        "the hidden states of its text encoders",
        text_encoder.hidden_size + text_encoder_2.hidden_size,
        unet.cross_attention_dim,
    )
    _check_width(
        "its pooled text and six sizes",
        text_encoder_2.projection_dim + SIZES * (unet.addition_time_embed_dim or 0),
        unet.projection_class_embeddings_input_dim,
    )


def _check_channels(unet: Any, vae: Any) -> None:
    channels = vae.latent_channels
    if unet.in_channels not in (channels, 2 * channels + 1):
        raise ValueError(
            f"its UNet takes {unet.in_channels} channels, as one for editing does, but its latents "
            f"have {channels}, and with a mask for inpainting {2 * channels + 1}"
        )
    if unet.out_channels != channels:
        raise ValueError(
            f"its UNet gives {unet.out_channels} channels, but its latents have {channels}"
        )
    for name in ("latents_mean", "latents_std"):
        values = vae.get(name)
        if values is not None and len(values) != channels:
            raise ValueError(f"its VAE has {len(values)} {name}, but its latents have {channels}")


def _check_conditions(unet: Any) -> None:
    """Check the UNet's conditions beside the text: SDXL's has sizes and nothing else."""
    wanted = {
        "addition_embed_type": "text_time",
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    }
    for name, value in wanted.items():
        if unet.get(name) != value:
            raise ValueError(f"its UNet has {name} {unet.get(name)}, but SDXL's has {value}")


def _check_width(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(
            f"{what} are {found} numbers wide, but its UNet takes {wanted}: "
            "it is another kind, such as a refiner"
        )
