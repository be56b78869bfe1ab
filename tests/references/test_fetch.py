"""A reference becomes plain pixels, and no request goes where it should not.

The host is a real HTTPS server on 127.0.0.1 with an authority of its own. The policy names the
name server that knows the host, its port and its authority.
"""

from __future__ import annotations

import ipaddress
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.net.addresses import is_public, resolve
from ourvidz_serverless.net.download import host_and_target
from ourvidz_serverless.net.retries import Fault, Refused, Retry
from ourvidz_serverless.references import fetch as references
from ourvidz_serverless.references.fetch import check_key
from ourvidz_serverless.references.policy import ReferencePolicy
from tests.patience import PATIENCE_S
from tests.references.images import IMAGE, SECRET, data_uri, encoded, plain_words, quarters
from tests.servers.https_server import (
    Act,
    HttpsServer,
    NameServer,
    answer,
    endless,
    redirect,
    reset,
)

URL = f"https://images.example/ada/portrait.png?token={SECRET}"
LOOPBACK = ipaddress.ip_address("127.0.0.1")


#: The deadline of a try that only the test itself ends.
AGES_S = PATIENCE_S


# --- the host ---


@pytest.fixture
def site(authority: Path) -> Iterator[HttpsServer]:
    site = HttpsServer(authority)
    yield site
    site.close()


@pytest.fixture
def names() -> NameServer:
    return NameServer()


class Fetch:
    """`references.fetch` for the user ada, under a policy that tests may change call by call."""

    def __init__(self, policy: ReferencePolicy) -> None:
        self.policy = policy
        self.naps: list[float] = []

    def __call__(
        self,
        reference: str = URL,
        *,
        read_object: Callable[[str], bytes] | None = None,
        remaining_s: Callable[[], float] = lambda: math.inf,
        **changes: object,
    ) -> Image.Image:
        return references.fetch(
            reference,
            policy=replace(self.policy, **changes),
            user_id="ada",
            read_object=read_object,
            deadline=Deadline(remaining_s, self.naps.append),
        )

    def refusal(self, reference: str = URL, **changes: object) -> str:
        """The message of the error that a fetch ends in, without its prefix."""
        with pytest.raises(ReferenceFrameError) as refused:
            self(reference, **changes)
        return plain_words(refused.value)


@pytest.fixture
def fetch(site: HttpsServer, names: NameServer, authority: Path) -> Fetch:
    return Fetch(
        ReferencePolicy(
            max_bytes=100_000,
            deadline_s=AGES_S,
            resolve=names,
            is_public=lambda address: address == LOOPBACK or is_public(address),
            port=site.port,
            tls=ssl.create_default_context(cafile=authority / "ca.pem"),
        )
    )


# --- what a reference may be ---


def test_an_https_url_becomes_its_image(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer(body=IMAGE)]

    assert fetch().tobytes() == quarters().tobytes()


def test_a_request_has_the_query_and_no_header_about_a_user(
    fetch: Fetch, site: HttpsServer
) -> None:
    site.script = [answer(body=IMAGE)]
    fetch()

    request, *headers = site.heads[0].rstrip().split("\r\n")
    assert request == f"GET /ada/portrait.png?token={SECRET} HTTP/1.1"
    assert {line.split(":")[0] for line in headers} == {
        "Host", "Accept", "Accept-Encoding", "User-Agent", "Connection",
    }  # fmt: skip
    assert "Host: images.example" in headers
    assert "Accept-Encoding: identity" in headers


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://images.example", "/"),
        ("HTTPS://IMAGES.EXAMPLE:443/A.png", "/A.png"),
        ("https://images.example?token=1", "/?token=1"),
        ("https://images.example/a%2Fb@c:d/..;/e?u=https://x/", "/a%2Fb@c:d/..;/e?u=https://x/"),
    ],
)
def test_a_target_is_sent_as_it_is_written(
    fetch: Fetch, site: HttpsServer, url: str, target: str
) -> None:
    site.script = [answer(body=IMAGE)]
    fetch(url)

    assert site.heads[0].startswith(f"GET {target} HTTP/1.1\r\nHost: images.example\r\n")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_data_uri_becomes_its_image(fetch: Fetch, kind: str) -> None:
    assert fetch(data_uri(encoded(quarters(), kind), kind)).size == (48, 32)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("data:text/html;base64,PGI+", "not data:image"),
        ("data:image/png,%89PNG", "not data:image"),
        ("data:image/png;charset=utf-8;base64,AAAA", "not data:image"),
        ("data:ımage/png;base64,AAAA", "not data:image"),
        ("data:image/png;base64,not base64", "not base64"),
        ("data:image/png;base64,ＡＡＡＡ", "not base64"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "not a PNG, JPEG or WebP"),
        ("data:image/png;base64," + "A" * 200_000, "more than 100000 bytes"),
        (data_uri(b"x" * 100_001), "more than 100000 bytes"),
    ],
)
def test_a_data_uri_that_is_no_base64_of_an_image_is_refused(
    fetch: Fetch, uri: str, why: str
) -> None:
    assert why in fetch.refusal(uri)


