"""WAN on a fake device: the worker's code and diffusers' pipelines, on the same networks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks import architectures
from benchmarks.dry_run.fake_cuda import FakeCuda
from benchmarks.dry_run.installed import device_of, installed
from benchmarks.dry_run.stages import DECODING, PROMPTS, REFERENCES, WEIGHTS, Marks, Run, Stages
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CudaMemory
from ourvidz_serverless.models.memory.ledger import Ledger, ModelHandle
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, WanMemoryPlan
from ourvidz_serverless.models.memory.types import Movable
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.regional_compile import compile_blocks
from ourvidz_serverless.models.wan.blocks import move_fewer_bytes
from ourvidz_serverless.models.wan.network import ImageEncoder, WanNetwork
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import (
    References,
    Route,
    SamplingDefaults,
    VideoRequest,
)
from ourvidz_serverless.models.wan.text_encoder import WanTextEncoder, block_by_block
from ourvidz_serverless.models.wan.vae import VideoVae
from ourvidz_serverless.settings import Settings

PROMPT, NEGATIVE = "a red circle on a table", "blurred"
CONFIG = architectures.POCKET / "wan"

NAMES: dict[Route, str] = {
    "t2v": "WAN T2V 1.3B",
    "vace": "WAN VACE 1.3B",
    "i2v": "WAN I2V 14B",
    "flf2v": "WAN FLF2V 14B",
}

#: The images that a job may have, by name, and what each network gets if the job names none.
Given = Literal["first", "last", "subject"]
USUALLY_GIVEN: dict[Route, tuple[Given, ...]] = {
    "t2v": (),
    "vace": ("first", "last"),
    "i2v": ("first",),
    "flf2v": ("first", "last"),
}
GIVEN_NAMES: dict[tuple[Given, ...], str] = {
    ("first", "last"): "first and last frame",
    ("first",): "first frame",
    ("last",): "last frame",
    ("subject",): "a subject",
}


@dataclass(frozen=True, slots=True)
class Modules:
    """WAN's networks, in the fake host's memory. I2V and FLF2V have an image encoder."""

    text: Any
    vae: Any
    transformer: Any
    image_encoder: Any = None


@dataclass(frozen=True, slots=True)
class Job:
    """One video. Which images are `given` matters to VACE; the others read what they were made for.

    By default they are the video's first and last frame, for I2V its first one.
    """

    route: Route = "t2v"
    size: tuple[int, int] = (832, 480)
    frames: int = 81
    steps: int = 3
    solver: str = "unipc"
    speed: str = "exact"
    is_low_vram: bool = False
    given: tuple[Given, ...] = ()

    @property
    def images(self) -> tuple[Given, ...]:
        return self.given or USUALLY_GIVEN[self.route]

    def __str__(self) -> str:
        width, height = self.size
        facts = [
            NAMES[self.route],
            GIVEN_NAMES[self.images] if self.route == "vace" else "",
            f"{self.frames} frames of {width}x{height}",
            self.solver if self.solver != "unipc" else "",
            f"{self.speed}, a shallow step" if self.speed != "exact" else "",
            "LOW_VRAM" if self.is_low_vram else "",
        ]
        return ", ".join(filter(None, facts))


def ours(job: Job, fake: FakeCuda | None = None) -> Run:
    """What the worker does. All its models are on the device when the job begins."""
    fake = fake or FakeCuda()
    with installed(fake):
        modules = networks(fake, job.route)
        device = device_of(fake, torch.bfloat16)
        with fake.on():
            prepare(modules, device)
            ledger = Ledger(CudaMemory(device.name, 0))
            model = model_of(job, device, ledger, modules)
            stages = Stages(fake)
            ledger.preload(*movables(model))
            stages.mark(WEIGHTS)
            weight_bytes = fake.live_bytes
            mark_networks(stages, modules)
            deque(model.generate(request(job), stages), maxlen=0)
            stages.mark(DECODING)
    return Run(str(job), "worker", weight_bytes, stages.stages, tuple(stages.plans))


def theirs(job: Job, fake: FakeCuda | None = None) -> Run:
    """What diffusers' pipeline does, with its VAE in fp32, as its documentation says.

    In inference mode: elsewhere torch's build for CPUs takes a norm apart before the fake device
    sees it, which is one kernel on CUDA.
    """
    fake = fake or FakeCuda()
    with installed(fake):
        modules = networks(fake, job.route)
        pipe = pipe_of(job.route, modules)
        pipe.set_progress_bar_config(disable=True)
        with fake.on(), torch.inference_mode():
            stages = Stages(fake)
            pipe.to("cuda")
            stages.mark(WEIGHTS)
            weight_bytes = fake.live_bytes
            mark_networks(stages, modules)
            call(pipe, job, stages)
            stages.mark(DECODING)
    return Run(str(job), "diffusers", weight_bytes, stages.stages)


def networks(fake: FakeCuda, route: Route) -> Modules:
    """The modules in the fake host's memory: UMT5 and the transformer in bf16, the rest in fp32."""
    with fake.fake:
        return made("cpu", torch.bfloat16, route)


