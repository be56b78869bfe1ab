"""Where the assets of a document are, and what their files are called."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urlsplit

from ourvidz_serverless.client.outcome import Asset, Document
from ourvidz_serverless.client.services import Connection
from ourvidz_serverless.client.steps import Request, Steps, send
from ourvidz_serverless.net.retries import Retry

#: How long the download of one asset may take without a byte, in seconds.
DOWNLOAD_S = 60.0

#: A place for assets: a URL or a folder, to which the paths in documents are relative.
Place = str | Path | Connection


def source_of(asset: Asset, place: Place | None) -> bytes | Request:
    """An asset's bytes, or the request that gets them.

    Keys are sent to the worker's own HTTP service alone, never to another URL. Raises ValueError
    if the asset's `url` is a path and `place` is not known. OSError if a file cannot be read.
    """
    url = asset["url"]
    scheme = urlsplit(url).scheme
    if scheme == "data":
        return _embedded(url)
    if scheme in ("http", "https"):
        return Request("GET", url, timeout_s=DOWNLOAD_S)
    if scheme or place is None:
        raise ValueError(
            f"{url} is no URL that others can reach: give the client's `assets`, "
            "the URL or the folder that the worker's paths are relative to"
        )
    if isinstance(place, Connection):
        headers, secrets = place.headers, place.secrets
        path = f"{place.url}/assets/{quote(url)}"
        return Request("GET", path, headers, timeout_s=DOWNLOAD_S, secrets=secrets)
    if isinstance(place, str):
        return Request("GET", f"{place.rstrip('/')}/{quote(url)}", timeout_s=DOWNLOAD_S)
    return _inside(place, url).read_bytes()


def _embedded(url: str) -> bytes:
    """The bytes in a `data:` URI (RFC 2397)."""
    head, _, body = url.partition(",")
    data = unquote_to_bytes(body)
    return base64.b64decode(data) if head.endswith(";base64") else data


def fetching(request: Request) -> Steps[bytes]:
    """The body of a request, with tries."""
    return (yield from send(request, Retry(tries=4), lambda answer: answer.body))


def files_of(document: Document) -> Iterator[tuple[Asset, str]]:
    """Each asset with the name of its file: `0.png`, `1.png`. No server chooses the name."""
    for index, asset in enumerate(document["assets"]):
        ending = str(asset["metadata"].get("format", ""))
        known = ending if re.fullmatch(r"[a-z0-9]{1,8}", ending) else "bin"
        yield asset, f"{index}.{known}"


def write(folder: Path, name: str, data: bytes) -> Path:
    """Write a file, which appears with its whole content."""
    folder.mkdir(parents=True, exist_ok=True)
    path, unfinished = folder / name, folder / f".{name}.part"
    unfinished.write_bytes(data)
    return unfinished.replace(path)


def _inside(folder: Path, path: str) -> Path:
    found = (folder / path).resolve()
    if not found.is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder}")
    return found
