"""Telling the application: sign the document, post it, keep trying, never follow.

Two signatures travel: the `X-Callback-Signature` that the edge function verifies, and the
Standard Webhooks trio (https://www.standardwebhooks.com). Both are over the very bytes posted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.document import Document
from ourvidz_serverless.net.addresses import is_listed
from ourvidz_serverless.net.retries import Retry, is_transient, retry
from ourvidz_serverless.net.supabase import Project
from ourvidz_serverless.net.transport import Transport
from ourvidz_serverless.setting_checks import webhook_key
from ourvidz_serverless.settings import Settings

#: The receiver marks the job before it inserts the assets, which takes its time.
RETRY = Retry(try_s=30.0)

#: The URL that a payload may name. Its host comes from this group and is followed by nothing that
#: another parser could read as the end of a user's name: behind "evil\\@allowed", `urlsplit` sees
#: the one host, and what connects the other.
_URL = re.compile(
    r"https?://(?P<host>[a-z0-9.-]+)(?::\d{1,5})?(?:[/?][!-~]*)?", re.ASCII | re.IGNORECASE
)

#: All tries of one document together; what is not delivered by then is kept.
DELIVERY_S = 75.0


class Callback:
    """Where one worker's documents are posted; without a URL, nowhere."""

    def __init__(
        self,
        url: str | None,
        secret: str | None = None,
        project: Project | None = None,
        allowed_hosts: tuple[str, ...] = (),
        policy: Retry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = url
        # For our own URL in the project. A payload's URL never gets the key.
        self._key = project.headers if project and url and project.has(url) else {}
        self._secret = secret
        self._allowed_hosts = allowed_hosts
        self._policy = policy or RETRY
        self._clock = clock
        self._transport = Transport()

    @classmethod
    def of(cls, settings: Settings) -> Callback:
        """The callback that the environment asks for."""
        secret = settings.job_callback_secret
        return cls(
            settings.resolved_callback_url,
            secret.get_secret_value() if secret else None,
            Project.of(settings),
            settings.callback_hosts,
        )

    def post(
        self, document: Document, job_url: str | None = None, deadline: Deadline = NEVER
    ) -> None:
        """Deliver a document, in three tries within `DELIVERY_S`; do nothing if there is no URL.

        `job_url` is the payload's own wish, which counts only when its host is allowed. Raises
        Fault with the last try's status.
        """
        body = json.dumps(document.callback(), allow_nan=False).encode()
        self.deliver(body, document.job_id, document.status, job_url, deadline)

    def deliver(
        self,
        body: bytes,
        job_id: str,
        status: str,
        job_url: str | None = None,
        deadline: Deadline = NEVER,
    ) -> None:
        """The same for a document that is bytes already."""
        url = self._target(job_url)
        if not url:
            return
        message_id = webhook_id(job_id, status)
        retry(
            lambda: self._try(url, body, message_id),
            on=is_transient,
            policy=self._policy,
            deadline=deadline.within(DELIVERY_S),
        )

    def _target(self, job_url: str | None) -> str | None:
        match = _URL.fullmatch(job_url) if job_url else None
        if match and is_listed(match["host"], self._allowed_hosts):
            return job_url
        return self._url

    def _try(self, url: str, body: bytes, message_id: str) -> None:
        headers = self._headers(body, message_id, int(self._clock()))
        if url == self._url:
            headers |= self._key
        self._transport.send("POST", url, data=body, headers=headers, within_s=self._policy.try_s)

    def _headers(self, body: bytes, message_id: str, timestamp: int) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "webhook-id": message_id}
        if self._secret:
            headers |= signatures(self._secret, body, message_id, timestamp)
        return headers


def webhook_id(job_id: str, status: str) -> str:
    """The `webhook-id` of a job's document: one for each job and status, the same at every try.

    It is a digest, since a job id may hold a dot: then the signed text `id.timestamp.body` would
    be ambiguous.
    """
    digest = hashlib.sha256(f"{job_id}.{status}".encode()).hexdigest()
    return f"msg_{digest[:32]}"


def signatures(secret: str, body: bytes, message_id: str, timestamp: int) -> dict[str, str]:
    """Both signatures of a body, as headers. `timestamp` is in seconds, and new at each try."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    webhook = base64.b64encode(hmac.digest(webhook_key(secret), signed, "sha256")).decode()
    return {
        "X-Callback-Signature": f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}",
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{webhook}",
    }
