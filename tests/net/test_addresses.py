"""Hosts are compared in one spelling."""

import pytest

from ourvidz_serverless.net.addresses import is_listed, is_loopback, origin


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
def test_loopback_is_this_machine_alone(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own


@pytest.mark.parametrize(
    ("url", "same"),
    [("https://A.example/x", "https://a.example:443"), ("http://[::1]/", "http://[0::1]:80/y")],
)
def test_urls_of_one_server_have_one_origin(url: str, same: str) -> None:
    assert origin(url) == origin(same)
