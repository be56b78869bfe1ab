"""Fetch a family's weights from the hub, verified, into a folder that workers find them in.

    python -m builder.fetch_models --family sdxl --dest models
    python -m builder.fetch_models --family sdxl --dest models --optional     IP-Adapter too
    python -m builder.fetch_models --family sdxl --dest models \\
        --url https://example.com/checkpoint.safetensors --sha256 31e35c80...

`builder/models.json` says which files of which repositories, at which revision, and their SHA-256
where it is known. What it leaves open (null) is recorded in `builder/models.lock.json` on first
use, and must be the same from then on: commit that file. Interrupted, the command goes on where
it stopped; run again, it verifies what is there. `HF_TOKEN` is honoured, and so is `HF_ENDPOINT`.

With `--url` a single-file checkpoint takes the place of the family's own weights; of those only
the configurations and tokenizers come with it, for `SDXL_CONFIG`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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
from urllib.parse import unquote, urlsplit

import requests
from tqdm import tqdm

# The images say that there is no hub; here there is one. Read when the library is imported.
os.environ["HF_HUB_OFFLINE"] = "0"

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

MANIFEST = Path(__file__).with_name("models.json")
LOCK = Path(__file__).with_name("models.lock.json")

CHUNK = 1 << 20
TIMEOUT_S = (10, 60)
TRIES = 6

#: The wait before a second try is twice this; each is twice the last.
RETRY_S = float(os.environ.get("FETCH_RETRY_S", "1"))

#: What a folder may need beside its weights.
WEIGHTS = "*.safetensors"


class FetchError(Exception):
    """Weights could not be fetched, or are not what they should be."""


class Damaged(FetchError):
    """A file arrived whole and is not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class File:
    """One file to fetch. `digest` is `sha256:...`, or `git:...` for a blob of git's, or None."""

    url: str
    path: Path
    name: str
    size: int | None
    digest: str | None
    token: str | None = None


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
            # Without its query, which may be a signature.
            plain = args.url.partition("?")[0]
            lock[plain] = fetch_url(args.url, args.sha256, lock.get(plain, {}), args)
    except (FetchError, requests.RequestException, HfHubHTTPError, OSError) as exc:
        sys.exit(f"cannot fetch: {exc}")
    args.lock.write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", required=True, choices=("sdxl", "chat", "wan"))
    parser.add_argument("--dest", type=Path, required=True, help="a folder of MODEL_DIRS")
    parser.add_argument("--optional", action="store_true", help="and what no setting names unasked")
    parser.add_argument("--url", help="a single-file checkpoint instead of the family's weights")
    parser.add_argument("--sha256", help="of that checkpoint")
    parser.add_argument("--jobs", type=int, default=4, help="downloads at once")
    parser.add_argument("--manifest", type=Path, default=MANIFEST)
    parser.add_argument("--lock", type=Path, default=LOCK)
    return parser.parse_args(argv)


def _chosen(manifest: Mapping[str, Any], family: str, optional: bool) -> dict[str, Any]:
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
    """What the lock file says of a repository once its files are there: revision and SHA-256s.

    The files lie as in the hub's cache, but as files, since not every volume has links.
    """
    # A lock of another revision than the manifest's is a lock of nothing.
    if revision and locked.get("revision") != revision:
        locked = {}
    info = _ask(repository, revision or locked.get("revision"))
    known = locked.get("files", {})
    cache = args.dest / f"models--{repository.replace('/', '--')}"
    files = [
        File(
            url=hf_hub_url(repository, sibling.rfilename, revision=info.sha),
            path=cache / "snapshots" / info.sha / sibling.rfilename,
            name=sibling.rfilename,
            size=sibling.size,
            digest=_digest_of(sibling, digest or known.get(sibling.rfilename)),
            token=get_token(),
        )
        for sibling, digest in _matching(repository, info.siblings, patterns)
    ]
    digests = fetch_all(files, args.jobs)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(info.sha)
    return {"revision": info.sha, "files": {**known, **digests}}


def _ask(repository: str, revision: str | None) -> Any:
    try:
        return HfApi().model_info(repository, revision=revision, files_metadata=True)
    except HfHubHTTPError as exc:
        if exc.response.status_code in (401, 403):
            raise FetchError(f"{repository} asks for a token that may read it: HF_TOKEN") from exc
        raise FetchError(f"{repository}: {exc}") from exc


