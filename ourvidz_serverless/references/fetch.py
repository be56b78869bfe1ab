"""Reference images: fetched without reaching where they should not, and decoded to plain pixels.

A reference is whatever the payload says, so it is hostile until shown otherwise. It may be

    https://host/path?query                     any public host, or one of `allowed_hosts`
    data:image/png;base64,...                   the picture itself
    <user>/<job>/0.png                          a key in storage, of the job's own user
    user-library/<user>/portrait.webp           the same, in one of `Policy.libraries`

and becomes an upright sRGB picture without alpha, profile or metadata, or a ReferenceFrameError.

An https request goes, in this order, through a grammar that knows one host and one target; a
look-up whose every answer must be a public address; a socket to that very address, with the
certificate checked for the name; and limits on bytes and on the time of the whole try. The
socket is our own, so no proxy, `.netrc` or second look-up can come between. A redirect starts
again at the grammar.

This module knows nothing of jobs; of storage it knows one callable.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import re
import socket
import ssl
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, cast
from urllib.parse import urljoin

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ourvidz_serverless import deadline as deadlines
from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.net.addresses import Address, is_listed, is_public, look_up, resolve
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.references.picture_files import PNG, Png, orientation, read_png

ReadObject = Callable[[str], bytes]
Once = Callable[[], bytes]

REDIRECTS = {301, 302, 303, 307, 308}
MAX_REDIRECTS = 3

#: A host with many addresses gets a few of them tried, none for long.
MAX_ADDRESSES = 4
CONNECT_S = 5.0

#: How soon a silent connection hears that the job was stopped.
POLL_S = 0.1

#: A JPEG has about ten scans, but may have thousands of a few bytes, each a pass over all pixels:
#: this many take some ten seconds. Scans are counted by their marker in the whole file; in the
#: film that some phones append it stands by chance, up to 300 times in 20 MB.
MAX_SCANNED_PIXELS = 8_000_000_000

MAX_URL_CHARS = 8192
MAX_KEY_CHARS = 512

#: The transposition that turns a picture upright, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: What `pad` fills with: the middle of a model's range, which asks for neither light nor dark.
GREY = (128, 128, 128)

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"

#: The whole of what is asked for comes from these two groups, so no other parser can differ. The
#: last label begins with a letter: no address in any spelling (0x7f.1, 2130706433) is a name.
#: ASCII, since without it IGNORECASE takes the Kelvin sign for a k.
_URL = re.compile(
    rf"https://(?P<host>(?![A-Za-z0-9_.-]{{254}})(?:{_LABEL}\.)+(?=[A-Za-z]){_LABEL})(?::443)?"
    r"(?P<target>[/?][!-~]*)?",
    re.IGNORECASE | re.ASCII,
)
_DATA = re.compile(r"data:image/[a-z.+-]{1,32};base64,", re.IGNORECASE | re.ASCII)
_SEGMENT = r"[A-Za-z0-9_-](?:[A-Za-z0-9_. -]*[A-Za-z0-9_-])?"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})+")


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


@dataclass(frozen=True, slots=True)
class Policy:
    """How far a reference may reach, and how large it may be."""

    allowed_hosts: frozenset[str] = frozenset()  # exact names; empty: any public host
    libraries: frozenset[str] = frozenset({"user-library"})  # first segments above a user's own
    max_bytes: int = 20_000_000  # of the encoded picture
    max_pixels: int = 64_000_000  # width times height: a phone's largest photograph
    max_aspect: float = 8.0  # the long side over the short one
    deadline_s: float = 20.0  # one try by the clock: look-up, redirects and drips included
    retry: Retry = field(default_factory=Retry)

    # The world outside. A test brings its own name server, port and authority.
    resolve: Callable[[str], Iterable[str]] = resolve
    is_public: Callable[[Address], bool] = is_public
    port: int = 443
    tls: ssl.SSLContext = field(default_factory=_tls, repr=False)


def fetch(
    reference: str,
    *,
    policy: Policy,
    user_id: str,
    read_object: ReadObject | None = None,
    deadline: Deadline = NEVER,
) -> Image.Image:
    """The picture that a reference names: upright, RGB in sRGB, nothing but pixels.

    `read_object` makes one try to read a key of storage; a transient Fault of it is tried again.
    The deadline is the job's. Raises ReferenceFrameError, whose message contains no path, query,
    address or secret.
    """

    def tried(once: Once) -> bytes:
        return retry(once, on=is_transient, policy=policy.retry, deadline=deadline)

    if reference[:5].lower() == "data:":
        data = _from_text(reference, policy)
    elif ":" in reference:
        data = _from_web(reference, policy, tried)
    else:
        data = _from_storage(reference, policy, user_id, read_object, tried)
    return decode(data, policy)


def download(url: str, *, policy: Policy, deadline: Deadline = NEVER) -> bytes:
    """What an https URL gives, as bytes, through the same gate and within the same limits.

    Raises ReferenceFrameError, like `fetch`.
    """
    return _from_web(
        url,
        policy,
        lambda once: retry(once, on=is_transient, policy=policy.retry, deadline=deadline),
    )


def fetch_all(
    references: Mapping[str, str],
    *,
    policy: Policy,
    user_id: str,
    read_object: ReadObject | None = None,
    deadline: Deadline = NEVER,
) -> dict[str, Image.Image | ReferenceFrameError]:
    """Fetch references side by side: role -> picture, or the error that it ended in.

    A reference that stands in two roles is fetched once.
    """

    def one(reference: str) -> Image.Image | ReferenceFrameError:
        try:
            return fetch(
                reference,
                policy=policy,
                user_id=user_id,
                read_object=read_object,
                deadline=deadline,
            )
        except ReferenceFrameError as exc:
            return exc

    if not references:
        return {}
    distinct = list(dict.fromkeys(references.values()))
    with ThreadPoolExecutor(min(len(distinct), 4), thread_name_prefix="reference") as pool:
        found = dict(zip(distinct, pool.map(one, distinct), strict=True))
    return {role: found[reference] for role, reference in references.items()}


def redact(reference: str) -> str:
    """A reference as a log may have it: `https://host/…`, the kind alone where the host is odd."""
    if reference[:5].lower() == "data:":
        return "data:…"
    if ":" not in reference:
        return "storage:…"
    match = _URL.fullmatch(reference) if "@" not in reference else None
    return f"https://{match['host'].lower()}/…" if match else "url:…"


def _refused(why: str) -> ReferenceFrameError:
    return ReferenceFrameError(f"reference: {why}")


class _NoAnswer(Fault):
    """A try that came to no answer, and why: as it may travel to the caller."""

    def __init__(self, why: str) -> None:
        super().__init__(None)
        self.args = (why,)


# --- from the text itself ---


def _from_text(reference: str, policy: Policy) -> bytes:
    prefix = _DATA.match(reference)
    if not prefix:
        raise _refused("the data URI is not data:image/...;base64,")
    if (len(reference) - prefix.end()) * 3 // 4 > policy.max_bytes + 2:
        raise _refused(f"more than {policy.max_bytes} bytes")
    try:
        data = base64.b64decode(reference[prefix.end() :], validate=True)
    except ValueError as exc:
        raise _refused("the data URI is not base64") from exc
    return _bounded(data, policy)


def _bounded(data: bytes, policy: Policy) -> bytes:
    if len(data) > policy.max_bytes:
        raise _refused(f"more than {policy.max_bytes} bytes")
    return data


# --- from storage ---


def _from_storage(
    key: str,
    policy: Policy,
    user_id: str,
    read_object: ReadObject | None,
    tried: Callable[[Once], bytes],
) -> bytes:
    check_key(key, user_id, policy.libraries)
    if read_object is None:
        raise _refused("no storage is configured for storage paths")
    try:
        data = tried(functools.partial(read_object, key))
    except Exception as exc:  # the caller's own callable, whose errors have no names here
        raise _refused("storage could not read the path") from exc
    return _bounded(data, policy)


def check_key(key: str, user_id: str, libraries: Collection[str]) -> None:
    """Raise ReferenceFrameError unless a storage key lies in the user's own folder.

    That is `<user>/...`, or `<library>/<user>/...` with one of `libraries` in front. Only a
    named library may stand there: with any folder, `<other user>/<user>/x.png` would pass. And
    a user who is called like a library owns nothing, or everyone's library would be theirs.
    """
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key):
        raise _refused("not an https URL, a data URI or a plain storage path")
    folders = key.split("/")[:-1]
    owner = folders[1:2] if folders[0] in libraries else folders[:1]
    if owner != [user_id] or user_id in libraries:
        raise _refused("the storage path is not in the user's own folder")


# --- from the web ---


def _from_web(url: str, policy: Policy, tried: Callable[[Once], bytes]) -> bytes:
    def once() -> bytes:
        return _try(url, policy, deadlines.current().within(policy.deadline_s))

    try:
        return tried(once)
    except Fault as exc:
        raise _refused(str(exc)) from exc


def _try(url: str, policy: Policy, deadline: Deadline) -> bytes:
    """One try, in which foreign errors get our names: a refusal, or worth another try."""
    try:
        return _get(url, policy, deadline)
    except ssl.SSLCertVerificationError as exc:
        raise _refused("the host's certificate does not hold") from exc
    except TimeoutError as exc:
        raise _NoAnswer("timed out") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise _NoAnswer("the connection failed") from exc


def _get(url: str, policy: Policy, deadline: Deadline) -> bytes:
    """A URL's body, redirects followed by hand: each one passes the same gate."""
    for _ in range(MAX_REDIRECTS + 1):
        host, target = _gate(url, policy)
        with _connect(host, _addresses(host, policy, deadline), policy, deadline) as sock:
            response = _ask(sock, host, target, deadline)
            location = response.getheader("Location")
            if response.status not in REDIRECTS or not location:
                return _body(response, policy)
        try:
            url = urljoin(url, location)
        except ValueError as exc:
            raise _refused("the redirect is not a URL") from exc
    raise _refused(f"more than {MAX_REDIRECTS} redirects")


