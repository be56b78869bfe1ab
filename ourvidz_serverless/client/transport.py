"""Requests and responses of the HTTP library, as both clients use it.

httpx2 has the same interface with and without `await`, and is in every image already, since
huggingface_hub needs it.
"""

from __future__ import annotations

import functools
import ssl
from typing import Any

import httpx2

from ourvidz_serverless.client.steps import Answer, Request, RequestFailed


@functools.cache
def tls() -> ssl.SSLContext:
    """The context of all clients. To read its certificates takes 25 milliseconds."""
    return httpx2.create_ssl_context()


def options_of(request: Request) -> dict[str, Any]:
    """The arguments of `request` and `stream`."""
    return {
        "method": request.method,
        "url": request.url,
        "headers": dict(request.headers),
        "content": request.body,
        "timeout": request.timeout_s,
        # A key is sent to no other host.
        "follow_redirects": not request.secrets,
    }


def answer_of(response: httpx2.Response, body: bytes) -> Answer:
    return Answer(response.status_code, {k.lower(): v for k, v in response.headers.items()}, body)


def failed(request: Request, error: Exception) -> RequestFailed:
    """The error for a request without a whole answer. It has the kind of the cause alone."""
    return RequestFailed(request, why=f"no whole answer ({type(error).__name__})")
