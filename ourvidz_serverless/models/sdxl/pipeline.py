"""SDXL on one set of weights: text-to-image and image-to-image by the same denoising loop.

The loop is ours, so that one picture can leave while the next is decoded, a batch can be split
without a change of pixels, and a stop or a deadline acts at the next step. diffusers loads the
weights and owns the networks and the schedulers; tests hold our loop to its pipelines' pixels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ModelMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ourvidz_serverless.models.finite import check_finite
from ourvidz_serverless.models.loading import checkpoints, weight_files
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger, standalone_handle
from ourvidz_serverless.models.memory.ledger import Ledger, ModelHandle
from ourvidz_serverless.models.memory.movable_tensors import MovableParts
from ourvidz_serverless.models.memory.oom_fallback import (
    MemoryPlans,
    OomFallback,
    ReportPlan,
    SdxlMemoryPlan,
)
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.models.schedulers import make_scheduler, set_steps, try_one_step
from ourvidz_serverless.models.sdxl import single_file
from ourvidz_serverless.models.sdxl import vae as decoders
from ourvidz_serverless.models.sdxl.ip_adapter import IpAdapter
from ourvidz_serverless.models.sdxl.loras import LoraShelf, applied
from ourvidz_serverless.models.sdxl.networks import check_networks
from ourvidz_serverless.models.sdxl.prompt_encoder import Embedding, PromptEncoder, level
from ourvidz_serverless.models.sdxl.prompt_weighting import Prompt, plain
from ourvidz_serverless.models.sdxl.vae import Decoder, TinyVae, Vae
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.embedding_cache import EmbeddingCache
from ourvidz_serverless.models.speed.presets import (
    EXACT,
    SDXL,
    ForwardStats,
    ReportSpeed,
    SpeedPreset,
)
from ourvidz_serverless.models.speed.regional_compile import (
    CompiledBlocks,
    check_cache_dir,
    compile_blocks,
)
from ourvidz_serverless.models.speed.step_cache import DeepCache
from ourvidz_serverless.settings import Settings

POCKET = Path(__file__).parents[3] / "pocket" / "sdxl.safetensors"

#: Each network's class, and the name of its weights in a folder.
NETWORKS = {
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
}

#: The side that SDXL was trained for, in pixels, and that jobs have which do not say.
USUAL_SIDE = 1024

#: What a job needs at once of a model that does not fit the device as a whole.
STAGES = (("text",), ("image", "unet"), ("vae",), ("tiny",))

#: Called after each step with (picture-steps done, picture-steps in all); what it raises ends
#: the generation.
Step = Callable[[int, int], None]


def load(settings: Settings, ledger: Ledger | None = None) -> Sdxl:
    """SDXL from `SDXL_MODEL`: `pocket`, or the name of a diffusers folder or a single file.

    Raises ModelLoadError with one line when the weights are missing, corrupt or of another kind.
    """
    ledger = ledger or open_ledger(settings)
    device = Device.choose(settings, on_gpu=torch.float16, memory=ledger.memory)
    pipe, adapter, tiny = _open(settings, device)
    attention.set_backend(pipe.unet, settings.attention_backend, device)
    stages = STAGES if settings.low_vram else ()
    parts = MovableParts(
        _parts(pipe, tiny), device, functools.partial(_reread, settings, device), stages
    )
    # By the specification SDXL is "always loaded": the last to leave.
    source = Path(settings.sdxl_model).name
    handle = ledger.register(parts, "sdxl", "sdxl", source=source, is_pinned=True)
    ledger.preload(parts)
    plans = low_vram_plans() if settings.low_vram else None
    loras = LoraShelf.of(settings)
    sdxl = Sdxl(pipe, device, settings.sdxl_max_batch, adapter, loras, handle, plans, tiny)
    sdxl.compiled_blocks = compile_blocks(pipe.unet, handle, device, settings)
    return sdxl


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError if the device does not support SDXL's settings."""
    device = Device.choose(settings, on_gpu=torch.float16, memory=ledger.memory)
    attention.check(settings.attention_backend, device)
    check_cache_dir(settings)


