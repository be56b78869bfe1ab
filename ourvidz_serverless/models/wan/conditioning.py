"""What WAN's networks are told of given frames: VACE's control latents, or an I2V's channels.

VACE (arXiv:2503.07598) reads a video in which known frames stand and unknown ones are grey, with
a mask; a subject that is no frame stands before the video, as frames of its own. I2V and FLF2V
(WAN 2.1, 14B) read the known frames' latents beside the noise, channel by channel, and the
pictures once more through CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ourvidz_serverless.models.wan.vae import VideoVae

#: VACE's word for "unknown", as in diffusers' documentation of its pipeline.
GREY = (128, 128, 128)


@dataclass(frozen=True, slots=True)
class Given:
    """What is given of a video: frames of its very size, and how strongly VACE holds to them."""

    first: Image.Image | None = None
    last: Image.Image | None = None
    subject: Image.Image | None = None
    scale: float = 1.0

    def __bool__(self) -> bool:
        return any((self.first, self.last, self.subject))

    def known(self, num_frames: int) -> dict[int, Image.Image]:
        """The given frames by their place in the video."""
        # Of a single frame the two places are one.
        places = ((0, self.first), (num_frames - 1, self.last))
        return {place: image for place, image in places if image}


@dataclass(frozen=True, slots=True)
class Condition:
    """How a network hears of it: `beside` joins the noise as channels, `words` go by keyword.

    `lead` is how many latent frames stand before the video's own.
    """

    words: Mapping[str, Any] = field(default_factory=dict)
    beside: torch.Tensor | None = None
    lead: int = 0


@torch.inference_mode()
def for_vace(
    given: Given, transformer: Any, vae: VideoVae, num_frames: int, size: tuple[int, int]
) -> Condition:
    """VACE's control latents: what is known, what is not, and the mask between the two."""
    known = given.known(num_frames)
    unknown = torch.tensor([float(place not in known) for place in range(num_frames)])
    grey = vae.pixels([Image.new("RGB", size, GREY)]) if known else torch.zeros(1, 3, 1, 1, 1)
    video = _film(known, vae, num_frames, size, fill=grey)
    mask = unknown.to(video.device).view(1, 1, -1, 1, 1)
    control = torch.cat([vae.encode(video * (1 - mask)), vae.encode(video * mask)], dim=1)
    masks = _masks(unknown, control, vae.spatial)
    if given.subject:
        picture = vae.encode(vae.pixels([given.subject]))
        control = torch.cat([torch.cat([picture, torch.zeros_like(picture)], 1), control], 2)
        masks = torch.cat([torch.zeros_like(masks[:, :, :1]), masks], dim=2)
    scale = torch.full((len(transformer.config.vace_layers),), given.scale)
    words = {
        "control_hidden_states": torch.cat([control, masks], dim=1).to(transformer.dtype),
        "control_hidden_states_scale": scale.to(control.device, transformer.dtype),
    }
    return Condition(words, lead=int(given.subject is not None))


def _film(
    known: Mapping[int, Image.Image],
    vae: VideoVae,
    num_frames: int,
    size: tuple[int, int],
    fill: torch.Tensor,
) -> torch.Tensor:
    """A video (1, 3, frames, height, width) of the known frames, and `fill` between them."""
    width, height = size
    video = fill.to(vae.device).expand(1, 3, num_frames, height, width).clone()
    for place, image in known.items():
        video[:, :, place] = vae.pixels([image])[:, :, 0]
    return video


def _masks(unknown: torch.Tensor, control: torch.Tensor, spatial: int) -> torch.Tensor:
    """One mask a pixel of each latent cell, (1, spatial^2, frames, height, width).

    Each latent frame takes the mask of the frame in its middle, which is how VACE was trained; so
    a single known frame among unknown ones shows in the latents alone.
    """
    _, _, frames, height, width = control.shape
    middle = torch.nn.functional.interpolate(
        unknown.view(1, 1, -1), size=frames, mode="nearest-exact"
    )
    masks = middle.to(control.device).view(1, 1, frames, 1, 1)
    return masks.expand(1, spatial * spatial, frames, height, width)


@dataclass(frozen=True, slots=True)
class Eyes:
    """The CLIP encoder that a 14B image-to-video network looks at pictures with."""

    processor: Any
    model: Any

    @torch.inference_mode()
    def look(self, images: Sequence[Image.Image], device: torch.device) -> torch.Tensor:
        """What is seen in pictures: (pictures, patches, dim), of the layer before the last."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(
            device, self.model.dtype
        )
        return self.model(**inputs, output_hidden_states=True).hidden_states[-2]


@torch.inference_mode()
def for_i2v(given: Given, vae: VideoVae, num_frames: int, size: tuple[int, int]) -> Condition:
    """The known frames as channels beside the noise, with a mask that marks them."""
    known = given.known(num_frames)
    latents = vae.encode(_film(known, vae, num_frames, size, fill=torch.zeros(1, 3, 1, 1, 1)))
    marks = torch.zeros(1, 1, num_frames, *latents.shape[3:], device=vae.device)
    marks[:, :, list(known)] = 1
    # The first latent frame holds one frame where the others hold four.
    marks = torch.cat([marks[:, :, :1].repeat_interleave(vae.temporal, 2), marks[:, :, 1:]], 2)
    marks = marks.view(1, -1, vae.temporal, *latents.shape[3:]).transpose(1, 2)
    return Condition(beside=torch.cat([marks, latents], dim=1))
