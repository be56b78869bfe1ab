"""A pod tells the application where it is, and when it leaves.

As the specification's worker registration does: a POST to the edge function of the family, with the
service key for a bearer. A serverless endpoint has one address for ever and needs none of this.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.transport import Transport

#: Which function hears of a family's workers.
FUNCTION_OF = {"chat": "register-chat-worker"}
FUNCTION = "update-worker-url"

METHOD = "ourvidz_serverless"
WITHIN_S = 15.0
RETRY = Retry(tries=4, base_s=1.0)


def _now() -> str:
    return datetime.now(UTC).isoformat()


class Registration:
    """One worker's entry with the application. A failure is logged, and keeps nobody from work."""

    def __init__(
        self,
        supabase_url: str,
        service_key: str,
        worker_url: str,
        families: Sequence[str],
        policy: Retry = RETRY,
        now: Callable[[], str] = _now,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        names = dict.fromkeys(FUNCTION_OF.get(family, FUNCTION) for family in families)
        self._functions = [f"{supabase_url.rstrip('/')}/functions/v1/{name}" for name in names]
        self._transport = Transport({"Authorization": f"Bearer {service_key}"})
        self._worker_url = worker_url
        self._policy, self._now, self._sleep = policy, now, sleep
        self._announcing, self._is_withdrawn = threading.Lock(), False

    @classmethod
    def of(cls, settings: Settings) -> Registration | None:
        """The registration that the environment asks for.

        Raises ModelLoadError that names what it cannot do without.
        """
        if not settings.register_worker:
            return None
        pod = os.environ.get("RUNPOD_POD_ID")
        proxied = f"https://{pod}-{settings.port}.proxy.runpod.net" if pod else None
        url, key = settings.worker_url or proxied, settings.supabase_service_key
        if not (settings.supabase_url and key and url):
            raise ModelLoadError(
                "REGISTER_WORKER: SUPABASE_URL, SUPABASE_SERVICE_KEY and, outside a pod, "
                "WORKER_URL are needed with it"
            )
        return cls(settings.supabase_url, key.get_secret_value(), url, settings.families)

    def announce(self) -> None:
        """Say where the worker is, in four tries, unless it is withdrawn by then."""
        self._tell({"worker_url": self._worker_url}, self._announce, self._policy)

    def withdraw(self) -> None:
        """Say that there is no worker any more, once: there is little time to leave.

        Where a try to announce it is under way, say so again after that has ended: the
        application may have heard of the two in either order.
        """
        self._is_withdrawn = True
        is_announcing = self._announcing.locked()
        self._leave()
        if is_announcing:
            with self._announcing:
                self._leave()

    def _leave(self) -> None:
        self._tell({"worker_url": None, "status": "inactive"}, self._post, Retry(tries=1))

    def _tell(
        self, facts: dict[str, Any], post: Callable[[str, dict[str, Any]], None], policy: Retry
    ) -> None:
        body = {
            **facts,
            "auto_registered": True,
            "registration_method": METHOD,
            "timestamp": self._now(),
        }
        for url in self._functions:
            call = functools.partial(post, url, body)
            try:
                retry(call, on=is_transient, policy=policy, sleep=self._sleep)
            except Fault as exc:
                log.warning("registration at %s failed: %s", url.rsplit("/", 1)[-1], exc)

    def _announce(self, url: str, body: dict[str, Any]) -> None:
        with self._announcing:
            if not self._is_withdrawn:
                self._post(url, body)

    def _post(self, url: str, body: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        self._transport.send("POST", url, data=data, headers=headers, within_s=WITHIN_S)
