"""Download a family's weights from the hub, verified, to a folder of `MODEL_DIRS`.

    python -m builder.fetch_models --family sdxl --dest models
    python -m builder.fetch_models --family sdxl --dest models --optional     IP-Adapter too
    python -m builder.fetch_models --family sdxl --dest models \\
        --url https://example.com/checkpoint.safetensors --sha256 31e35c80...

`builder/models.json` says which files of which repositories, at which revision, and their SHA-256
where it is known. A revision or SHA-256 of null is recorded in `builder/models.lock.json` at first
use, and must be the same from then on: commit that file. After an interruption the command
continues where it stopped. Run again, it verifies the files that are there. It uses `HF_TOKEN` and
`HF_ENDPOINT`.

With `--url` a single-file checkpoint replaces the family's own weights. Of the family only the
configurations and tokenizers are fetched, for `SDXL_CONFIG`. The URL with its query is the file's
source, the key of its row in `builder/models.lock.json`. `--name` names the file if the URL's path
does not. If a file of that name is there, and may come from another source, the command ends with
an error: it neither uses nor replaces that file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

import requests
from huggingface_hub import get_token
from tqdm import tqdm

from ourvidz_serverless.net.signed_urls import unsigned

MANIFEST = Path(__file__).with_name("models.json")
LOCK = Path(__file__).with_name("models.lock.json")

CHUNK = 1 << 20
TIMEOUT_S = (10, 60)
TRIES = 6

#: The weights among the files of a repository.
WEIGHTS = "*.safetensors"

#: Parameters of a URL that select a file: the lock file holds their values. For any other parameter
#: it holds a digest, since the value may be a secret.
PUBLIC = (
    *("type", "format", "size", "fp", "download", "name", "file", "filename", "path", "id"),
    *("version", "revision", "ref", "raw", "dl"),
)


class FetchError(Exception):
    """Weights cannot be downloaded, or are not the expected ones."""


class Damaged(FetchError):
    """A file is complete, but has another digest than expected."""


@dataclass(frozen=True, slots=True)
class File:
    """One file to fetch. `digest` is `sha256:...`, or `git:...` for a blob of git's, or None.

    `source` is the part of the URL that is the same in every download.
    """

    url: str
    path: Path
    name: str
    size: int | None
    digest: str | None
    source: str
    token: str | None = None

    @property
    def partial(self) -> Path:
        """The path of the partial download. Each source has its own."""
        source = hashlib.sha256(self.source.encode()).hexdigest()
        return self.path.with_name(f"{self.path.name}.{source[:16]}.incomplete")

    @property
    def etag(self) -> Path:
        """The path of the strong ETag under which the partial file's bytes were sent."""
        return self.partial.with_suffix(".etag")


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    manifest = json.loads(args.manifest.read_text())
    lock = json.loads(args.lock.read_text()) if args.lock.exists() else {}
    try:
        for repository, entry in _chosen(manifest, args.family, args.optional).items():
            print(f"{repository}: licence {entry['license']}", flush=True)
            patterns = {
                pattern: digest
                for pattern, digest in entry["files"].items()
                if not (args.url and fnmatchcase(pattern, WEIGHTS))
            }
            lock[repository] = fetch_repository(
                repository, entry["revision"], patterns, lock.get(repository, {}), args
            )
        if args.url:
            source = source_of(args.url)
            lock[source] = fetch_url(source, lock, args)
    except (FetchError, requests.RequestException, OSError) as exc:
        sys.exit(f"cannot fetch: {exc}")
    args.lock.write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", required=True, help="one of the manifest's")
    parser.add_argument("--dest", type=Path, required=True, help="a folder of MODEL_DIRS")
    parser.add_argument("--optional", action="store_true", help="and what no setting names unasked")
    parser.add_argument("--url", help="a single-file checkpoint instead of the family's weights")
    parser.add_argument("--sha256", type=_sha256, help="of that checkpoint")
    parser.add_argument("--name", help="of that checkpoint's file, if not the URL's last part")
    parser.add_argument("--jobs", type=int, default=4, help="downloads at once")
    parser.add_argument("--manifest", type=Path, default=MANIFEST)
    parser.add_argument("--lock", type=Path, default=LOCK)
    return parser.parse_args(argv)


