"""The answer to a job: the body of the callback, and the result that the handler returns.

Specification, "Callback Payload Format". The application's edge function reads `error_message` and
`metadata.error_type` first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import core_schema

from ourvidz_serverless import __version__
from ourvidz_serverless.errors import (
    Code,
    DeviceLost,
    InternalError,
    JobError,
    PromptTooLong,
)

#: RunPod drops a larger result of `/run` without an error (10 MB; `/runsync` allows 20).
MAX_RESULT_BYTES = 10_000_000

#: The packages whose versions a document reports.
VERSIONED = ("runpod", "torch", "diffusers", "transformers")

Status = Literal["processing", "completed", "failed"]


class ContractModel(BaseModel):
    """A part of a document. More keys may come with any version; none of these goes."""

    model_config = ConfigDict(extra="allow")


class AssetMetadata(ContractModel):
    """Pictures and videos have sizes and seeds, texts have not.

    `marks` are what the worker's classifiers see in a picture, by its rules.
    """

    format: str
    batch_size: int
    asset_index: int
    file_size_bytes: int
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    denoise_strength: float | None = None
    frame_num: int | None = None
    fps: float | None = None
    duration_seconds: float | None = None
    marks: list[str] | None = None


class Usage(ContractModel):
    """Tokens of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_reused: int


class DocumentMetadata(ContractModel):
    """What the worker knows of the whole job; `timings` are seconds by stage.

    `cost` is the job's share of the device's time, in the currency of `GPU_PRICE_PER_SECOND`.
    `refused` has the `asset_index` of each picture that was made and is not delivered.

    Of a video `frame_num` is its seconds times 16, whatever its `fps`: the asset's `frame_num` is
    the number of frames in the file.
    """

    processing_time: float | None = None
    timings: dict[str, float] | None = None
    versions: dict[str, str] | None = None
    reference_mode: str | None = None
    batch_size: int | None = None
    frame_num: int | None = None
    fps: float | None = None
    vram_used: float | None = None
    cost: float | None = None
    refused: list[int] | None = None
    warnings: list[str] | None = None
    error_type: Code | None = None
    model: str | None = None
    engine: str | None = None
    system_prompt_used: str | None = None
    enhancement_source: str | None = None
    unrestricted_mode: bool | None = None
    nsfw_optimization: bool | None = None


class Reply(ContractModel):
    """What stands beside the assets: the reply of a chat, or the `result` of an administrator."""

    response: str | None = None
    enhanced_prompt: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """The annotation of a mapping whose keys a `ContractModel` describes."""

    model: type[ContractModel]

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return handler.generate_schema(self.model)


@dataclass(frozen=True, slots=True)
class Asset:
    """One output. `url` is a path in the bucket, a link, or a `data:` URI with the whole file."""

    __pydantic_config__ = ContractModel.model_config

    type: Literal["image", "video", "text"]
    url: str
    thumbnail_url: str | None
    metadata: Annotated[Mapping[str, Any], Keys(AssetMetadata)]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed; `retryable` says whether the same job may succeed later."""

    __pydantic_config__ = ContractModel.model_config

    code: Code
    message: str
    retryable: bool
    retry_after: float | None = None
    #: Whether the worker can do no further job. No document holds it.
    ends_worker: SkipJsonSchema[bool] = False
    #: Whether a prompt is longer than the context. OpenAI's protocol has a code for it.
    is_too_long: SkipJsonSchema[bool] = False

    @classmethod
    def of(cls, error: JobError) -> Failure:
        return cls(
            error.code,
            error.message,
            error.retryable,
            error.retry_after,
            ends_worker=isinstance(error, DeviceLost),
            is_too_long=isinstance(error, PromptTooLong),
        )

    def as_dict(self) -> dict[str, Any]:
        body = {"code": self.code, "message": self.message, "retryable": self.retryable}
        return body if self.retry_after is None else {**body, "retry_after": self.retry_after}


@dataclass(frozen=True, slots=True)
class Document:
    """The answer to a job: `callback` and `result` write it, and its schema describes both.

    Plain values in a dataclass: the worker wrote them itself, so nothing validates or converts
    them.
    """

    __pydantic_config__ = ContractModel.model_config

    job_id: str
    worker_id: str
    status: Status
    assets: tuple[Asset, ...] = ()
    metadata: Annotated[Mapping[str, Any], Keys(DocumentMetadata)] = field(default_factory=dict)
    failure: Failure | None = None
    reply: Annotated[Mapping[str, Any], Keys(Reply)] = field(default_factory=dict)

    def callback(self) -> dict[str, Any]:
        """The body that is posted. `error` is an object, as in the specification."""
        body: dict[str, Any] = {
            "job_id": self.job_id,
            "worker_id": self.worker_id,
            "status": self.status,
            "assets": [_asset(asset) for asset in self.assets],
            # Null without a failure: the application merges these into the job's row, which may
            # hold the error of an earlier try.
            "metadata": {
                **self.metadata,
                "error_type": self.failure.code if self.failure else None,
            },
            **self.reply,
        }
        if self.failure:
            body["error"] = self.failure.as_dict()
            body["error_message"] = self.failure.message
        return body

    def result(self) -> dict[str, Any]:
        """What the handler returns: a new dict at each call, since the SDK removes `error` from it.

        RunPod expects `error` as a string: a job whose `error` is an object shows as COMPLETED
        without output. So `error` holds the failure as JSON text, and `failure` holds the object.
        With `refresh_worker`, which the SDK removes too, RunPod replaces the worker.
        """
        body = self.callback()
        if self.failure:
            body["failure"] = body["error"]
            body["error"] = json.dumps(body["error"])
            if self.failure.ends_worker:
                body["refresh_worker"] = True
        return body


def _asset(asset: Asset) -> dict[str, Any]:
    body = {"type": asset.type, "url": asset.url, "metadata": dict(asset.metadata)}
    return {**body, "thumbnail_url": asset.thumbnail_url} if asset.thumbnail_url else body


def check_result(document: Document) -> None:
    """Raise InternalError for a document that RunPod would lose: no valid JSON, or too large."""
    try:
        # Not escaped, as the SDK writes it, so that half a surrogate pair fails here already.
        text = json.dumps(document.result(), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError) as exc:
        raise InternalError("the result could not be written as JSON") from exc
    if size > MAX_RESULT_BYTES:
        raise InternalError(f"the result has {size} bytes; the platform takes {MAX_RESULT_BYTES}")


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the worker and of the `VERSIONED` packages that are installed, by name."""
    found = {"worker": __version__}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
