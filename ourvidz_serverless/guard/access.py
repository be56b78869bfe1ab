"""Who may use the worker: callers that send one of its keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from pydantic import SecretStr

from ourvidz_serverless.errors import Unauthorized


def check(given: str | None, keys: Collection[SecretStr]) -> None:
    """Raise Unauthorized unless `given` is one of the keys. Without keys everybody is accepted.

    Every key is compared, each in constant time, so that the time of an answer reveals nothing.
    """
    matches = [_is_same(given or "", key.get_secret_value()) for key in keys]
    if keys and not any(matches):
        raise Unauthorized("api_key: Input should be a key of this worker")


def _is_same(given: str, key: str) -> bool:
    return hmac.compare_digest(_digest(given), _digest(key))


def _digest(text: str) -> bytes:
    # Digests have one length, so the comparison does not reveal a key's length. A payload may hold
    # half a surrogate pair.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