def _sha256(text: str) -> str:
    """A hash in lower case. Raises ArgumentTypeError for any other text."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError("64 hexadecimal digits were expected")
    return text.lower()


def _chosen(manifest: Mapping[str, Any], family: str, optional: bool) -> dict[str, Any]:
    known = sorted({entry["family"] for entry in manifest.values()})
    if family not in known:
        raise FetchError(f"--family: one of {', '.join(known)} was expected")
    return {
        repository: entry
        for repository, entry in manifest.items()
        if entry["family"] == family and (optional or not entry.get("optional"))
    }


def fetch_repository(
    repository: str,
    revision: str | None,
    patterns: Mapping[str, str | None],
    locked: Mapping[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Download a repository. The value is its entry in the lock file: revision and SHA-256s.

    The folders are those of the hub's cache, but without links, which not every volume supports.
    """
    # A lock of another revision than the manifest's is ignored.
    if revision and locked.get("revision") != revision:
        locked = {}
    info = _ask(repository, revision or locked.get("revision"))
    sha, siblings = info["sha"], info["siblings"]
    known = locked.get("files", {})
    cache = args.dest / f"models--{repository.replace('/', '--')}"
    files = [
        File(
            url=f"{_hub()}/{repository}/resolve/{sha}/{quote(sibling['rfilename'])}",
            path=cache / "snapshots" / sha / sibling["rfilename"],
            name=sibling["rfilename"],
            size=sibling.get("size"),
            digest=_digest_of(sibling, digest or known.get(sibling["rfilename"])),
            source=f"{repository}@{sha}/{sibling['rfilename']}",
            token=get_token(),
        )
        for sibling, digest in _matching(repository, siblings, patterns)
    ]
    digests = fetch_all(files, args.jobs)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(sha)
    return {"revision": sha, "files": {**known, **digests}}


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _ask(repository: str, revision: str | None) -> Any:
    """What the hub knows of a repository: the revision's hash, and its files with their digests.

    This is not `huggingface_hub.HfApi`, which is offline in the images: they set `HF_HUB_OFFLINE`.
    """
    url = f"{_hub()}/api/models/{repository}"
    if revision:
        url += f"/revision/{quote(revision, safe='')}"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = requests.get(url, {"blobs": "true"}, headers=headers, timeout=TIMEOUT_S)
    if answer.status_code in (401, 403):
        raise FetchError(f"{repository} asks for a token that may read it: HF_TOKEN")
    if not answer.ok:
        raise FetchError(f"{repository}: HTTP {answer.status_code}")
    return answer.json()


def _matching(
    repository: str, siblings: Sequence[Any], patterns: Mapping[str, str | None]
) -> Iterator[tuple[Any, str | None]]:
    """A repository's files that match a pattern, each with its SHA-256 if it is known."""
    for pattern, digest in patterns.items():
        found = [each for each in siblings if fnmatchcase(each["rfilename"], pattern)]
        if not found:
            raise FetchError(f"{repository} has no {pattern}")
        yield from ((each, digest) for each in found)


def _digest_of(sibling: Any, sha256: str | None) -> str:
    """The digest that a file must have: the known SHA-256, else the hub's."""
    if sha256 or sibling.get("lfs"):
        return f"sha256:{sha256 or sibling['lfs']['sha256']}"
    return f"git:{sibling['blobId']}"


def source_of(url: str) -> str:
    """A URL for the lock file: without credentials, signatures and other secrets.

    Two URLs of one file that differ only in their signatures have the same source.
    """
    parts = urlsplit(url)
    kept, _ = unsigned(parts.query)
    query = urlencode([(name, _public(name, value)) for name, value in kept])
    host = parts.netloc.rpartition("@")[2].lower()
    return f"{parts.scheme.lower()}://{host}{parts.path}{'?' if query else ''}{query}"


def _public(name: str, value: str) -> str:
    if name.lower() in PUBLIC:
        return value
    return f"sha256-{hashlib.sha256(value.encode()).hexdigest()[:16]}"


