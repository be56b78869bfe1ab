"""WAN 2.1: text to video, and references through VACE or the 14B image-to-video networks.

The denoising loop is ours, so that a stop or a deadline acts at the next step and frames leave
while the next are decoded. diffusers loads the weights and owns the networks and the schedulers;
tests hold our loop to its pipelines' pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ourvidz_serverless.models.chat.model import Chat
from ourvidz_serverless.models.memory.device import Device, translate_out_of_memory
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger, ModelHandle
from ourvidz_serverless.models.memory.oom_fallback import (
    MemoryPlans,
    OomFallback,
    ReportPlan,
    WanMemoryPlan,
)
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.models.schedulers import (
    default_flow_shift,
    default_solver,
    make_dmd_scheduler,
    make_flow_scheduler,
)
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.presets import (
    EXACT,
    WAN,
    ForwardStats,
    ReportSpeed,
    SpeedPreset,
)
from ourvidz_serverless.models.speed.regional_compile import check_cache_dir
from ourvidz_serverless.models.speed.step_cache import FirstBlockCache
from ourvidz_serverless.models.wan.conditioning import Condition, Given, for_i2v, for_vace
from ourvidz_serverless.models.wan.network import Network, Route, Shelf, read_enhancer, read_prompt
from ourvidz_serverless.models.wan.text_encoder import TextEncoder
from ourvidz_serverless.models.wan.vae import VideoVae
from ourvidz_serverless.settings import Settings

#: Called after each step with (steps done, steps in all); what it raises ends the generation.
Step = Callable[[int, int], None]

#: Two latent frames: the first, which is decoded by itself, and one that is decoded after it.
WARMING_FRAMES = 5


def load(settings: Settings, ledger: Ledger | None = None) -> Wan:
    """WAN from `WAN_MODEL` and the optional networks beside it.

    Raises ModelLoadError with one line that names the setting, when weights are missing, corrupt
    or of another kind.
    """
    ledger = ledger or open_ledger(settings)
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    shelf = Shelf(settings, device, ledger)
    text, vae = shelf.text_encoder(), shelf.vae()
    networks = shelf.networks(vae)
    sampling = Sampling.of(settings, shelf.scheduler_config)
    wan = Wan(text=text, vae=vae, networks=networks, sampling=sampling, device=device)
    wan.plans = MemoryPlans(
        WanMemoryPlan(offload=settings.low_vram), always_report=settings.low_vram
    )
    wan.enhancement_prompt = read_prompt(settings)
    wan.enhancer = read_enhancer(settings, device, ledger)
    handles = (*(network.handle for network in networks.values()), vae.handle, text.handle)
    ledger.preload(*(handle.model for handle in handles))
    return wan


def connect(models: Mapping[str, Any], settings: Settings) -> None:
    """Let WAN's enhanced jobs ask the chat model that this worker serves anyway."""
    if settings.wan_asks_chat:
        models["wan"].enhancer = models["chat"]


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError if the device does not support WAN's settings."""
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    attention.check(settings.attention_backend, device)
    check_cache_dir(settings)
    read_prompt(settings)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one job's noise becomes latents of `shape` (1, channels, frames, h, w)."""

    steps: int
    solver: str
    flow_shift: float
    seed: int
    shape: tuple[int, ...]
    preset: SpeedPreset = EXACT

    def shape_with(self, lead: int) -> tuple[int, ...]:
        """The same shape with so many latent frames more, which stand before the video."""
        return (*self.shape[:2], self.shape[2] + lead, *self.shape[3:])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How noise becomes a video where the job does not say, or has no say.

    `distilled_steps` and what stands below it are a step-distilled checkpoint's: its jobs take
    these and no guidance.
    """

    config: Any
    solver: str
    flow_shift: float
    distilled_steps: int | None = None
    distilled_timesteps: tuple[int, ...] = ()

    @classmethod
    def of(cls, settings: Settings, config: Any) -> Sampling:
        steps, timesteps = settings.wan_distilled_steps, settings.wan_distilled_timesteps
        solver = settings.wan_distilled_solver if steps else default_solver(config)
        shift = settings.wan_flow_shift or default_flow_shift(config)
        return cls(config, solver, shift, len(timesteps) or steps, timesteps)

    @property
    def is_distilled(self) -> bool:
        return self.distilled_steps is not None

    def scheduler(self, schedule: Schedule, device: Device) -> Any:
        """A scheduler that is set to its timesteps."""
        if self.distilled_timesteps:
            return make_dmd_scheduler(self.distilled_timesteps, device.name)
        scheduler = make_flow_scheduler(self.config, schedule.solver, schedule.flow_shift)
        if self.is_distilled and schedule.solver == "euler":
            # diffusers' own last one is all but clean already: of few that is one for nothing.
            sigmas = [1 - step / schedule.steps for step in range(schedule.steps)]
            scheduler.set_timesteps(sigmas=sigmas, device=device.name)
        else:
            scheduler.set_timesteps(schedule.steps, device=device.name)
        return scheduler


@dataclass(frozen=True, slots=True)
class Guidance:
    """The prompts' embeddings (1, 512, dim); `negative` is None where the job is not guided."""

    positive: torch.Tensor
    negative: torch.Tensor | None
    scale: float