def _gate(url: str, policy: Policy) -> tuple[str, str]:
    """Host and request target of a URL that may be asked for."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARS else None
    if not match or "\\" in url or "#" in url:
        raise _refused(
            "not a plain https URL (a host name, port 443, no user, no fragment, ASCII, "
            f"at most {MAX_URL_CHARS} characters)"
        )
    host, target = match["host"].lower(), match["target"] or "/"
    if policy.allowed_hosts and not is_listed(host, policy.allowed_hosts):
        raise _refused("the host is not on the allow-list")
    return host, target if target.startswith("/") else f"/{target}"


def _addresses(host: str, policy: Policy, deadline: Deadline) -> list[Address]:
    """A host's addresses, each of them public: one that is not condemns them all."""
    try:
        addresses = look_up(host, deadline, policy.resolve)
    except ValueError as exc:
        raise _refused("the host's address is not public") from exc
    except socket.gaierror as exc:
        raise _NoAnswer("the host has no address") from exc
    if not addresses:
        raise _NoAnswer("the host has no address")
    if not all(policy.is_public(address) for address in addresses):
        raise _refused("the host's address is not public")
    return addresses


def _connect(
    host: str, addresses: list[Address], policy: Policy, deadline: Deadline
) -> ssl.SSLSocket:
    """A connection to the first address that takes one, its certificate checked for `host`."""
    failure: OSError = ConnectionError()
    for address in addresses[:MAX_ADDRESSES]:
        try:
            # The text of a parsed address: nothing is looked up again.
            raw = socket.create_connection(
                (str(address), policy.port), timeout=deadline.timeout_s(CONNECT_S)
            )
        except OSError as exc:
            failure = exc
            continue
        try:
            raw.settimeout(deadline.timeout_s())
            return policy.tls.wrap_socket(raw, server_hostname=host)
        except OSError:
            raw.close()
            raise
    raise failure