def low_vram_plans() -> MemoryPlans[SdxlMemoryPlan]:
    """The smallest way at once: one picture, one part of the model, the VAE in strips."""
    return MemoryPlans(
        SdxlMemoryPlan(1, tiled_decode=True, offload=True, lean=True), always_report=True
    )


def _open(settings: Settings, device: Device) -> tuple[Any, IpAdapter | None, TinyVae | None]:
    """The pipeline with all that belongs to it, in the host's memory."""
    path = POCKET
    if settings.sdxl_model != "pocket":
        path = checkpoints.find("SDXL_MODEL", settings.sdxl_model, settings.model_dirs)
    with checkpoints.loading("SDXL_MODEL", path, "SDXL"):
        pipe = _read(path, settings, device.dtype)
    if settings.sdxl_timestep_spacing:
        pipe.scheduler.register_to_config(timestep_spacing=settings.sdxl_timestep_spacing)
    if settings.memory_format == "channels_last":
        # Here, so that it is so again whenever the weights come from the disk anew.
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
    return pipe, _adapter(pipe, settings), decoders.read_tiny(settings, device, pipe.vae)


def _reread(settings: Settings, device: Device) -> dict[str, list[torch.nn.Module]]:
    pipe, _, tiny = _open(settings, device)
    return _parts(pipe, tiny)


def _parts(pipe: Any, tiny: TinyVae | None = None) -> dict[str, list[torch.nn.Module]]:
    """The networks by when a job needs them: `text` and `image` to condition it."""
    parts: dict[str, list[Any]] = {name: [] for name in ("text", "image", "unet", "vae")}
    parts["tiny"] = [tiny.network] if tiny else []
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            parts[name.split("_")[0]].append(part.eval())
    return parts


def _adapter(pipe: Any, settings: Settings) -> IpAdapter | None:
    if settings.sdxl_ip_adapter is None:
        return None
    path = checkpoints.find("SDXL_IP_ADAPTER", settings.sdxl_ip_adapter, settings.model_dirs)
    with checkpoints.loading("SDXL_IP_ADAPTER", path, "an IP-Adapter"):
        return IpAdapter(pipe, path)


def _read(path: Path, settings: Settings, dtype: torch.dtype) -> Any:
    folder = path if path.is_dir() else _config_of(path, settings)
    is_mapped = checkpoints.is_mapped(path, settings.mmap_weights)
    weight_files.check_configs(folder, NETWORKS)
    whole = None if path.is_dir() else weight_files.read(path, is_mapped)
    networks = {}
    for name, (kind, weights) in NETWORKS.items():
        config = _config(kind, folder / name)
        kept = torch.float32 if name == "vae" and _overflows(config, dtype) else dtype
        if whole is None:
            tensors = weight_files.read_parts(
                folder / name, weight_files.names(weights, kept), is_mapped
            )
        else:
            tensors = single_file.convert(name, whole, config)
        networks[name] = _network(kind, config, tensors, kept)
    check_networks(**{name: network.config for name, network in networks.items()})
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, **networks, local_files_only=True, add_watermarker=False
    )
    try_one_step(pipe.scheduler.config)
    return pipe


def _config_of(path: Path, settings: Settings) -> Path:
    """The folder of a checkpoint's configurations and tokenizers: it has weights only."""
    folder = path.with_suffix("")
    if settings.sdxl_config:
        folder = checkpoints.find("SDXL_CONFIG", settings.sdxl_config, settings.model_dirs)
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"no configuration in {folder.name}, see SDXL_CONFIG")
    return folder


def _config(kind: Any, folder: Path) -> Any:
    if issubclass(kind, ModelMixin):
        return kind.load_config(folder, local_files_only=True)
    return kind.config_class.from_pretrained(folder, local_files_only=True)