def made(device: str, dtype: torch.dtype, route: Route) -> Modules:
    """Modules with random weights on a device, the VAE and the image encoder in fp32."""
    with architectures.made_on(device, dtype):
        text = UMT5EncoderModel(UMT5Config(**architectures.WAN_TEXT))
        transformer = _transformer(route)
    with torch.device(device):
        vae, image_encoder = AutoencoderKLWan(**architectures.WAN_VAE), None
        if route in ("i2v", "flf2v"):
            image_encoder = CLIPVisionModel(CLIPVisionConfig(**architectures.WAN_IMAGE_ENCODER))
    for each in filter(None, (text, vae, transformer, image_encoder)):
        each.requires_grad_(False).eval()
    keep_in_fp32(transformer)
    return Modules(text, vae, transformer, image_encoder)


def _transformer(route: Route) -> Any:
    if route == "i2v":
        return WanTransformer3DModel(**architectures.WAN_I2V_14B)
    if route == "flf2v":
        return WanTransformer3DModel(**architectures.WAN_FLF2V_14B)
    config = architectures.WAN_TRANSFORMER
    if route == "t2v":
        return WanTransformer3DModel(**config)
    return WanVACETransformer3DModel(
        **config, vace_layers=list(range(0, config["num_layers"], 2)), vace_in_channels=96
    )


def pipe_of(route: Route, modules: Modules) -> Any:
    """diffusers' pipeline of these networks."""
    kinds = {"t2v": WanPipeline, "vace": WanVACEPipeline}
    extra: dict[str, Any] = {}
    if modules.image_encoder:
        extra = {"image_encoder": modules.image_encoder, "image_processor": CLIPImageProcessorPil()}
    return kinds.get(route, WanImageToVideoPipeline)(
        tokenizer=_tokenizer(),
        text_encoder=modules.text,
        transformer=modules.transformer,
        vae=modules.vae,
        scheduler=UniPCMultistepScheduler.from_pretrained(CONFIG / "scheduler"),
        **extra,
    )


def keep_in_fp32(transformer: Any) -> None:
    """Have in fp32 what diffusers' `from_pretrained` leaves in it."""
    for name, parameter in transformer.named_parameters():
        if any(part in name.split(".") for part in transformer._keep_in_fp32_modules):
            module, _, leaf = name.rpartition(".")
            wide = torch.nn.Parameter(parameter.float(), requires_grad=False)
            setattr(transformer.get_submodule(module), leaf, wide)


def prepare(modules: Modules, device: Device) -> None:
    """Have diffusers' networks compute as the worker's loader has them."""
    move_fewer_bytes(modules.transformer)
    attention.set_backend(modules.transformer, "native", device)


