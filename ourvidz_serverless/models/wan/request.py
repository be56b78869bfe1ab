"""What a job asks of a WAN model, and the model as jobs call it. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from ourvidz_serverless.models.chat.request import TextModel
from ourvidz_serverless.models.progress import Progress

#: The network that serves a job: for text alone, for references, for a first frame, or for a
#: first and a last one.
Route = Literal["t2v", "vace", "i2v", "flf2v"]


@dataclass(frozen=True, slots=True)
class References:
    """Images that guide a video, each of the video's own size.

    `first` and `last` are frames of the video. `subject` is an image of something that the video
    shows, and is no frame. `scale` is VACE's `conditioning_scale`, from 0 to 1: how closely the
    video follows the images. The other networks have no scale.
    """

    first: Image.Image | None = None
    last: Image.Image | None = None
    subject: Image.Image | None = None
    scale: float = 1.0

    def __bool__(self) -> bool:
        return any((self.first, self.last, self.subject))

    def frames(self, num_frames: int) -> dict[int, Image.Image]:
        """The known frames by their index in a video of so many frames."""
        # In a video of one frame, both indices are 0.
        places = ((0, self.first), (num_frames - 1, self.last))
        return {index: image for index, image in places if image}


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """One video. `size` is width and height, multiples of 16; `num_frames` is 4k + 1.

    `solver` and `flow_shift` are the checkpoint's own where they are None, and `speed` is a preset
    of `models.speed`.
    """

    prompt: str
    seed: int
    size: tuple[int, int]
    num_frames: int
    steps: int
    guidance_scale: float
    negative: str | None = None
    solver: str | None = None
    flow_shift: float | None = None
    speed: str = "exact"
    references: References = References()


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The solver and the flow shift of a checkpoint, for jobs that name none.

    A step-distilled checkpoint has `distilled_steps`, and perhaps the `distilled_timesteps` that
    its authors published. Its jobs take these steps and its solver, and no guidance.
    """

    solver: str
    flow_shift: float
    distilled_steps: int | None = None
    distilled_timesteps: tuple[int, ...] = ()

    @property
    def is_distilled(self) -> bool:
        return self.distilled_steps is not None


class VideoModel(Protocol):
    """A WAN model, as jobs call it.

    `enhancer` is the chat model that rewrites prompts; None where this worker has none.
    `enhancement_prompt` is the system prompt of enhanced jobs that bring none.
    """

    enhancer: TextModel | None
    enhancement_prompt: str
    sampling: SamplingDefaults

    def prefetch(self) -> None:
        """Start to move the weights that a job needs first to the device."""

    def route(self, references: References) -> Route | None:
        """The network for a job with these references; None where this worker has none."""

    def generate(self, request: VideoRequest, progress: Progress) -> Generator[np.ndarray]:
        """A video's frames, uint8 (frames, height, width, 3), a few at a time as they are decoded.

        Raises OutOfMemory if the video does not fit the device, ValueError if there is no network
        for its references, and whatever `progress` raises.
        """
