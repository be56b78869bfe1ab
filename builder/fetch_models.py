"""Download a family's weights from the Hub, verified, to a folder of `MODEL_DIRS`.

    python -m builder.fetch_models --family sdxl --dest models
    python -m builder.fetch_models --family sdxl --dest models --optional     IP-Adapter too
    python -m builder.fetch_models --family sdxl --dest models \\
        --url https://example.com/checkpoint.safetensors --sha256 31e35c80...

`builder/models.json` says which files of which repositories, at which revision, and their SHA-256
where it is known. A revision or SHA-256 of null is recorded in `builder/models.lock.json` at first
use, and must be the same from then on: commit that file. Run again, the command keeps the files
that are there, and verifies them. It uses `HF_TOKEN` and `HF_ENDPOINT`. A worker fetches without
manifest and lock file, by `FETCH_MODELS`; both download by `ourvidz_serverless.net.hub`.

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
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

from ourvidz_serverless.net import hub
from ourvidz_serverless.net.hub import FetchError, Listing
from ourvidz_serverless.net.signed_urls import unsigned

MANIFEST = Path(__file__).with_name("models.json")
LOCK = Path(__file__).with_name("models.lock.json")

#: The weights among the files of a repository.
WEIGHTS = "*.safetensors"

#: Parameters of a URL that select a file: the lock file holds their values. For any other parameter
#: it holds a digest, since the value may be a secret.
PUBLIC = (
    *("type", "format", "size", "fp", "download", "name", "file", "filename", "path", "id"),
    *("version", "revision", "ref", "raw", "dl"),
)


class Damaged(FetchError):
    """A file is complete, but has another digest than expected."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    manifest = json.loads(args.manifest.read_text())
    lock = json.loads(args.lock.read_text()) if args.lock.exists() else {}
    try:
        with hub.online():
            _fetch(args, manifest, lock)
    except (FetchError, OSError) as exc:
        sys.exit(f"cannot fetch: {exc}")
    args.lock.write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")


def _fetch(args: argparse.Namespace, manifest: Mapping[str, Any], lock: dict[str, Any]) -> None:
    """Fetch what the arguments ask for, and note it in `lock`."""
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
    """Download a repository. The value is its entry in the lock file: revision and SHA-256s."""
    # A lock of another revision than the manifest's is ignored.
    if revision and locked.get("revision") != revision:
        locked = {}
    listing = hub.list_files(repository, revision or locked.get("revision"))
    known = locked.get("files", {})
    digests = {
        name: f"sha256:{sha256 or known[name]}" if sha256 or name in known else file.digest
        for name, file, sha256 in _matching(listing, patterns)
    }
    fetched = _fetch_verified(listing, digests, args.dest)
    refs = listing.cache(args.dest) / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(listing.commit)
    return {"revision": listing.commit, "files": {**known, **fetched}}


def _matching(
    listing: Listing, patterns: Mapping[str, str | None]
) -> Iterator[tuple[str, hub.HubFile, str | None]]:
    """A repository's files that match a pattern, each with its SHA-256 if it is known."""
    for pattern, sha256 in patterns.items():
        found = [name for name in listing.files if fnmatchcase(name, pattern)]
        if not found:
            raise FetchError(f"{listing.repository} has no {pattern}")
        yield from ((name, listing.files[name], sha256) for name in found)


def _fetch_verified(listing: Listing, digests: Mapping[str, str], dest: Path) -> dict[str, str]:
    """The SHA-256 of each file, by name. A damaged file is fetched once more."""
    snapshot = hub.fetch_files(listing, digests, dest)
    found: dict[str, str] = {}
    damaged = []
    for name, digest in digests.items():
        try:
            found[name] = _verified(snapshot / name, name, digest)
        except Damaged as exc:
            print(f"{exc}; once more", file=sys.stderr)
            damaged.append(name)
    if damaged:
        hub.fetch_files(listing, damaged, dest)
    return found | {name: _verified(snapshot / name, name, digests[name]) for name in damaged}


def _verified(path: Path, name: str, digest: str) -> str:
    """The SHA-256 of a file of a snapshot.

    If its digest is wrong, the file is removed and Damaged is raised.
    """
    if not path.exists():
        # Its bytes were another damaged file's too, and are removed.
        path.unlink(missing_ok=True)
        raise Damaged(f"{name}: it was damaged")
    sha256 = hub.sha256_of(path)
    kind, _, wanted = digest.partition(":")
    found = _git_blob(path) if kind == "git" else sha256
    if found != wanted:
        # First the file that the snapshot's link leads to.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise Damaged(f"{name}: {kind} is {found[:12]}..., and should be {wanted[:12]}...")
    return sha256


def _git_blob(path: Path) -> str:
    """Git's hash of a file's content. The Hub gives it for small files."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


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
    sha256 = args.sha256 or next(iter(names.values()), None)
    path = args.dest / name
    if not path.exists() or not _is_this(path, source, sha256, lock):
        sha256 = hub.fetch_url(args.url, path, sha256)
    return {"files": {**dict.fromkeys(names, sha256), name: sha256}}


def _is_this(path: Path, source: str, sha256: str | None, lock: Mapping[str, Any]) -> bool:
    """Whether an existing file is the source's. It is not if it is the source's, and damaged.

    Raises FetchError if the file may belong to another source.
    """
    if not sha256:
        raise FetchError(
            f"{path.name} is there already, and may not be this URL's file: "
            "give its --sha256, or another --name or --dest"
        )
    found = hub.sha256_of(path)
    named = {
        other: entry["files"][path.name]
        for other, entry in lock.items()
        if path.name in entry.get("files", {})
    }
    owners = [other for other, known in named.items() if known == found]
    # A hash that no source has may be this source's file, damaged, if it has had this name.
    if found != sha256 and source not in (owners or named):
        raise FetchError(
            f"{path.name} is there already, and it is another file (sha256 {found[:12]}...): "
            "give another --name or --dest, or remove it"
        )
    return found == sha256


if __name__ == "__main__":
    main()
