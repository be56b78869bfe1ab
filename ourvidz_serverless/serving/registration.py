"""A pod posts its address to the application.

This is the specification's worker registration: a POST to the edge function of the family, with the
service key. A serverless endpoint has a fixed address and does not need it.

A worker that ends posts nothing: both functions refuse a body without an address, and store the
last address that was posted, which may already be the next worker's. The application requests
`/health` before it uses a worker, and `/health` answers 503 after SIGTERM.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import Family
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.supabase import Project
from ourvidz_serverless.net.transport import Transport
from ourvidz_serverless.settings import Settings

METHOD = "ourvidz_serverless"
TIMEOUT_S = 15.0

#: Half a minute in all: a pod's proxy does not notice at once that the port is open.
RETRY = Retry(tries=6, base_s=1.0)


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _may_succeed_later(error: BaseException) -> bool:
    """Whether another try may succeed: `update-worker-url` answers 400 until `/health` answers."""
    return is_transient(error) or (isinstance(error, Fault) and error.status == 400)


class Registration:
    """Posts one worker's address to the application. A failure is only logged."""

    def __init__(
        self,
        project: Project,
        worker_url: str,
        families: Sequence[Family],
        policy: Retry = RETRY,
        now: Callable[[], str] = _now,
    ) -> None:
        names = dict.fromkeys(family.registers_at for family in families)
        self._functions = [f"{project.url}/functions/v1/{name}" for name in names]
        self._transport = Transport(project.headers)
        self.worker_url = worker_url
        self._policy, self._now = policy, now
        self._closed = threading.Event()

    @classmethod
    def of(cls, settings: Settings) -> Registration | None:
        """The registration that the settings ask for; None without `REGISTER_WORKER`.

        Raises ModelLoadError if another setting is missing.
        """
        if not settings.register_worker:
            return None
        pod = os.environ.get("RUNPOD_POD_ID")
        proxied = f"https://{pod}-{settings.port}.proxy.runpod.net" if pod else None
        url, project = settings.worker_url or proxied, Project.of(settings)
        if not (project and url):
            raise ModelLoadError(
                "REGISTER_WORKER: SUPABASE_URL, SUPABASE_SERVICE_KEY and, outside a pod, "
                "WORKER_URL are needed with it"
            )
        return cls(project, url, settings.served)

    @property
    def host(self) -> str | None:
        """The host name of the address that the application gets."""
        return urlsplit(self.worker_url).hostname

    def announce(self) -> None:
        """Post the worker's address, in a few tries, unless `close` comes first."""
        body = {
            "worker_url": self.worker_url,
            "auto_registered": True,
            "registration_method": METHOD,
            "timestamp": self._now(),
        }
        deadline = Deadline(sleep=self._pause)
        for url in self._functions:
            post = functools.partial(self._post, url, json.dumps(body).encode())
            try:
                retry(post, on=_may_succeed_later, policy=self._policy, deadline=deadline)
            except Fault as exc:
                log.warning("registration at %s failed: %s", url.rsplit("/", 1)[-1], exc)

    def close(self) -> None:
        """End the tries: the worker ends."""
        self._closed.set()

    def _pause(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def _post(self, url: str, body: bytes) -> None:
        if not self._closed.is_set():
            headers = {"Content-Type": "application/json"}
            self._transport.send("POST", url, data=body, headers=headers, within_s=TIMEOUT_S)
