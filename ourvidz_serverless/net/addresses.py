"""Hosts: comparing names, looking up addresses, and keeping requests from private addresses."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from urllib.parse import urlsplit

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.net.retries import Refused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Whether a connection may be made to an address.
Gate = Callable[[Address], bool]

#: Networks that are not the public internet, or that are public and serve a cloud's own machines.
#: Of IPv6 only 2000::/3 is public at all, so loopback, mapped, compatible, NAT64, link-local,
#: unique-local and multicast addresses need no line here. The standard library's `is_global` does
#: not suffice: for it 6to4 and multicast are global, and it changes from one Python to the next.
PRIVATE_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; one cloud's metadata
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; one cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast relays
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "2001::/23",  # protocol assignments, Teredo and ORCHID among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")


NOT_PUBLIC = "the host's address is not public"

#: How long the look-up of a name before a job computes may take, in seconds.
LOOK_UP_S = 5.0

#: The port of a URL without one.
PORTS = {"http": 80, "https": 443}


def host_name(text: str) -> str:
    """A host's canonical spelling, for comparison.

    It is in lower case, without brackets and final dot; an address has its shortest form.
    """
    name = text.strip().removeprefix("[").removesuffix("]").removesuffix(".").lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name


def is_listed(host: str, hosts: Iterable[str]) -> bool:
    """Whether a host is one of `hosts`, in any spelling."""
    return bool(host) and host_name(host) in map(host_name, hosts)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by name or by address."""
    name = host_name(host)
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def origin(url: str) -> tuple[str, str, int | None]:
    """A URL's scheme, host and port: two URLs of one origin lead to the same server.

    Raises ValueError for an invalid port.
    """
    parts = urlsplit(url)
    return parts.scheme, host_name(parts.hostname or ""), parts.port or PORTS.get(parts.scheme)


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet; a mapped one is checked as IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped and not address.scope_id:
            return is_public(address.ipv4_mapped)
        if address.scope_id or address not in PUBLIC_IPV6:
            return False
    return not any(address in network for network in PRIVATE_NETWORKS)


def may_be_public(host: str, gate: Gate, resolve: Callable[[str], Iterable[str]]) -> bool:
    """Whether every address of a host passes the gate; True too if the host has none yet.

    The name may lead elsewhere later, so whoever connects has to ask the gate again.
    """
    deadline = NEVER.within(LOOK_UP_S)
    try:
        return all(map(gate, look_up(host, deadline, resolve=resolve)))
    except OSError:
        return True


def resolve(host: str) -> list[str]:
    """Every address of a host that the system's resolver knows; raises OSError."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def look_up(
    host: str,
    deadline: Deadline,
    gate: Gate | None = None,
    resolve: Callable[[str], Iterable[str]] = resolve,
) -> list[Address]:
    """Every address of a host, one at least; with a gate, each of them passes it.

    Raises OSError: gaierror if the host has no address, TimeoutError at the deadline. Raises
    Refused if an address does not pass the gate: one such address is enough.
    """
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            answer.set_result(list(resolve(host)))
        except Exception as exc:  # raised below, where the answer is awaited
            answer.set_exception(exc)

    # In a thread, since the system's resolver takes no deadline.
    threading.Thread(target=ask, daemon=True, name="resolve").start()
    try:
        found = answer.result(deadline.timeout_s())
    except UnicodeError:  # no host has such a name
        found = []
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "the host has no address")
    try:
        addresses = [ipaddress.ip_address(text) for text in found]
    except ValueError as exc:
        raise Refused(NOT_PUBLIC) from exc
    if gate and not all(map(gate, addresses)):
        raise Refused(NOT_PUBLIC)
    return addresses
