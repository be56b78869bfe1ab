"""`sdxl_image_fast` and `sdxl_image_high`: from a payload to an `ImageRequest`, and to its outputs.

{"id": "job_1", "type": "sdxl_image_fast", "user_id": "user_1",
 "prompt": "green hills under a blue sky, a yellow sun on the right", "negative_prompt": "blurry",
 "config": {"num_images": 3, "num_inference_steps": 15, "guidance_scale": 6,
            "resolution": "1024x576", "seed": 42, "denoise_strength": 0.5},
 "metadata": {"reference_image_url": "https://...", "reference_type": "style"}}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import cached_property
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AliasChoices, Field, ValidationInfo, field_validator, model_validator

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.job import (
    JSON_NUMBER,
    MAX_PICTURES,
    SEEDS,
    CheckedText,
    Flag,
    Reference,
    Wire,
    no_text_nor_flag,
)
from ourvidz_serverless.jobs import inpainting
from ourvidz_serverless.jobs.inpainting import Inpainting
from ourvidz_serverless.jobs.media import (
    JobProgress,
    MediaJob,
    ResizeMode,
    Speed,
    Strength,
    Text,
    UploadUrls,
)
from ourvidz_serverless.models.sdxl import prompt_weighting
from ourvidz_serverless.models.sdxl.request import (
    ImageModel,
    ImageRequest,
    IpAdapterImage,
    StartImage,
)
from ourvidz_serverless.output import Output
from ourvidz_serverless.settings import Settings

STEPS = {"sdxl_image_fast": 15, "sdxl_image_high": 25}
MAX_STEPS = 50

#: What a job below the minimum of steps lacks.
FEWER_STEPS = (
    'fewer need a distilled checkpoint (SDXL_DISTILLED_STEPS), or a LoRA with "distilled": true'
)

MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 2048, 8

#: An exact copy is the reference, re-encoded with one denoising step.
COPY_STRENGTH = 0.05

#: A job that sets a denoise strength of at most this keeps the reference's pixels, which an
#: IP-Adapter does not keep. The application's exact copy is such a job.
NEAR_COPY_STRENGTH = 0.1

#: The denoise strength by the type of the reference, if the job sets none. A style keeps only
#: colours and mood, a character nearly everything.
STRENGTHS = {None: 0.5, "style": 0.8, "composition": 0.65, "character": 0.45}

#: The denoise strength of a job that inpaints, if it sets none, without and with a checkpoint for
#: inpainting. All that the mask shows is made anew. The card of the published checkpoint wants a
#: little less than 1 (https://huggingface.co/diffusers/stable-diffusion-xl-1.0-inpainting-0.1).
INPAINTING_STRENGTHS = (1.0, 0.99)

#: The scale of an IP-Adapter by the type of the reference, if the job sets none. diffusers'
#: documentation has these scales: for InstantStyle's single blocks, and for all blocks.
ADAPTER_SCALES = {"style": 1.0, "composition": 1.0, "character": 0.6}

Scheduler = Literal[
    "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "unipc", "ddim", "lcm"
]
ReferenceType = Literal["style", "composition", "character"]
SdxlResizeMode = Literal[ResizeMode, "extend"]
Resolution = Annotated[str, Field(pattern=r"^\d{1,5}[xX]\d{1,5}$", description="1024x1024")]


class Lora(Wire):
    """A LoRA by name, from the worker's own folder, or by the URL of an allowed host."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_. -]{0,127}$")
    url: str | None = Field(None, pattern=r"^https://", max_length=8192)
    scale: float = Field(1.0, ge=-2.0, le=2.0)
    distilled: Flag = Field(
        False, description="made for few steps: LCM, Lightning, Hyper, DMD2; allows 1 step and more"
    )

    _json_number = field_validator("scale", mode="before")(no_text_nor_flag)

    @model_validator(mode="after")
    def _one_source(self) -> Lora:
        if (self.name is None) == (self.url is None):
            raise ValueError("Input should have either a name or a url")
        return self

    @property
    def source(self) -> str:
        return self.name or self.url or ""