# --- which URLs are asked at all ---

HOSTILE_URLS = [
    "http://images.example/a.png",
    "ftp://images.example/a.png",
    "file:///etc/passwd",
    "gopher://images.example/",
    "javascript:alert(1)",
    "https:images.example/a.png",
    "https:/images.example/a.png",
    "https:///images.example/a.png",
    "https://",
    "https://images.example:80/a.png",
    "https://images.example:8443/a.png",
    "https://images.example:/a.png",
    "https://images.example:443:443/a.png",
    # Addresses, in every spelling.
    "https://127.0.0.1/a.png",
    "https://8.8.8.8/a.png",
    "https://2130706433/a.png",
    "https://0x7f000001/a.png",
    "https://0x7f.0.0.1/a.png",
    "https://127.0.0.0x1/a.png",
    "https://0177.0.0.1/a.png",
    "https://017700000001/a.png",
    "https://127.1/a.png",
    "https://127.0.1/a.png",
    "https://0/a.png",
    "https://0.0.0.0/a.png",
    "https://127.0.0.1./a.png",
    "https://[::1]/a.png",
    "https://[::]/a.png",
    "https://[::ffff:127.0.0.1]/a.png",
    "https://[::ffff:7f00:1]/a.png",
    "https://[::127.0.0.1]/a.png",
    "https://[64:ff9b::7f00:1]/a.png",
    "https://[fe80::1%25eth0]/a.png",
    "https://[fe80::1%eth0]/a.png",
    "https://[v1.x]/a.png",
    "https://１２７.０.０.１/a.png",
    "https://①②⑦.⓪.⓪.①/a.png",
    "https://127。0。0。1/a.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://[fd00:ec2::254]/latest/meta-data/",
    "https://100.100.100.200/latest/meta-data/",
    "https://168.63.129.16/machine",
    # Names that are none, or only inside.
    "https://localhost/a.png",
    "https://intranet/a.png",
    "https://images.example./a.png",
    "https://.images.example/a.png",
    "https://images..example/a.png",
    "https://-images.example/a.png",
    "https://images%2eexample/a.png",
    "https://images。example/a.png",
    "https://ｉｍａｇｅｓ.example/a.png",
    "https://\u212aimages.example/a.png",
    "http\u017f://images.example/a.png",
    f"https://{'a' * 64}.example/a.png",
    f"https://{'a.' * 130}example/a.png",
    # What one parser reads as a host and the next as something else.
    "https://images.example@internal.example/a.png",
    f"https://user:{SECRET}@images.example/a.png",
    "https://images.example\\@internal.example/a.png",
    "https://images.example\\.internal.example/a.png",
    "https:\\\\images.example\\a.png",
    "https://images.example#@internal.example/a.png",
    "https://images.example/a.png#b",
    "https://images.example&@internal.example/a.png",
    "https://images.example;internal.example/a.png",
    "https://images.example /a.png",
    " https://images.example/a.png",
    "https://images.example/a.png\n",
    "https://images.example/a b.png",
    "https://images.example/a.png HTTP/1.1\r\nX: y",
    "https://images.example/\x00a.png",
    "https://ima\tges.example/a.png",
    "https://images.example/ä.png",
    f"https://images.example/{'a' * 8192}",
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_a_url_that_is_not_plain_https_is_refused_before_a_look_up(
    fetch: Fetch, names: NameServer, url: str
) -> None:
    assert fetch.refusal(url).startswith("not a plain https URL")
    assert names.asked == []


@given(st.from_regex(r"https?://[a-z0-9.@:\\#\[\]%/?&-]{1,40}", fullmatch=True))
def test_every_parser_agrees_on_the_host_of_a_url_that_passes(url: str) -> None:
    with suppress(Refused):
        host, target = host_and_target(
            url, ReferencePolicy(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        )
        parts = urlsplit(url)

        assert (parts.hostname, parts.username, parts.port) in [
            (host, None, None),
            (host, None, 443),
        ]
        assert target.startswith("/")


def test_only_hosts_of_the_allow_list_are_asked(
    fetch: Fetch, site: HttpsServer, names: NameServer
) -> None:
    site.script = [answer(body=IMAGE)]
    allowed = frozenset({"Images.Example"})

    assert fetch(URL, allowed_hosts=allowed).size == (48, 32)
    for url in ("https://cdn.example/a.png", "https://a.images.example/a.png"):
        assert fetch.refusal(url, allowed_hosts=allowed) == "the host is not on the allow-list"
    assert names.asked == ["images.example"]


# --- which addresses are reached ---

CLOSED_ADDRESSES = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.2
    127.255.255.255 168.63.129.16 169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255
    192.0.0.192 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255 198.51.100.1
    203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 127.1 2130706433

    :: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.2 ::ffff:10.0.0.1 ::ffff:169.254.169.254
    ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::808:808 64:ff9b:1::a00:1 100::1 2001::1
    2001:0:7f00:1:: 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a9fe:a9fe::
    3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700:4700::1111%eth0 fec0::1
    ff02::1 ff0e::1
""".split()  # noqa: SIM905


@pytest.mark.parametrize("address", CLOSED_ADDRESSES)
def test_a_host_with_an_address_that_is_not_public_is_refused(
    fetch: Fetch, names: NameServer, address: str
) -> None:
    names.answers["images.example"] = [address]

    assert fetch.refusal() == "the host's address is not public"
    assert fetch.naps == []


@pytest.mark.parametrize(
    "answers", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["8.8.8.8", "::1"]]
)
def test_a_host_with_one_private_address_among_others_is_refused(
    fetch: Fetch, site: HttpsServer, names: NameServer, answers: list[str]
) -> None:
    names.answers["images.example"] = answers

    assert fetch.refusal() == "the host's address is not public"
    assert site.connections == 0


def test_a_host_is_looked_up_once_for_a_request(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer(body=IMAGE)]
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    assert fetch(resolve=lambda host: next(answers)).size == (48, 32)
    assert next(answers) == ["10.0.0.1"]


def test_a_host_that_gets_a_private_address_between_redirects_is_refused(
    fetch: Fetch, site: HttpsServer
) -> None:
    site.script = [redirect("/again"), answer(body=IMAGE)]
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    assert fetch.refusal(resolve=lambda host: next(answers)) == "the host's address is not public"
    assert site.connections == 1


def test_a_host_that_gets_a_private_address_between_tries_is_refused(
    fetch: Fetch, site: HttpsServer
) -> None:
    site.script = [answer("503 Busy"), answer(body=IMAGE)]
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    assert fetch.refusal(resolve=lambda host: next(answers)) == "the host's address is not public"
    assert site.connections == 1


def test_the_next_address_is_tried_if_one_accepts_no_connection(
    fetch: Fetch, site: HttpsServer, names: NameServer
) -> None:
    site.script = [answer(body=IMAGE)]
    names.answers["images.example"] = ["127.0.0.9", "127.0.0.1"]

    assert fetch(is_public=lambda address: True).size == (48, 32)
    assert fetch.naps == []


def test_a_host_without_an_address_is_looked_up_three_times(
    fetch: Fetch, names: NameServer
) -> None:
    assert fetch.refusal("https://unknown.example/") == "the host has no address"
    assert len(names.asked) == 3


def test_a_host_with_no_address_at_all_is_refused(fetch: Fetch, names: NameServer) -> None:
    names.answers["images.example"] = []

    assert fetch.refusal() == "the host has no address"


def test_a_certificate_for_another_name_is_refused_at_once(
    fetch: Fetch, site: HttpsServer, names: NameServer
) -> None:
    names.answers["other.example"] = ["127.0.0.1"]
    site.script = [answer(body=IMAGE)]

    assert fetch.refusal("https://other.example/") == "the host's certificate does not hold"
    assert site.heads == []
    assert fetch.naps == []


def test_a_certificate_of_an_unknown_authority_is_refused(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer(body=IMAGE)]

    assert fetch.refusal(tls=ReferencePolicy().tls) == "the host's certificate does not hold"
    assert site.heads == []


def test_a_policy_for_production_checks_names_on_port_443() -> None:
    policy = ReferencePolicy()

    assert policy.tls.check_hostname
    assert policy.tls.verify_mode == ssl.CERT_REQUIRED
    assert (policy.port, policy.is_public) == (443, is_public)
    assert policy.resolve is resolve


def test_proxies_and_netrc_in_the_environment_are_ignored(
    fetch: Fetch, site: HttpsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text(f"machine images.example login ada password {SECRET}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site.script = [answer(body=IMAGE)]

    assert fetch().size == (48, 32)
    assert "authorization" not in site.heads[0].lower()


# --- redirects ---


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(fetch: Fetch, site: HttpsServer, status: int) -> None:
    site.script = [
        redirect("https://cdn.example/b.png?c=d", f"{status} Moved"),
        answer(body=IMAGE),
    ]

    assert fetch().size == (48, 32)
    assert site.heads[1].startswith("GET /b.png?c=d HTTP/1.1\r\nHost: cdn.example\r\n")


def test_a_relative_redirect_stays_with_its_host(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [redirect("../b.png"), answer(body=IMAGE)]
    fetch()

    assert site.heads[1].startswith("GET /b.png HTTP/1.1\r\nHost: images.example\r\n")


def test_three_redirects_are_followed_and_a_fourth_is_not(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [*[redirect("/again")] * 3, answer(body=IMAGE)]
    assert fetch().size == (48, 32)

    site.connections, site.script = 0, [redirect("/again")]
    assert fetch.refusal() == "more than 3 redirects"
    assert site.connections == 4


#: Relative ones lead back to the host that sent them; empty and white ones lead nowhere.
HOSTILE_REDIRECTS = [
    url
    for url in HOSTILE_URLS
    if url.isascii()
    and url.strip().isprintable()
    and url == url.strip()
    and not re.match(r"https:(/?[^/\\]|/{3}|\\|//$)", url)
]


@pytest.mark.parametrize(
    "location", [*HOSTILE_REDIRECTS, "//127.0.0.1/a.png", "data:image/png;base64,AAAA"]
)
def test_a_redirect_to_a_url_that_is_not_plain_https_is_refused(
    fetch: Fetch, site: HttpsServer, location: str
) -> None:
    site.script = [redirect(location)]

    assert fetch.refusal().startswith(("not a plain https URL", "the redirect is not a URL"))
    assert site.connections == 1


@pytest.mark.parametrize("address", CLOSED_ADDRESSES)
def test_a_redirect_to_an_address_that_is_not_public_is_refused(
    fetch: Fetch, site: HttpsServer, names: NameServer, address: str
) -> None:
    names.answers["internal.example"] = [address]
    site.script = [redirect("https://internal.example/a.png")]

    assert fetch.refusal() == "the host's address is not public"
    assert site.connections == 1


def test_a_redirect_out_of_the_allow_list_is_refused(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [redirect("https://cdn.example/")]

    refusal = fetch.refusal(allowed_hosts=frozenset({"images.example"}))

    assert refusal == "it redirects to cdn.example, which is not on the allow-list"


def test_a_redirect_without_a_location_is_refused(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer("302 Found")]

    assert fetch.refusal() == "HTTP 302"


# --- tokens ---

TOKENS = {"images.example": SECRET, "cdn.example": "another"}


def tokens_sent(site: HttpsServer) -> list[str | None]:
    """The bearer token of each request."""
    found = [re.search(r"^authorization: bearer (\S+)", head, re.I | re.M) for head in site.heads]
    return [match and match[1] for match in found]


def test_a_hosts_token_is_sent_to_it_also_after_a_redirect_to_itself(
    fetch: Fetch, site: HttpsServer
) -> None:
    site.script = [redirect("/again"), answer(body=IMAGE)]
    fetch(tokens=TOKENS)

    assert tokens_sent(site) == [SECRET, SECRET]


def test_no_token_is_sent_to_or_after_another_host(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [
        redirect("https://cdn.example/a.png"),
        redirect("https://images.example/b.png"),
        answer(body=IMAGE),
    ]
    fetch(tokens=TOKENS)

    assert tokens_sent(site) == [SECRET, None, None]


def test_a_host_without_a_token_of_its_own_is_sent_none(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer(body=IMAGE)]
    fetch(tokens={"example": SECRET, "cdn.images.example": SECRET})

    assert tokens_sent(site) == [None]


def test_no_error_has_a_token(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer("401 Unauthorized")]

    assert fetch.refusal(tokens=TOKENS) == "HTTP 401"
    assert SECRET not in repr(replace(fetch.policy, tokens=TOKENS))


# --- answers ---


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 451])
def test_a_status_that_is_neither_200_nor_transient_is_refused_at_once(
    fetch: Fetch, site: HttpsServer, status: int
) -> None:
    site.script = [answer(f"{status} {SECRET}", IMAGE if status >= 400 else b"")]

    assert fetch.refusal() == f"HTTP {status}"
    assert site.connections == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_a_transient_status_is_tried_three_times(
    fetch: Fetch, site: HttpsServer, status: int
) -> None:
    site.script = [answer(f"{status} Later")]

    assert fetch.refusal() == f"HTTP {status}"
    assert site.connections == 3
    assert 0.3 < fetch.naps[0] < 0.7 < fetch.naps[1] < 1.3


def test_a_host_that_recovers_gives_its_image(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [reset, answer("503 Busy"), answer(body=IMAGE)]

    assert fetch().size == (48, 32)


@pytest.mark.parametrize(("asked", "waited"), [("3", 3.0), ("86400", 10.0), ("soon", 0.5)])
def test_a_host_may_ask_for_a_longer_wait(
    fetch: Fetch, site: HttpsServer, asked: str, waited: float
) -> None:
    site.script = [answer("429 Slow down", b"", f"Retry-After: {asked}"), answer(body=IMAGE)]
    fetch()

    assert fetch.naps == [pytest.approx(waited, rel=0.3)]


def test_no_wait_outlasts_the_job(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer("503 Busy")]

    assert fetch.refusal(remaining_s=lambda: 0.2) == "HTTP 503"
    assert fetch.naps == []


def test_a_job_without_time_left_connects_to_no_host(fetch: Fetch, site: HttpsServer) -> None:
    assert fetch.refusal(remaining_s=lambda: 0.0) == "timed out"
    assert site.connections == 0


def test_a_web_page_with_status_200_is_no_image(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer("200 OK", b"<html>Sign in</html>", "Content-Type: image/png")]

    assert fetch.refusal() == "not a PNG, JPEG or WebP image"
    assert site.connections == 1


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip"])
def test_a_compressed_response_is_refused(fetch: Fetch, site: HttpsServer, encoding: str) -> None:
    site.script = [answer("200 OK", IMAGE, f"Content-Encoding: {encoding}")]

    assert fetch.refusal() == "the host compressed the picture"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        UNTIL_CLOSE + IMAGE,
        b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE,
        b"HTTP/1.1 100 Continue\r\n\r\n" + UNTIL_CLOSE + IMAGE,
        CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(IMAGE), IMAGE),
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + IMAGE,
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + IMAGE,
    ],
)
def test_a_body_may_be_chunked_or_end_with_the_connection(
    fetch: Fetch, site: HttpsServer, raw: bytes
) -> None:
    site.script = [raw]

    assert fetch().size == (48, 32)


@pytest.mark.parametrize(
    "act",
    [
        endless(CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        endless(CHUNKED + b"-1\r\n", b"x" * 4096),
        endless(CHUNKED + b"ffffffffffffffff\r\n", b"x" * 4096),
        endless(UNTIL_CLOSE, b"x" * 4096),
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"x" * 4096),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n",
        answer(body=b"x" * 100_001),
    ],
)
def test_a_body_over_the_limit_is_cut_off(fetch: Fetch, site: HttpsServer, act: Act) -> None:
    site.script = [act]

    assert fetch.refusal() == "more than 100000 bytes"
    assert site.connections == 1


def test_a_body_of_exactly_the_limit_is_accepted(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [answer(body=IMAGE)]

    assert fetch(max_bytes=len(IMAGE)).size == (48, 32)


@pytest.mark.parametrize(
    "act",
    [
        reset,
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + IMAGE,
        CHUNKED + b"1388\r\n" + IMAGE,
        CHUNKED + b"-1\r\n" + IMAGE,
        CHUNKED + b"zz\r\n" + IMAGE,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n" + IMAGE,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n" + IMAGE,
    ],
)
def test_a_response_that_breaks_off_is_requested_again(
    fetch: Fetch, site: HttpsServer, act: Act
) -> None:
    site.script = [act]

    assert fetch.refusal() == "the connection failed"
    assert site.connections == 3


def test_a_content_length_that_is_too_short_damages_the_image(
    fetch: Fetch, site: HttpsServer
) -> None:
    site.script = [b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + IMAGE]

    assert fetch.refusal() == "the image is damaged"


def test_a_host_without_tls_is_refused(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [b""]
    site.before_tls = lambda raw: raw.sendall(answer(body=IMAGE))

    assert fetch.refusal() == "the connection failed"


def test_a_closed_port_is_tried_three_times(fetch: Fetch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert fetch.refusal(port=port) == "the connection failed"
    assert len(fetch.naps) == 2


# --- time ---

ONCE = {"deadline_s": 0.25, "retry": Retry(tries=1)}

DRIPS = {
    "status line": endless(b"HTTP/1.1 200 ", b"O", 0.05),
    "header": endless(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.05),
    "headers": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.05),
    "promises": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "body": endless(UNTIL_CLOSE, b"x", 0.05),
    "chunk": endless(CHUNKED + b"ffff\r\n", b"x", 0.05),
    "chunk size": endless(CHUNKED, b"0", 0.05),
    "trailers": endless(CHUNKED + b"0\r\n", b"X: y\r\n", 0.0),
    "nothing": endless(b"", b"", 0.1),
    "redirects": lambda sock: (time.sleep(0.1), sock.sendall(redirect("/again"))),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_a_try_ends_at_its_deadline_wherever_the_response_drips(
    fetch: Fetch, site: HttpsServer, drip: str
) -> None:
    # Each sends bytes for ever: only the deadline ends it.
    site.script = [DRIPS[drip]]

    assert fetch.refusal(**ONCE) == "timed out"


@pytest.mark.parametrize("piece", [b"", b"\x16\x03\x03\x40\x00" + b"\x02" * 9])
def test_a_try_ends_at_its_deadline_in_the_tls_handshake(
    fetch: Fetch, site: HttpsServer, piece: bytes
) -> None:
    site.script = [b""]
    site.before_tls = endless(piece, piece[5:6], 0.05)

    assert fetch.refusal(**ONCE) == "timed out"


def test_a_try_ends_at_its_deadline_while_the_host_is_looked_up(fetch: Fetch) -> None:
    given_up = threading.Event()

    def slow(host: str) -> list[str]:
        given_up.wait(PATIENCE_S)
        return ["127.0.0.1"]

    try:
        assert fetch.refusal(resolve=slow, **ONCE) == "timed out"
    finally:
        given_up.set()


def test_each_try_has_a_deadline_of_its_own(fetch: Fetch, site: HttpsServer) -> None:
    # On a slow machine the second try may be too late as well.
    site.script = [DRIPS["body"], answer(body=IMAGE), answer(body=IMAGE)]

    assert fetch(deadline_s=0.8).size == (48, 32)


def test_a_try_ends_at_its_jobs_deadline(fetch: Fetch, site: HttpsServer) -> None:
    site.script = [DRIPS["body"]]
    ends = time.monotonic() + 0.25

    refusal = fetch.refusal(deadline_s=AGES_S, remaining_s=lambda: ends - time.monotonic())

    assert refusal == "timed out"


# --- storage ---


@pytest.mark.parametrize(
    "key",
    [
        "ada/job-1/0.png",
        "ada/portrait.webp",
        "user-library/ada/portrait.webp",
        "user-library/ada/2026/my holiday 1.jpg",
    ],
)
def test_a_path_in_the_user_s_own_folder_is_read_from_storage(fetch: Fetch, key: str) -> None:
    assert fetch(key, read_object={key: IMAGE}.__getitem__).size == (48, 32)


STRANGE_PATHS = [
    "",
    "ada",
    "ada/",
    "/ada/0.png",
    "//images.example/ada/0.png",
    "ada//0.png",
    "ada/../bob/0.png",
    "ada/./0.png",
    "ada/.../0.png",
    "ada/.hidden",
    "../ada/0.png",
    "ada/..\\bob\\0.png",
    "ada\\0.png",
    "ada/%2e%2e/bob/0.png",
    "ada/%2e%2e%2fbob/0.png",
    "ada/0.png?download=1",
    "ada/0.png#x",
    "ada/0.png\n",
    "ada/0\x00.png",
    "ada/ /0.png",
    "ada/0.png ",
    "ada/0.png.",
    "ada/․․/0.png",
    "ada／0.png",
    "ada/" + "a" * 600,
]

OTHERS_PATHS = [
    "bob/job-1/0.png",
    "Ada/job-1/0.png",
    "ada2/job-1/0.png",
    "bob/ada/0.png",
    "bob/job-1/ada/0.png",
    "user-library/bob/0.png",
    "user-library/ada",
    "user-library/0.png",
    "user-library/bob/ada/0.png",
    "other-library/ada/0.png",
    "user-library/user-library/ada/0.png",
]


@pytest.mark.parametrize("key", STRANGE_PATHS)
def test_a_path_that_is_not_plain_is_not_read(fetch: Fetch, key: str) -> None:
    assert "plain storage path" in fetch.refusal(key, read_object=must_not_be_read)


@pytest.mark.parametrize("key", OTHERS_PATHS)
def test_a_path_outside_the_user_s_own_folder_is_not_read(fetch: Fetch, key: str) -> None:
    refusal = fetch.refusal(key, read_object=must_not_be_read)

    assert refusal == "the storage path is not in the user's own folder"


def must_not_be_read(key: str) -> bytes:
    raise AssertionError(f"{key} was read")


def test_a_user_who_is_called_like_a_library_does_not_own_it() -> None:
    for key in ("user-library/bob/0.png", "user-library/user-library/0.png"):
        with pytest.raises(ReferenceFrameError):
            check_key(key, "user-library", {"user-library"})


@given(st.lists(st.sampled_from(["ada", "bob", "user-library", "..", ".", "", "a b", "0.png"])))
def test_a_path_that_passes_begins_with_the_user_s_folder(segments: list[str]) -> None:
    with suppress(ReferenceFrameError):
        check_key("/".join(segments), "ada", {"user-library"})

        assert segments[0] == "ada" or segments[:2] == ["user-library", "ada"]
        assert not {"..", ".", ""} & set(segments)


def test_storage_with_a_transient_fault_is_tried_three_times(fetch: Fetch) -> None:
    asked: list[str] = []

    def read(key: str) -> bytes:
        asked.append(key)
        raise Fault(503)

    assert fetch.refusal("ada/0.png", read_object=read) == "storage could not read the path"
    assert len(asked) == 3


def test_an_object_that_storage_lacks_is_requested_once(fetch: Fetch) -> None:
    assert fetch.refusal("ada/0.png", read_object={}.__getitem__).startswith("storage could not")
    assert fetch.naps == []


def test_a_worker_without_storage_refuses_paths(fetch: Fetch) -> None:
    assert fetch.refusal("ada/0.png") == "no storage is configured for storage paths"


def test_a_data_uri_of_exactly_the_limit_is_accepted(fetch: Fetch) -> None:
    assert fetch(data_uri(IMAGE.ljust(100_000, b"\0"))).size == (48, 32)


def test_an_object_over_the_limit_is_refused(fetch: Fetch) -> None:
    refusal = fetch.refusal("ada/0.png", read_object=lambda key: b"x" * 100_001)

    assert refusal == "more than 100000 bytes"


# --- many at once ---


def test_references_are_fetched_in_parallel_and_a_failure_affects_no_other(
    fetch: Fetch, site: HttpsServer
) -> None:
    meeting = threading.Barrier(2, timeout=PATIENCE_S)

    def meet(key: str) -> bytes:
        meeting.wait()
        return IMAGE

    found = references.fetch_all(
        {"first": "ada/a.png", "last": "ada/b.png", "bad": "bob/c.png"},
        policy=fetch.policy,
        user_id="ada",
        read_object=meet,
    )

    assert list(found) == ["first", "last", "bad"]
    assert [type(result).__name__ for result in found.values()] == [
        "Image", "Image", "ReferenceFrameError",
    ]  # fmt: skip


def test_a_reference_in_two_roles_is_fetched_once(fetch: Fetch) -> None:
    read: list[str] = []
    found = references.fetch_all(
        {"single": "ada/a.png", "start": "ada/a.png"},
        policy=fetch.policy,
        user_id="ada",
        read_object=lambda key: read.append(key) or IMAGE,  # type: ignore[func-returns-value]
    )

    assert list(found) == ["single", "start"]
    assert read == ["ada/a.png"]


def test_without_references_nothing_is_fetched(fetch: Fetch) -> None:
    assert references.fetch_all({}, policy=fetch.policy, user_id="ada") == {}
