"""What a setting such as `SDXL_MODEL` names, if it is no path: a repository of the Hub, or a URL.

stabilityai/stable-diffusion-xl-base-1.0    a repository
Qwen/Qwen2.5-7B-Instruct@a09a35458c70...    a revision of one
h94/IP-Adapter/sdxl_models/x.safetensors    a file in one
https://example.com/x.safetensors#sha256=0123...    a URL, with the file's hash if it is known
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ourvidz_serverless.net.signed_urls import unsigned

_SHA256 = re.compile(r"sha256=([0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, or a file or folder in one. `revision` and `inside` may be empty."""

    repository: str
    revision: str = ""
    inside: str = ""

    @property
    def cache(self) -> str:
        """The name of the repository's folder in a cache of the Hub's layout."""
        return f"models--{self.repository.replace('/', '--')}"

    @property
    def is_file(self) -> bool:
        return self.inside.endswith(".safetensors")

    def __str__(self) -> str:
        inside = f"/{self.inside}" if self.inside else ""
        return self.repository + (f"@{self.revision}" if self.revision else "") + inside


@dataclass(frozen=True, slots=True)
class UrlName:
    """A checkpoint in one file, by its URL. `sha256` is in lower case, or empty."""

    url: str
    sha256: str = ""

    @property
    def file(self) -> str:
        """A file name without anything but the last part of the URL's path."""
        stem = unquote(urlsplit(self.url).path).rpartition("/")[2].removesuffix(".safetensors")
        return f"{re.sub(r'[^A-Za-z0-9._-]', '_', stem).lstrip('.') or 'checkpoint'}.safetensors"

    @property
    def place(self) -> Path:
        """Where the file lies in a folder of weights: a place for each source and hash.

        Signed URLs of one file have the same place.
        """
        parts = urlsplit(self.url)
        source = [parts.hostname, parts.port, parts.path, unsigned(parts.query)[0], self.sha256]
        digest = hashlib.sha256(json.dumps(source).encode()).hexdigest()
        return Path("urls") / digest[:16] / self.file

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    def __str__(self) -> str:
        """The URL without its user, password, query and fragment, which may be secrets."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def parse(name: str | Path) -> HubName | UrlName | None:
    """What a name may mean beside a path; None for an absolute path or a single file's name."""
    text = str(name)
    if "://" in text:
        url, _, fragment = text.partition("#")
        match = _SHA256.fullmatch(fragment)
        return UrlName(url, match[1].lower() if match else "")
    path = Path(text)
    if path.is_absolute() or len(path.parts) < 2:
        return None
    organisation, repository, *inside = path.parts
    repository, _, revision = repository.partition("@")
    return HubName(f"{organisation}/{repository}", revision, "/".join(inside))


def short(name: str | Path) -> str:
    """The last part of a name, for people: no folders, and nothing secret of a URL."""
    found = parse(name)
    return found.file if isinstance(found, UrlName) else Path(name).name


def public(name: str | Path) -> str:
    """A name without the secrets of a URL."""
    found = parse(name)
    return str(found) if isinstance(found, UrlName) else str(name)