def model_of(
    job: Job,
    device: Device,
    ledger: Ledger,
    modules: Modules,
    settings: Settings | None = None,
) -> WanModel:
    """The worker's model of these modules. `settings` are those by which blocks are compiled."""
    text, vae = modules.text, modules.vae

    def handle(name: str, *parts: Any) -> ModelHandle:
        if job.is_low_vram and name == "text":
            return ledger.register(block_by_block(text, device, lambda: text), name, "wan")
        return ledger.register(MovableTensors(parts, device), name, "wan")

    return WanModel(
        device=device,
        text_encoder=WanTextEncoder(_tokenizer(), text, device, handle("text", text)),
        vae=VideoVae(vae, device, handle("vae", vae)),
        networks={job.route: _network(modules, handle, device, settings or Settings())},
        scheduler_config=UniPCMultistepScheduler.load_config(CONFIG / "scheduler"),
        sampling=SamplingDefaults(solver=job.solver, flow_shift=3.0),
        plans=MemoryPlans(WanMemoryPlan(offload=job.is_low_vram)),
        enhancement_prompt="",
        enhancer=None,
    )


def _network(
    modules: Modules, handle: Callable[..., ModelHandle], device: Device, settings: Settings
) -> WanNetwork:
    transformer, encoder = modules.transformer, modules.image_encoder
    parts = [transformer, encoder] if encoder else [transformer]
    own = handle("network", *parts)
    image_encoder = ImageEncoder(CLIPImageProcessorPil(), encoder) if encoder else None
    blocks = compile_blocks(transformer, own, device, settings)
    return WanNetwork(transformer, own, image_encoder, blocks)


def movables(model: WanModel) -> list[Movable]:
    """The models of the ledger, in the order in which the worker loads them."""
    networks = [each.handle for each in model.networks.values()]
    handles = (*networks, model.vae.handle, model.text_encoder.handle)
    return [each.model for each in handles]


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CONFIG / "tokenizer")


def mark_networks(stages: Marks, modules: Modules) -> None:
    stages.after_each(modules.text, PROMPTS)
    stages.before_first(modules.transformer, REFERENCES)


def request(job: Job, prompt: str = PROMPT) -> VideoRequest:
    """The job for the worker."""
    return VideoRequest(
        prompt=prompt,
        negative=NEGATIVE,
        seed=0,
        size=job.size,
        num_frames=job.frames,
        steps=job.steps,
        guidance_scale=5.0,
        speed=job.speed,
        references=References(**dict.fromkeys(job.images, _image(job))),
    )


def call(pipe: Any, job: Job, stages: Marks, prompt: str = PROMPT) -> Any:
    """The job for diffusers' pipeline; returns its frames."""

    def on_step(_: Any, index: int, __: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        stages.step(index + 1, job.steps)
        return kwargs

    width, height = job.size
    options = _vace_options(job) if job.route == "vace" else _image_options(job)
    return pipe(
        prompt=prompt,
        negative_prompt=NEGATIVE,
        width=width,
        height=height,
        num_frames=job.frames,
        num_inference_steps=job.steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=on_step,
        output_type="np",
        **options,
    ).frames[0]


def _image_options(job: Job) -> dict[str, Any]:
    names = {"first": "image", "last": "last_image"}
    return {names[each]: _image(job) for each in job.images}


def _vace_options(job: Job) -> dict[str, Any]:
    """The known frames in a grey video, with a mask of the unknown ones; a subject beside it."""
    grey, known = Image.new("RGB", job.size, (128, 128, 128)), Image.new("L", job.size, 0)
    video, mask = [grey] * job.frames, [Image.new("L", job.size, 255)] * job.frames
    for index in References(**dict.fromkeys(job.images, grey)).frames(job.frames):
        video[index], mask[index] = _image(job), known
    subject = {"reference_images": [_image(job)]} if "subject" in job.images else {}
    return {"video": video, "mask": mask, **subject}


def _image(job: Job) -> Image.Image:
    return Image.new("RGB", job.size, "grey")
