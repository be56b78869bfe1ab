"""A reference becomes plain pixels, and reaches nothing that it should not.

The other side is a real HTTPS server on 127.0.0.1 with an authority of its own. It is reached as
any host is, through the policy: a name server that knows it, its port, its authority.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import math
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.net.addresses import Address, is_public, resolve
from ourvidz_serverless.net.download import host_and_target
from ourvidz_serverless.net.retries import Fault, Refused, Retry, is_transient, retry
from ourvidz_serverless.references import fetch as references
from ourvidz_serverless.references.decode import GREY, decode, fit
from ourvidz_serverless.references.fetch import check_key
from ourvidz_serverless.references.picture_files import PNG, orientation, read_png
from ourvidz_serverless.references.policy import ReferencePolicy
from tests.patience import PATIENCE_S

SECRET = "t0ken-s3cret"
URL = f"https://images.example/ada/portrait.png?token={SECRET}"
LOOPBACK = ipaddress.ip_address("127.0.0.1")
Act = bytes | Callable[[ssl.SSLSocket], None]


# --- pictures ---


def quarters(mode: str = "RGB") -> Image.Image:
    """A picture that looks different from every side."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste("lime", (24, 0, 48, 16))
    image.paste("blue", (0, 16, 24, 32))
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


PICTURE = encoded(quarters())

#: A try that nothing cuts short but what a test means to.
AGES_S = 3600.0


# --- the other side ---


