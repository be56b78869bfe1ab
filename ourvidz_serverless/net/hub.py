"""Downloads from the Hugging Face Hub, and of a file by its URL, with the Hub's own client.

`huggingface_hub` has the layout of the cache, Xet, and the resumption of a broken connection:
https://huggingface.co/docs/huggingface_hub/guides/download. A download that was interrupted keeps
its complete files, and begins the others anew, since the client gives each process partial files
of its own. Files appear under their names when they are complete, so that a process never reads a
part of one.

The build of an image uses this module without most of the package: see the Dockerfile.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name

from ourvidz_serverless.net.retries import TRANSIENT, Retry, is_transient, retry

T = TypeVar("T")

#: A storage that is down for a while, or refuses too many requests at once.
RETRY = Retry(tries=4, base_s=2.0, max_s=30.0)

#: Files that are downloaded at once.
WORKERS = 4

#: The age in seconds of a partial file whose process has ended: a running one writes to it.
STALE_S = 600.0

#: No space on the disk, or in the quota of a volume.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

#: What a library writes for these two errors if it does not raise OSError, as Xet's does.
_NO_SPACE_TEXTS = tuple(os.strerror(number).lower() for number in NO_SPACE)


class FetchError(Exception):
    """Weights cannot be downloaded. The message has no URL with a query, no token and no path."""

    def __init__(self, why: str, *, is_transient: bool = False) -> None:
        super().__init__(why)
        self.is_transient = is_transient


#: Receives the bytes and the files that have arrived so far.
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: its bytes, and `sha256:...`, or `git:...` for a small one."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit, by name."""

    repository: str
    commit: str
    files: Mapping[str, HubFile]

    def cache(self, folder: Path) -> Path:
        """The repository's own folder in a cache of the Hub's layout."""
        return folder / repo_folder_name(repo_id=self.repository, repo_type="model")

    def snapshot(self, folder: Path) -> Path:
        return self.cache(folder) / "snapshots" / self.commit

    def missing_bytes(self, names: Iterable[str], folder: Path) -> int:
        """The bytes of the files that are not in the snapshot yet."""
        absent = [name for name in names if not (self.snapshot(folder) / name).exists()]
        return sum(self.files[name].size for name in absent)


@contextmanager
def online() -> Iterator[None]:
    """Let the Hub's client use the network for a while.

    The images set `HF_HUB_OFFLINE`, so that no library asks the Hub when a model is loaded. The
    client reads that variable when it is imported. Log lines of the client, and of the library for
    HTTP below it, name signed URLs, and are off.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx2")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def list_files(repository: str, revision: str | None, token: str | None = None) -> Listing:
    """The files of a repository at a commit, a branch or a tag, by default `main`.

    Raises FetchError.
    """

    def ask() -> Listing:
        with _explained(repository, revision):
            api = HfApi(endpoint=_endpoint(), token=token)
            info = api.model_info(repository, revision=revision, files_metadata=True)
            files = {each.rfilename: _file(each) for each in info.siblings or ()}
            return Listing(repository, info.sha or "", files)

    return _tried_again(ask)


def _file(sibling: Any) -> HubFile:
    kind, digest = ("sha256", sibling.lfs.sha256) if sibling.lfs else ("git", sibling.blob_id)
    return HubFile(sibling.size or 0, f"{kind}:{digest}")


def fetch_files(
    listing: Listing,
    names: Iterable[str],
    folder: Path,
    token: str | None = None,
    report: Report | None = None,
) -> Path:
    """Bring files of a repository into a cache of the Hub's layout. The value is their snapshot.

    Files that are there are not fetched again. Without `report` the client shows its own bars.
    Raises FetchError.
    """
    names = list(names)
    folder.mkdir(parents=True, exist_ok=True)
    check_space(listing.missing_bytes(names, folder), folder)

    def fetch() -> Path:
        with _explained(listing.repository, listing.commit):
            return Path(
                snapshot_download(
                    listing.repository,
                    revision=listing.commit,
                    cache_dir=folder,
                    allow_patterns=[_literal(name) for name in names],
                    max_workers=WORKERS,
                    endpoint=_endpoint(),
                    token=token,
                    tqdm_class=_reporting(report) if report else None,
                )
            )

    return _tried_again(fetch)


def fetch_url(
    url: str,
    path: Path,
    sha256: str | None = None,
    token: str | None = None,
    report: Report | None = None,
) -> str:
    """Download a URL to a path. The value is the file's SHA-256: `sha256`, if that is given.

    A token goes to the URL's own origin alone: the client drops it if it is redirected elsewhere.
    Raises FetchError, and leaves nothing then.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.incomplete")

    def fetch() -> None:
        with _explained(path.name, None), partial.open("wb") as file:
            http_get(url, file, headers=headers, tqdm_class=_reporting(report) if report else None)

    try:
        _tried_again(fetch)
        found = sha256_of(partial)
        if sha256 and found != sha256:
            raise FetchError(
                f"{path.name}: sha256 is {found[:12]}..., and should be {sha256[:12]}..."
            )
        os.replace(partial, path)
        return found
    finally:
        partial.unlink(missing_ok=True)


