"""Moves jobs from the application's Redis lists to RunPod's endpoints.

    python -m ourvidz_serverless bridge

With the bridge an application can change to RunPod's queue without a change of its own code: it
still pushes its payloads to `sdxl_queue`, `chat_queue` and `wan_queue`. The bridge takes the jobs
of each list in order, one at a time. It removes a job from Redis when the platform has accepted it:

    LMOVE  QUEUE -> QUEUE:processing    claims the job; old workers may still pop from the list
    POST   /run of the endpoint that serves the job's type
    LREM   QUEUE:processing

At the start the bridge moves the jobs in `QUEUE:processing` back to the front of their list, in
order. It does the same after an answer of Redis was lost, because that may have claimed a job. A
job is submitted at least once, and twice after a crash between the last two steps. That does no
harm: the id is the same, so the worker runs the job once at a time, and a second run writes the
same files.

An item that is no job goes to `QUEUE:dead` as {"reason", "at", "payload"}, and the next item
follows. A job that the worker itself refuses is submitted: the callback reports the refusal.
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

from ourvidz_serverless import logs, settings
from ourvidz_serverless.client import Client
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.job_types import job_type
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.plain_redis import PlainRedis, RedisError
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.upstash import Upstash
from ourvidz_serverless.settings import Settings

T = TypeVar("T")

End = Literal["left", "right"]

#: The tries end only with the outage.
OUTAGE_RETRY = Retry(tries=sys.maxsize, max_s=30.0)

#: The client tries a request once. `OUTAGE_RETRY` repeats it.
ONCE = Retry(tries=1)

#: The platform's status for a payload that it will never accept. Any other refusal, such as of the
#: key or of the endpoint's id, is a fault of the bridge's settings. Jobs then wait until it is
#: fixed.
UNACCEPTABLE = {400, 413, 422}

#: How long Redis may take for a command, in seconds.
REDIS_S = 10.0

#: The largest record that Upstash holds (https://upstash.com/pricing/redis).
MAX_BYTES = 100_000_000


class Redis(Protocol):
    """The Redis that has the lists. `call` sends one command once and returns its reply.

    Raises Fault, which is not transient if another try would not help.
    """

    def call(self, *command: str) -> Any: ...


class NotAJob(Exception):
    """Raised for an item that no endpoint can run. The message is for the log."""


class Stopped(Exception):
    """Raised when a wait ends because the process ends."""


def endpoints(config: Settings) -> dict[str, tuple[str, ...]]:
    """The ids of the RunPod endpoints that the environment names, by family."""
    named = {name: config.value_of(family.endpoint_setting) for name, family in FAMILIES.items()}
    return {name: ids for name, ids in named.items() if ids}


class Bridge:
    """Moves the jobs of all lists, one thread a list: one family's outage delays no other."""

    def __init__(self, config: Settings, redis: Redis, client: Client) -> None:
        self._stop = threading.Event()
        self._drains = [
            Drain(name, redis, client, config.bridge_take_from, config.bridge_poll_s, self._stop)
            for name in config.bridge_queues
        ]

    @classmethod
    def of(cls, config: Settings) -> Bridge:
        """The bridge of the settings. Raises ModelLoadError if one is missing."""
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
        """Move jobs until `close`. Raises Fault if Redis refuses a command for good."""
        with ThreadPoolExecutor(len(self._drains), thread_name_prefix="drain") as threads:
            for ended in as_completed([threads.submit(drain.run) for drain in self._drains]):
                self.close()
                ended.result()

    def close(self) -> None:
        """Take no more jobs. The job that is being submitted is submitted."""
        self._stop.set()