class SdxlConfig(Wire):
    num_images: Annotated[int, Field(ge=1, le=MAX_PICTURES), JSON_NUMBER] = 1
    # Before the steps, whose minimum depends on it.
    loras: tuple[Lora, ...] = Field((), max_length=4)
    num_inference_steps: int | None = Field(
        None, le=MAX_STEPS, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    guidance_scale: float = Field(7.0, ge=1.0, le=20.0)
    resolution: tuple[int, int] = (1024, 1024)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    negative_prompt: str | None = Text
    image: str | None = Reference
    denoise_strength: float | None = Strength
    scheduler: Scheduler | None = None
    clip_skip: Annotated[int, Field(ge=0, le=11), JSON_NUMBER] = 0
    resize_mode: SdxlResizeMode = "crop"
    mask: str | None = Reference
    mask_blur: Annotated[int, Field(ge=0, le=64), JSON_NUMBER] = 8
    reference_required: Flag = False
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = Field(95, ge=1, le=100)
    upload_urls: UploadUrls | None = None
    inline: Flag = False
    speed: Speed = "exact"

    _json_numbers = field_validator(
        *("num_inference_steps", "guidance_scale", "seed", "denoise_strength", "quality"),
        mode="before",
    )(no_text_nor_flag)

    @field_validator("num_inference_steps")
    @classmethod
    def _at_least_the_minimum(cls, steps: int | None, info: ValidationInfo) -> int | None:
        loras, settings = info.data.get("loras", ()), info.context
        least = 1 if settings is None or _is_distilled(loras, settings) else settings.sdxl_min_steps
        if steps is not None and steps < least:
            raise ValueError(
                f"Input should be greater than or equal to {least}"
                f"{': ' + FEWER_STEPS if steps > 0 else ''}"
            )
        return steps

    @field_validator("scheduler", mode="before")
    @classmethod
    def _by_any_spelling(cls, name: object) -> object:
        """`DPM++ 2M Karras`, `dpmpp-2m-karras` and `dpmpp_2m_karras` are the same scheduler."""
        if not isinstance(name, str):
            return name
        return re.sub(r"[\W_]+", "_", name.lower().replace("++", "pp")).strip("_")

    @field_validator("resolution", mode="before", json_schema_input_type=Resolution)
    @classmethod
    def _width_x_height(cls, value: object) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", value) if isinstance(value, str) else None
        sides = tuple(int(side) for side in match.groups()) if match else ()
        if len(sides) != 2 or any(
            side % SIDE_MULTIPLE or not MIN_SIDE <= side <= MAX_SIDE for side in sides
        ):
            raise ValueError(
                "Input should be WIDTHxHEIGHT, each a multiple of "
                f"{SIDE_MULTIPLE} from {MIN_SIDE} to {MAX_SIDE}"
            )
        return sides[0], sides[1]


class SdxlMetadata(Wire):
    negative_prompt: str | None = Text
    reference_image_url: str | None = Reference
    reference_strength: float | None = Strength
    reference_type: ReferenceType | None = None
    denoise_strength: float | None = Strength
    exact_copy_mode: bool = False
    # `modify`, `copy`, or a video mode in a payload that is not about video: only `copy` counts.
    reference_mode: str | None = None
    reference_consent: Flag = False
    content_type: str | None = Field(None, validation_alias=AliasChoices("contentType"))
    nsfw_optimization: bool = False


class SdxlJob(MediaJob):
    type: Literal["sdxl_image_fast", "sdxl_image_high"]
    compel_enabled: Flag = False
    compel_weights: str | None = Text
    config: SdxlConfig = SdxlConfig()
    metadata: SdxlMetadata = SdxlMetadata()

    @model_validator(mode="after")
    def _has_reference_to_copy(self) -> SdxlJob:
        if self.is_exact_copy and not self.reference:
            raise ValueError("metadata.reference_image_url: Field required for an exact copy")
        return self

    @model_validator(mode="after")
    def _has_reference_to_repaint(self) -> SdxlJob:
        if not self.is_inpainting:
            return self
        field = "config.mask" if self.config.mask else "config.resize_mode"
        if not self.reference:
            raise ValueError(f"metadata.reference_image_url: Field required beside {field}")
        if self.is_exact_copy:
            raise ValueError(f"{field}: Input should not repaint a part of an exact copy")
        return self

    @model_validator(mode="after")
    def _one_place_for_the_pictures(self) -> SdxlJob:
        if self.is_inline and self.upload_urls:
            raise ValueError("config.inline: Input should be false beside upload_urls")
        return self

    @model_validator(mode="after")
    def _weights_that_can_be_read(self) -> SdxlJob:
        _ = self.weighted_prompt, self.weighted_negative
        return self

    @property
    def texts(self) -> list[CheckedText]:
        texts = [
            CheckedText(self.prompt or "", "prompt"),
            CheckedText(self.compel_weights or "", "compel_weights"),
        ]
        if self.compel_enabled:
            # As the model reads it: without the syntax, which may split a word or join two words.
            parts = [part.text for part in self.weighted_prompt]
            texts += [CheckedText(between.join(parts), "prompt") for between in ("", " ")]
        return texts

    @property
    def num_outputs(self) -> int:
        return self.config.num_images

    @property
    def size(self) -> tuple[int, int]:
        return self.config.resolution

    @property
    def reference(self) -> str | None:
        return self.config.image or self.metadata.reference_image_url

    @property
    def references(self) -> dict[str, str]:
        given = {"reference": self.reference, "mask": self.config.mask}
        return {role: each for role, each in given.items() if each}

    @property
    def reference_required(self) -> bool:
        # These cannot fall back to a job without their pictures.
        return self.config.reference_required or self.is_exact_copy or self.is_inpainting

    @property
    def is_inpainting(self) -> bool:
        """Whether the job keeps some pixels of the reference and makes others anew."""
        return bool(self.config.mask) or self.config.resize_mode == "extend"

    @property
    def is_exact_copy(self) -> bool:
        return self.metadata.exact_copy_mode or self.metadata.reference_mode == "copy"

    @property
    def is_inline(self) -> bool:
        return self.config.inline

    @property
    def steps(self) -> int:
        return self.config.num_inference_steps or STEPS[self.type]

    @cached_property
    def weighted_prompt(self) -> prompt_weighting.Prompt:
        """The prompt as the model reads it, followed by the terms of `compel_weights`."""
        terms = {"prompt": self.prompt}
        if self.compel_enabled:
            terms["compel_weights"] = self.compel_weights
        return prompt_weighting.listed(
            self._read(field, text) for field, text in terms.items() if text
        )

    @cached_property
    def weighted_negative(self) -> prompt_weighting.Prompt | None:
        return next((self._read(field, text) for field, text in self.negatives.items()), None)

    def _read(self, field: str, text: str) -> prompt_weighting.Prompt:
        if not self.compel_enabled:
            return prompt_weighting.plain(text)
        try:
            return prompt_weighting.parse(text)
        except ValueError as exc:
            raise ValueError(f"{field}: {exc}") from None

    @property
    def strength(self) -> float:
        """The denoise strength, from 0.05 (a copy) to 1 (nothing of the reference is left)."""
        if self.is_exact_copy:
            return COPY_STRENGTH
        asked = self.reference_strength
        default = STRENGTHS[self.metadata.reference_type]
        return max(asked.changed if asked else default, COPY_STRENGTH)

    @property
    def adapter_scale(self) -> float:
        """The scale of the IP-Adapter, from 0 to 1."""
        asked = self.reference_strength
        default = ADAPTER_SCALES[self.metadata.reference_type or "character"]
        return 1 - asked.changed if asked else default

    @property
    def keeps_pixels(self) -> bool:
        """Whether the job asks for the reference's own pixels, nearly unchanged."""
        asked = self.reference_strength
        is_near_copy = asked and asked.is_denoise_strength and asked.changed <= NEAR_COPY_STRENGTH
        return self.is_exact_copy or bool(is_near_copy)

    @property
    def seeds(self) -> list[int]:
        """One seed for each image, upwards from the job's seed.

        After 2^31 - 1 comes 0, so that a job may ask for each reported seed.
        """
        return [(self.seed + index) % SEEDS for index in range(self.config.num_images)]


def parse(payload: Mapping[str, Any], settings: Settings) -> SdxlJob:
    """The job of a payload; raises pydantic's ValidationError."""
    job = SdxlJob.model_validate(payload, context=settings)
    return _with_distilled_defaults(job, settings)


def _with_distilled_defaults(job: SdxlJob, settings: Settings) -> SdxlJob:
    """The job with a distilled checkpoint's steps, and without guidance, where it names neither."""
    config, given = job.config, job.config.model_fields_set
    changes: dict[str, Any] = {}
    if settings.sdxl_distilled_steps and config.num_inference_steps is None:
        changes["num_inference_steps"] = settings.sdxl_distilled_steps
    if _is_distilled(config.loras, settings) and "guidance_scale" not in given:
        changes["guidance_scale"] = 1.0
    return job.model_copy(update={"config": config.model_copy(update=changes)}) if changes else job


def _is_distilled(loras: Iterable[Lora], settings: Settings) -> bool:
    """Whether the checkpoint, or a LoRA, was made for few steps."""
    return settings.sdxl_distilled_steps is not None or any(lora.distilled for lora in loras)


def prepare(job: SdxlJob, model: ImageModel, context: JobContext) -> None:
    """Start to move the weights to the device, and download the job's LoRAs."""
    model.prefetch()
    for lora in job.config.loras:
        context.check()
        model.loras.fetch(lora.source, job.user_id, context.deadline)


def run(
    job: SdxlJob, model: ImageModel, references: Mapping[str, Image.Image], context: JobContext
) -> Iterator[Output]:
    """The images of a job, in order; `context.metadata` says how a reference was used."""
    canvas = _inpainting(job, references)
    reference = (
        _repainted(job, canvas, model)
        if canvas
        else _reference(job, references.get("reference"), model.has_ip_adapter)
    )
    context.metadata.update(_reference_metadata(job, reference))
    request = ImageRequest(
        prompt=job.weighted_prompt,
        negative=job.weighted_negative,
        seeds=tuple(job.seeds),
        size=job.size,
        steps=job.steps,
        guidance_scale=job.config.guidance_scale,
        scheduler=job.config.scheduler,
        loras=tuple(
            (model.loras.path(lora.source, job.user_id), lora.scale) for lora in job.config.loras
        ),
        reference=reference,
        speed=job.config.speed,
        clip_skip=job.config.clip_skip,
        has_distilled_lora=any(lora.distilled for lora in job.config.loras),
    )
    images = model.generate(request, JobProgress(context))
    # Closed here, however the loop ends: the model releases its memory before the next job has the
    # device.
    with closing(images):
        for index, (seed, pixels) in enumerate(zip(request.seeds, images, strict=True)):
            context.check()
            yield Output(
                index=index,
                pixels=canvas.composite(pixels) if canvas else pixels,
                metadata=_asset_metadata(job, request, index, seed),
                format=job.config.output_format,
                quality=job.config.quality,
                composite=request.start is not None,
            )


def _inpainting(job: SdxlJob, references: Mapping[str, Image.Image]) -> Inpainting | None:
    """The reference with its mask, as the job asks; None for a job that keeps no pixels."""
    if not job.is_inpainting:
        return None
    config, picture, mask = job.config, references["reference"], references.get("mask")
    if config.resize_mode == "extend":
        return inpainting.extended(picture, mask, job.size, config.mask_blur)
    return inpainting.masked(
        picture, references["mask"], job.size, config.resize_mode, config.mask_blur
    )


def _repainted(job: SdxlJob, canvas: Inpainting, model: ImageModel) -> StartImage:
    asked, default = job.reference_strength, INPAINTING_STRENGTHS[model.is_inpainting_checkpoint]
    strength = max(asked.changed if asked else default, COPY_STRENGTH)
    return StartImage(canvas.picture, strength, canvas.mask)


def _reference(
    job: SdxlJob, image: Image.Image | None, has_ip_adapter: bool
) -> StartImage | IpAdapterImage | None:
    """The reference as the model takes it: for the IP-Adapter, or as the start image."""
    if image is None:
        return None
    keeps = job.metadata.reference_type
    if keeps and has_ip_adapter and not job.keeps_pixels:
        return IpAdapterImage(image, keeps, job.adapter_scale)
    mode = job.config.resize_mode
    assert mode != "extend"  # it inpaints
    return StartImage(job.fit(image, mode), job.strength)


def _method(reference: StartImage | IpAdapterImage) -> str:
    if isinstance(reference, IpAdapterImage):
        return "ip_adapter"
    return "inpaint" if reference.mask else "img2img"


def _asset_metadata(job: SdxlJob, request: ImageRequest, index: int, seed: int) -> dict[str, Any]:
    metadata = job.asset_metadata(
        seed, request.steps, request.guidance_scale, index, len(request.seeds)
    )
    if request.start:
        metadata["denoise_strength"] = request.start.strength
    return metadata


def _reference_metadata(
    job: SdxlJob, reference: StartImage | IpAdapterImage | None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"batch_size": job.config.num_images, "reference_mode": "none"}
    if reference is None:
        return metadata
    metadata["reference_mode"] = "copy" if job.is_exact_copy else "modify"
    metadata["reference_method"] = _method(reference)
    if job.metadata.reference_type:
        metadata["reference_type"] = job.metadata.reference_type
    if isinstance(reference, StartImage):
        metadata["denoise_strength"] = reference.strength
        metadata["resize_mode"] = job.config.resize_mode
    else:
        metadata["reference_scale"] = reference.scale
    return metadata
