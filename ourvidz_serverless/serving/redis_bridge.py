"""The application's Redis lists, drained into the endpoints: the way over on the first day.

    python -m ourvidz_serverless bridge

The application goes on pushing its payloads to `sdxl_queue`, `chat_queue` and `wan_queue`. Each
list is drained in its order, one job at a time, and a job leaves Redis for good only once the
platform has accepted it:

    LMOVE  QUEUE -> QUEUE:processing    a claim, so that old workers may still pop from the list
    POST   /run of the endpoint that serves the job's type
    LREM   QUEUE:processing

What lies in `QUEUE:processing` at the start goes back to the front of its list, in order, and so
does what was claimed when an answer of Redis was lost. A job is submitted at least once; twice
where a crash came between the last two steps, which does no harm: under its one id the worker does
it once while it runs, and later on writes the same files.

What is no job goes to `QUEUE:dead` as {"reason", "at", "payload"} and blocks nothing. What the
worker itself will refuse is no such thing: the application hears of that by the callback.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

from pydantic import SecretStr

from ourvidz_serverless import jobs, logs, settings
from ourvidz_serverless.client import Client
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.settings import Settings

T = TypeVar("T")

End = Literal["left", "right"]

#: An outage is waited out, however long it lasts.
PATIENCE = Retry(tries=sys.maxsize, max_s=30.0)

#: A request to the platform is made once, and made again by `PATIENCE`.
ONCE = Retry(tries=1)

#: What the platform says of a payload that it will never take. Any other refusal, such as of the
#: key or of the endpoint's id, is about us: jobs then wait until somebody has put it right.
UNACCEPTABLE = {400, 413, 422}

#: How long Redis may take for a command, in seconds.
REDIS_S = 10.0

#: Errors of Redis that end by themselves: it fails over, loads its data, has no memory or replica
#: left, cannot write to its disk, or runs a script. An error's first word is its kind.
PASSING = {
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
PASSING_LIMITS = (
    "max number of clients",
    "max concurrent connections",
    "max daily request limit",
    "max requests limit",
    "DB capacity quota",
)

#: The largest record that Upstash holds (https://upstash.com/pricing/redis).
MAX_BYTES = 100_000_000


class Redis(Protocol):
    """Where the lists are. `call` makes one try at a command and gives its reply.

    Raises Fault. It is not transient if another try would not help.
    """

    def call(self, *command: str) -> Any: ...


class Refused(Fault):
    """An error of Redis. The message has only its kind, since the rest may quote the command."""

    def __init__(self, said: str) -> None:
        super().__init__(None)
        self.kind, _, rest = said.partition(" ")
        self.passes = self.kind in PASSING or rest.startswith(PASSING_LIMITS)
        self.args = (f"Redis says {self.kind[:40]}",)

    @property
    def is_transient(self) -> bool:
        return self.passes


class NotAJob(Exception):
    """Raised for what no endpoint can be asked to do; the message is for the log."""


class Stopped(Exception):
    """Raised where a wait is cut short since the process is to end."""


def endpoints(config: Settings) -> dict[str, tuple[str, ...]]:
    """The ids of the RunPod endpoints that the environment names, by family."""
    named = {name: config.of(family.endpoint_setting) for name, family in FAMILIES.items()}
    return {name: ids for name, ids in named.items() if ids}


class Bridge:
    """All lists, each drained by a thread of its own, so that one family's outage is its own."""

    def __init__(self, config: Settings, redis: Redis, client: Client) -> None:
        self._stop = threading.Event()
        self._drains = [
            Drain(name, redis, client, config.bridge_take_from, config.bridge_poll_s, self._stop)
            for name in config.bridge_queues
        ]

    @classmethod
    def of(cls, config: Settings) -> Bridge:
        """The bridge that the environment names; raises ModelLoadError where that is not enough."""
        found = endpoints(config)
        if not (config.runpod_api_key and found and config.bridge_queues):
            *others, last = [family.endpoint_setting for family in FAMILIES.values()]
            raise ModelLoadError(
                f"RUNPOD_API_KEY, one of {', '.join(others)} and {last}, and BRIDGE_QUEUES: "
                "Input should not be empty"
            )
        client = Client(
            found,
            _secret(config.runpod_api_key),
            worker_key=_secret(config.worker_api_key[0]) if config.worker_api_key else None,
            base_url=config.runpod_base_url,
            policy=ONCE,
        )
        return cls(config, open_redis(config), client)

    def run(self) -> None:
        """Drain until `close`; raises Fault where Redis refuses what waiting will not mend."""
        with ThreadPoolExecutor(len(self._drains), thread_name_prefix="drain") as threads:
            for ended in as_completed([threads.submit(drain.run) for drain in self._drains]):
                self.close()
                ended.result()

    def close(self) -> None:
        """Take no further job; what is being handed over is handed over."""
        self._stop.set()