def _matching(
    repository: str, siblings: Sequence[Any], patterns: Mapping[str, str | None]
) -> Iterator[tuple[Any, str | None]]:
    """A repository's files that a pattern asks for, each with its SHA-256 where it is known."""
    for pattern, digest in patterns.items():
        found = [each for each in siblings if fnmatchcase(each.rfilename, pattern)]
        if not found:
            raise FetchError(f"{repository} has no {pattern}")
        yield from ((each, digest) for each in found)


def _digest_of(sibling: Any, sha256: str | None) -> str:
    """What a file must hash to: as we know it, else as the hub says."""
    if sha256 or sibling.lfs:
        return f"sha256:{sha256 or sibling.lfs.sha256}"
    return f"git:{sibling.blob_id}"


def fetch_url(
    url: str, sha256: str | None, locked: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """What the lock file says of a checkpoint once it is there: its SHA-256."""
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    known = sha256 or locked.get("files", {}).get(name)
    file = File(url, args.dest / name, name, None, f"sha256:{known}" if known else None)
    return {"files": fetch_all([file], args.jobs)}


def fetch_all(files: Sequence[File], jobs: int) -> dict[str, str]:
    """The SHA-256 of each file by its name, once all are there and verified.

    Raises FetchError for the first that cannot be had; what is there of the others stays.
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
    missing = sum(
        (file.size or 0) - _size(_partial(file)) for file in files if not _size(file.path)
    )
    free = shutil.disk_usage(files[0].path.parent).free
    if missing > free:
        raise FetchError(f"{missing / 1e9:.1f} GB are missing, and {free / 1e9:.1f} GB are free")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _partial(file: File) -> Path:
    return file.path.with_name(f"{file.path.name}.incomplete")


def _fetch(file: File, bar: Any, stop: threading.Event) -> str:
    """The SHA-256 of a file that is there and verified: from before, or from now on."""
    if file.path.exists():
        with suppress(Damaged):
            sha256 = _verified(file, file.path)
            bar.update(_size(file.path))
            return sha256
    partial = _partial(file)
    for attempt in range(1, TRIES + 1):
        try:
            _download(file, partial, bar, stop)
            sha256 = _verified(file, partial)
            break
        except (requests.RequestException, Damaged) as exc:
            # A file that is wrong twice is another file, not one that suffered on its way.
            tries = 2 if isinstance(exc, Damaged) else TRIES
            if attempt >= tries or not _is_passing(exc):
                raise FetchError(f"{file.name}: {_why(exc)}") from exc
            tqdm.write(f"{file.name}: {_why(exc)}; once more", file=sys.stderr)
            stop.wait(min(2**attempt, 30) * RETRY_S)
    os.replace(partial, file.path)
    return sha256


def _is_passing(exc: Exception) -> bool:
    """Whether a failure may be gone at the next try."""
    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return exc.response.status_code in (408, 416, 425, 429) or exc.response.status_code >= 500
    return True


def _why(exc: Exception) -> str:
    """A failure in a few words, without the query of a URL, which may be signed."""
    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"HTTP {exc.response.status_code}"
    return str(exc) if isinstance(exc, FetchError) else type(exc).__name__


def _download(file: File, partial: Path, bar: Any, stop: threading.Event) -> None:
    """Append to a partial file what is missing of it."""
    start = _size(partial)
    if file.size is not None and start == file.size:
        bar.update(start)
        return
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if file.token:
        # Not followed to the storage that the hub redirects to: `requests` sees to that.
        headers["Authorization"] = f"Bearer {file.token}"
    with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == 416:
            partial.unlink()
        answer.raise_for_status()
        resumes = answer.status_code == 206
        with partial.open("ab" if resumes else "wb") as out:
            for chunk in answer.iter_content(CHUNK):
                if stop.is_set():
                    raise FetchError(f"{file.name}: stopped")
                out.write(chunk)
                bar.update(len(chunk))


def _verified(file: File, path: Path) -> str:
    """The SHA-256 of a file. Raises Damaged, and removes it, when it is not the right one."""
    with path.open("rb") as data:
        sha256 = hashlib.file_digest(data, "sha256").hexdigest()
    kind, _, wanted = (file.digest or "").partition(":")
    found = {"": "", "sha256": sha256, "git": _git_blob(path) if kind == "git" else ""}[kind]
    if found != wanted:
        path.unlink()
        raise Damaged(f"{kind} is {found[:12]}..., and should be {wanted[:12]}...")
    return sha256


def _git_blob(path: Path) -> str:
    """The name that git gives to a file's content, by which the hub knows its small files."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


if __name__ == "__main__":
    main()