class Site:
    """An HTTPS server that does, connection by connection, what its script says."""

    def __init__(self, authority: Path) -> None:
        self.script: list[Act] = [b""]  # the last act is played for ever
        self.before_tls: Callable[[socket.socket], None] = lambda raw: None
        self.heads: list[str] = []
        self.connections = 0
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(authority / "host.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                act = self.script[min(self.connections, len(self.script) - 1)]
                self.connections += 1
                threading.Thread(target=self._play, args=(raw, act), daemon=True).start()

    def _play(self, raw: socket.socket, act: Act) -> None:
        with suppress(OSError), raw:
            raw.settimeout(10)
            self.before_tls(raw)
            with self._tls.wrap_socket(raw, server_side=True) as sock:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(65536)
                self.heads.append(head.decode())
                if callable(act):
                    act(sock)
                else:
                    sock.sendall(act)


def answer(status: str = "200 OK", body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(status, b"", f"Location: {location}")


def reset(sock: ssl.SSLSocket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(sock)


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Callable[[socket.socket], None]:
    """Send `head`, then `piece` until nobody listens."""

    def act(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(piece)
            time.sleep(pause_s)

    return act


@pytest.fixture
def site(authority: Path) -> Iterator[Site]:
    site = Site(authority)
    yield site
    site.close()


class NameServer:
    """Knows one name server's worth of names, and who asked for which."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = {"images.example": ["127.0.0.1"], "cdn.example": ["127.0.0.1"]}

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        try:
            return self.answers[host]
        except KeyError:
            raise socket.gaierror(socket.EAI_NONAME, "unknown name") from None


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
        """The message that a fetch ends in, once it is seen to tell nothing."""
        with pytest.raises(ReferenceFrameError) as refused:
            self(reference, **changes)
        return plain_words(refused.value)


def plain_words(error: ReferenceFrameError) -> str:
    message = error.message
    assert message.startswith("reference: ")
    assert not re.search(rf"inf|nan|{SECRET}|images\.|portrait|ada|\d+\.\d+\.\d", message)
    return message.removeprefix("reference: ")


@pytest.fixture
def fetch(site: Site, names: NameServer, authority: Path) -> Fetch:
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


def test_an_https_url_becomes_its_picture(fetch: Fetch, site: Site) -> None:
    site.script = [answer(body=PICTURE)]

    assert fetch().tobytes() == quarters().tobytes()


def test_the_query_is_sent_and_no_one_is_told_of_a_user(fetch: Fetch, site: Site) -> None:
    site.script = [answer(body=PICTURE)]
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
def test_a_target_is_sent_as_it_is_written(fetch: Fetch, site: Site, url: str, target: str) -> None:
    site.script = [answer(body=PICTURE)]
    fetch(url)

    assert site.heads[0].startswith(f"GET {target} HTTP/1.1\r\nHost: images.example\r\n")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_data_uri_becomes_its_picture(fetch: Fetch, kind: str) -> None:
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
def test_another_data_uri_is_refused(fetch: Fetch, uri: str, why: str) -> None:
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
def test_a_url_that_is_not_plain_https_is_not_even_looked_up(
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


def test_an_allow_list_lets_only_its_own_names_in(
    fetch: Fetch, site: Site, names: NameServer
) -> None:
    site.script = [answer(body=PICTURE)]
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
def test_one_bad_address_condemns_the_others(
    fetch: Fetch, site: Site, names: NameServer, answers: list[str]
) -> None:
    names.answers["images.example"] = answers

    assert fetch.refusal() == "the host's address is not public"
    assert site.connections == 0


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8"]
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_without_being_told_so_even_the_test_server_is_not_public() -> None:
    assert not is_public(LOOPBACK)


@given(st.ip_addresses())
def test_what_is_public_here_is_so_for_the_standard_library(address: Address) -> None:
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


def test_a_name_server_that_changes_its_mind_is_asked_once(fetch: Fetch, site: Site) -> None:
    site.script = [answer(body=PICTURE)]
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    assert fetch(resolve=lambda host: next(answers)).size == (48, 32)
    assert next(answers) == ["10.0.0.1"]


def test_a_name_server_that_changes_its_mind_between_redirects_is_caught(
    fetch: Fetch, site: Site
) -> None:
    site.script = [redirect("/again"), answer(body=PICTURE)]
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    assert fetch.refusal(resolve=lambda host: next(answers)) == "the host's address is not public"
    assert site.connections == 1


def test_a_name_server_that_changes_its_mind_between_tries_is_caught(
    fetch: Fetch, site: Site
) -> None:
    site.script = [answer("503 Busy"), answer(body=PICTURE)]
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])

    assert fetch.refusal(resolve=lambda host: next(answers)) == "the host's address is not public"
    assert site.connections == 1


def test_the_next_address_is_tried_where_one_takes_no_connection(
    fetch: Fetch, site: Site, names: NameServer
) -> None:
    site.script = [answer(body=PICTURE)]
    names.answers["images.example"] = ["127.0.0.9", "127.0.0.1"]

    assert fetch(is_public=lambda address: True).size == (48, 32)
    assert fetch.naps == []


def test_a_host_without_an_address_is_looked_up_three_times(
    fetch: Fetch, names: NameServer
) -> None:
    assert fetch.refusal("https://unknown.example/") == "the host has no address"
    assert len(names.asked) == 3


def test_a_host_that_no_one_answers_for_is_refused(fetch: Fetch, names: NameServer) -> None:
    names.answers["images.example"] = []

    assert fetch.refusal() == "the host has no address"


def test_a_certificate_for_another_name_is_refused_at_once(
    fetch: Fetch, site: Site, names: NameServer
) -> None:
    names.answers["other.example"] = ["127.0.0.1"]
    site.script = [answer(body=PICTURE)]

    assert fetch.refusal("https://other.example/") == "the host's certificate does not hold"
    assert site.heads == []
    assert fetch.naps == []


def test_a_certificate_of_an_unknown_authority_is_refused(fetch: Fetch, site: Site) -> None:
    site.script = [answer(body=PICTURE)]

    assert fetch.refusal(tls=ReferencePolicy().tls) == "the host's certificate does not hold"
    assert site.heads == []


def test_a_policy_for_production_checks_names_on_port_443() -> None:
    policy = ReferencePolicy()

    assert policy.tls.check_hostname
    assert policy.tls.verify_mode == ssl.CERT_REQUIRED
    assert (policy.port, policy.is_public) == (443, is_public)
    assert policy.resolve is resolve


def test_the_system_s_resolver_tells_plain_addresses() -> None:
    assert resolve("127.0.0.1") == ["127.0.0.1"]


def test_proxies_and_netrc_in_the_environment_are_not_heard(
    fetch: Fetch, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text(f"machine images.example login ada password {SECRET}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site.script = [answer(body=PICTURE)]

    assert fetch().size == (48, 32)
    assert "authorization" not in site.heads[0].lower()


# --- redirects ---


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(fetch: Fetch, site: Site, status: int) -> None:
    site.script = [
        redirect("https://cdn.example/b.png?c=d", f"{status} Moved"),
        answer(body=PICTURE),
    ]

    assert fetch().size == (48, 32)
    assert site.heads[1].startswith("GET /b.png?c=d HTTP/1.1\r\nHost: cdn.example\r\n")


def test_a_relative_redirect_stays_with_its_host(fetch: Fetch, site: Site) -> None:
    site.script = [redirect("../b.png"), answer(body=PICTURE)]
    fetch()

    assert site.heads[1].startswith("GET /b.png HTTP/1.1\r\nHost: images.example\r\n")


def test_three_redirects_are_followed_and_a_fourth_is_not(fetch: Fetch, site: Site) -> None:
    site.script = [*[redirect("/again")] * 3, answer(body=PICTURE)]
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
def test_a_redirect_passes_the_same_gate(fetch: Fetch, site: Site, location: str) -> None:
    site.script = [redirect(location)]

    assert fetch.refusal().startswith(("not a plain https URL", "the redirect is not a URL"))
    assert site.connections == 1


@pytest.mark.parametrize("address", CLOSED_ADDRESSES)
def test_a_redirect_to_an_address_that_is_not_public_is_refused(
    fetch: Fetch, site: Site, names: NameServer, address: str
) -> None:
    names.answers["internal.example"] = [address]
    site.script = [redirect("https://internal.example/a.png")]

    assert fetch.refusal() == "the host's address is not public"
    assert site.connections == 1


def test_a_redirect_out_of_the_allow_list_is_refused(fetch: Fetch, site: Site) -> None:
    site.script = [redirect("https://cdn.example/")]

    refusal = fetch.refusal(allowed_hosts=frozenset({"images.example"}))

    assert refusal == "the host is not on the allow-list"


def test_a_redirect_to_nowhere_is_refused(fetch: Fetch, site: Site) -> None:
    site.script = [answer("302 Found")]

    assert fetch.refusal() == "HTTP 302"


# --- answers ---


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 451])
def test_another_status_is_refused_at_once(fetch: Fetch, site: Site, status: int) -> None:
    site.script = [answer(f"{status} {SECRET}", PICTURE if status >= 400 else b"")]

    assert fetch.refusal() == f"HTTP {status}"
    assert site.connections == 1


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_a_host_that_is_unwell_is_asked_three_times(fetch: Fetch, site: Site, status: int) -> None:
    site.script = [answer(f"{status} Later")]

    assert fetch.refusal() == f"HTTP {status}"
    assert site.connections == 3
    assert 0.3 < fetch.naps[0] < 0.7 < fetch.naps[1] < 1.3


def test_a_host_that_recovers_gives_its_picture(fetch: Fetch, site: Site) -> None:
    site.script = [reset, answer("503 Busy"), answer(body=PICTURE)]

    assert fetch().size == (48, 32)


@pytest.mark.parametrize(("asked", "waited"), [("3", 3.0), ("86400", 10.0), ("soon", 0.5)])
def test_a_host_may_ask_for_a_longer_wait(
    fetch: Fetch, site: Site, asked: str, waited: float
) -> None:
    site.script = [answer("429 Slow down", b"", f"Retry-After: {asked}"), answer(body=PICTURE)]
    fetch()

    assert fetch.naps == [pytest.approx(waited, rel=0.3)]


def test_no_wait_outlasts_the_job(fetch: Fetch, site: Site) -> None:
    site.script = [answer("503 Busy")]

    assert fetch.refusal(remaining_s=lambda: 0.2) == "HTTP 503"
    assert fetch.naps == []


def test_a_job_without_time_asks_nobody(fetch: Fetch, site: Site) -> None:
    assert fetch.refusal(remaining_s=lambda: 0.0) == "timed out"
    assert site.connections == 0


def test_a_web_page_with_status_200_is_no_picture(fetch: Fetch, site: Site) -> None:
    site.script = [answer("200 OK", b"<html>Sign in</html>", "Content-Type: image/png")]

    assert fetch.refusal() == "not a PNG, JPEG or WebP image"
    assert site.connections == 1


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip"])
def test_a_compressed_answer_is_refused(fetch: Fetch, site: Site, encoding: str) -> None:
    site.script = [answer("200 OK", PICTURE, f"Content-Encoding: {encoding}")]

    assert fetch.refusal() == "the host compressed the picture"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        UNTIL_CLOSE + PICTURE,
        b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE,
        b"HTTP/1.1 100 Continue\r\n\r\n" + UNTIL_CLOSE + PICTURE,
        CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(PICTURE), PICTURE),
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + PICTURE,
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + PICTURE,
    ],
)
def test_a_body_may_come_in_any_shape(fetch: Fetch, site: Site, raw: bytes) -> None:
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
def test_a_body_without_end_is_cut_off(fetch: Fetch, site: Site, act: Act) -> None:
    site.script = [act]

    assert fetch.refusal() == "more than 100000 bytes"
    assert site.connections == 1


def test_a_body_of_the_very_limit_is_taken(fetch: Fetch, site: Site) -> None:
    site.script = [answer(body=PICTURE)]

    assert fetch(max_bytes=len(PICTURE)).size == (48, 32)


@pytest.mark.parametrize(
    "act",
    [
        reset,
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + PICTURE,
        CHUNKED + b"1388\r\n" + PICTURE,
        CHUNKED + b"-1\r\n" + PICTURE,
        CHUNKED + b"zz\r\n" + PICTURE,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n" + PICTURE,
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n" + PICTURE,
    ],
)
def test_an_answer_that_breaks_off_is_asked_for_again(fetch: Fetch, site: Site, act: Act) -> None:
    site.script = [act]

    assert fetch.refusal() == "the connection failed"
    assert site.connections == 3


def test_a_length_that_is_told_too_short_leaves_half_a_picture(fetch: Fetch, site: Site) -> None:
    site.script = [b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + PICTURE]

    assert fetch.refusal() == "the image is damaged"


def test_a_host_that_speaks_no_tls_is_refused(fetch: Fetch, site: Site) -> None:
    site.script = [b""]
    site.before_tls = lambda raw: raw.sendall(answer(body=PICTURE))

    assert fetch.refusal() == "the connection failed"


def test_a_closed_port_is_tried_three_times(fetch: Fetch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    assert fetch.refusal(port=port) == "the connection failed"
    assert len(fetch.naps) == 2


# --- time ---

ONCE = {"deadline_s": 0.4, "retry": Retry(tries=1)}

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
    "redirects": lambda sock: (time.sleep(0.25), sock.sendall(redirect("/again"))),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_a_try_ends_by_the_clock_whatever_drips(fetch: Fetch, site: Site, drip: str) -> None:
    # Each drips for ever: only the clock ends it.
    site.script = [DRIPS[drip]]

    assert fetch.refusal(**ONCE) == "timed out"


@pytest.mark.parametrize("piece", [b"", b"\x16\x03\x03\x40\x00" + b"\x02" * 9])
def test_a_try_ends_by_the_clock_in_the_handshake(fetch: Fetch, site: Site, piece: bytes) -> None:
    site.script = [b""]
    site.before_tls = endless(piece, piece[5:6], 0.05)

    assert fetch.refusal(**ONCE) == "timed out"


def test_a_try_ends_by_the_clock_while_the_name_is_looked_up(fetch: Fetch) -> None:
    given_up = threading.Event()

    def slow(host: str) -> list[str]:
        given_up.wait()
        return ["127.0.0.1"]

    try:
        assert fetch.refusal(resolve=slow, **ONCE) == "timed out"
    finally:
        given_up.set()


def test_each_try_has_its_own_time(fetch: Fetch, site: Site) -> None:
    site.script = [DRIPS["body"], DRIPS["header"], answer(body=PICTURE)]

    # Long enough for the third, which must succeed in it, on a slow machine.
    assert fetch(deadline_s=2.0).size == (48, 32)


def test_a_try_has_no_more_time_than_its_job(fetch: Fetch, site: Site) -> None:
    site.script = [DRIPS["body"]]
    ends = time.monotonic() + 0.4

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
    assert fetch(key, read_object={key: PICTURE}.__getitem__).size == (48, 32)


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


def test_storage_that_is_unwell_is_asked_three_times(fetch: Fetch) -> None:
    asked: list[str] = []

    def read(key: str) -> bytes:
        asked.append(key)
        raise Fault(503)

    assert fetch.refusal("ada/0.png", read_object=read) == "storage could not read the path"
    assert len(asked) == 3


def test_storage_that_lacks_an_object_is_asked_once(fetch: Fetch) -> None:
    assert fetch.refusal("ada/0.png", read_object={}.__getitem__).startswith("storage could not")
    assert fetch.naps == []


def test_a_worker_without_storage_refuses_paths(fetch: Fetch) -> None:
    assert fetch.refusal("ada/0.png") == "no storage is configured for storage paths"


def test_an_object_over_the_limit_is_refused(fetch: Fetch) -> None:
    refusal = fetch.refusal("ada/0.png", read_object=lambda key: b"x" * 100_001)

    assert refusal == "more than 100000 bytes"


# --- many at once ---


def test_references_are_fetched_side_by_side_and_one_failure_stays_alone(
    fetch: Fetch, site: Site
) -> None:
    meeting = threading.Barrier(2, timeout=PATIENCE_S)

    def meet(key: str) -> bytes:
        meeting.wait()
        return PICTURE

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
        read_object=lambda key: read.append(key) or PICTURE,  # type: ignore[func-returns-value]
    )

    assert list(found) == ["single", "start"]
    assert read == ["ada/a.png"]


def test_no_references_are_no_work(fetch: Fetch) -> None:
    assert references.fetch_all({}, policy=fetch.policy, user_id="ada") == {}


# --- pixels ---


def refusal_of(data: bytes, **limits: object) -> str:
    with pytest.raises(ReferenceFrameError) as refused:
        decode(data, ReferencePolicy(**limits))
    return plain_words(refused.value)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM", "PDF", "JPEG2000"])
def test_other_formats_are_refused(format: str) -> None:
    assert refusal_of(encoded(quarters(), format)) == "not a PNG, JPEG or WebP image"


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", PICTURE[:20], b"<svg/>", b"\xff\xd8\xff"]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert refusal_of(data) == "not a PNG, JPEG or WebP image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_half_a_picture_is_refused(format: str) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    data = encoded(noise, format)

    assert refusal_of(data[: len(data) // 2]) in (
        "the image is damaged",
        "not a PNG, JPEG or WebP image",
    )


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([encoded(quarters(), format) for format in ("PNG", "JPEG", "WEBP")]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_corrupted_picture_is_a_picture_or_a_refusal(
    data: bytes, changes: list[tuple[int, int]]
) -> None:
    corrupted = bytearray(data)
    for position, byte in changes:
        corrupted[position % len(corrupted)] = byte

    with suppress(ReferenceFrameError):
        assert decode(bytes(corrupted), SMALL).mode == "RGB"


@given(st.binary(max_size=60), st.sampled_from([b"", PNG, encoded(quarters())[:50]]))
def test_any_bytes_behind_a_png_s_first_ones_are_read_as_far_as_they_go(
    data: bytes, first: bytes
) -> None:
    assert read_png(first + data).file.startswith(PNG)


@given(st.binary(max_size=60), st.sampled_from([b"II*\0", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff"]))
def test_any_exif_says_how_a_picture_stands(data: bytes, first: bytes) -> None:
    assert 1 <= orientation(first + data) <= 8


SMALL = ReferencePolicy(max_pixels=100_000)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG's header without a body: whoever wants its pixels finds it damaged."""
    header = b"IHDR" + struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 4, b"IDAT")


def webp_that_claims(width: int, height: int) -> bytes:
    size = [(side - 1).to_bytes(3, "little") for side in (width, height)]
    body = b"WEBPVP8X" + struct.pack("<I4x", 10) + size[0] + size[1]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        png_that_claims(9000, 8000),
        png_that_claims(10_000, 9_500),
        png_that_claims(100_000, 100_000),
        png_that_claims(2**31 - 1, 2**31 - 1),
        webp_that_claims(16_000, 16_000),
    ],
)
def test_a_bomb_is_refused_by_its_header(data: bytes) -> None:
    assert refusal_of(data) == "more than 64000000 pixels"


def test_a_picture_of_the_very_limit_is_taken() -> None:
    assert decode(PICTURE, ReferencePolicy(max_pixels=48 * 32)).size == (48, 32)
    assert refusal_of(PICTURE, max_pixels=48 * 32 - 1) == "more than 1535 pixels"


@pytest.mark.parametrize("size", [(9, 1), (1, 9), (1601, 200)])
def test_a_picture_that_is_long_and_thin_is_refused(size: tuple[int, int]) -> None:
    assert "one side is more than 8 times" in refusal_of(encoded(Image.new("L", size)))


def test_a_text_chunk_that_inflates_without_end_is_left_out() -> None:
    text = PngInfo()
    text.add_text("bomb", "x" * 50_000_000, zip=True)

    assert decode(encoded(quarters(), pnginfo=text), SMALL).tobytes() == quarters().tobytes()


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(Image.new("L", (4000, 3000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]

    assert refusal_of(data[:-2] + scan * 1000 + data[-2:]) == "the image has too many scans"


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_refused(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])

    assert refusal_of(data) == "the image is animated"


def test_a_phone_s_jpeg_with_a_second_frame_is_its_first_one() -> None:
    data = encoded(
        Image.new("RGB", (16, 16), "red"),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (16, 16), "blue")],
    )

    assert decode(data, SMALL).getpixel((8, 8))[0] > 250


STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_stands_upright_however_it_was_stored(orientation: int, format: str) -> None:
    turn = STORED[orientation]
    stored = quarters() if turn is None else quarters().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}

    image = decode(encoded(stored, format, exif=exif, **options), SMALL)

    assert image.tobytes() == quarters().tobytes()


def profile(*, swapped: bool = False, space: str = "sRGB") -> bytes:
    """An ICC profile; a swapped one means green where it says red."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    if swapped:
        data = data.replace(b"rXYZ", b"temp", 1).replace(b"gXYZ", b"rXYZ", 1)
        data = data.replace(b"temp", b"gXYZ", 1)
    return data


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_colours_are_those_that_the_profile_means(format: str) -> None:
    red = Image.new("RGB", (16, 16), "red")
    image = decode(encoded(red, format, icc_profile=profile(swapped=True)), SMALL)

    assert image.getpixel((8, 8)) == pytest.approx((0, 255, 0), abs=4)


def test_a_profile_reaches_a_picture_with_alpha_and_one_with_a_palette() -> None:
    for mode in ("RGBA", "P"):
        data = encoded(
            Image.new("RGB", (4, 4), "red").convert(mode), icc_profile=profile(swapped=True)
        )

        assert decode(data, SMALL).getpixel((2, 2)) == pytest.approx((0, 255, 0), abs=4)


@pytest.mark.parametrize("broken", [b"no profile", profile()[:200], profile(space="LAB")])
def test_a_profile_that_makes_no_sense_is_left_out(broken: bytes) -> None:
    image = decode(encoded(quarters(), icc_profile=broken), SMALL)

    assert image.tobytes() == quarters().tobytes()


def with_transparency(mode: str) -> Image.Image:
    """Transparent to the left, opaque red or black to the right."""
    image = Image.new("LA" if mode == "LA" else "RGBA", (4, 2))
    image.paste((0, 255) if mode == "LA" else (255, 0, 0, 255), (2, 0, 4, 2))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = decode(encoded(with_transparency(mode)), SMALL)

    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((3, 0)) == ((0, 0, 0) if mode == "LA" else (255, 0, 0))


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3))])
def test_a_colour_that_stands_for_transparency_lies_over_white(mode: str, colour: object) -> None:
    data = encoded(Image.new(mode, (4, 2), colour), transparency=colour)

    assert decode(data, SMALL).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "CMYK"])
def test_every_kind_of_pixel_becomes_rgb(mode: str) -> None:
    data = encoded(Image.new(mode, (8, 8), 0), "JPEG" if mode == "CMYK" else "PNG")
    image = decode(data, SMALL)

    assert image.mode == "RGB"
    assert image.getpixel((4, 4)) == ((255, 255, 255) if mode == "CMYK" else (0, 0, 0))


def test_sixteen_bits_of_grey_become_eight() -> None:
    grey = Image.new("I;16", (8, 8), 32768)

    assert decode(encoded(grey), SMALL).getpixel((4, 4)) == (128, 128, 128)


def test_nothing_of_the_file_but_its_pixels_goes_on() -> None:
    exif = Image.Exif()
    exif[0x010E] = SECRET
    data = encoded(quarters(), exif=exif, icc_profile=profile(), dpi=(72, 72)) + SECRET.encode()
    image = decode(data, SMALL)

    assert (type(image), image.info, dict(image.getexif())) == (Image.Image, {}, {})
    assert SECRET.encode() not in encoded(image)


# --- to size ---


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (64, 64), (31, 200), (1000, 8)])
@pytest.mark.parametrize("shape", [(48, 32), (1, 8), (800, 100)])
def test_an_image_is_fitted_to_the_very_size(
    mode: str, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert fit(Image.new("RGB", shape), *size, mode).size == size


def striped() -> Image.Image:
    """Red and blue ends, a lime middle as long as it is high."""
    image = Image.new("RGB", (60, 20), "lime")
    image.paste("red", (0, 0, 20, 20))
    image.paste("blue", (40, 0, 60, 20))
    return image


@pytest.mark.parametrize(
    ("mode", "left", "top"),
    [("crop", "lime", "lime"), ("pad", "red", "grey"), ("stretch", "red", "lime")],
)
def test_crop_keeps_the_centre_and_pad_the_whole(mode: str, left: str, top: str) -> None:
    colours = {"lime": (0, 255, 0), "red": (255, 0, 0), "grey": GREY}
    image = fit(striped(), 60, 60, mode)

    assert image.getpixel((1, 30)) == pytest.approx(colours[left], abs=12)
    assert image.getpixel((30, 1)) == pytest.approx(colours[top], abs=12)


def test_an_image_of_the_right_size_is_the_same_in_every_mode() -> None:
    for mode in ("crop", "pad", "stretch"):
        assert fit(quarters(), 48, 32, mode).tobytes() == quarters().tobytes()


# --- trying again ---


class Failing:
    """A call that raises its errors in turn, then returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


