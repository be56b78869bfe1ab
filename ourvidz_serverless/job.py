"""A job, parsed from its payload: what all job types share, and the types of their fields."""

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

#: The most pictures of one job. Their seeds are consecutive.
MAX_PICTURES = 6

Role = Literal["system", "user", "assistant"]

#: Ids become storage keys, and Supabase takes plain keys only.
KEY_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$"
Key = Field(pattern=KEY_PATTERN)

#: The user of a job that names none.
ANONYMOUS = "anonymous"


@dataclass(frozen=True, slots=True)
class Identity:
    """What identifies a job: two deliveries with the same user, key and id are one job."""

    user_id: str | None
    api_key: str | None = field(repr=False)
    job_id: str

    @classmethod
    def of(cls, user_id: str | None, api_key: str | None, job_id: str) -> Identity:
        """The identity of a job; a job of `anonymous` has no user."""
        return cls(None if user_id == ANONYMOUS else user_id, api_key or None, job_id)


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    """The same value; raises ValueError if other JSON parsers would refuse it."""
    # No recursion: the value may be nested deeper than Python's stack.
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return value
    raise ValueError(f"Input should be nested at most {MAX_JSON_DEPTH} levels deep")


def _parts(value: object) -> Iterable[object]:
    """The parts of a list or an object. A text or a number has none; it is checked here."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise ValueError("Input should be valid text, without lone surrogates")
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError("Input should hold finite numbers only")
    return ()


def no_text_nor_flag(value: object) -> object:
    """The same value, which may be a number; raises ValueError for a text or a boolean."""
    if isinstance(value, str | bool):
        raise ValueError("Input should be a number")
    return value


#: Numbers: "7" and true are refused. 7.0 is a whole number.
JSON_NUMBER = BeforeValidator(no_text_nor_flag)

#: Booleans: 1 and "true" are refused, as the contract's `boolean` says.
Flag = Annotated[bool, Field(strict=True)]

#: A JSON object that another parser of JSON will read.
JsonObject = Annotated[dict[str, Any], AfterValidator(_plain_json)]


#: A reference picture: its URL, its path in a bucket, or a data URI. Plain HTTP accepts 30 MB.
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

    # The widest rule that S3 has had. No ARN, which would name a second host beside `endpointUrl`.
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
    """A text for the content floor, the field that it is from, and the role of its author."""

    text: str
    field: str
    role: Role = "user"


@dataclass(frozen=True, slots=True)
class Signs:
    """The signs that the content floor found in texts; in adult mode every text is sexual."""

    minor: bool = False
    sexual: bool = False


class Job(Wire):
    """What every job type has in common."""

    id: str = Key
    type: str
    # A job needs no account. Its files are then stored under this name.
    user_id: str = Field(ANONYMOUS, pattern=KEY_PATTERN)
    callback_url: str | None = Field(None, max_length=MAX_CALLBACK_URL)
    s3_config: S3Config | None = Field(None, validation_alias="s3Config")

    @property
    def own_seed(self) -> int:
        """The seed of a job without one: the same at each delivery of the job.

        A second delivery overwrites the files of the first, which the application may already use.
        The seed is never 0, which the callback's receiver reads as "none".
        """
        digest = hashlib.sha256(f"{self.user_id}/{self.id}".encode()).digest()
        return 1 + int.from_bytes(digest) % (SEEDS - MAX_PICTURES)

    @property
    def texts(self) -> list[CheckedText]:
        """The texts for the content floor: all that may reach a model, except negative prompts."""
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
        """The reference images to fetch before the job computes: role -> URL, data URI or path."""
        return {}

    @property
    def upload_urls(self) -> tuple[str, ...]:
        """The caller's own URLs for the job's files, one for each output; none, if there are none.

        Their queries are secrets.
        """
        return ()

    @property
    def is_inline(self) -> bool:
        """Whether the job's files are a part of its document, and stored nowhere."""
        return False

    @property
    def reference_consent(self) -> bool:
        """Whether the caller declares that the person in a reference agreed to this use."""
        return False

    @property
    def reference_required(self) -> bool:
        """Whether a reference that cannot be fetched ends the job; otherwise it runs without it."""
        return False


def has_adult_label(*labels: str | None) -> bool:
    """Whether one of the caller's content labels is `nsfw`, in any case."""
    return any(label is not None and label.strip().lower() == "nsfw" for label in labels)
