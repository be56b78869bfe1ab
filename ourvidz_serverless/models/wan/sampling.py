"""How noise becomes the latents of a video: a checkpoint's schedulers, and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ourvidz_serverless.models.schedulers import (
    default_flow_shift,
    default_solver,
    make_dmd_scheduler,
    make_flow_scheduler,
)
from ourvidz_serverless.models.wan.request import SamplingDefaults, VideoRequest
from ourvidz_serverless.settings import Settings


def sampling_defaults(settings: Settings, config: Any) -> SamplingDefaults:
    """The defaults of a checkpoint whose scheduler has this `config`; the settings win."""
    steps, timesteps = settings.wan_distilled_steps, settings.wan_distilled_timesteps
    solver = settings.wan_distilled_solver if steps else default_solver(config)
    shift = settings.wan_flow_shift or default_flow_shift(config)
    return SamplingDefaults(solver, shift, len(timesteps) or steps, timesteps)


def make_scheduler(config: Any, defaults: SamplingDefaults, request: VideoRequest) -> Any:
    """A scheduler with the timesteps of a request set, made from a checkpoint's `config`."""
    if defaults.distilled_timesteps:
        return make_dmd_scheduler(defaults.distilled_timesteps)
    solver = request.solver or defaults.solver
    scheduler = make_flow_scheduler(config, solver, request.flow_shift or defaults.flow_shift)
    if defaults.is_distilled and solver == "euler":
        # The last timestep that diffusers sets is almost free of noise. Among few steps that is
        # one step wasted.
        sigmas = [1 - step / request.steps for step in range(request.steps)]
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        scheduler.set_timesteps(request.steps)
    return scheduler


@dataclass(frozen=True, slots=True)
class Guidance:
    """The prompts' embeddings (1, 512, dim); `negative` is None in a job without guidance."""

    positive: torch.Tensor
    negative: torch.Tensor | None
    scale: float

    def predict(self, forward: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The prediction for one step, with classifier-free guidance (arXiv:2207.12598).

        `forward` takes the name of the branch and its prompt. It runs twice, not once with a batch
        of two: at these lengths one video uses the whole device, and takes half the memory.
        """
        positive = forward("positive", self.positive)
        if self.negative is None:
            return positive
        negative = forward("negative", self.negative)
        return negative + self.scale * (positive - negative)
