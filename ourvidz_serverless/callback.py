"""Telling the application: sign the document, post it, keep trying, never follow.

Two signatures travel: the `X-Callback-Signature` that the edge function verifies, and the
Standard Webhooks trio (https://www.standardwebhooks.com). Both are over the very bytes posted.
"""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import requests

from ourvidz_serverless.payloads import Document
from ourvidz_serverless.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.settings import Settings

#: The receiver marks the job before it inserts the assets, which takes its time.
TIMEOUT_S = (5, 30)


class Callback:
    """Where one worker's documents are posted; without a URL, nowhere."""

    def __init__(
        self,
        url: str | None,
        secret: str | None = None,
        bearer: str | None = None,
        allowed_hosts: tuple[str, ...] = (),
        policy: Retry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url, self._bearer = url, bearer
        self._secret = secret
        self._allowed_hosts = allowed_hosts
        self._policy = policy or Retry()
        self._clock = clock

    @classmethod
    def of(cls, settings: Settings) -> Callback:
        """The callback that the environment asks for."""
        secret, bearer = settings.job_callback_secret, settings.supabase_service_key
        return cls(
            settings.resolved_callback_url,
            secret.get_secret_value() if secret else None,
            bearer.get_secret_value() if bearer else None,
            settings.callback_hosts,
        )

    def post(self, document: Document, job_url: str | None = None) -> None:
        """Deliver a document, in three tries; do nothing where there is no URL.

        `job_url` is the payload's own wish, which counts only when its host is allowed. Raises
        Fault with the last try's status.
        """
        url = self._target(job_url)
        if not url:
            return
        body = json.dumps(document.callback(), allow_nan=False).encode()
        message_id = f"{document.job_id}.{document.status}"
        retry(lambda: self._try(url, body, message_id), on=is_transient, policy=self._policy)

    def _target(self, job_url: str | None) -> str | None:
        if job_url and urlsplit(job_url).hostname in self._allowed_hosts:
            return job_url
        return self._url

    def _try(self, url: str, body: bytes, message_id: str) -> None:
        headers = self._headers(body, message_id, int(self._clock()))
        try:
            with requests.Session() as session:
                # Proxies and .netrc would send the signed document elsewhere.
                session.trust_env = False
                answer = session.post(
                    url, data=body, headers=headers, timeout=TIMEOUT_S, allow_redirects=False
                )
        except (OSError, ValueError) as exc:  # of requests, and of a URL or header that is none
            raise Fault(None) from exc
        if not 200 <= answer.status_code < 300:
            raise Fault(answer.status_code, answer.headers.get("Retry-After"))

    def _headers(self, body: bytes, message_id: str, timestamp: int) -> Mapping[str, str]:
        headers = {"Content-Type": "application/json", "webhook-id": message_id}
        if self._bearer:
            headers["Authorization"] = f"Bearer {self._bearer}"
        if self._secret:
            headers |= signatures(self._secret, body, message_id, timestamp)
        return headers


def signatures(secret: str, body: bytes, message_id: str, timestamp: int) -> dict[str, str]:
    """Both signatures of a body, as headers. `timestamp` is in seconds, and new at each try."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    webhook = base64.b64encode(hmac.digest(_webhook_key(secret), signed, "sha256")).decode()
    return {
        "X-Callback-Signature": f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}",
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{webhook}",
    }


def _webhook_key(secret: str) -> bytes:
    """Standard Webhooks hands out keys as `whsec_` and base64; any other secret is its own key."""
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"))
    return secret.encode()
