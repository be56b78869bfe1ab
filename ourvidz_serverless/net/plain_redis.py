"""Redis by its own protocol, with redis-py."""

from __future__ import annotations

from typing import Any

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.retries import Fault

#: Kinds of Redis errors that end by themselves: Redis fails over, loads its data, has no memory or
#: replica left, cannot write to its disk, or runs a script. An error's first word is its kind.
TRANSIENT = {
    "BUSY",
    "CLUSTERDOWN",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "OOM",
    "READONLY",
    "TRYAGAIN",
}

#: Errors of the kind ERR that also end: limits (https://upstash.com/docs/redis/troubleshooting).
TRANSIENT_LIMITS = (
    "max number of clients",
    "max concurrent connections",
    "max daily request limit",
    "max requests limit",
    "DB capacity quota",
)


class RedisError(Fault):
    """An error of Redis. The message has only its kind, because the rest may quote the command."""

    def __init__(self, text: str) -> None:
        super().__init__(None)
        self.kind, _, rest = text.partition(" ")
        self._is_transient = self.kind in TRANSIENT or rest.startswith(TRANSIENT_LIMITS)
        self.args = (f"Redis says {self.kind[:40]}",)

    @property
    def is_transient(self) -> bool:
        return self._is_transient


class PlainRedis:
    """A client of one Redis, for any number of threads."""

    def __init__(self, url: str, within_s: float) -> None:
        """Each command, and each connection, may take `within_s` seconds.

        Raises ModelLoadError if the URL is none of Redis. No connection is made yet.
        """
        import redis  # Not needed with Upstash, nor without limits.
        from redis.backoff import NoBackoff
        from redis.retry import Retry as RedisRetry

        self._refusals = (redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError)
        self._error = redis.RedisError
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=within_s,
                socket_connect_timeout=within_s,
                # No tries of its own (the default is three): the caller must see a lost answer.
                retry=RedisRetry(NoBackoff(), 0),
                decode_responses=True,
                # Invalid UTF-8 is sent back unchanged, so that LREM finds it.
                encoding_errors="surrogateescape",
            )
        except ValueError:
            raise ModelLoadError("REDIS_URL: Input should be a redis:// URL") from None

    def call(self, *command: str | int) -> Any:
        """The reply to one command, sent once. Raises Fault."""
        try:
            return self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except self._refusals as exc:
            raise self._error_of(exc) from exc
        except self._error as exc:
            raise Fault(None) from exc

    def _error_of(self, exc: Any) -> RedisError:
        # redis-py removes the kind from the text if it knows the kind.
        kind = f"{exc.status_code} " if exc.status_code else ""
        error = RedisError(f"{kind}{exc}")
        if error.is_transient:
            # After a failover the host name leads to another server, but open connections do not.
            self._client.connection_pool.disconnect()
        return error