class _Timed(io.RawIOBase):
    """What comes in on a socket, as long as the try has time left.

    A socket's own timeout begins anew at every byte, so it never ends a slow drip.
    """

    def __init__(self, sock: ssl.SSLSocket, deadline: Deadline) -> None:
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            self._sock.settimeout(self._deadline.timeout_s(POLL_S))
            with suppress(TimeoutError):
                return self._sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse wants of a socket."""
        return io.BufferedReader(self)


def _ask(
    sock: ssl.SSLSocket, host: str, target: str, deadline: Deadline
) -> http.client.HTTPResponse:
    """Send the request, and read the head of the answer."""
    sock.settimeout(deadline.timeout_s())
    sock.sendall(
        f"GET {target} HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        "Accept: image/png, image/jpeg, image/webp\r\n"
        "Accept-Encoding: identity\r\n"
        "User-Agent: ourvidz-serverless\r\n"
        "Connection: close\r\n\r\n".encode("ascii")
    )
    response = http.client.HTTPResponse(cast(socket.socket, _Timed(sock, deadline)), method="GET")
    response.begin()
    return response


def _body(response: http.client.HTTPResponse, policy: Policy) -> bytes:
    """The body of an answer that is the picture; raises for any that is not."""
    if response.status != HTTPStatus.OK:
        raise Fault(response.status, response.getheader("Retry-After"))
    if (response.getheader("Content-Encoding") or "identity").lower() != "identity":
        raise _refused("the host compressed the picture")
    if (response.length or 0) > policy.max_bytes:
        raise _refused(f"more than {policy.max_bytes} bytes")
    return _read(response, policy)


def _read(response: http.client.HTTPResponse, policy: Policy) -> bytes:
    data = bytearray()
    # `read1`, since `read` takes a chunk of size -1 for leave to read without end.
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > policy.max_bytes:
            raise _refused(f"more than {policy.max_bytes} bytes")
    if response.length:  # what was promised and did not come
        raise _NoAnswer("the connection failed")
    return bytes(data)


# --- from bytes to pixels ---


def decode(data: bytes, policy: Policy) -> Image.Image:
    """The picture in a PNG, JPEG or WebP file: upright, RGB in sRGB, nothing but pixels.

    Raises ReferenceFrameError for what is none of the three, too large, too long and thin,
    animated or damaged.
    """
    png = read_png(data) if data.startswith(PNG) else None
    try:
        image = Image.open(io.BytesIO(png.file if png else data), formats=("PNG", "JPEG", "WEBP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise _refused(f"more than {policy.max_pixels} pixels") from exc
    except Exception as exc:  # whatever a malformed byte leads a decoder to
        raise _refused("not a PNG, JPEG or WebP image") from exc
    _check_shape(image, policy)
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
    if image.width * image.height * scans > MAX_SCANNED_PIXELS:
        raise _refused("the image has too many scans")
    try:
        return _plain(image, png)
    except Exception as exc:  # as above
        raise _refused("the image is damaged") from exc


def _check_shape(image: Image.Image, policy: Policy) -> None:
    """Refuse by the header alone, before any pixel is decoded."""
    if image.width * image.height > policy.max_pixels:
        raise _refused(f"more than {policy.max_pixels} pixels")
    if max(image.size) > policy.max_aspect * min(image.size):
        raise _refused(f"one side is more than {policy.max_aspect:g} times the other")
    # A JPEG's further frames are a phone's depth and gain maps: its first one is the picture.
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise _refused("the image is animated")


def _plain(image: Image.Image, png: Png | None) -> Image.Image:
    """The picture over white, in sRGB, upright. XMP's orientation is ignored."""
    profile = png.profile if png else image.info.get("icc_profile")
    exif = png.exif if png else image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    image.load()
    alpha = _opaque(image, png) if png and png.key else None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    # A new picture, so that nothing of the file but its pixels goes on.
    plain = Image.new("RGB", image.size, "white")
    plain.paste(_srgb(image, profile), mask=alpha)
    turn = TURNS.get(orientation(exif))
    return plain if turn is None else plain.transpose(turn)


