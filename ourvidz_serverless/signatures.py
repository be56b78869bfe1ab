"""The two signatures of a callback: how they are made, and how a receiver checks them.

`X-Callback-Signature` signs the body. The three headers of Standard Webhooks
(https://www.standardwebhooks.com) sign the body with an id and a time.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Mapping

#: Standard Webhooks writes a secret's bytes in base64 after this prefix.
WEBHOOK_PREFIX = "whsec_"

#: How old a callback may be, and how much the clocks may differ, in seconds.
TOLERANCE_S = 300

_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def signatures(secret: str, body: bytes, message_id: str, timestamp: int) -> dict[str, str]:
    """The headers with both signatures of a body. `timestamp` is in seconds, new at each try."""
    return {
        "X-Callback-Signature": _body_signature(secret, body),
        "webhook-timestamp": str(timestamp),
        "webhook-signature": _webhook_signature(secret, body, message_id, str(timestamp)),
    }


def webhook_key(secret: str) -> bytes:
    """The signing key for Standard Webhooks: the base64 after `whsec_`, else the text itself.

    Raises ValueError if `whsec_` is followed by something other than base64.
    """
    if not secret.startswith(WEBHOOK_PREFIX):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(WEBHOOK_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError(f"Input should be base64 after {WEBHOOK_PREFIX}")
    return key


def is_signed(secret: str, body: bytes, headers: Mapping[str, str]) -> bool:
    """Whether `X-Callback-Signature` is right. The names in `headers` are in lower case."""
    given = headers.get("x-callback-signature", "")
    return bool(secret) and _are_equal(given, _body_signature(secret, body))


def is_webhook(
    secret: str, body: bytes, headers: Mapping[str, str], now: float, tolerance_s: float
) -> bool:
    """Whether one of the signatures in `webhook-signature` is right, and its time near `now`."""
    message_id, timestamp = headers.get("webhook-id"), headers.get("webhook-timestamp", "")
    if not message_id or not _TIMESTAMP.fullmatch(timestamp):
        return False
    if abs(now - int(timestamp)) > tolerance_s:
        return False
    right = _webhook_signature(secret, body, message_id, timestamp)
    # Several signatures stand in the header while a sender changes its secret.
    return any(
        _are_equal(given, right) for given in headers.get("webhook-signature", "").split(" ")
    )


def _body_signature(secret: str, body: bytes) -> str:
    return f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}"


def _webhook_signature(secret: str, body: bytes, message_id: str, timestamp: str) -> str:
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.digest(webhook_key(secret), signed, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def _are_equal(given: str, right: str) -> bool:
    # As bytes: `compare_digest` takes no text outside ASCII, and anybody may send one.
    return hmac.compare_digest(given.encode(), right.encode())