def check_space(size: int, folder: Path) -> None:
    """Raise FetchError if a folder's disk has not so many bytes. A volume's quota is not known."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise FetchError(f"{size / 1e9:.1f} GB are missing, and {free / 1e9:.1f} GB are free")


def remove_stale(folder: Path) -> None:
    """Delete the partial files below a folder that a killed process has left there."""
    for path in folder.rglob("*.incomplete"):
        # Another process may end its download meanwhile.
        try:
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
        except FileNotFoundError:
            continue


def sha256_of(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _endpoint() -> str | None:
    """`HF_ENDPOINT`, which the client itself reads only once; None for the Hub."""
    return os.environ.get("HF_ENDPOINT") or None


def _literal(name: str) -> str:
    """A pattern that matches one name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _tried_again(call: Callable[[], T]) -> T:
    return retry(call, on=is_transient, policy=RETRY)


@contextmanager
def _explained(what: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of a download into a FetchError that a deployer understands."""
    try:
        yield
    except FetchError:
        raise
    except Exception as exc:
        raise _explanation(exc, what, revision) from exc


def _explanation(error: Exception, what: str, revision: str | None) -> FetchError:
    if isinstance(error, GatedRepoError):
        return FetchError(f"{what} is gated: accept its terms on the Hub, and set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return FetchError(f"the Hub has no {what}, or HF_TOKEN may not read it")
    if isinstance(error, RevisionNotFoundError):
        return FetchError(f"{what} has no revision {revision}")
    if isinstance(error, HFValidationError):
        return FetchError(f"{what} cannot be the name of a repository")
    return _other_explanation(error, what)


def _other_explanation(error: Exception, what: str) -> FetchError:
    causes = [error, *_causes(error)]
    answers = [each.response.status_code for each in causes if isinstance(each, HfHubHTTPError)]
    if answers:
        return FetchError(f"{what}: HTTP {answers[0]}", is_transient=_is_passing(answers[0]))
    if any(isinstance(each, OSError) and each.errno in NO_SPACE for each in causes):
        return FetchError(f"{what}: no space is left for it")
    if any(text in str(error).lower() for text in _NO_SPACE_TEXTS):
        return FetchError(f"{what}: no space is left for it")
    if any(isinstance(each, PermissionError) for each in causes):
        return FetchError(f"{what}: its folder cannot be written")
    # The innermost cause names what happened to the connection.
    names = [type(each).__name__ for each in causes if isinstance(each, httpx2.HTTPError)]
    if names:
        return FetchError(f"{what}: its host does not answer ({names[-1]})", is_transient=True)
    return FetchError(f"{what}: the download failed ({type(error).__name__})", is_transient=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    while cause := error.__cause__:
        yield cause
        error = cause


def _is_passing(status: int) -> bool:
    return status in TRANSIENT or status >= 500


def _reporting(report: Report) -> type:
    """A class of progress bars that draw nothing, and report bytes and files together.

    `snapshot_download` makes one bar of files, and two of bytes: received, and written. Xet
    receives fewer than it writes. The client asks of a bar what tqdm's have.
    """
    bars: list[Bar] = []
    lock = threading.Lock()

    class Bar:
        format_dict: ClassVar[Mapping[str, float | None]] = {"rate": None}

        def __init__(
            self, *_: Any, total: float | None = None, initial: float = 0, unit: str = "", **__: Any
        ) -> None:
            self.total, self.n, self.unit = total, initial, unit
            bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                received = [bar.n for bar in bars if bar.unit == "B"]
                files = [bar.n for bar in bars if bar.unit != "B"]
                report(int(max(received, default=0)), int(max(files, default=0)))

        def refresh(self, *_: Any, **__: Any) -> None:
            """Nothing is drawn."""

        set_description = set_description_str = set_postfix_str = close = refresh

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    return Bar
