"""What image jobs and video jobs have in common: their fields, and how the fields are read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from PIL import Image
from pydantic import AfterValidator, Field, SecretStr, model_validator

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.job import MAX_PICTURES, Job, has_adult_label
from ourvidz_serverless.net.download import plain_url
from ourvidz_serverless.net.retries import Refused
from ourvidz_serverless.references import decode

ResizeMode = Literal["crop", "pad", "stretch"]
Speed = Literal["exact", "balanced", "fast"]

#: A text of the caller, in characters.
Text = Field(None, max_length=20_000)

#: A share, from 0 to 1.
Strength = Field(None, ge=0.0, le=1.0)


def _plain_url(url: SecretStr) -> SecretStr:
    try:
        plain_url(url.get_secret_value())
    except Refused as exc:
        raise ValueError(f"Input should be {str(exc).removeprefix('not ')}") from None
    return url


#: A presigned URL: whoever knows it may write there.
UploadUrl = Annotated[
    SecretStr, AfterValidator(_plain_url), Field(json_schema_extra={"pattern": "^https://"})
]
UploadUrls = Annotated[tuple[UploadUrl, ...], Field(min_length=1, max_length=MAX_PICTURES)]


class MediaConfig(Protocol):
    """The fields of `config` that every media job has."""

    @property
    def seed(self) -> int | None: ...

    @property
    def negative_prompt(self) -> str | None: ...

    @property
    def denoise_strength(self) -> float | None: ...

    @property
    def reference_required(self) -> bool: ...

    @property
    def upload_urls(self) -> tuple[SecretStr, ...] | None: ...


class MediaMetadata(Protocol):
    """The fields of `metadata` that every media job has."""

    @property
    def negative_prompt(self) -> str | None: ...

    @property
    def reference_strength(self) -> float | None: ...

    @property
    def denoise_strength(self) -> float | None: ...

    @property
    def reference_consent(self) -> bool: ...

    @property
    def content_type(self) -> str | None: ...

    @property
    def nsfw_optimization(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ReferenceStrength:
    """How much of a reference the job asks to change and to keep, both from 0 to 1.

    `field` is the field of the payload that says it.
    """

    field: str
    changed: float
    kept: float

    @property
    def is_denoise_strength(self) -> bool:
        return self.field.endswith(".denoise_strength")


class MediaJob(Job):
    """A job whose output is an image or a video."""

    prompt: str | None = Text
    negative_prompt: str | None = Text
    content_type: str | None = None

    if TYPE_CHECKING:
        # Each family declares these fields itself, because their order is part of the contract.
        config: MediaConfig
        metadata: MediaMetadata

    @model_validator(mode="after")
    def _has_prompt_or_reference(self) -> Self:
        if self.prompt is None and not self.references:
            raise ValueError("prompt: Field required where no reference image is given")
        return self

    @model_validator(mode="after")
    def _an_upload_url_for_each_output(self) -> Self:
        urls, num_outputs = self.upload_urls, self.num_outputs
        if urls and len(urls) != num_outputs:
            items = "1 URL" if num_outputs == 1 else f"{num_outputs} URLs"
            raise ValueError(
                f"config.upload_urls: Input should have {items}, one for each asset of the job, "
                f"not {len(urls)}"
            )
        if len(set(urls)) != len(urls):
            raise ValueError("config.upload_urls: Input should be different URLs")
        return self

    @property
    def num_outputs(self) -> int:
        """How many pictures or videos the job makes."""
        raise NotImplementedError

    @property
    def upload_urls(self) -> tuple[str, ...]:
        return tuple(url.get_secret_value() for url in self.config.upload_urls or ())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the output, in pixels."""
        raise NotImplementedError

    @property
    def adult(self) -> bool:
        labels = self.content_type, self.metadata.content_type
        return has_adult_label(*labels) or self.metadata.nsfw_optimization

    @property
    def reference_consent(self) -> bool:
        return self.metadata.reference_consent

    @property
    def reference_required(self) -> bool:
        return self.config.reference_required

    @property
    def seed(self) -> int:
        """The job's seed, or `own_seed` if the job names none."""
        return self.own_seed if self.config.seed is None else self.config.seed

    @property
    def negative(self) -> str | None:
        """The negative prompt: top level, then `config`, then `metadata`."""
        return next(iter(self.negatives.values()), None)

    @property
    def negatives(self) -> dict[str, str]:
        """The negative prompts that are given, by field; the first one counts."""
        texts = {
            "negative_prompt": self.negative_prompt,
            "config.negative_prompt": self.config.negative_prompt,
            "metadata.negative_prompt": self.metadata.negative_prompt,
        }
        return {field: text for field, text in texts.items() if text is not None}

    @property
    def reference_strength(self) -> ReferenceStrength | None:
        """The strength that the job sets for its reference: the first field that is given.

        `denoise_strength` says how much of a reference changes, `reference_strength` how much
        of it stays.
        """
        denoise_strengths = {
            "config.denoise_strength": self.config.denoise_strength,
            "metadata.denoise_strength": self.metadata.denoise_strength,
        }
        for field, changed in denoise_strengths.items():
            if changed is not None:
                return ReferenceStrength(field, changed, kept=1 - changed)
        kept = self.metadata.reference_strength
        if kept is None:
            return None
        return ReferenceStrength("metadata.reference_strength", changed=1 - kept, kept=kept)

    def fit(self, reference: Image.Image, mode: ResizeMode) -> Image.Image:
        """A reference at the job's size."""
        return decode.fit(reference, *self.size, mode)

    def asset_metadata(
        self, seed: int, steps: int, guidance_scale: float, index: int = 0, batch_size: int = 1
    ) -> dict[str, Any]:
        """What a document says of one output of a job."""
        width, height = self.size
        return {
            "width": width,
            "height": height,
            "batch_size": batch_size,
            "asset_index": index,
            "seed": seed,
            "steps": steps,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
        }


class JobProgress:
    """The `Progress` of a running job: steps go to its callers, reports to its metadata."""

    def __init__(self, context: JobContext) -> None:
        self._context = context

    def check(self) -> None:
        self._context.check()

    def step(self, done: int, total: int) -> None:
        self._context.step("generate", done, total)

    def span(self, name: str) -> AbstractContextManager[object]:
        return self._context.trace.span(name)

    def memory_plan(self, plan: Mapping[str, Any]) -> None:
        self._context.metadata["memory_plan"] = dict(plan)

    def speed(self, report: Mapping[str, Any]) -> None:
        self._context.metadata["speed"] = dict(report)
