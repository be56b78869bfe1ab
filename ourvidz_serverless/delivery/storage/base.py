"""What every storage does, and how an asset is stored within the time of its job.

Keys are deterministic, `{user_id}/{job_id}/{index}.png`, and a put overwrites. That makes a retry
safe, and a second delivery of the same job.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Protocol, TypeVar

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import UploadError
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry

T = TypeVar("T")

RETRY = Retry()

#: The largest object that is read back: a reference.
MAX_BYTES = 20_000_000


class Storage(Protocol):
    """A place for assets. Each method makes one try and raises Fault."""

    policy: Retry

    def put(self, key: str, data: bytes, mime: str) -> None:
        """Store an object; one that is stored under this key already is replaced."""
        ...

    def get(self, key: str, bucket: str | None = None) -> bytes:
        """A stored object of this bucket, or of another `bucket` in the same store."""
        ...

    def keys(self) -> Iterator[str]:
        """Every key that is stored here."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object that is stored under this key."""
        ...

    def url(self, key: str, style: str, expiry_s: int) -> str:
        """How the caller finds a stored key: its `path` in the bucket, or a URL."""
        ...


def upload(
    storage: Storage,
    key: str,
    data: bytes,
    mime: str,
    policy: Retry | None = None,
    deadline: Deadline = NEVER,
) -> None:
    """Put an object, in as many tries as the policy and the deadline allow.

    Raises UploadError, whose message names the HTTP status of the last try and nothing else.
    """
    _retry(lambda: storage.put(key, data, mime), policy or storage.policy, deadline)


def locate(
    storage: Storage,
    key: str,
    style: str,
    expiry_s: int,
    deadline: Deadline = NEVER,
) -> str:
    """How the caller finds a stored object. Tries again, and raises, as `upload` does."""
    return _retry(lambda: storage.url(key, style, expiry_s), storage.policy, deadline)


def _retry(once: Callable[[], T], policy: Retry, deadline: Deadline) -> T:
    try:
        return retry(once, on=is_transient, policy=policy, deadline=deadline)
    except Fault as exc:
        raise UploadError(f"storage did not take an asset ({exc})") from exc


def read_reference(storage: Storage, key: str, buckets: Collection[str]) -> bytes:
    """A stored picture, by the path that the application uses for it.

    The path is a key, or the name of one of `buckets` before a key. One try; raises Fault.
    """
    first, _, rest = key.partition("/")
    return storage.get(rest, bucket=first) if first in buckets else storage.get(key)


def folder(prefix: str) -> str:
    """A prefix of keys: empty, or with one slash at its end."""
    return f"{prefix.strip('/')}/" if prefix.strip("/") else ""