class Asking(Exception):
    def __init__(self, retry_after: float | None) -> None:
        self.retry_after = retry_after


def test_a_call_is_tried_again_with_growing_waits() -> None:
    naps: list[float] = []
    call = Failing(OSError(), OSError(), OSError())
    policy = Retry(tries=4, jitter=0)

    assert retry(call, on=OSError, policy=policy, deadline=Deadline(sleep=naps.append)) == "done"
    assert naps == [0.5, 1.0, 2.0]


def test_the_last_error_is_the_one_raised() -> None:
    last = OSError("third")
    call = Failing(OSError("first"), OSError("second"), last)

    with pytest.raises(OSError) as raised:
        retry(call, on=(OSError, KeyError), policy=Retry(), deadline=Deadline(sleep=lambda s: None))
    assert raised.value is last


@pytest.mark.parametrize("on", [OSError, (OSError, TimeoutError), lambda error: False])
def test_an_error_that_is_not_named_is_raised_at_once(on: object) -> None:
    call = Failing(KeyError("x"), KeyError("y"))

    with pytest.raises(KeyError):
        retry(call, on=on, policy=Retry(), deadline=Deadline(sleep=must_not_sleep))
    assert len(call.errors) == 1


def must_not_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s")


@pytest.mark.parametrize(("asked", "waited"), [(None, 0.5), (0.1, 0.5), (4.0, 4.0), (99.0, 10.0)])
def test_an_error_may_ask_for_a_longer_wait(asked: float | None, waited: float) -> None:
    naps: list[float] = []
    policy, deadline = Retry(jitter=0), Deadline(sleep=naps.append)
    retry(Failing(Asking(asked)), on=Asking, policy=policy, deadline=deadline)

    assert naps == [waited]