class Wan:
    """WAN 2.1 on one device. One job at a time: the worker's lane sees to that.

    `enhancer` is a chat model, or None where this worker has none; `enhancement_prompt` the system
    prompt for jobs that bring none.
    """

    enhancer: Chat | None = None
    enhancement_prompt: str = ""

    def __init__(
        self,
        *,
        text: TextEncoder,
        vae: VideoVae,
        networks: Mapping[Route, Network],
        sampling: Sampling,
        device: Device,
    ) -> None:
        self.device, self.sampling = device, sampling
        self.plans = MemoryPlans(WanMemoryPlan())
        self._text, self._vae, self._networks = text, vae, networks

    def prefetch(self) -> None:
        """Have on its way what the next job begins with."""
        self._text.handle.prefetch()

    def route(self, *, first: bool, last: bool, subject: bool) -> Route | None:
        """Which network serves a job with these references; None where there is none for it."""
        if not (first or last or subject):
            return "t2v"
        special: Route = "flf2v" if last else "i2v"
        if first and not subject and special in self._networks:
            return special
        return "vace" if "vace" in self._networks else None

    def warm_up(self) -> None:
        """Film a few frames in one step by each network, and have an enhancer of our own speak."""
        width, height = (832, 480) if self.device.is_cuda else (32, 32)
        grey = Image.new("RGB", (width, height), "grey")
        references: dict[Route, dict[str, Any]] = {
            "t2v": {},
            "vace": {"subject": grey},
            "i2v": {"first": grey},
            "flf2v": {"first": grey, "last": grey},
        }
        for route in self._networks:
            frames = self.generate(
                prompt="",
                negative_prompt="",
                seed=0,
                width=width,
                height=height,
                num_frames=WARMING_FRAMES,
                num_inference_steps=1,
                guidance_scale=2.0,
                **references[route],
            )
            for _ in frames:
                pass
        if self.enhancer:
            self.enhancer.warm_up()
        self.prefetch()

    def generate(
        self,
        *,
        prompt: str,
        negative_prompt: str | None,
        seed: int,
        width: int,
        height: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        solver: str | None = None,
        flow_shift: float | None = None,
        first: Image.Image | None = None,
        last: Image.Image | None = None,
        subject: Image.Image | None = None,
        conditioning_scale: float = 1.0,
        speed: str = "exact",
        step: Step = lambda done, total: None,
        check: Check = lambda: None,
        planned: ReportPlan = lambda plan: None,
        sped: ReportSpeed = lambda report: None,
    ) -> Iterator[np.ndarray]:
        """A video's frames, uint8 (frames, height, width, 3), a few at a time as they are decoded.

        `num_frames` is 4k + 1; sides are multiples of 16. References are of that very size: the
        `first` frame, the `last` one, or a `subject` that is no frame; VACE holds to them by
        `conditioning_scale`. `speed` is a preset of `models.speed`; of any but `exact`, `sped`
        hears what it did. Raises OutOfMemory when the video does not fit the device, and whatever
        `step` raises, or `check`, which is called between pieces. `planned` hears of every way to
        compute but the usual one.
        """
        given = Given(first, last, subject, conditioning_scale)
        route = self.route(first=bool(first), last=bool(last), subject=bool(subject))
        if route is None:
            raise ValueError("there is no network for these references")
        size = f"{width}x{height}x{num_frames}"
        fallback = OomFallback(self.plans, size, self.device, planned)
        with translate_out_of_memory():
            guidance = self._guide(prompt, negative_prompt, guidance_scale, check, fallback)
            schedule = Schedule(
                num_inference_steps,
                solver or self.sampling.solver,
                flow_shift or self.sampling.flow_shift,
                seed,
                self._vae.latent_shape(num_frames, height, width),
                # A few-step checkpoint has no steps that are alike.
                EXACT if self.sampling.is_distilled else WAN[speed],
            )
            stats = ForwardStats()
            network = self._networks[route]
            condition = self._condition(
                network, given, num_frames, (width, height), check, fallback
            )
            compiled = network.compiled_blocks.job() if network.compiled_blocks else nullcontext()
            with self._using(network.handle, check, size), compiled:
                condition = self._look(network, given, num_frames, condition, fallback)
                job = (network.transformer, condition, guidance, schedule, step, stats)
                latents = fallback.run(network.handle, "denoise", lambda plan: self._denoise(*job))
            if speed != "exact":
                sped(stats.report(speed))
            with self._using(self._vae.handle, check, size):
                yield from self._decode(latents, check, fallback)
            fallback.succeeded()

    @contextmanager
    def _using(self, handle: ModelHandle, check: Check, shape: str) -> Iterator[None]:
        """Have a model for one stage of a job, and let the ledger know what that takes."""
        with handle.using(check, shape) as lease:
            before = self.device.begin_stage()
            yield
            lease.measured_bytes = self.device.stage_peak_bytes(before)

    def _decode(
        self, latents: torch.Tensor, check: Check, fallback: OomFallback[WanMemoryPlan]
    ) -> Iterator[np.ndarray]:
        """The frames, piece by piece; where a piece does not fit, all anew with more room."""
        pieces = Pieces(lambda: self._vae.decode(latents))
        while found := fallback.run(self._vae.handle, "decode", lambda plan: pieces.next()):
            check()
            yield found[0]

    def _guide(
        self,
        prompt: str,
        negative: str | None,
        scale: float,
        check: Check,
        fallback: OomFallback[WanMemoryPlan],
    ) -> Guidance:
        # At a scale of 1 the negative cancels out, and half the work with it.
        is_guided = scale > 1 and not self.sampling.is_distilled
        texts = [prompt, negative or ""] if is_guided else [prompt]
        positive, *others = fallback.run(
            self._text.handle, "condition", lambda plan: self._text.encode(texts, check)
        )
        return Guidance(positive, others[0] if others else None, scale)

    def _condition(
        self,
        network: Network,
        given: Given,
        num_frames: int,
        size: tuple[int, int],
        check: Check,
        fallback: OomFallback[WanMemoryPlan],
    ) -> Condition:
        if not given:
            return Condition()

        def read(plan: WanMemoryPlan) -> Condition:
            with self._using(self._vae.handle, check, f"{size[0]}x{size[1]}x{num_frames} in"):
                if network.is_vace:
                    return for_vace(given, network.transformer, self._vae, num_frames, size)
                return for_i2v(given, self._vae, num_frames, size)

        return fallback.run(self._vae.handle, "condition", read)

    def _look(
        self,
        network: Network,
        given: Given,
        num_frames: int,
        condition: Condition,
        fallback: OomFallback[WanMemoryPlan],
    ) -> Condition:
        """The same, with what the network's own eyes see of the references, if it has any."""
        eyes, shown = network.eyes, list(given.known(num_frames).values())
        if eyes is None or not given:
            return condition
        seen = fallback.run(
            network.handle, "condition", lambda plan: eyes.look(shown, self.device.name)
        )
        words = {"encoder_hidden_states_image": seen.to(network.transformer.dtype)}
        return replace(condition, words=words)

    @torch.inference_mode()
    def _denoise(
        self,
        transformer: Any,
        condition: Condition,
        guidance: Guidance,
        schedule: Schedule,
        step: Step,
        stats: ForwardStats,
    ) -> torch.Tensor:
        """Latents (1, channels, frames, h, w) in fp32, made from the seed."""
        scheduler = self.sampling.scheduler(schedule, self.device)
        # Drawn on the CPU and in fp32: then a seed means the same video on every device.
        generator = torch.Generator().manual_seed(schedule.seed)
        noise = torch.randn(schedule.shape_with(condition.lead), generator=generator)
        latents = noise.to(self.device.name)
        # Only a distilled checkpoint's steps draw noise.
        extra = {"generator": generator} if self.sampling.distilled_timesteps else {}
        cache, count = (
            FirstBlockCache(transformer, schedule.preset.first_block_threshold),
            ForwardStats(),
        )

        def forward(branch: str, prompt: torch.Tensor) -> torch.Tensor:
            cache.begin_forward(branch)
            predicted = _forward(transformer, latents, timestep, condition, prompt)
            count.count(1, cache.is_full)
            return predicted

        with cache.enabled():
            for index, timestep in enumerate(scheduler.timesteps):
                predicted = _predict(forward, guidance)
                latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[
                    0
                ]
                step(index + 1, len(scheduler.timesteps))
        stats.add(count)
        return latents[:, :, condition.lead :]


