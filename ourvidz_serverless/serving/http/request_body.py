"""Reads the JSON body of a request, within limits of size, time and complexity."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.serving.http import request_checks
from ourvidz_serverless.serving.http.job_store import CallThreads

#: A body that takes longer to arrive is refused, in seconds.
BODY_TIMEOUT_S = 60.0

#: Most commas and brackets in a body: no other thread runs while Python parses it. They are more
#: than the characters that a job's texts may have. A picture as a data URI has one comma.
MAX_JSON_MARKS = 250_000
JSON_MARKS = (b",", b"[", b"{")


async def read_json(request: Request, has_key: bool, readers: CallThreads) -> dict[str, Any]:
    """The request's JSON object, parsed in a thread of `readers`.

    Raises InvalidPrompt for a body that is no JSON object, HTTPException (408, 413, 400) for a body
    that is late, too long or incomplete, Unauthorized for one that is too long without a key.
    """
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await _receive(request, has_key)
    except TimeoutError:
        raise HTTPException(408, "the body took too long to arrive") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body did not arrive") from None
    try:
        body = await readers.run(parse_json, raw)
    except (ValueError, RecursionError):
        raise InvalidPrompt("body: Input should be JSON") from None
    if not isinstance(body, dict):
        raise InvalidPrompt("body: Input should be an object")
    return body


def parse_json(raw: bytes) -> object:
    """The value of a JSON text.

    Raises ValueError if it is not JSON, InvalidPrompt if it has more than `MAX_JSON_MARKS`.
    """
    if sum(map(raw.count, JSON_MARKS)) > MAX_JSON_MARKS:
        raise InvalidPrompt(f"body: Input should have at most {MAX_JSON_MARKS} commas and brackets")
    return json.loads(raw, parse_constant=_refuse_constant)


async def _receive(request: Request, has_key: bool) -> bytes:
    raw, limit = bytearray(), request_checks.body_limit(has_key)
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise request_checks.too_long(has_key)
    return bytes(raw)


def _refuse_constant(constant: str) -> None:
    """NaN and Infinity, which Python's parser accepts, are not JSON."""
    raise ValueError(constant)