@pytest.mark.parametrize(
    ("status", "transient"),
    [(None, True), (408, True), (425, True), (429, True), (500, True), (522, True)]
    + [(status, False) for status in (301, 400, 403, 404, 409, 413, 422)],
)
def test_a_fault_is_transient_where_the_other_side_is_busy_or_gone(
    status: int | None, transient: bool
) -> None:
    assert is_transient(Fault(status)) is transient
    assert not is_transient(OSError())


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), (None, None), ("", None), ("-1", None), ("²", None)]
)
def test_a_fault_reads_the_seconds_that_were_asked_for(
    header: str | None, seconds: float | None
) -> None:
    assert Fault(429, header).retry_after == seconds


def test_a_wait_that_outlasts_the_time_left_is_not_begun() -> None:
    with pytest.raises(OSError):
        retry(
            Failing(OSError()),
            on=OSError,
            policy=Retry(),
            deadline=Deadline(lambda: 0.1, must_not_sleep),
        )


@given(st.integers(1, 100_000), st.floats(0, 1), st.none() | st.floats(0, 1e9))
def test_a_wait_is_never_negative_nor_above_its_limit(
    failures: int, drawn: float, asked: float | None
) -> None:
    assert 0 <= Retry().wait_s(failures, asked, lambda: drawn) <= Retry().max_s