def _forward(
    transformer: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    condition: Condition,
    prompt: torch.Tensor,
) -> torch.Tensor:
    rows = latents if condition.beside is None else torch.cat([latents, condition.beside], dim=1)
    predicted: torch.Tensor = transformer(
        hidden_states=rows.to(transformer.dtype),
        timestep=timestep.expand(1),
        encoder_hidden_states=prompt.to(transformer.dtype),
        **condition.words,
        return_dict=False,
    )[0]
    return predicted


def _predict(
    forward: Callable[[str, torch.Tensor], torch.Tensor],
    guidance: Guidance,
) -> torch.Tensor:
    """The network's prediction for one step, guided where the job is (arXiv:2207.12598).

    Two forwards and not one of two rows: at these lengths a row fills a device, and one holds
    half the memory.
    """
    positive = forward("positive", guidance.positive)
    if guidance.negative is None:
        return positive
    negative = forward("negative", guidance.negative)
    return negative + guidance.scale * (positive - negative)


class Pieces:
    """What a generator gives, one by one; after an error it begins anew, and skips what is told."""

    def __init__(self, begin: Callable[[], Iterator[np.ndarray]]) -> None:
        self._begin, self._told = begin, 0
        self._pieces: Iterator[np.ndarray] | None = None

    def next(self) -> list[np.ndarray]:
        """The next piece, if there is one."""
        pieces = self._pieces or itertools.islice(self._begin(), self._told, None)
        self._pieces = None
        found = list(itertools.islice(pieces, 1))
        self._pieces = pieces
        self._told += len(found)
        return found
