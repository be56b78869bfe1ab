"""Who may have jobs done: whoever brings one of the worker's own keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from pydantic import SecretStr

from ourvidz_serverless.errors import Unauthorized


def check(given: str | None, keys: Collection[SecretStr]) -> None:
    """Raise Unauthorized unless `given` is one of the keys; without keys everybody may.

    Every key is compared, each in constant time, so that no answer's time tells how near it was.
    """
    matches = [_is_same(given or "", key.get_secret_value()) for key in keys]
    if keys and not any(matches):
        raise Unauthorized("api_key: Input should be a key of this worker")


def _is_same(given: str, key: str) -> bool:
    return hmac.compare_digest(_digest(given), _digest(key))


def _digest(text: str) -> bytes:
    # Of one length, which tells nothing; and a payload may hold half a surrogate pair.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