def fetch_url(source: str, lock: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Download a checkpoint. The value is its entry in the lock file: its SHA-256 by name."""
    name = args.name or unquote(urlsplit(args.url).path).rpartition("/")[2]
    if not name or name != Path(name).name:
        raise FetchError("--name: the URL's path does not end with a file's name, so give one")
    names = lock.get(source, {}).get("files", {})
    # A source has the same file under each of its names.
    known = args.sha256 or next(iter(names.values()), None)
    digest = f"sha256:{known}" if known else None
    file = File(args.url, args.dest / name, name, None, digest, source)
    if file.path.exists():
        _check_owner(file, lock)
    fetched = fetch_all([file], args.jobs)
    return {"files": {**dict.fromkeys(names, fetched[name]), **fetched}}


def _check_owner(file: File, lock: Mapping[str, Any]) -> None:
    """Raise FetchError if the existing file may belong to another source."""
    if not file.digest:
        raise FetchError(
            f"{file.name} is there already, and may not be this URL's file: "
            "give its --sha256, or another --name or --dest"
        )
    found = _sha256_of(file.path)
    named = {
        source: entry["files"][file.name]
        for source, entry in lock.items()
        if file.name in entry.get("files", {})
    }
    owners = [source for source, sha256 in named.items() if sha256 == found]
    # A hash that no source has may be this source's file, damaged, if it has had this name.
    is_own = file.source in (owners or named)
    if file.digest != f"sha256:{found}" and not is_own:
        raise FetchError(
            f"{file.name} is there already, and it is another file (sha256 {found[:12]}...): "
            "give another --name or --dest, or remove it"
        )


def fetch_all(files: Sequence[File], jobs: int) -> dict[str, str]:
    """Download and verify all files. The value is the SHA-256 of each, by name.

    Raises FetchError for the first one that fails. Partial downloads of the others stay.
    """
    for file in files:
        file.path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(files)
    total = sum(file.size or 0 for file in files)
    stop = threading.Event()
    with (
        tqdm(total=total or None, unit="B", unit_scale=True, desc="fetch") as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        try:
            return dict(pool.map(lambda file: (file.name, _fetch(file, bar, stop)), files))
        except BaseException:
            stop.set()
            raise


def _check_space(files: Sequence[File]) -> None:
    missing = sum((file.size or 0) - _size(file.partial) for file in files if not _size(file.path))
    free = shutil.disk_usage(files[0].path.parent).free
    if missing > free:
        raise FetchError(f"{missing / 1e9:.1f} GB are missing, and {free / 1e9:.1f} GB are free")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(file: File, bar: Any, stop: threading.Event) -> str:
    """The SHA-256 of a file that was there already, or is downloaded now. It is verified."""
    if file.path.exists():
        with suppress(Damaged):
            sha256 = _verified(file, file.path)
            bar.update(_size(file.path))
            return sha256
    unit = float(os.environ.get("FETCH_RETRY_S", "1"))
    for attempt in range(1, TRIES + 1):
        try:
            _download(file, bar, stop)
            sha256 = _verified(file, file.partial)
            break
        except (requests.RequestException, Damaged) as exc:
            if not file.partial.exists():
                file.etag.unlink(missing_ok=True)
            # A file with a wrong digest twice is another file. It was not damaged on the way.
            tries = 2 if isinstance(exc, Damaged) else TRIES
            if attempt >= tries or not _is_passing(exc):
                raise FetchError(f"{file.name}: {_why(exc)}") from exc
            tqdm.write(f"{file.name}: {_why(exc)}; once more", file=sys.stderr)
            stop.wait(min(2**attempt, 30) * unit)
    os.replace(file.partial, file.path)
    file.etag.unlink(missing_ok=True)
    return sha256


def _is_passing(exc: Exception) -> bool:
    """Whether the next try may succeed."""
    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return exc.response.status_code in (408, 416, 425, 429) or exc.response.status_code >= 500
    return True


def _why(exc: Exception) -> str:
    """A failure in a few words, without the query of a URL, which may be signed."""
    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"HTTP {exc.response.status_code}"
    return str(exc) if isinstance(exc, FetchError) else type(exc).__name__


def _download(file: File, bar: Any, stop: threading.Event) -> None:
    """Append the missing rest to a partial file, or fetch the file from the start.

    The rest is only appended if it must be of the same file: the hash of the whole is known, or the
    request depends on the ETag.
    """
    start, etag = _size(file.partial), _read(file.etag)
    if file.size is not None and start == file.size:
        bar.update(start)
        return
    if not (file.digest or etag):
        start = 0
    headers = _headers(file, start, etag)
    with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == 416:
            file.partial.unlink()
        answer.raise_for_status()
        continues = answer.status_code == 206
        if continues and not _continues(answer, start, etag):
            file.partial.unlink()
            raise Damaged("the rest is another file's, or begins elsewhere")
        with file.partial.open("ab" if continues else "wb") as out:
            if not continues:
                # Not before the old bytes are deleted.
                _note_etag(file, answer.headers.get("ETag", ""))
            for chunk in answer.iter_content(CHUNK):
                if stop.is_set():
                    raise FetchError(f"{file.name}: stopped")
                out.write(chunk)
                bar.update(len(chunk))


def _headers(file: File, start: int, etag: str) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if etag:
            headers["If-Range"] = etag
    if file.token:
        # `requests` does not send it to the storage host that the hub redirects to.
        headers["Authorization"] = f"Bearer {file.token}"
    return headers


def _continues(answer: requests.Response, start: int, etag: str) -> bool:
    """Whether a partial response continues the existing bytes, by its headers."""
    is_same = not etag or answer.headers.get("ETag", etag) == etag
    return is_same and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _note_etag(file: File, etag: str) -> None:
    """Keep a strong ETag. Files with different bytes may share a weak one (`W/"..."`)."""
    if etag.startswith('"'):
        file.etag.write_text(etag)
    else:
        file.etag.unlink(missing_ok=True)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _verified(file: File, path: Path) -> str:
    """The SHA-256 of a file. If it is wrong, the file is removed and Damaged is raised."""
    sha256 = _sha256_of(path)
    kind, _, wanted = (file.digest or "").partition(":")
    found = {"": "", "sha256": sha256, "git": _git_blob(path) if kind == "git" else ""}[kind]
    if found != wanted:
        path.unlink()
        raise Damaged(f"{kind} is {found[:12]}..., and should be {wanted[:12]}...")
    return sha256


def _sha256_of(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _git_blob(path: Path) -> str:
    """Git's hash of a file's content. The hub gives it for small files."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


if __name__ == "__main__":
    main()
