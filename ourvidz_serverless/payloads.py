"""What travels: a job in, outputs between the floors, one document out.

The document is the callback and the returned output alike (specification, "Callback Payload
Format"; `error_message` and `metadata.error_type` are what the edge function reads first).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
)

from ourvidz_serverless.errors import DeviceLost, InternalError, JobError

#: RunPod drops a larger result of `/run` without a word (10 MB; `/runsync` allows 20).
MAX_RESULT_BYTES = 10_000_000

#: In characters.
MAX_CALLBACK_URL = 2000

#: Levels of nested lists and objects: fewer than the limit of any parser of JSON.
MAX_JSON_DEPTH = 64

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")

#: Seeds are below this.
SEEDS = 2**31

#: The most pictures of one job, whose seeds follow one another.
MAX_PICTURES = 6

Status = Literal["processing", "completed", "failed"]

Role = Literal["system", "user", "assistant"]

#: Ids become storage keys, and Supabase takes plain keys only.
KEY_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$"
Key = Field(pattern=KEY_PATTERN)

#: The user of a job that needs none and names none.
ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a job is known by. Two jobs are one only where user, key and id are the same."""

    user_id: str | None
    api_key: str | None = field(repr=False)
    job_id: str

    @classmethod
    def of(cls, user_id: str | None, api_key: str | None, job_id: str) -> Identity:
        """The identity of a job; one of `anonymous` has no user."""
        return cls(None if user_id == ANONYMOUS else user_id, api_key or None, job_id)


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value itself. Raises ValueError for values that other parsers of JSON refuse."""
    # No recursion: the value may be nested deeper than Python's own stack.
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return value
    raise ValueError(f"Input should be nested at most {MAX_JSON_DEPTH} levels deep")


def _parts(value: object) -> Iterable[object]:
    """The parts of a list or an object. A text or a number has none, and is checked here."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise ValueError("Input should be valid text, without lone surrogates")
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError("Input should hold finite numbers only")
    return ()


def _no_text_nor_flag(value: object) -> object:
    if isinstance(value, str | bool):
        raise ValueError("Input should be a number")
    return value


#: Numbers: "7" and true are refused. 7.0 is a whole number.
JSON_NUMBER = BeforeValidator(_no_text_nor_flag)

#: Booleans: 1 and "true" are refused, as by the contract's `boolean`.
Flag = Annotated[bool, Field(strict=True)]

#: A JSON object that another parser of JSON will read.
JsonObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]


#: A picture that a job brings, as its URL, its path or a data URI. Plain HTTP takes 30 MB.
Reference = Field(
    None,
    max_length=30_000_000,
    description="a data URI is part of the request: RunPod takes 10 MB on /run, 20 on /runsync",
)


class Wire(BaseModel):
    """A part of a payload. Unknown keys are ignored: the caller sends many."""

    model_config = ConfigDict(frozen=True, extra="ignore", loc_by_alias=True, allow_inf_nan=False)


