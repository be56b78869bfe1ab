"""Hosts are compared in one spelling, and only addresses of the internet are public."""

import ipaddress
import socket
import threading
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.addresses import (
    NOT_PUBLIC,
    Address,
    is_listed,
    is_loopback,
    is_public,
    look_up,
    origin,
    resolve,
)
from ourvidz_serverless.net.retries import Refused
from tests.patience import PATIENCE_S


@pytest.mark.parametrize(
    ("host", "listed"),
    [
        ("minio.internal", "minio.internal"),
        ("minio.internal", "MinIO.Internal"),
        ("MINIO.internal.", "minio.internal"),
        ("minio.internal", "minio.internal."),
        ("2001:DB8::1", "[2001:db8:0:0:0:0:0:1]"),
        ("[::1]", "0:0:0:0:0:0:0:1"),
    ],
)
def test_two_spellings_of_a_host_are_one_host(host: str, listed: str) -> None:
    assert is_listed(host, ("other.example", listed))


@pytest.mark.parametrize(
    "host",
    ["", "internal", "evil-minio.internal", "minio.internal.evil.example", "minio.internal:80"],
)
def test_another_host_is_not_listed(host: str) -> None:
    assert not is_listed(host, ("minio.internal", ""))


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("192.168.0.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_only_addresses_and_names_of_this_machine_are_loopback(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own


@pytest.mark.parametrize(
    ("url", "same"),
    [("https://A.example/x", "https://a.example:443"), ("http://[::1]/", "http://[0::1]:80/y")],
)
def test_urls_of_one_server_have_one_origin(url: str, same: str) -> None:
    assert origin(url) == origin(same)


# --- which addresses are public ---


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"]
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_loopback_address_is_not_public() -> None:
    assert not is_public(ipaddress.ip_address("127.0.0.1"))


@given(st.ip_addresses())
def test_every_public_address_is_global_for_the_standard_library(address: Address) -> None:
    seen = getattr(address, "ipv4_mapped", None) or address
    if is_public(address):
        assert seen.is_global
        assert not (seen.is_multicast or seen.is_reserved or seen.is_private)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_wrapped_for_a_tunnel_is_never_public(
    address: ipaddress.IPv4Address,
) -> None:
    number = int(address)
    wrapped = {
        "compatible": number,
        "translated": 0xFFFF << 48 | number,
        "NAT64": 0x64FF9B << 96 | number,
        "6to4": 0x2002 << 112 | number << 80,
        "Teredo": 0x20010000 << 96 | number,
    }

    assert [name for name, n in wrapped.items() if is_public(ipaddress.IPv6Address(n))] == []


def test_the_systems_resolver_returns_plain_addresses() -> None:
    assert resolve("127.0.0.1") == ["127.0.0.1"]


# --- looking up ---


def deadline() -> Deadline:
    return Deadline(lambda: PATIENCE_S)


def test_an_error_of_the_resolver_ends_a_look_up_at_once() -> None:
    def unknown(host: str) -> Iterable[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    with pytest.raises(socket.gaierror, match="no such name"):
        look_up("nowhere.example", deadline(), resolve=unknown)


def test_a_resolver_that_does_not_answer_is_waited_for_until_the_deadline() -> None:
    closing, threads = threading.Event(), list[threading.Thread]()

    def silent(host: str) -> Iterable[str]:
        threads.append(threading.current_thread())
        closing.wait(PATIENCE_S)
        return []

    with pytest.raises(TimeoutError):
        look_up("slow.example", Deadline(lambda: 0.05), resolve=silent)
    # The process may end before the resolver answers.
    assert [thread.daemon for thread in threads] == [True]
    closing.set()


@pytest.mark.parametrize("host", ["a..example", "x" * 64 + ".example"])
def test_a_name_that_no_host_can_have_has_no_address(host: str) -> None:
    with pytest.raises(socket.gaierror):
        look_up(host, deadline())


def test_one_address_that_the_gate_refuses_is_enough_to_refuse_the_host() -> None:
    with pytest.raises(Refused, match=NOT_PUBLIC):
        look_up("a.example", deadline(), is_public, lambda host: ["8.8.8.8", "10.0.0.1"])


def test_without_a_gate_every_address_of_a_host_is_returned_in_order() -> None:
    found = look_up("a.example", deadline(), resolve=lambda host: ["10.0.0.1", "8.8.8.8"])

    assert [str(address) for address in found] == ["10.0.0.1", "8.8.8.8"]
