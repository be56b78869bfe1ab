"""The body of a request: the payload with an id, the worker's key, and pictures from files."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: The largest file that a worker reads as a reference, by default (`REFERENCE_MAX_BYTES`).
MAX_REFERENCE_BYTES = 20_000_000

#: The kinds of pictures that a worker reads, by a file's first bytes.
_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}


def data_uri(picture: Path | str | bytes) -> str:
    """A picture as a `data:` URI, for any field that takes a reference: a file's, or its bytes.

    Raises ValueError for a file that no worker would read: neither PNG, JPEG nor WebP, or larger
    than 20 MB. OSError if the file cannot be read.
    """
    if isinstance(picture, bytes):
        name, data = "the picture", picture
    else:
        name, data = Path(picture).name, Path(picture).read_bytes()
    if len(data) > MAX_REFERENCE_BYTES:
        size = f"{len(data) / 1e6:.1f} MB"
        raise ValueError(f"{name} has {size}, and a worker reads references up to 20")
    return f"data:image/{_kind(data, name)};base64,{base64.b64encode(data).decode()}"


def body_of(
    payload: Mapping[str, Any],
    worker_key: str | None = None,
    s3_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The body for a payload.

    Every `Path` in the payload becomes a `data:` URI. The payload gets an id, so that it can be
    sent again after a lost answer.
    """
    job_id = payload.get("id") or payload.get("job_id") or str(uuid.uuid4())
    key = {"api_key": worker_key} if worker_key else {}
    body: dict[str, Any] = {"input": {**_with_pictures(payload), "id": job_id, **key}}
    return {**body, "s3Config": s3_config} if s3_config else body


def _with_pictures(value: Any) -> Any:
    if isinstance(value, Path):
        return data_uri(value)
    if isinstance(value, Mapping):
        return {name: _with_pictures(each) for name, each in value.items()}
    return [_with_pictures(each) for each in value] if isinstance(value, list | tuple) else value


def _kind(data: bytes, name: str) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for start, kind in _KINDS.items():
        if data.startswith(start):
            return kind
    raise ValueError(f"{name} is no PNG, JPEG or WebP")