def _overflows(config: Any, dtype: torch.dtype) -> bool:
    """Whether a VAE is one that overflows in fp16, as SDXL's own is.

    diffusers converts it to fp32 and back in every job; here it keeps one dtype for good.
    """
    return dtype == torch.float16 and config.get("force_upcast", True)


def _network(kind: Any, config: Any, tensors: weight_files.Tensors, dtype: torch.dtype) -> Any:
    if issubclass(kind, ModelMixin):
        return weight_files.build(lambda: kind.from_config(config), tensors, dtype)
    if kind is CLIPTextModel:
        # transformers has flattened it; checkpoints are as they were.
        tensors = {name.removeprefix("text_model."): each for name, each in tensors.items()}
    return weight_files.build(lambda: kind(config), tensors, dtype)


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
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def is_guided(self) -> bool:
        return self.rows == 2

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
    preset: SpeedPreset = EXACT

    @property
    def steps(self) -> int:
        return steps_to_run(self.num_inference_steps, self.strength)


class Sdxl:
    """One SDXL checkpoint on one device. One job at a time: the worker's lane sees to that.

    `regions` are its UNet's compiled blocks, or None where nothing is compiled.
    """

    compiled_blocks: CompiledBlocks | None = None

    def __init__(
        self,
        pipe: Any,
        device: Device,
        max_batch: int = 6,
        adapter: IpAdapter | None = None,
        loras: LoraShelf | None = None,
        handle: ModelHandle | None = None,
        plans: MemoryPlans[SdxlMemoryPlan] | None = None,
        tiny: TinyVae | None = None,
    ) -> None:
        self.device = device
        self.adapter = adapter
        self.loras = loras or LoraShelf(None)
        self.handle = handle or standalone_handle(MovableParts(_parts(pipe, tiny), device))
        self._parts = cast(MovableParts, self.handle.model)
        self._plans = plans or MemoryPlans(SdxlMemoryPlan(max_batch))
        self._pipe, self._unet, self._vae, self._tiny = pipe, pipe.unet, pipe.vae, tiny
        self._prompts, self._kept = PromptEncoder(pipe), EmbeddingCache(device)

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
        speed: str = "exact",
        check: Check = lambda: None,
        step: Step = lambda done, total: None,
        planned: ReportPlan = lambda plan: None,
        sped: ReportSpeed = lambda report: None,
    ) -> Iterator[np.ndarray]:
        """One picture a seed, in order, each as soon as it is decoded: uint8 (height, width, 3).

        An `image` of that size is where the generation starts, noised to `strength`; at least
        one step runs however low that is. A `likeness` is a picture whose style, composition or
        character (`likeness_keeps`) the IP-Adapter carries over, if there is one. `speed` is a
        preset of `models.speed`; of any but `exact`, `sped` hears what it did. Raises OutOfMemory
        when not even one picture fits in the smallest way, and whatever `step`, or `check` while
        the weights are waited for, raises. `planned` hears of every way but the
        usual one.
        """
        preset = SDXL[speed]
        decoder = self._decoder(preset)
        size = f"{width}x{height}{'' if guidance_scale > 1 else ' unguided'}"
        size += f" {decoder.lever}" if decoder.lever else ""
        job = f"{size} x{len(seeds)}"
        # A LoRA's layers are other ones.
        compiled = (
            self.compiled_blocks.job(use_compiled=not loras)
            if self.compiled_blocks
            else nullcontext()
        )
        with self.handle.using(check, job) as lease, applied(self._pipe, loras), compiled:
            others = self.device.allocated_bytes() - self._parts.device_bytes
            fallback = OomFallback(self._plans, size, self.device, planned)
            conditioning = fallback.run(
                self.handle,
                "condition",
                lambda plan: self._condition(
                    functools.partial(self._read, plan, check, bool(loras)),
                    prompt,
                    negative_prompt,
                    (width, height),
                    guidance_scale,
                ),
            )
            if self.adapter:
                shown = fallback.run(
                    self.handle,
                    "condition",
                    lambda plan: self._show(
                        plan, likeness, likeness_keeps, likeness_scale, conditioning.is_guided
                    ),
                )
                conditioning = replace(conditioning, shown=shown)
            factor = self._pipe.vae_scale_factor
            schedule = Schedule(
                scheduler,
                num_inference_steps,
                latent_shape=(self._unet.config.in_channels, height // factor, width // factor),
                start=None
                if image is None
                else fallback.run(self.handle, "condition", lambda plan: self._encode(image, plan)),
                strength=1.0 if image is None else strength,
                preset=preset,
            )
            stats = ForwardStats()
            for latents in self._denoise_all(seeds, conditioning, schedule, step, fallback, stats):
                if speed != "exact":
                    sped(stats.report(speed, decoder.lever))
                for latent in latents:
                    decode = functools.partial(self._decode, decoder, latent)
                    yield fallback.run(self.handle, "decode", decode)
            fallback.succeeded()
            lease.measured_bytes = self._took(others)

    def warm_up(self) -> None:
        """Paint one picture in one step, of the usual size where that is nothing: on a GPU."""
        side = USUAL_SIDE if self.device.is_cuda else 64
        pictures = self.generate(
            prompt=plain(""),
            negative_prompt=plain(""),
            seeds=[0],
            width=side,
            height=side,
            num_inference_steps=1,
            guidance_scale=2.0,
        )
        for _ in pictures:
            pass

    def _took(self, others: int) -> int | None:
        """What a job took beside all weights, where others hold so many bytes; None on a CPU."""
        peak = self.device.peak_bytes()
        return None if peak is None else max(peak - others - self._parts.num_bytes, 0)

    def _have(self, plan: SdxlMemoryPlan, *parts: str) -> None:
        """Have the weights of a stage on the device: its own alone, where others have no room."""
        if plan.offload:
            self._parts.to_device_only(*parts)
        else:
            self._parts.to_device()

    def _denoise_all(
        self,
        seeds: Sequence[int],
        conditioning: Conditioning,
        schedule: Schedule,
        step: Step,
        fallback: OomFallback[SdxlMemoryPlan],
        stats: ForwardStats,
    ) -> Iterator[torch.Tensor]:
        """The seeds' latents in equal batches as large as memory allows; no pixel depends on it."""
        total = schedule.steps * len(seeds)
        finished = 0

        def denoise(plan: SdxlMemoryPlan) -> torch.Tensor:
            batch = seeds[finished : finished + plan.size(len(seeds))]
            before = finished * schedule.steps
            self._have(plan, "unet")
            return self._denoise(
                batch,
                conditioning,
                schedule,
                lambda done: step(before + done * len(batch), total),
                stats,
                plan.lean,
            )

        while finished < len(seeds):
            latents = fallback.run(self.handle, "denoise", denoise, len(seeds))
            finished += len(latents)
            yield latents

    def _denoise(
        self,
        seeds: Sequence[int],
        conditioning: Conditioning,
        schedule: Schedule,
        stepped: Callable[[int], None],
        stats: ForwardStats,
        is_lean: bool,
    ) -> torch.Tensor:
        """Latents (len(seeds), 4, h, w), each made from its own seed alone."""
        scheduler = make_scheduler(self._pipe.scheduler.config, schedule.scheduler)
        set_steps(scheduler, schedule.num_inference_steps, self.device.name)
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

        inputs, preset = conditioning.for_batch(len(seeds)), schedule.preset
        # The step adds no noise of its own, as in diffusers' pipelines; TCD's does by default.
        extra = _accepted(scheduler.step, generator=generators, eta=0.0)
        settled = preset.warmup_steps(len(timesteps))
        cache, count = DeepCache(self._unet, preset.deep_cache_interval, settled), ForwardStats()
        remembering = nullcontext() if is_lean else attention.cached_prompt_keys(self._unet)
        with remembering, cache.enabled():
            for index, timestep in enumerate(timesteps):
                cache.begin_forward(index)
                predicted = self._predict(latents, timestep, scheduler, conditioning, inputs)
                count.count(conditioning.rows, cache.is_full)
                latents = scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[
                    0
                ]
                stepped((index + 1) // scheduler.order)
        stats.add(count)
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
        rows = torch.cat([latents] * conditioning.rows)
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
        self,
        read: Callable[[Prompt], Embedding],
        prompt: Prompt,
        negative: Prompt | None,
        size: tuple[int, int],
        guidance_scale: float,
    ) -> Conditioning:
        rows = [read(prompt)]
        distilled = self._distilled(guidance_scale)
        # At a scale of 1 the negative cancels out, and half the work with it.
        if guidance_scale > 1 and distilled is None:
            if negative is None and self._pipe.config.force_zeros_for_empty_prompt:
                rows = [rows[0].zeros(), *rows]
            else:
                rows = level([read(negative or plain("")), *rows], lambda: read(plain("")))
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

    def _read(
        self, plan: SdxlMemoryPlan, check: Check, is_changed: bool, prompt: Prompt
    ) -> Embedding:
        """A prompt's embedding: the one that was kept, unless a LoRA has changed the encoders."""

        def read(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
            self._have(plan, "text")
            made = self._prompts.encode(prompt, check)
            return made.hidden, made.pooled

        return Embedding(*(read(prompt) if is_changed else self._kept.get(read, prompt)))

    def _show(
        self,
        plan: SdxlMemoryPlan,
        likeness: Image.Image | None,
        keeps: str | None,
        scale: float,
        is_guided: bool,
    ) -> torch.Tensor:
        """What the IP-Adapter shows of a likeness, and from then on acts on."""
        assert self.adapter is not None
        self._have(plan, "image", "unet")
        self.adapter.keep(keeps if likeness else None, scale)
        return self.adapter.embed(likeness, is_guided)

    def _encode(self, image: Image.Image, plan: SdxlMemoryPlan | None = None) -> torch.Tensor:
        """The latent (1, 4, height / 8, width / 8) of a picture: its most likely one, no seed."""
        self._have(plan or self._plans.default, "vae")
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(self.device.name)
        pixels = pixels.permute(2, 0, 1)[None].to(self._vae.dtype) / 127.5 - 1
        latent = self._vae.encode(pixels).latent_dist.mode()
        return decoders.normalised(latent, self._vae.config)

    def _decoder(self, preset: SpeedPreset) -> Decoder:
        """What decodes a job: the VAE as it is, unless the levers let something smaller."""
        if preset.tiny_vae and self._tiny:
            return self._tiny
        if preset.vae_bf16:
            return decoders.in_bf16(self._vae, self.device)
        return Vae(self._vae, self.device, self._vae.dtype)

    def _decode(self, decoder: Decoder, latent: torch.Tensor, plan: SdxlMemoryPlan) -> np.ndarray:
        """The picture of one latent (4, h, w); it becomes bytes where the decoder leaves it."""
        self._have(plan, decoder.part)
        decoded = decoder.decode(check_finite(latent, "the latent")[None], plan.tiled_decode)
        with self.device.uncounted() if plan.tiled_decode else nullcontext():
            check_finite(decoded, "the decoded picture")
            # bf16 has not 255 grey levels; the exact way takes its bytes as diffusers does.
            pixels = _pixels(decoded.float() if decoder.lever else decoded)
        return self.device.copy_to_host(pixels).numpy()


def _pixels(decoded: torch.Tensor) -> torch.Tensor:
    """A decoded picture (3, height, width) as uint8 (height, width, 3)."""
    pixels = (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous()


def _accepted(call: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that a scheduler's step takes: only the stochastic ones take a generator."""
    parameters = inspect.signature(call).parameters
    return {name: value for name, value in options.items() if name in parameters}
