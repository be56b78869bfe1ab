"""The checks of every HTTP request, before a route reads its body.

Keys protect a worker that has them. A worker without keys can be attacked through a browser on its
own machine: any web page can send requests to it, and with a host name that resolves to 127.0.0.1
(DNS rebinding) the page can even read the answers. So without a key the worker answers only to its
own host names, refuses a foreign `Origin`, and takes only JSON bodies, which a page of another
origin cannot send without permission.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ourvidz_serverless.errors import JobError, Unauthorized, WorkerUnavailable
from ourvidz_serverless.guard import access
from ourvidz_serverless.net.addresses import is_listed, is_loopback

#: The limit of RunPod's load balancer.
MAX_BODY_BYTES = 30_000_000

#: The limit for a body without a key in a header: the body may have the key.
MAX_BODY_BYTES_WITHOUT_KEY = 1_000_000

#: Requests at once, with an accepted key and without. Together they are fewer than the connections,
#: so that a new caller can always connect.
MAX_REQUESTS = 320
MAX_REQUESTS_WITHOUT_KEY = 128

#: The `Retry-After`, in seconds, when the worker has too many requests.
RETRY_AFTER_S = 2

#: These need no key, and are answered at any number of requests.
OPEN_PATHS = ("/ping", "/health")

DEFAULT_PORTS = {"http": 80, "https": 443}


class RequestChecks:
    """ASGI middleware: refuses a request, or passes it on and counts it while it runs.

    `refuse` makes the response for an error and a path.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[SecretStr],
        hosts: Collection[str],
        refuse: Callable[[Exception, str], Response],
    ) -> None:
        self._app, self._keys, self._hosts, self._refuse = app, keys, hosts, refuse
        self._num_running: Counter[bool] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        has_key = is_known(headers, self._keys)
        try:
            check_framing(headers, scope["http_version"])
            if not self._keys:
                check_origin(headers, self._hosts, path)
            check_length(headers, body_limit(has_key), has_key)
            if path not in OPEN_PATHS:
                self._check_room(has_key)
        except (HTTPException, JobError) as exc:
            await self._refuse(exc, path)(scope, receive, send)
            return
        await self._pass_on(scope, receive, send, has_key)

    def _check_room(self, has_key: bool) -> None:
        if self._num_running[has_key] >= (MAX_REQUESTS if has_key else MAX_REQUESTS_WITHOUT_KEY):
            raise WorkerUnavailable(
                f"{self._num_running[has_key]} requests are under way here already",
                retry_after=RETRY_AFTER_S,
            )

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, has_key: bool) -> None:
        self._num_running[has_key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_running[has_key] -= 1


def key_of(headers: Headers) -> str | None:
    """The key in a request's headers. `X-API-Key` is for callers behind a gateway's bearer."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else None
    return headers.get("X-API-Key") or bearer or None


def is_known(headers: Headers, keys: Collection[SecretStr]) -> bool:
    """Whether the headers have one of the worker's keys. True if the worker has no keys."""
    try:
        access.check(key_of(headers), keys)
    except Unauthorized:
        return False
    return True


def body_limit(has_key: bool) -> int:
    """The most bytes that a body may have."""
    return MAX_BODY_BYTES if has_key else MAX_BODY_BYTES_WITHOUT_KEY


def check_framing(headers: Headers, http_version: str) -> None:
    """Refuse a request whose end is ambiguous, and close its connection (RFC 9112, 6.1)."""
    if "Transfer-Encoding" not in headers:
        return
    if "Content-Length" in headers or http_version == "1.0":
        raise HTTPException(
            400,
            "Transfer-Encoding: Input should not come with Content-Length, nor in HTTP/1.0",
            {"Connection": "close"},
        )


def check_length(headers: Headers, limit: int, has_key: bool) -> None:
    """Refuse a body by its `Content-Length`, before any of it is read."""
    if int(headers.get("Content-Length", "0")) > limit:
        raise too_long(has_key)


def too_long(has_key: bool) -> Exception:
    """The error for a body that is too long for its caller."""
    if has_key:
        return HTTPException(413, f"the body may have {MAX_BODY_BYTES} bytes at most")
    return Unauthorized(
        f"Authorization: a body of more than {MAX_BODY_BYTES_WITHOUT_KEY} bytes needs a key of "
        "this worker in a header"
    )


def check_origin(headers: Headers, allowed_hosts: Collection[str], path: str) -> None:
    """Refuse requests that a web page of another origin sends. For workers without a key."""
    host = headers.get("Host", "")
    if not is_own_host(host, allowed_hosts) and not (path == "/ping" and _is_address(host)):
        raise HTTPException(
            403,
            "Host: Input should be a loopback name or one of ALLOWED_HOSTS: the worker has no key",
        )
    origin = headers.get("Origin")
    if origin is not None and not _is_same_origin(origin, host):
        raise HTTPException(403, "Origin: Input should be the worker's own")
    if _has_body(headers) and _media_type(headers) != "application/json":
        raise HTTPException(415, "Content-Type: Input should be application/json")


def is_own_host(host: str, allowed_hosts: Collection[str]) -> bool:
    """Whether a `Host` header names this machine, or one of the allowed hosts."""
    name = _name(host)
    return "*" in allowed_hosts or is_listed(name, allowed_hosts) or is_loopback(name)


def _is_address(host: str) -> bool:
    # A load balancer sends an IP address. It is safe: DNS rebinding needs a name.
    try:
        return bool(ipaddress.ip_address(_name(host)))
    except ValueError:
        return False


def _name(host: str) -> str:
    """A `Host` header's name in lower case, without the port; empty if it is invalid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_same_origin(origin: str, host: str) -> bool:
    """Whether an `Origin` is the scheme, name and port that a `Host` header names."""
    try:
        page = urlsplit(origin)
        default = DEFAULT_PORTS.get(page.scheme)
        own = urlsplit(f"//{host}")
        return bool(default and page.hostname) and (
            (page.hostname, page.port or default) == (own.hostname, own.port or default)
        )
    except ValueError:
        return False


def _has_body(headers: Headers) -> bool:
    return "Transfer-Encoding" in headers or headers.get("Content-Length", "0") != "0"


def _media_type(headers: Headers) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()
