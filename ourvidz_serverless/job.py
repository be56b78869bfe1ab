"""A job as its payload describes it: what all types have in common, and the types of its fields."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
)

#: In characters.
MAX_CALLBACK_URL = 2000

#: Levels of nested lists and objects: fewer than the limit of any parser of JSON.
MAX_JSON_DEPTH = 64

LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")

#: Seeds are below this.
SEEDS = 2**31

#: The most pictures of one job, whose seeds follow one another.
MAX_PICTURES = 6

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


def has_adult_label(*labels: str | None) -> bool:
    """Whether a content label of the caller is `nsfw`, in whatever case."""
    return any(label is not None and label.strip().lower() == "nsfw" for label in labels)
