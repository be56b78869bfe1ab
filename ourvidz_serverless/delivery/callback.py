"""A document is signed and posted to the application, in several tries; no redirect is followed.

`signatures` has the two signatures of a document. Both sign the posted bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ourvidz_serverless.context import NO_TRACE, Trace
from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.document import Document
from ourvidz_serverless.net.addresses import is_listed
from ourvidz_serverless.net.retries import Retry, is_transient, retry
from ourvidz_serverless.net.supabase import Project
from ourvidz_serverless.net.transport import Transport
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.signatures import signatures

#: A try may take long: the receiver marks the job before it inserts the assets.
RETRY = Retry(try_s=30.0)

#: The URL that a payload may name. The host is this group. No character after it may be one that
#: another parser takes for the end of a user name: in "evil\\@allowed", `urlsplit` finds one host,
#: and the library that connects finds the other.
_URL = re.compile(
    r"https?://(?P<host>[a-z0-9.-]+)(?::\d{1,5})?(?:[/?][!-~]*)?", re.ASCII | re.IGNORECASE
)

#: How long all tries of one document may take together, in seconds.
DELIVERY_S = 75.0


@dataclass(frozen=True, slots=True)
class Message:
    """A document as it is posted, and the job and status that it is about."""

    body: bytes
    job_id: str
    status: str

    @classmethod
    def of(cls, document: Document) -> Message:
        """The message of a document, whose values are plain JSON."""
        body = json.dumps(document.callback(), allow_nan=False).encode()
        return cls(body, document.job_id, document.status)


class Callback:
    """Posts the documents of one worker to its URL. Without a URL it posts nothing."""

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
        # Only for the worker's own URL in the project. A payload's URL never gets the key.
        self._key = project.headers if project and url and project.has(url) else {}
        self._secret = secret
        self._allowed_hosts = allowed_hosts
        self._policy = policy or RETRY
        self._clock = clock
        self._transport = Transport()

    @classmethod
    def of(cls, settings: Settings) -> Callback:
        """The callback that the settings describe."""
        secret = settings.job_callback_secret
        return cls(
            settings.resolved_callback_url,
            secret.get_secret_value() if secret else None,
            Project.of(settings),
            settings.callback_hosts,
        )

    def post(
        self,
        document: Document,
        job_url: str | None = None,
        deadline: Deadline = NEVER,
        trace: Trace = NO_TRACE,
    ) -> None:
        """Deliver a document, in three tries within `DELIVERY_S`; do nothing if there is no URL.

        `job_url` is the payload's own URL. It is used only if its host is allowed. Raises Fault
        with the status of the last try.
        """
        self.deliver(Message.of(document), job_url, deadline, trace)

    def deliver(
        self,
        message: Message,
        job_url: str | None = None,
        deadline: Deadline = NEVER,
        trace: Trace = NO_TRACE,
    ) -> None:
        """Deliver a document whose bytes are given, as `post` does."""
        url = self._target(job_url)
        if not url:
            return
        with trace.span("callback", status=message.status):
            retry(
                lambda: self._try(url, message, trace.headers),
                on=is_transient,
                policy=self._policy,
                deadline=deadline.within(DELIVERY_S),
            )

    def _target(self, job_url: str | None) -> str | None:
        match = _URL.fullmatch(job_url) if job_url else None
        if match and is_listed(match["host"], self._allowed_hosts):
            return job_url
        return self._url

    def _try(self, url: str, message: Message, trace_headers: Mapping[str, str]) -> None:
        headers = {**trace_headers, **self._headers(message, int(self._clock()))}
        if url == self._url:
            headers |= self._key
        within_s = self._policy.try_s
        self._transport.send("POST", url, data=message.body, headers=headers, within_s=within_s)

    def _headers(self, message: Message, timestamp: int) -> dict[str, str]:
        message_id = webhook_id(message.job_id, message.status)
        headers = {"Content-Type": "application/json", "webhook-id": message_id}
        if self._secret:
            headers |= signatures(self._secret, message.body, message_id, timestamp)
        return headers


def webhook_id(job_id: str, status: str) -> str:
    """The `webhook-id` of a document: one for each job and status, the same at every try.

    It is a digest, because a job id may hold a dot, and the signed text `id.timestamp.body` must
    not be ambiguous.
    """
    digest = hashlib.sha256(f"{job_id}.{status}".encode()).hexdigest()
    return f"msg_{digest[:32]}"
