"""Downloads from URLs that a stranger wrote, without reaching where they should not.

A request goes, in this order, through a grammar that knows one host and one target; a look-up
whose every address must be public; a socket to that very address, with the certificate checked
for the name; and limits on the bytes and on the time of the whole try. A redirect starts again at
the grammar.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from urllib.parse import urljoin

from ourvidz_serverless import deadline as deadlines
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.addresses import is_listed, look_up
from ourvidz_serverless.net.connection import (
    USER_AGENT,
    Connection,
    Request,
    ResponseTooLarge,
    read_body,
)
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.net.retries import Fault, Refused, is_transient, retry

REDIRECTS = {301, 302, 303, 307, 308}
MAX_REDIRECTS = 3

MAX_URL_CHARS = 8192

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"

#: The whole request comes from these two groups, so no other parser can read it differently. The
#: last label begins with a letter: no address in any spelling (0x7f.1, 2130706433) is a name.
#: ASCII, since without it IGNORECASE takes the Kelvin sign for a k.
_URL = re.compile(
    rf"https://(?P<host>(?![A-Za-z0-9_.-]{{254}})(?:{_LABEL}\.)+(?=[A-Za-z]){_LABEL})(?::443)?"
    r"(?P<target>[/?][!-~]*)?",
    re.IGNORECASE | re.ASCII,
)


def download(url: str, policy: Policy, deadline: Deadline | None = None) -> bytes:
    """The bytes behind an https URL, tried again by the policy until the deadline.

    Raises Fault. Its message may be shown to anybody: it contains no path, query, address or
    secret.
    """
    return retry(lambda: _try(url, policy), on=is_transient, policy=policy.retry, deadline=deadline)


def plain_url(url: str) -> tuple[str, str]:
    """The host and the request target of a URL that all parsers read alike; raises Refused."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if not match or "\\" in url or "#" in url:
        raise Refused(
            "not a plain https URL (a host name, port 443, no user, no fragment, ASCII, "
            f"at most {MAX_URL_CHARS} characters)"
        )
    host, target = match["host"].lower(), match["target"] or "/"
    return host, target if target.startswith("/") else f"/{target}"


def host_and_target(url: str, policy: Policy) -> tuple[str, str]:
    """The host and the request target of a URL that the policy allows; raises Refused."""
    host, target = plain_url(url)
    if policy.allowed_hosts and not is_listed(host, policy.allowed_hosts):
        raise Refused("the host is not on the allow-list")
    return host, target


@contextmanager
def connected(host: str, policy: Policy, deadline: Deadline) -> Iterator[Connection]:
    """A connection to a host whose every address the policy allows."""
    addresses = look_up(host, deadline, policy.is_public, policy.resolve)
    with Connection.open(addresses, policy.port, deadline) as connection:
        connection.start_tls(policy.tls, host, deadline)
        yield connection


@contextmanager
def faults(policy: Policy) -> Iterator[None]:
    """Errors of other libraries become a Fault, with a message that anybody may read."""
    try:
        yield
    except ssl.SSLCertVerificationError as exc:
        raise Refused("the host's certificate does not hold") from exc
    except ResponseTooLarge as exc:
        raise Refused(f"more than {policy.max_bytes} bytes") from exc
    except TimeoutError as exc:
        raise Fault(None, why="timed out") from exc
    except socket.gaierror as exc:
        raise Fault(None, why="the host has no address") from exc
    except (OSError, HTTPException) as exc:
        raise Fault(None, why="the connection failed") from exc


def _try(url: str, policy: Policy) -> bytes:
    with faults(policy):
        return _get(url, policy, deadlines.current().within(policy.deadline_s))


def _get(url: str, policy: Policy, deadline: Deadline) -> bytes:
    """The body behind a URL. Redirects are followed here, so that each one is checked."""
    named, _ = host_and_target(url, policy)
    token = policy.tokens.get(named)
    for _ in range(MAX_REDIRECTS + 1):
        host, target = host_and_target(url, policy)
        # A host that was redirected to gets no token, nor does a host that it redirects back to.
        token = token if host == named else None
        with connected(host, policy, deadline) as connection:
            response = connection.exchange(_request(host, target, policy, token), deadline)
            location = response.getheader("Location")
            if response.status not in REDIRECTS or not location:
                return _body(response, policy)
        url = _redirected(url, location, policy)
    raise Refused(f"more than {MAX_REDIRECTS} redirects")


def _redirected(url: str, location: str, policy: Policy) -> str:
    """Where a response redirects to.

    Raises Refused, with the host's name, for a host that is not on the allow-list: a deployer who
    trusts it can add it.
    """
    try:
        url = urljoin(url, location)
    except ValueError as exc:
        raise Refused("the redirect is not a URL") from exc
    host, _ = host_and_target(url, replace(policy, allowed_hosts=frozenset()))
    if policy.allowed_hosts and not is_listed(host, policy.allowed_hosts):
        raise Refused(f"it redirects to {host}, which is not on the allow-list")
    return url


def _request(host: str, target: str, policy: Policy, token: str | None) -> Request:
    headers = {
        "Host": host,
        "Accept": policy.accept,
        "Accept-Encoding": "identity",
        "User-Agent": USER_AGENT,
        "Connection": "close",
    }
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return Request("GET", target, headers)


def _body(response: HTTPResponse, policy: Policy) -> bytes:
    """The body of a response that is the file itself."""
    if response.status != HTTPStatus.OK:
        raise Fault(response.status, response.getheader("Retry-After"))
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise Refused("the host compressed the picture")
    return read_body(response, policy.max_bytes)