class Drain:
    """One list on its way into the endpoints."""

    def __init__(
        self,
        name: str,
        redis: Redis,
        client: Client,
        take_from: End,
        poll_s: float,
        stop: threading.Event,
    ) -> None:
        self.name, self._processing, self._dead = name, f"{name}:processing", f"{name}:dead"
        self._redis, self._client = redis, client
        self._front, self._back = ("LEFT", "RIGHT") if take_from == "left" else ("RIGHT", "LEFT")
        self._poll_s, self._stop = poll_s, stop
        # Whether a job may be claimed of which we do not know: of the process before, at first.
        self._may_hold = True

    def run(self) -> None:
        """Hand over one job after another until stopped."""
        try:
            while not self._stop.is_set():
                raw = self._patiently("Redis", self._take, is_transient)
                if raw is None:
                    self._stop.wait(self._poll_s)
                else:
                    self._hand_over(raw)
        except Stopped:
            log.info("%s: a job could not be handed over in time, and stays", self.name)
        finally:
            with suppress(Fault):  # the next start does it too
                self._put_back()

    def _take(self) -> str | None:
        """The job at the front, claimed; None where there is none."""
        if self._may_hold:
            self._put_back()
        # An answer that is lost may have claimed a job.
        self._may_hold = True
        raw: str | None = self._redis.call(
            "LMOVE", self.name, self._processing, self._front, self._back
        )
        self._may_hold = False
        return raw

    def _put_back(self) -> None:
        """Whatever is claimed goes to the front again: the last one first, so that order holds."""
        move = ("LMOVE", self._processing, self.name, self._back, self._front)
        while self._redis.call(*move) is not None:
            pass

    def _hand_over(self, raw: str) -> None:
        try:
            payload = read(raw)
            self._submit(payload)
        except NotAJob as exc:
            log.warning("%s ✗ to %s: %s", self.name, self._dead, exc)
            record = {"reason": str(exc), "at": round(time.time(), 3), "payload": raw}
            self._redis_does("RPUSH", self._dead, json.dumps(record))
        self._redis_does("LREM", self._processing, "1", raw)

    def _submit(self, payload: Mapping[str, Any]) -> None:
        """Have the platform accept a job. Raises NotAJob, or Stopped where it takes too long."""
        try:
            job = self._patiently(
                "the platform",
                lambda: self._client.submit(payload),
                lambda error: isinstance(error, Fault) and error.status not in UNACCEPTABLE,
            )
        except ValueError as exc:  # no endpoint serves it
            raise NotAJob(str(exc)) from None
        except Fault as exc:
            raise NotAJob(f"the platform refuses it: {exc}") from None
        name, kind = jobs.job_id({"input": payload}), jobs.job_type(payload)
        log.info("%s → %s(%s) is %s at %s", self.name, kind, name, job.id, job.endpoint)

    def _redis_does(self, *command: str) -> None:
        self._patiently("Redis", lambda: self._redis.call(*command), is_transient)

    def _patiently(
        self, side: str, call: Callable[[], T], on: Callable[[BaseException], bool]
    ) -> T:
        """What a call gives, however long that takes; raises Stopped, and what `on` leaves out."""

        def once() -> T:
            try:
                return call()
            except Fault as exc:
                log.warning("%s: %s: %s", self.name, side, exc)
                raise

        return retry(once, on=on, policy=PATIENCE, deadline=Deadline(sleep=self._pause))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


