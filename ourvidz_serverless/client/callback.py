"""Verifies a callback and returns its document."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ourvidz_serverless.signatures import TOLERANCE_S, is_signed, is_webhook

_WEBHOOK_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


class BadSignature(Exception):
    """Raised for a callback that the worker did not sign. Answer it with 401."""


def verify_callback(
    headers: Mapping[str, str],
    body: bytes,
    secret: str | Sequence[str],
    *,
    tolerance_s: float = TOLERANCE_S,
    require_webhook: bool = True,
    now: Callable[[], float] = time.time,
) -> dict[str, Any]:
    """The document of a callback, if both of its signatures are right and its time is near.

    `body` is the request's body as it came, before any parser. `secret` is JOB_CALLBACK_SECRET, or
    several during a rotation. A callback may be `tolerance_s` old, so that a recorded one cannot
    be sent again later. `require_webhook=False` also accepts a callback without `webhook-*`
    headers, which has no time. Raises BadSignature, or ValueError for a signed body that is no
    JSON.
    """
    found = {name.lower(): value for name, value in headers.items()}
    has_webhook = any(found.get(name) for name in _WEBHOOK_HEADERS)
    for each in [secret] if isinstance(secret, str) else secret:
        if not is_signed(each, body, found):
            continue
        if not has_webhook and not require_webhook:
            return _document(body)
        if is_webhook(each, body, found, now(), tolerance_s):
            return _document(body)
    raise BadSignature("the callback's signature does not hold")


def _document(body: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(body)
    return document
