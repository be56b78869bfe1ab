"""Checks of a setting's text, beyond its type.

Each check returns its value, or raises ValueError with a message that does not repeat the value,
since it may be a secret.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from pydantic import HttpUrl, SecretStr, TypeAdapter

from ourvidz_serverless.signatures import webhook_key

#: The characters of a header's value: visible ASCII, without a space (RFC 9110, 5.5).
_HEADER = re.compile(r"[!-~]+")

_URL = re.compile(r"https?://[^\s\\]+", re.IGNORECASE)
_HTTP_URL = TypeAdapter(HttpUrl)

#: The bucket names that S3 clients accept (botocore, `VALID_BUCKET`).
_BUCKET = re.compile(r"[a-zA-Z0-9.\-_]{1,255}")

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_SHA256 = re.compile(r"sha256=[0-9a-fA-F]{64}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,99}")
_REGION = re.compile(r"(?!\d+$)[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")

#: What a rule of `SAFETY_RULES` may do, and the threshold of one that names none.
SAFETY_ACTIONS = ("refuse", "refuse_if_sexual", "sexual", "mark")
SAFETY_THRESHOLD = 0.5

_SAFETY_RULE = re.compile(rf"(.+?)\s*:\s*({'|'.join(SAFETY_ACTIONS)})(?:\s*:\s*(\d?\.?\d{{1,6}}))?")

#: The models that OpenAI's protocol reaches.
OPENAI_MODELS = ("qwen_instruct", "qwen_base", "sdxl")


def http_url(text: str) -> str:
    """An http or https URL with a host."""
    problem = "Input should be a URL that begins with http:// or https://"
    if not _URL.fullmatch(text):
        raise ValueError(problem)
    try:
        _HTTP_URL.validate_python(text)
    except ValueError:
        raise ValueError(problem) from None
    return text


def header_secret(secret: SecretStr) -> SecretStr:
    """A secret that is sent in a header."""
    if not _HEADER.fullmatch(secret.get_secret_value()):
        raise ValueError("Input should be visible ASCII characters without spaces")
    return secret


def signing_secret(secret: SecretStr) -> SecretStr:
    """A secret that signs callbacks."""
    webhook_key(secret.get_secret_value())
    return secret


def model_name(text: str) -> str:
    """A model's name; if it is a URL, its fragment may be the file's hash and nothing else."""
    url, _, fragment = text.partition("#")
    is_url = _URL.fullmatch(url) and (not fragment or _SHA256.fullmatch(fragment))
    if "://" in text and not is_url:
        raise ValueError("Input should be a model's name, or URL or URL#sha256=64 hex digits")
    return text


@dataclass(frozen=True, slots=True)
class HostToken:
    """A token that one host is sent."""

    host: str
    token: SecretStr

    def __str__(self) -> str:
        return f"{self.host}=***"


def host_token(text: str) -> HostToken:
    """A host, in lower case, and its token, from HOST=TOKEN."""
    host, _, token = (part.strip() for part in text.partition("="))
    if not (_HOST.fullmatch(host) and _HEADER.fullmatch(token)):
        raise ValueError("Input should be HOST=TOKEN, comma-separated")
    return HostToken(host.lower(), SecretStr(token))


@dataclass(frozen=True, slots=True)
class NamedModel:
    """Another name of one of this worker's models."""

    name: str
    model: str

    def __str__(self) -> str:
        return f"{self.name}={self.model}"


def named_model(text: str) -> NamedModel:
    """A name and its model, from NAME=MODEL."""
    name, _, model = (part.strip() for part in text.partition("="))
    if not (_MODEL_NAME.fullmatch(name) and model in OPENAI_MODELS):
        models = " or ".join(OPENAI_MODELS)
        raise ValueError(f"Input should be NAME={models}, comma-separated")
    return NamedModel(name, model)


@dataclass(frozen=True, slots=True)
class SafetyRule:
    """What it means if the scores of some labels, in lower case, reach the threshold together."""

    labels: tuple[str, ...]
    action: str
    threshold: float

    @property
    def name(self) -> str:
        return "|".join(self.labels)

    def __str__(self) -> str:
        return f"{self.name}:{self.action}:{self.threshold:g}"


def safety_rule(text: str) -> SafetyRule:
    """A rule, from LABEL:ACTION or LABEL|LABEL:ACTION:THRESHOLD."""
    match = _SAFETY_RULE.fullmatch(text.strip())
    labels = tuple(label.strip().lower() for label in match[1].split("|")) if match else ()
    threshold = float(match[3] or SAFETY_THRESHOLD) if match else 0.0
    if not match or not all(labels) or not 0 < threshold <= 1:
        actions = ", ".join(SAFETY_ACTIONS)
        raise ValueError(
            "Input should be LABEL:ACTION:THRESHOLD, comma-separated, with several labels as "
            f"LABEL|LABEL, an action of {actions}, and a threshold above 0, at most 1"
        )
    return SafetyRule(labels, match[2], threshold)


def is_bucket(text: str) -> bool:
    """Whether S3 clients accept a text as the name of a bucket."""
    return bool(_BUCKET.fullmatch(text))


def region(text: str) -> str:
    """A region of S3, which becomes part of a host name."""
    if not _REGION.fullmatch(text):
        raise ValueError("Input should be a region's name, such as us-east-1")
    return text


def command(text: str) -> str:
    """A program and its arguments, quoted as for a shell, which does not run it."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if not words:
        raise ValueError("Input should be a program and its arguments, quoted as for a shell")
    return text


def device(text: str) -> str:
    """The name of a device, in torch's spelling."""
    if not _DEVICE.fullmatch(text):
        raise ValueError("Input should be auto, cpu, cuda or cuda:NUMBER")
    return text