def read(raw: str) -> dict[str, Any]:
    """The payload of a list's item, with an id. Raises NotAJob.

    An item is a JSON object, or a JSON list of one object or of one object's JSON text: Upstash
    stores the body of a POST to `/rpush/LIST` as it is, and the application posts such a list.
    """
    payload = _parsed(raw)
    match payload:
        case [str(text)]:
            payload = _parsed(text)
        case [dict(only)]:
            payload = only
    if not isinstance(payload, dict):
        raise NotAJob("it is not an object")
    if jobs.job_type(payload) is None:
        raise NotAJob("its type is none of the job types")
    if payload.get("id") or payload.get("job_id"):
        return payload
    # The same at every reading, so that even this job is known again.
    return {**payload, "id": str(uuid.uuid5(uuid.NAMESPACE_OID, raw))}


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises NotAJob."""
    try:
        value = json.loads(text)
        # Values that JSON does not have, such as NaN or 1e999, could not be sent on.
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise NotAJob("it is not JSON") from None
    return value


def open_redis(config: Settings) -> Redis:
    """Redis by `REDIS_URL`, or Upstash by its REST interface; raises ModelLoadError for neither."""
    if config.redis_url:
        return Plain(_secret(config.redis_url))
    url, token = config.upstash_redis_rest_url, config.upstash_redis_rest_token
    if url and token:
        return UpstashRedis(Upstash(url, _secret(token)))
    raise ModelLoadError("REDIS_URL: needed, or UPSTASH_REDIS_REST_URL and its token")


class UpstashRedis:
    """Redis by Upstash's REST interface."""

    def __init__(self, client: Upstash) -> None:
        self._client = client

    def call(self, *command: str) -> Any:
        match self._ask(command):
            case [{"result": reply}]:
                return reply
            case [{"error": str(said)}]:
                raise Refused(said)
        raise Fault(None)

    def _ask(self, command: Sequence[str]) -> Any:
        try:
            return self._client.pipeline(command, within_s=REDIS_S, max_bytes=MAX_BYTES)
        except Fault as exc:
            # Beyond a limit Upstash refuses the whole request, with the error's text in the body.
            if exc.status == 400 and (said := _error_in(exc.body)):
                raise Refused(said) from exc
            raise


def _error_in(body: bytes) -> str | None:
    """The error in Upstash's answer: `{"error": TEXT}`."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None


class Plain:
    """Redis by its own protocol."""

    def __init__(self, url: str) -> None:
        import redis  # only who bridges from a Redis needs it
        from redis.backoff import NoBackoff
        from redis.retry import Retry as RedisRetry

        self._refusals = (redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError)
        self._error = redis.RedisError
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=REDIS_S,
                socket_connect_timeout=REDIS_S,
                # Three tries are its default; but a claim whose answer was lost must be known.
                retry=RedisRetry(NoBackoff(), 0),
                decode_responses=True,
                # Bytes that are no UTF-8 come back as they were, to be found by LREM.
                encoding_errors="surrogateescape",
            )
        except ValueError:
            raise ModelLoadError("REDIS_URL: Input should be a redis:// URL") from None

    def call(self, *command: str) -> Any:
        try:
            return self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except self._refusals as exc:
            raise self._refused(exc) from exc
        except self._error as exc:
            raise Fault(None) from exc

    def _refused(self, error: Any) -> Refused:
        # redis-py removes the kind from the text if it knows that kind.
        kind = f"{error.status_code} " if error.status_code else ""
        refused = Refused(f"{kind}{error}")
        if refused.passes:
            # After a failover the host name leads to another server, but this connection does not.
            self._client.connection_pool.disconnect()
        return refused


def _secret(value: SecretStr) -> str:
    return value.get_secret_value()


def main(argv: Sequence[str]) -> int:
    """The command `bridge`: moves jobs until SIGTERM or SIGINT; its exit code.

    Raises ModelLoadError if a setting is missing or wrong.
    """
    argparse.ArgumentParser(
        prog="python -m ourvidz_serverless bridge",
        description="Move jobs from the application's Redis lists to RunPod's endpoints.",
        epilog="Settings: REDIS_URL or UPSTASH_REDIS_REST_URL and its token, RUNPOD_API_KEY, "
        "SDXL_ENDPOINT_ID, CHAT_ENDPOINT_ID, WAN_ENDPOINT_ID; see docs/settings.md.",
    ).parse_args(argv)
    config = settings.read()
    logs.configure(config.log_level)
    bridge = Bridge.of(config)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: bridge.close())
    log.info("draining %s", ", ".join(config.bridge_queues))
    try:
        bridge.run()
    except Fault as exc:
        print(f"Redis refuses: {exc}", file=sys.stderr)
        return 1
    return 0