class Drain:
    """Moves the jobs of one list to the endpoints."""

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
        # Whether an unknown job may be claimed. At first it may, by an earlier process.
        self._may_have_claim = True

    def run(self) -> None:
        """Submit one job after another until stopped."""
        try:
            while not self._stop.is_set():
                raw = self._repeat("Redis", self._claim, is_transient)
                if raw is None:
                    self._stop.wait(self._poll_s)
                else:
                    self._move(raw)
        except Stopped:
            log.info("%s: a job could not be handed over in time, and stays", self.name)
        finally:
            with suppress(Fault):  # If Redis fails here, the next start does it.
                self._put_back()

    def _claim(self) -> str | None:
        """Claim the job at the front and return it; None if the list is empty."""
        if self._may_have_claim:
            self._put_back()
        # If the answer is lost, a job may be claimed all the same.
        self._may_have_claim = True
        raw: str | None = self._redis.call(
            "LMOVE", self.name, self._processing, self._front, self._back
        )
        self._may_have_claim = False
        return raw

    def _put_back(self) -> None:
        """Move claimed jobs back to the front, the last one first, which keeps their order."""
        move = ("LMOVE", self._processing, self.name, self._back, self._front)
        while self._redis.call(*move) is not None:
            pass

    def _move(self, raw: str) -> None:
        try:
            payload = read(raw)
            self._submit(payload)
        except NotAJob as exc:
            log.warning("%s ✗ to %s: %s", self.name, self._dead, exc)
            record = {"reason": str(exc), "at": round(time.time(), 3), "payload": raw}
            self._call_redis("RPUSH", self._dead, json.dumps(record))
        self._call_redis("LREM", self._processing, "1", raw)

    def _submit(self, payload: Mapping[str, Any]) -> None:
        """Submit a job until the platform accepts it. Raises NotAJob, or Stopped at the end."""
        try:
            job = self._repeat(
                "the platform",
                lambda: self._client.submit(payload),
                lambda error: isinstance(error, Fault) and error.status not in UNACCEPTABLE,
            )
        except ValueError as exc:  # No endpoint serves the job's type.
            raise NotAJob(str(exc)) from None
        except Fault as exc:
            raise NotAJob(f"the platform refuses it: {exc}") from None
        sent = Envelope.of({"input": payload})
        kind, name = sent.job_type, sent.job_id
        log.info("%s → %s(%s) is %s at %s", self.name, kind, name, job.id, job.endpoint)

    def _call_redis(self, *command: str) -> None:
        self._repeat("Redis", lambda: self._redis.call(*command), is_transient)

    def _repeat(self, side: str, call: Callable[[], T], on: Callable[[BaseException], bool]) -> T:
        """The result of a call, repeated until it succeeds.

        Raises the errors that `on` is false for, and Stopped when the process ends.
        """

        def attempt() -> T:
            try:
                return call()
            except Fault as exc:
                log.warning("%s: %s: %s", self.name, side, exc)
                raise

        return retry(attempt, on=on, policy=OUTAGE_RETRY, deadline=Deadline(sleep=self._pause))

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
    if job_type(payload) is None:
        raise NotAJob("its type is none of the job types")
    if payload.get("id") or payload.get("job_id"):
        return payload
    # The same id each time the item is read, so that a second submission is the same job.
    return {**payload, "id": str(uuid.uuid5(uuid.NAMESPACE_OID, raw))}


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises NotAJob."""
    try:
        value = json.loads(text)
        # Raises for values that JSON does not have, such as NaN or 1e999: they cannot be sent.
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise NotAJob("it is not JSON") from None
    return value


def open_redis(config: Settings) -> Redis:
    """Redis by `REDIS_URL`, or else Upstash. Raises ModelLoadError if neither is set."""
    if config.redis_url:
        return PlainRedis(_secret(config.redis_url), REDIS_S)
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
            case [{"error": str(text)}]:
                raise RedisError(text)
        raise Fault(None)

    def _ask(self, command: Sequence[str]) -> Any:
        try:
            return self._client.pipeline(command, within_s=REDIS_S, max_bytes=MAX_BYTES)
        except Fault as exc:
            # Above a limit Upstash refuses the request, with the error's text in the body.
            if exc.status == 400 and (text := _error_in(exc.body)):
                raise RedisError(text) from exc
            raise


def _error_in(body: bytes) -> str | None:
    """The text in a body of Upstash, `{"error": TEXT}`; None if the body is another."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


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
