"""No storage: the document itself holds the files (`delivery/inline.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from ourvidz_serverless.delivery.storage.base import RETRY
from ourvidz_serverless.net.retries import Refused

NOTHING = "with STORAGE_URL=inline: nothing is stored"


class InlineStorage:
    """A storage in which nothing can be stored or found; every method raises Refused."""

    policy = RETRY

    def put(self, key: str, data: bytes, mime: str) -> None:
        raise Refused(NOTHING)

    def get(self, key: str, bucket: str | None = None) -> bytes:
        raise Refused(NOTHING)

    def keys(self) -> Iterator[str]:
        raise Refused(NOTHING)

    def delete(self, key: str) -> None:
        raise Refused(NOTHING)

    def url(self, key: str, style: str, expiry_s: int) -> str:
        raise Refused(NOTHING)
