"""SDXL's denoising loop.

The loop is ours, so that an image can leave while the next one is decoded, a batch can be split
without a change of pixels, and a stop or a deadline acts at the next step. Tests compare its pixels
with those of diffusers' pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.schedulers import (
    add_noise,
    make_scheduler,
    set_steps,
    take_step,
    timestep_pairs,
)
from ourvidz_serverless.models.sdxl.latent_mask import LatentMask
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.models.sdxl.step_graphs import StepGraphs
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.presets import ForwardStats, SpeedPreset
from ourvidz_serverless.models.speed.step_cache import DeepCache


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The UNet's inputs that are the same for every image and step of a request.

    `hidden` is (1 or 2, tokens, dim) and `pooled` (1 or 2, dim): with guidance there are two rows,
    the negative first. `time_ids` (1, 6) is SDXL's size conditioning (arXiv:2307.01952).
    `image_embeds` (1 or 2, 1, dim) are for an IP-Adapter, if there is one. `guidance_embed`
    (1, dim) is for a UNet with distilled guidance.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    image_embeds: torch.Tensor | None = None
    guidance_embed: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """The UNet's rows for one image."""
        return self.hidden.shape[0]

    @property
    def is_guided(self) -> bool:
        return self.rows == 2

    def unet_inputs(self, batch: int) -> dict[str, Any]:
        """The UNet's keyword arguments for a batch of images."""
        hidden = self.hidden.repeat_interleave(batch, dim=0)
        added: dict[str, Any] = {
            "text_embeds": self.pooled.repeat_interleave(batch, dim=0),
            "time_ids": self.time_ids.expand(hidden.shape[0], -1),
        }
        if self.image_embeds is not None:
            added["image_embeds"] = [self.image_embeds.repeat_interleave(batch, dim=0)]
        return {
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": added,
            "timestep_cond": self.guidance_embed,
        }


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The denoising loop of one request.

    `latent_shape` is (4, height / 8, width / 8) of one image. `start` (1, 4, height / 8, width / 8)
    is the latent of the request's start image; without one, the loop starts from noise.

    `mask` is that of a job that inpaints, and of every job of a checkpoint for inpainting.
    """

    unet: Any
    scheduler_config: Any
    device: Device
    request: ImageRequest
    conditioning: Conditioning
    latent_shape: tuple[int, int, int]
    start: torch.Tensor | None
    preset: SpeedPreset
    mask: LatentMask | None = None
    #: The graphs of the UNet's forwards, if this job may use them.
    graphs: StepGraphs | None = None

    @property
    def num_steps(self) -> int:
        """How many of the scheduler's steps run: with a start image the last ones, at least one."""
        steps, start = self.request.steps, self.request.start
        return steps if start is None else min(max(int(steps * start.strength), 1), steps)

    def denoise(
        self,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        stats: ForwardStats,
        is_lean: bool,
    ) -> torch.Tensor:
        """Latents (len(seeds), 4, h, w), each made from its own seed alone.

        A `lean` loop takes less memory: it computes the prompt's keys and values in every step, as
        a loop with graphs does too, and uses no graphs.
        """
        scheduler = make_scheduler(
            self.scheduler_config, self.request.scheduler, self.request.has_distilled_lora
        )
        set_steps(scheduler, self.request.steps)
        skipped = (self.request.steps - self.num_steps) * scheduler.order
        timesteps = timestep_pairs(scheduler, self.device.name, skipped)

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators)
        latents = self._first_latents(scheduler, timesteps[0][0], noise)
        inputs = self.conditioning.unet_inputs(len(seeds))
        # As in diffusers' pipelines, the step adds no noise of its own; TCD's does by default.
        options = _accepted(scheduler.step, generator=generators, eta=0.0)
        warmup = self.preset.warmup_steps(len(timesteps))
        cache, count = DeepCache(self.unet, self.preset.deep_cache_interval, warmup), ForwardStats()
        graphs = None if is_lean else self.graphs
        # A graph would compute with the keys of the prompt with which it was captured.
        is_caching = not is_lean and graphs is None
        remembering = attention.cached_prompt_keys(self.unet) if is_caching else nullcontext()
        with remembering, cache.enabled():
            for index, (timestep, sent) in enumerate(timesteps):
                cache.begin_forward(index)
                rows = torch.cat([latents] * self.conditioning.rows)
                rows = scheduler.scale_model_input(rows, timestep)
                rows = self.mask.beside(rows) if self.mask else rows
                predicted = self._predict(rows, sent, inputs, graphs)
                latents = take_step(scheduler, predicted, timestep, latents, **options)
                following = timesteps[index + 1][0] if index + 1 < len(timesteps) else None
                latents = self._with_start(latents, scheduler, following, noise)
                count.count(self.conditioning.rows, cache.is_full)
                on_step((index + 1) // scheduler.order)
        stats.add(count)
        return latents

    def _noise(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        # On the CPU and in fp32, so that a seed has the same noise on every device, and as nearly
        # as possible in every dtype.
        noise = torch.stack([torch.randn(self.latent_shape, generator=each) for each in generators])
        return noise.to(self.device.name, self.device.dtype)

    def _first_latents(
        self, scheduler: Any, timestep: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The start image's latents with noise, or noise alone.

        As in diffusers' pipelines, inpainting at strength 1 starts from noise alone.
        """
        start = self.request.start
        if self.start is None or (start and start.mask and start.strength >= 1):
            return noise * scheduler.init_noise_sigma
        return add_noise(scheduler, self.start.to(noise.dtype).expand_as(noise), noise, timestep)

    def _with_start(
        self,
        latents: torch.Tensor,
        scheduler: Any,
        following: torch.Tensor | None,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """The latents, with the start image's own where nothing is repainted.

        Those have the noise of the `following` timestep, or none after the last step. A UNet that
        reads the mask was trained to keep the picture, so its latents stay as they are.
        """
        if self.mask is None or self.mask.visible is not None:
            return latents
        assert self.start is not None
        start = self.start.to(noise.dtype).expand_as(noise)
        if following is not None:
            start = add_noise(scheduler, start, noise, following)
        return (1 - self.mask.cells) * start + self.mask.cells * latents

    def _predict(
        self,
        rows: torch.Tensor,
        timestep: torch.Tensor,
        inputs: dict[str, Any],
        graphs: StepGraphs | None,
    ) -> torch.Tensor:
        """The UNet's prediction for one step, with classifier-free guidance (arXiv:2207.12598)."""
        if graphs:
            predicted = graphs.forward(rows, timestep, inputs)
        else:
            predicted = self.unet(rows, timestep, **inputs, return_dict=False)[0]
        if not self.conditioning.is_guided:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + self.request.guidance_scale * (positive - negative)


def _accepted(call: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that a scheduler's step takes: only stochastic schedulers take a generator."""
    parameters = inspect.signature(call).parameters
    return {name: value for name, value in options.items() if name in parameters}
