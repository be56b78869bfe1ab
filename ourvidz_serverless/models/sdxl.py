"""SDXL on one set of weights: text-to-image and image-to-image by the same denoising loop.

The loop is ours, so that one picture can leave while the next is decoded, a batch can be split
without a change of pixels, and a stop or a deadline acts at the next step. diffusers loads the
weights and owns the networks and the schedulers; tests hold our loop to its pipelines' pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from ourvidz_serverless.errors import ModelLoadError, OutOfMemory
from ourvidz_serverless.models.device import Device, is_out_of_memory, out_of_memory_is_ours
from ourvidz_serverless.models.ip_adapter import IpAdapter
from ourvidz_serverless.models.loras import LoraShelf, applied
from ourvidz_serverless.models.prompts import Embedding, PromptEncoder
from ourvidz_serverless.models.schedulers import make_scheduler
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.weights import Prompt, plain

POCKET = Path(__file__).parents[2] / "pocket" / "sdxl.safetensors"

#: Called after each step with (picture-steps done, picture-steps in all); what it raises ends
#: the generation.
Step = Callable[[int, int], None]


def load(settings: Settings) -> Sdxl:
    """SDXL from `SDXL_MODEL`: `pocket`, a diffusers folder, or a single-file checkpoint.

    Raises ModelLoadError with one line when the weights are missing, corrupt or of another kind.
    """
    device = Device.choose(settings, on_gpu=torch.float16)
    path = POCKET if settings.sdxl_model == "pocket" else Path(settings.sdxl_model)
    if not path.exists():
        raise ModelLoadError(f"SDXL_MODEL: there is nothing at {path}")
    try:
        pipe = _read(path, settings.sdxl_config, device.dtype)
    except Exception as exc:
        raise ModelLoadError(
            f"SDXL_MODEL: {path.name} does not load as SDXL ({_why(exc)})"
        ) from exc
    if settings.sdxl_timestep_spacing:
        pipe.scheduler.register_to_config(timestep_spacing=settings.sdxl_timestep_spacing)
    adapter = _adapter(pipe, settings.sdxl_ip_adapter)
    return Sdxl(pipe, device, settings.sdxl_max_batch, adapter, LoraShelf.of(settings))


def _adapter(pipe: Any, path: Path | None) -> IpAdapter | None:
    if path is None:
        return None
    try:
        return IpAdapter(pipe, path)
    except Exception as exc:
        raise ModelLoadError(f"SDXL_IP_ADAPTER: {path.name} does not load ({_why(exc)})") from exc


def _read(path: Path, config: Path | None, dtype: torch.dtype) -> Any:
    options = {"torch_dtype": dtype, "local_files_only": True, "add_watermarker": False}
    if path.is_dir():
        return StableDiffusionXLPipeline.from_pretrained(path, **options)
    # A checkpoint has weights only: its configurations and tokenizers lie in a folder beside it.
    folder = config or path.with_suffix("")
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"no configuration in {folder.name}, see SDXL_CONFIG")
    return StableDiffusionXLPipeline.from_single_file(str(path), config=str(folder), **options)


def _why(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """How many of the schedule's steps an image-to-image run takes: at least one."""
    return min(max(int(num_inference_steps * strength), 1), num_inference_steps)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What every forward of one job shares.

    `hidden` is (1 or 2, tokens, dim) and `pooled` (1 or 2, dim): two rows, the negative first,
    where the job is guided. `time_ids` (1, 6) is SDXL's size conditioning (arXiv:2307.01952),
    `shown` (1 or 2, 1, dim) is what the IP-Adapter, where there is one, shows of a reference.
    `distilled` (1, dim) tells the guidance scale to a UNet that has guidance distilled into it.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    guidance_scale: float
    shown: torch.Tensor | None = None
    distilled: torch.Tensor | None = None

    @property
    def is_guided(self) -> bool:
        return self.hidden.shape[0] == 2

    def for_batch(self, size: int) -> dict[str, Any]:
        """The UNet's keyword arguments for `size` pictures at once."""
        hidden = self.hidden.repeat_interleave(size, dim=0)
        added: dict[str, Any] = {
            "text_embeds": self.pooled.repeat_interleave(size, dim=0),
            "time_ids": self.time_ids.expand(hidden.shape[0], -1),
        }
        if self.shown is not None:
            added["image_embeds"] = [self.shown.repeat_interleave(size, dim=0)]
        return {
            "encoder_hidden_states": hidden,
            "added_cond_kwargs": added,
            "timestep_cond": self.distilled,
        }


