"""SDXL on a fake device: the worker's code and diffusers' pipelines, on the same networks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from benchmarks import architectures
from benchmarks.dry_run.adapters import add_ip_adapter, write_lora
from benchmarks.dry_run.fake_cuda import FakeCuda
from benchmarks.dry_run.installed import device_of, installed
from benchmarks.dry_run.stages import DECODING, PROMPTS, REFERENCES, WEIGHTS, Marks, Run, Stages
from ourvidz_serverless.models import schedulers
from ourvidz_serverless.models.memory.device_memory import CudaMemory
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableParts
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.sdxl.ip_adapter import IpAdapter
from ourvidz_serverless.models.sdxl.loader import STAGES, low_vram_plans
from ourvidz_serverless.models.sdxl.networks import SdxlNetworks
from ourvidz_serverless.models.sdxl.pipeline import MAX_BATCH, SdxlModel
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from ourvidz_serverless.models.sdxl.request import ImageRequest, IpAdapterImage, Keeps, StartImage
from ourvidz_serverless.models.sdxl.resnets import move_fewer_bytes
from ourvidz_serverless.models.speed import attention

#: Those that jobs may name.
SCHEDULERS = tuple(schedulers.SCHEDULERS)

PROMPT, NEGATIVE = "a red circle on a table", "blurred"


@dataclass(frozen=True, slots=True)
class Job:
    """Pictures of one request. With a `strength` they start from an image.

    With `is_masked` half of that image is masked, for inpainting. `keeps` is what the IP-Adapter
    keeps of an image; without it there is no adapter.
    """

    count: int = 1
    side: int = 1024
    steps: int = 3
    strength: float | None = None
    is_masked: bool = False
    scheduler: str | None = None
    speed: str = "exact"
    is_low_vram: bool = False
    has_lora: bool = False
    keeps: Keeps | None = None

    def __str__(self) -> str:
        noun = "picture" if self.count == 1 else "pictures"
        facts = [
            f"SDXL, {self.count} {noun} of {self.side}x{self.side}",
            ("inpainting" if self.is_masked else "image-to-image") if self.strength else "",
            self.scheduler or "",
            f"{self.speed}, a shallow step" if self.speed != "exact" else "",
            "LOW_VRAM" if self.is_low_vram else "",
            "a LoRA" if self.has_lora else "",
            f"an IP-Adapter that keeps a {self.keeps}" if self.keeps else "",
        ]
        return ", ".join(filter(None, facts))


def ours(job: Job, fake: FakeCuda | None = None) -> Run:
    """What the worker does."""
    fake = fake or FakeCuda()
    with installed(fake), TemporaryDirectory() as folder:
        pipe = networks(fake)
        device = device_of(fake, torch.float16)
        loras, adapter = _loras(job, pipe, folder), _ip_adapter(job, pipe, fake)
        with fake.on():
            prepare(pipe, device)
            ledger = Ledger(CudaMemory(device.name, 0))
            model = model_of(pipe, device, ledger, job.is_low_vram, adapter)
            stages = Stages(fake)
            model.parts.to_device()
            stages.mark(WEIGHTS)
            weight_bytes = fake.live_bytes
            mark_networks(stages, pipe)
            deque(model.generate(request(job, loras=loras), stages), maxlen=0)
            stages.mark(DECODING)
    return Run(str(job), "worker", weight_bytes, stages.stages, tuple(stages.plans))


def theirs(job: Job, fake: FakeCuda | None = None) -> Run:
    """What diffusers' pipeline does."""
    fake = fake or FakeCuda()
    with installed(fake), TemporaryDirectory() as folder:
        pipe = networks(fake)
        loras, adapter = _loras(job, pipe, folder), _ip_adapter(job, pipe, fake)
        # diffusers loads the VAE in fp16 too, and widens it for each decode.
        with fake.fake:
            pipe.vae.half()
        with fake.on():
            stages = Stages(fake)
            pipe.to("cuda")
            stages.mark(WEIGHTS)
            weight_bytes = fake.live_bytes
            mark_networks(stages, pipe)
            for path, _ in loras:
                pipe.load_lora_weights(str(path))
            if adapter:
                adapter.encode(_ip_adapter_image(job), is_guided=False)
            call(pipe, job, stages)
            stages.mark(DECODING)
    return Run(str(job), "diffusers", weight_bytes, stages.stages)


def _loras(job: Job, pipe: Any, folder: str) -> tuple[tuple[Path, float], ...]:
    return ((write_lora(Path(folder), pipe.unet), 1.0),) if job.has_lora else ()


def _ip_adapter(job: Job, pipe: Any, fake: FakeCuda) -> IpAdapter | None:
    if not job.keeps:
        return None
    with fake.fake, architectures.made_on("cpu", torch.float16):
        return add_ip_adapter(pipe)


