"""The references of a video as inputs of WAN's networks.

VACE (arXiv:2503.07598) reads a control video, whose known frames are given and whose unknown ones
are grey, with a mask. A subject, which is no frame, comes as frames of its own before the video.
I2V and FLF2V (WAN 2.1, 14B) read the latents of the known frames as further channels of the noise,
and the images once more through CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.models.wan.vae import VideoVae

#: VACE's colour of unknown frames, as in diffusers' documentation of its pipeline.
GREY = (128, 128, 128)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The inputs of a network other than the noise and the prompt.

    `extra_kwargs` are keyword arguments of its forward. `concat_latents` are concatenated to the
    noise as channels. `leading_frames` is the number of latent frames before the video's own.
    """

    extra_kwargs: Mapping[str, Any] = field(default_factory=dict)
    concat_latents: torch.Tensor | None = None
    leading_frames: int = 0


@torch.inference_mode()
def vace_conditioning(request: VideoRequest, transformer: Any, vae: VideoVae) -> Conditioning:
    """VACE's control latents: the known frames, the unknown ones, and the mask of both."""
    references, known = request.references, request.references.frames(request.num_frames)
    unknown = torch.tensor([float(index not in known) for index in range(request.num_frames)])
    grey = torch.zeros(1, 3, 1, 1, 1)
    if known:
        grey = vae.video_of([Image.new("RGB", request.size, GREY)])
    video = _control_video(request, vae, fill=grey)
    mask = unknown.to(video.device).view(1, 1, -1, 1, 1)
    control = torch.cat([vae.encode(video * (1 - mask)), vae.encode(video * mask)], dim=1)
    masks = _latent_masks(unknown, control, vae.spatial)
    if references.subject:
        subject = vae.encode(vae.video_of([references.subject]))
        control = torch.cat([torch.cat([subject, torch.zeros_like(subject)], 1), control], 2)
        masks = torch.cat([torch.zeros_like(masks[:, :, :1]), masks], dim=2)
    scale = torch.full((len(transformer.config.vace_layers),), references.scale)
    extra_kwargs = {
        "control_hidden_states": torch.cat([control, masks], dim=1).to(transformer.dtype),
        "control_hidden_states_scale": scale.to(control.device, transformer.dtype),
    }
    return Conditioning(extra_kwargs, leading_frames=int(references.subject is not None))


@torch.inference_mode()
def i2v_conditioning(request: VideoRequest, vae: VideoVae) -> Conditioning:
    """The latents of the known frames, and a mask that marks them, as channels."""
    video = _control_video(request, vae, fill=torch.zeros(1, 3, 1, 1, 1))
    latents = vae.encode(video)
    mask = torch.zeros(1, 1, request.num_frames, *latents.shape[3:], device=vae.device)
    mask[:, :, list(request.references.frames(request.num_frames))] = 1
    # The first latent frame holds one frame, each of the others holds four.
    mask = torch.cat([mask[:, :, :1].repeat_interleave(vae.temporal, 2), mask[:, :, 1:]], 2)
    mask = mask.view(1, -1, vae.temporal, *latents.shape[3:]).transpose(1, 2)
    return Conditioning(concat_latents=torch.cat([mask, latents], dim=1))


def _control_video(request: VideoRequest, vae: VideoVae, fill: torch.Tensor) -> torch.Tensor:
    """A video (1, 3, frames, height, width): the known frames, and `fill` in the others."""
    width, height = request.size
    video = fill.to(vae.device).expand(1, 3, request.num_frames, height, width).clone()
    for index, image in request.references.frames(request.num_frames).items():
        video[:, :, index] = vae.video_of([image])[:, :, 0]
    return video


def _latent_masks(unknown: torch.Tensor, control: torch.Tensor, spatial: int) -> torch.Tensor:
    """One mask for each pixel of a latent cell, (1, spatial^2, frames, height, width).

    Each latent frame takes the mask of the frame in its middle, which is how VACE was trained. So
    a single known frame among unknown ones is in the latents, and not in the mask.
    """
    _, _, frames, height, width = control.shape
    middle = torch.nn.functional.interpolate(
        unknown.view(1, 1, -1), size=frames, mode="nearest-exact"
    )
    masks = middle.to(control.device).view(1, 1, frames, 1, 1)
    return masks.expand(1, spatial * spatial, frames, height, width)