class S3Config(Wire):
    """RunPod's top-level `s3Config`: the job's own bucket, which wins over the worker's.

    What no store could take is refused here, before anything is computed for it.
    """

    # The widest rule that S3 has had. No ARN: it names a host beside `endpointUrl`.
    bucketName: str = Field(pattern=r"^[A-Za-z0-9._-]{3,255}$")
    endpointUrl: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+/?$")
    accessId: SecretStr = Field(min_length=1, json_schema_extra={"pattern": "^[!-~]+$"})
    accessSecret: SecretStr = Field(min_length=1)

    @field_validator("accessId")
    @classmethod
    def _fit_for_a_header(cls, key_id: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[!-~]+", key_id.get_secret_value()):
            raise ValueError("Input should be ASCII characters without spaces")
        return key_id


@dataclass(frozen=True, slots=True)
class CheckedText:
    """A text that the content floor reads, its field, and the role of its speaker."""

    text: str
    field: str
    role: Role = "user"


@dataclass(frozen=True, slots=True)
class Signs:
    """What the content floor found in texts; in adult mode every text counts as sexual."""

    minor: bool = False
    sexual: bool = False


class Job(Wire):
    """What every job type has in common."""

    id: str = Key
    type: str
    user_id: str = Key
    callback_url: str | None = Field(None, max_length=MAX_CALLBACK_URL)
    s3_config: S3Config | None = Field(None, validation_alias="s3Config")

    @property
    def own_seed(self) -> int:
        """The seed of a job that names none: the same at each delivery of the job.

        A second delivery overwrites the files of the first, which the application may already use.
        The seed is never 0: the callback's receiver reads 0 as "none".
        """
        digest = hashlib.sha256(f"{self.user_id}/{self.id}".encode()).digest()
        return 1 + int.from_bytes(digest) % (SEEDS - MAX_PICTURES)

    @property
    def texts(self) -> list[CheckedText]:
        """Every text that may reach a model, negative prompts excepted: what the floor reads."""
        return []

    @property
    def adult(self) -> bool:
        """Whether the job asks for adult content."""
        return False

    @property
    def is_counted(self) -> bool:
        """Whether the job counts against the rate limits."""
        return True

    @property
    def references(self) -> dict[str, str]:
        """Reference images to fetch before the device is taken: role -> URL, data URI or path."""
        return {}

    @property
    def reference_consent(self) -> bool:
        """Whether the caller vouches that the person in a reference agreed to this use of it."""
        return False

    @property
    def reference_required(self) -> bool:
        """Whether a reference that fails ends the job instead of falling back."""
        return False


def says_adult(*labels: str | None) -> bool:
    """Whether a content label of the caller is `nsfw`, in whatever case."""
    return any(label is not None and label.strip().lower() == "nsfw" for label in labels)


@dataclass(frozen=True, slots=True)
class Output:
    """One thing a model made, before it is encoded.

    `pixels` is uint8, shape (height, width, 3). `metadata` holds the asset's own facts (seed,
    steps, ...), in the document's words.
    """

    index: int
    pixels: np.ndarray
    metadata: Mapping[str, Any]
    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 95
    composite: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """One text a model wrote; `metadata` as in `Output`."""

    index: int
    text: str
    metadata: Mapping[str, Any]


class Reel:
    """Frames between the model that decodes them and the encoder that waits for them.

    The model's side puts pieces in, uint8 (frames, height, width, 3), and waits while a few are
    unread, so that memory stays flat however long the video is. The encoder's side iterates.
    """

    #: How soon a model's side that waits hears that its job was stopped.
    POLL_S = 0.05

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._news = threading.Condition()
        self._pieces: deque[np.ndarray] = deque()
        self._is_whole = self._is_cut = False

    def put(self, piece: np.ndarray, check: Callable[[], None]) -> None:
        """Hand over a piece; what `check` raises while there is no room ends the wait.

        A reel that nobody reads any more takes everything.
        """
        with self._news:
            while len(self._pieces) == self._depth and not self._is_cut:
                self._news.wait(self.POLL_S)
                check()
            if not self._is_cut:
                self._pieces.append(piece)
                self._news.notify_all()

    def end(self) -> None:
        """That was the last piece."""
        with self._news:
            self._is_whole = True
            self._news.notify_all()

    def cut(self) -> None:
        """One of the sides has gone: no further piece is put in or read."""
        with self._news:
            self._is_cut = True
            self._news.notify_all()

    def __iter__(self) -> Iterator[np.ndarray]:
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> np.ndarray | None:
        with self._news:
            self._news.wait_for(lambda: self._pieces or self._is_whole or self._is_cut)
            if self._is_cut:
                raise InternalError("the video ended before its last frame")
            piece = self._pieces.popleft() if self._pieces else None
            self._news.notify_all()
            return piece


@dataclass(frozen=True, slots=True)
class Video:
    """A video on its way: sent before its first frame is there. `metadata` as in `Output`."""

    index: int
    frames: Reel
    width: int
    height: int
    fps: int
    metadata: Mapping[str, Any]
    composite: bool = False


@dataclass(frozen=True, slots=True)
class Asset:
    """One stored output, as the caller finds it."""

    type: Literal["image", "video", "text"]
    url: str
    thumbnail_url: str | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed, in the specification's shape."""

    code: str
    message: str
    retryable: bool
    retry_after: float | None = None
    #: Whether the worker can do no further job.
    is_the_workers_end: bool = False

    @classmethod
    def of(cls, error: JobError) -> Failure:
        is_end = isinstance(error, DeviceLost)
        return cls(error.code, error.message, error.retryable, error.retry_after, is_end)

    def as_dict(self) -> dict[str, Any]:
        body = {"code": self.code, "message": self.message, "retryable": self.retryable}
        return body if self.retry_after is None else {**body, "retry_after": self.retry_after}


@dataclass(frozen=True, slots=True)
class Document:
    """The one answer to a job. `reply` is what stands beside the assets: a chat's own words."""

    job_id: str
    worker_id: str
    status: Status
    assets: tuple[Asset, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    reply: Mapping[str, Any] = field(default_factory=dict)

    def callback(self) -> dict[str, Any]:
        """The body that is posted: `error` is an object, as the specification has it."""
        body: dict[str, Any] = {
            "job_id": self.job_id,
            "worker_id": self.worker_id,
            "status": self.status,
            "assets": [_asset(asset) for asset in self.assets],
            # Null without a failure: the application merges these into its row, which may hold
            # the error of an earlier try.
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
        """What the handler returns, anew at each call, since the SDK takes `error` out of it.

        RunPod wants `error` as a string: an object there shows as COMPLETED without output. So
        the failure's JSON text stands in `error`, and the object beside it in `failure`. With
        `refresh_worker`, which the SDK takes out too, RunPod replaces the worker.
        """
        body = self.callback()
        if self.failure:
            body["failure"] = body["error"]
            body["error"] = json.dumps(body["error"])
            if self.failure.is_the_workers_end:
                body["refresh_worker"] = True
        return body


def _asset(asset: Asset) -> dict[str, Any]:
    body = {"type": asset.type, "url": asset.url, "metadata": dict(asset.metadata)}
    return {**body, "thumbnail_url": asset.thumbnail_url} if asset.thumbnail_url else body


def check_result(document: Document) -> None:
    """Raise InternalError for a document that RunPod would lose: not JSON, or too large."""
    try:
        # As the SDK writes it: not escaped, so that half a surrogate pair fails here, not there.
        text = json.dumps(document.result(), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (TypeError, ValueError) as exc:
        raise InternalError("the result could not be written as JSON") from exc
    if size > MAX_RESULT_BYTES:
        raise InternalError(f"the result has {size} bytes; the platform takes {MAX_RESULT_BYTES}")