def _ip_adapter_image(job: Job) -> IpAdapterImage:
    assert job.keeps
    return IpAdapterImage(_image(job), job.keeps)


def moves() -> Run:
    """The weights to the device, to the host's memory, and from there and from the disk again.

    What is read from the disk is in the host's memory when it is counted.
    """
    fake = FakeCuda()
    with installed(fake):
        own, read = (SdxlNetworks(networks(fake)).parts() for _ in range(2))
        parts = MovableParts(own, device_of(fake, torch.float16), lambda: read)
        with fake.on():
            stages = Stages(fake)
            parts.to_device()
            stages.mark("to the device")
            parts.to_host()
            stages.mark("to the host")
            parts.to_device()
            stages.mark("from the host to the device")
            parts.drop()
            stages.mark("to the disk")
            parts.load()
            parts.to_device()
            stages.mark("from the disk to the device")
    return Run("SDXL's weights", "worker", 0, stages.stages)


def networks(fake: FakeCuda) -> Any:
    """SDXL in fp16, its VAE in fp32, in the fake host's memory."""
    with fake.fake:
        pipe = made("cpu", torch.float16)
    # The scheduler's tensors are the host's, which are real.
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def made(device: str, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with random weights on a device in `dtype`, its VAE in fp32."""
    with architectures.made_on(device, dtype):
        pipe = architectures.sdxl()
    pipe.vae.float()
    for each in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        each.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepare(pipe: Any, device: Any) -> None:
    """Have diffusers' networks compute as the worker's loader has them."""
    for network in (pipe.unet, pipe.vae):
        move_fewer_bytes(network)
    attention.set_backend(pipe.unet, "native", device)


def model_of(
    pipe: Any,
    device: Any,
    ledger: Ledger,
    is_low_vram: bool = False,
    adapter: IpAdapter | None = None,
) -> SdxlModel:
    """The worker's model of these networks."""
    all_networks = SdxlNetworks(pipe, adapter)
    stages = STAGES if is_low_vram else ()
    parts = MovableParts(all_networks.parts(), device, stages=stages)
    plans = low_vram_plans() if is_low_vram else MemoryPlans(SdxlMemoryPlan(MAX_BATCH))
    return SdxlModel(
        all_networks, device, handle=ledger.register(parts, "sdxl", "sdxl"), plans=plans
    )


def mark_networks(stages: Marks, pipe: Any) -> None:
    stages.after_each(pipe.text_encoder, PROMPTS)
    stages.after_each(pipe.text_encoder_2, PROMPTS)
    stages.before_first(pipe.unet, REFERENCES)


def request(
    job: Job, prompt: str = PROMPT, loras: tuple[tuple[Path, float], ...] = ()
) -> ImageRequest:
    """The job for the worker."""
    reference: StartImage | IpAdapterImage | None = None
    if job.strength:
        reference = StartImage(_image(job), job.strength, _mask(job))
    elif job.keeps:
        reference = _ip_adapter_image(job)
    return ImageRequest(
        prompt=plain(prompt),
        negative=plain(NEGATIVE),
        seeds=tuple(range(job.count)),
        size=(job.side, job.side),
        steps=job.steps,
        guidance_scale=6.0,
        scheduler=job.scheduler,
        loras=loras,
        reference=reference,
        speed=job.speed,
    )


def call(pipe: Any, job: Job, stages: Marks, prompt: str = PROMPT) -> Any:
    """The job for diffusers' pipeline; returns its images."""
    options: dict[str, Any] = {"width": job.side, "height": job.side}
    if job.keeps:
        options["ip_adapter_image"] = _image(job)
    if job.strength:
        kind = (
            StableDiffusionXLInpaintPipeline if job.is_masked else StableDiffusionXLImg2ImgPipeline
        )
        pipe = kind(**pipe.components, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        masked = {**options, "mask_image": _mask(job)} if job.is_masked else {}
        options = {**masked, "image": _image(job), "strength": job.strength}

    def on_step(_: Any, index: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        stages.step(index + 1, job.steps)
        return kwargs

    return pipe(
        prompt=prompt,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=job.count,
        generator=[torch.Generator().manual_seed(seed) for seed in range(job.count)],
        num_inference_steps=job.steps,
        guidance_scale=6.0,
        callback_on_step_end=on_step,
        **options,
    ).images


def _image(job: Job) -> Image.Image:
    return Image.new("RGB", (job.side, job.side), "grey")


def _mask(job: Job) -> Image.Image | None:
    """White in the left half."""
    if not job.is_masked:
        return None
    mask = Image.new("L", (job.side, job.side))
    mask.paste(255, (0, 0, job.side // 2, job.side))
    return mask