def _opaque(image: Image.Image, png: Png) -> Image.Image:
    """A mask: 0 where a PNG has its transparent colour, 255 elsewhere."""
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    key = np.array(png.key)
    if png.depth < 8:
        key = key * 255 // (2**png.depth - 1)  # as Pillow spreads the samples
    elif png.depth == 16 and image.mode == "RGB":
        samples = samples.astype(np.uint16) << 8 | _low_bytes(png)
    is_key = (samples.reshape(image.height, image.width, -1) == key).all(axis=-1)
    return Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))


def _low_bytes(png: Png) -> np.ndarray:
    """The low bytes of 16-bit RGB; Pillow itself keeps only the high ones."""
    image = Image.open(io.BytesIO(png.file), formats=("PNG",))
    # Read with the other byte order, the low byte is the high one.
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return np.asarray(image)


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours of a picture as its profile means them, without its alpha."""
    if image.mode == "I;16":
        image = image.point(lambda grey: grey * (1 / 256)).convert("L")  # `convert` alone clips
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB")
    try:
        return cast(
            Image.Image,
            ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            ),
        )
    except (ImageCms.PyCMSError, OSError):
        # Broken, or for another kind of pixels: browsers show such a picture as sRGB.
        return image.convert("RGB")


# --- to the size of a model ---


def fit(
    image: Image.Image,
    width: int,
    height: int,
    mode: Literal["crop", "pad", "stretch"],
    background: tuple[int, int, int] = GREY,
) -> Image.Image:
    """An image at exactly `width` x `height` pixels.

    `crop` keeps the centre that fills the frame, `pad` the whole image on `background`, `stretch`
    the whole image without its proportions.
    """
    size = (width, height)
    if mode == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    if mode == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    padded = Image.new("RGB", size, background)
    corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
    padded.paste(image.resize(inner, Image.Resampling.LANCZOS), corner)
    return padded