@dataclass(frozen=True, slots=True)
class Schedule:
    """How noise becomes a latent: which scheduler, how many steps, and from where.

    `start` is the latent (1, 4, height / 8, width / 8) of a reference, or None for pure noise.
    """

    scheduler: str | None
    num_inference_steps: int
    latent_shape: tuple[int, int, int]
    start: torch.Tensor | None
    strength: float

    @property
    def steps(self) -> int:
        return steps_to_run(self.num_inference_steps, self.strength)


class Sdxl:
    """One SDXL checkpoint on one device. One job at a time: the worker's lane sees to that."""

    def __init__(
        self,
        pipe: Any,
        device: Device,
        max_batch: int = 6,
        adapter: IpAdapter | None = None,
        loras: LoraShelf | None = None,
    ) -> None:
        self.device = device
        self.adapter = adapter
        self.loras = loras or LoraShelf(None)
        self._max_batch = max_batch
        self._pipe = pipe.to(device.name)
        self._unet, self._vae = pipe.unet.eval(), pipe.vae.eval()
        self._prompts = PromptEncoder(pipe)
        # In fp16 SDXL's own VAE overflows. diffusers converts it to fp32 and back in every job;
        # here it keeps one dtype for good.
        if self._vae.config.force_upcast and device.dtype == torch.float16:
            self._vae.to(torch.float32)

    def generate(
        self,
        *,
        prompt: Prompt,
        negative_prompt: Prompt | None,
        seeds: Sequence[int],
        width: int,
        height: int,
        num_inference_steps: int,
        guidance_scale: float,
        scheduler: str | None = None,
        loras: Sequence[tuple[Path, float]] = (),
        image: Image.Image | None = None,
        strength: float = 1.0,
        likeness: Image.Image | None = None,
        likeness_keeps: str | None = None,
        likeness_scale: float = 1.0,
        step: Step = lambda done, total: None,
    ) -> Iterator[np.ndarray]:
        """One picture a seed, in order, each as soon as it is decoded: uint8 (height, width, 3).

        An `image` of that size is where the generation starts, noised to `strength`; at least
        one step runs however low that is. A `likeness` is a picture whose style, composition or
        character (`likeness_keeps`) the IP-Adapter carries over, if there is one. Raises
        OutOfMemory when not even one picture fits, and whatever `step` raises.
        """
        with out_of_memory_is_ours(), applied(self._pipe, loras):
            conditioning = self._condition(prompt, negative_prompt, (width, height), guidance_scale)
            if self.adapter:
                self.adapter.keep(likeness_keeps if likeness else None, likeness_scale)
                shown = self.adapter.embed(likeness, conditioning.is_guided)
                conditioning = replace(conditioning, shown=shown)
            factor = self._pipe.vae_scale_factor
            schedule = Schedule(
                scheduler,
                num_inference_steps,
                latent_shape=(self._unet.config.in_channels, height // factor, width // factor),
                start=None if image is None else self._encode(image),
                strength=1.0 if image is None else strength,
            )
            for latents in self._denoise_all(seeds, conditioning, schedule, step):
                for latent in latents:
                    yield self._decode(latent)

    def _denoise_all(
        self, seeds: Sequence[int], conditioning: Conditioning, schedule: Schedule, step: Step
    ) -> Iterator[torch.Tensor]:
        """The seeds' latents in equal batches as large as memory allows; no pixel depends on it."""
        total = schedule.steps * len(seeds)
        batches = -(-len(seeds) // self._max_batch)
        finished = 0
        while finished < len(seeds):
            size = -(-len(seeds) // batches)
            batch = seeds[finished : finished + size]
            before = finished * schedule.steps
            each = len(batch)
            latents = self._denoise_if_it_fits(
                batch, conditioning, schedule, lambda i, b=before, n=each: step(b + i * n, total)
            )
            # Not inside the `except`: there the traceback still pins the tensors that did not fit.
            if latents is None:
                self.device.free_memory()
                if size == 1:
                    raise OutOfMemory("one picture of this size does not fit the device's memory")
                batches = -(-len(seeds) // (size // 2))
                continue
            finished += each
            yield latents

    def _denoise_if_it_fits(self, *args: Any) -> torch.Tensor | None:
        try:
            return self._denoise(*args)
        except RuntimeError as exc:
            if not is_out_of_memory(exc):
                raise
            return None

    @torch.inference_mode()
    def _denoise(
        self,
        seeds: Sequence[int],
        conditioning: Conditioning,
        schedule: Schedule,
        stepped: Callable[[int], None],
    ) -> torch.Tensor:
        """Latents (len(seeds), 4, h, w), each made from its own seed alone."""
        scheduler = make_scheduler(self._pipe.scheduler.config, schedule.scheduler)
        scheduler.set_timesteps(schedule.num_inference_steps, device=self.device.name)
        skipped = (schedule.num_inference_steps - schedule.steps) * scheduler.order
        timesteps = scheduler.timesteps[skipped:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators, schedule.latent_shape)
        if schedule.start is None:
            latents = noise * scheduler.init_noise_sigma
        else:
            start = schedule.start.to(noise.dtype).expand_as(noise)
            latents = scheduler.add_noise(start, noise, timesteps[:1].expand(len(seeds)))

        inputs = conditioning.for_batch(len(seeds))
        extra = _accepted(scheduler.step, generator=generators)
        for index, timestep in enumerate(timesteps):
            predicted = self._predict(latents, timestep, scheduler, conditioning, inputs)
            latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
            stepped((index + 1) // scheduler.order)
        return latents

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        scheduler: Any,
        conditioning: Conditioning,
        inputs: dict[str, Any],
    ) -> torch.Tensor:
        """The UNet's prediction for one step, guided where the job is (arXiv:2207.12598)."""
        rows = torch.cat([latents] * conditioning.hidden.shape[0])
        rows = scheduler.scale_model_input(rows, timestep)
        predicted = self._unet(rows, timestep, **inputs, return_dict=False)[0]
        if not conditioning.is_guided:
            return predicted
        negative, positive = predicted.chunk(2)
        return negative + conditioning.guidance_scale * (positive - negative)

    def _noise(
        self, generators: Sequence[torch.Generator], shape: tuple[int, int, int]
    ) -> torch.Tensor:
        # Drawn on the CPU and in fp32: then a seed means the same picture on every device, and
        # in every dtype as nearly as the dtype allows.
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.to(self.device.name, self.device.dtype)

    def _condition(
        self, prompt: Prompt, negative: Prompt | None, size: tuple[int, int], guidance_scale: float
    ) -> Conditioning:
        rows = [self._prompts.encode(prompt)]
        distilled = self._distilled(guidance_scale)
        # At a scale of 1 the negative cancels out, and half the work with it.
        if guidance_scale > 1 and distilled is None:
            rows = self._prompts.level([self._negative(negative, like=rows[0]), *rows])
        width, height = size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device.name)
        return Conditioning(
            hidden=torch.cat([row.hidden for row in rows]),
            pooled=torch.cat([row.pooled for row in rows]),
            time_ids=time_ids.to(rows[0].hidden.dtype),
            guidance_scale=guidance_scale,
            distilled=distilled,
        )

    def _distilled(self, guidance_scale: float) -> torch.Tensor | None:
        """The embedded guidance scale that a UNet of an LCM takes (arXiv:2310.04378), or None."""
        width = self._unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.tensor([guidance_scale - 1.0])
        embedded = self._pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return embedded.to(self.device.name, self.device.dtype)

    def _negative(self, prompt: Prompt | None, like: Embedding) -> Embedding:
        if prompt is None and self._pipe.config.force_zeros_for_empty_prompt:
            return like.zeros()
        return self._prompts.encode(prompt or plain(""))

    @torch.inference_mode()
    def _encode(self, image: Image.Image) -> torch.Tensor:
        """The latent (1, 4, height / 8, width / 8) of a picture: its most likely one, no seed."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(self.device.name)
        pixels = pixels.permute(2, 0, 1)[None].to(self._vae.dtype) / 127.5 - 1
        return self._vae.encode(pixels).latent_dist.mode() * self._vae.config.scaling_factor

    @torch.inference_mode()
    def _decode(self, latent: torch.Tensor) -> np.ndarray:
        """The picture of one latent (4, h, w); it becomes bytes on the device, not on the host."""
        latent = latent[None].to(self._vae.dtype) / self._vae.config.scaling_factor
        pixels = self._vae.decode(latent, return_dict=False)[0][0]
        pixels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()


def _accepted(call: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that a scheduler's step takes: only the stochastic ones take a generator."""
    parameters = inspect.signature(call).parameters
    return {name: value for name, value in options.items() if name in parameters}
