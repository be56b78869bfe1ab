"""What a job asks of an SDXL model, and the model as jobs call it. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.prompt_weighting import Prompt

#: What an IP-Adapter keeps of its image.
Keeps = Literal["style", "composition", "character"]


@dataclass(frozen=True, slots=True)
class StartImage:
    """Image-to-image: the generation starts from this image, of the request's size.

    `strength` is the share of the denoising steps that run, from 0 to 1; at least one step runs.
    With a `mask`, of mode L and the same size, it is inpainting: only where the mask is not black
    are pixels made anew. The others come back nearly unchanged, by way of the VAE.
    """

    image: Image.Image
    strength: float
    mask: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class IpAdapterImage:
    """An image, of any size, whose style, composition or character the IP-Adapter keeps.

    `scale` weights the adapter's attention, from 0 to 1.
    """

    image: Image.Image
    keeps: Keeps
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image for each seed. `size` is width and height, multiples of 8.

    Without a `negative` the unconditional embedding is the checkpoint's own. `scheduler` is the
    checkpoint's own where it is None. `loras` are files with their scales, and `speed` is a preset
    of `models.speed`. `has_distilled_lora`: one of the LoRAs was made for few steps. `clip_skip`
    layers of the text encoders are left out for the prompt, beside the last one.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    size: tuple[int, int]
    steps: int
    guidance_scale: float
    negative: Prompt | None = None
    scheduler: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    reference: StartImage | IpAdapterImage | None = None
    speed: str = "exact"
    has_distilled_lora: bool = False
    clip_skip: int = 0

    @property
    def start(self) -> StartImage | None:
        return self.reference if isinstance(self.reference, StartImage) else None

    @property
    def mask(self) -> Image.Image | None:
        """Where the start image is repainted; None without one, or if all of it may change."""
        return self.start.mask if self.start else None

    @property
    def ip_adapter_image(self) -> IpAdapterImage | None:
        return self.reference if isinstance(self.reference, IpAdapterImage) else None


class Loras(Protocol):
    """The LoRAs that a worker has, or may download.

    A source is a name or an https URL. Both methods raise InvalidPrompt for a source that they do
    not have or do not allow.
    """

    def path(self, source: str, user_id: str) -> Path:
        """The file of a name, or of a URL that the user's job has fetched."""

    def fetch(self, source: str, user_id: str, deadline: Deadline) -> Path:
        """The same file, downloaded if necessary. Raises ModelLoadError if that fails."""


class ImageModel(Protocol):
    """An SDXL model, as jobs call it."""

    @property
    def loras(self) -> Loras: ...

    @property
    def has_ip_adapter(self) -> bool: ...

    @property
    def is_inpainting_checkpoint(self) -> bool:
        """Whether the UNet was trained to read a mask."""

    def prefetch(self) -> None:
        """Start to move the weights to the device."""

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        """The images by their seeds, uint8 (height, width, 3), each as soon as it is decoded.

        Raises OutOfMemory if not even one image fits the device, ModelLoadError if a LoRA does not
        fit the checkpoint, and whatever `progress` raises.
        """
