"""Which hosts a download may come from, and how large and how slow it may be."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ourvidz_serverless.net.addresses import Gate, is_public, resolve
from ourvidz_serverless.net.connection import default_tls
from ourvidz_serverless.net.retries import Retry


@dataclass(frozen=True, slots=True)
class Policy:
    """The limits of a download."""

    allowed_hosts: frozenset[str] = frozenset()  # exact names; empty: any public host
    max_bytes: int = 20_000_000
    deadline_s: float = 20.0  # of one try, from the look-up of the name to the last byte
    accept: str = "*/*"  # the media types that are asked for
    retry: Retry = field(default_factory=Retry)
    # Bearer tokens by host, each for the host that a URL names, not for where that redirects to.
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)

    # The world outside. A test brings its own name server, port and authority.
    resolve: Callable[[str], Iterable[str]] = resolve
    is_public: Gate = is_public
    port: int = 443
    tls: ssl.SSLContext = field(default_factory=default_tls, repr=False)
