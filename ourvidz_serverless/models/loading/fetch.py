"""Brings the weights that the settings name, before anything is loaded: `FETCH_MODELS=true`.

A repository of the Hub comes as the files that its family reads, in one format and precision, and
in the layout of the Hub's own cache. A checkpoint comes from its URL. Both go to the last of
`MODEL_DIRS` that can be written, where `checkpoints.find` then finds them: a network volume if
there is one, else the container's disk.

Workers that start at once on one volume fetch each model once: the first one holds a lock, the
others wait. The kernel releases the lock when its holder ends, however it ends. On a volume without
such locks each worker downloads for itself, and nothing breaks, since files are moved into place
when they are complete.

The worker fetches in a process of its own (`run`), for three reasons: the Hub's client is offline
in the worker's, SIGTERM ends a download at once, and its memory is free again when models load.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES, Weights
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.loading import checkpoints, names
from ourvidz_serverless.models.loading.names import HubName, UrlName
from ourvidz_serverless.models.loading.readahead import wants_half_precision
from ourvidz_serverless.settings import Settings

if TYPE_CHECKING:
    # Imported where something is fetched: it takes a third of a second, and most starts fetch
    # nothing.
    from ourvidz_serverless.net import hub

#: Weights by the names that the loaders read, whole or in shards, in either precision; and the
#: index of their shards.
_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model)"
    r"(?:(?P<half>\.fp16)?(?:-\d+-of-\d+)?\.safetensors"
    r"|\.safetensors\.index(?P<half_index>\.fp16)?\.json)"
)

#: How often a worker that waits for another one's download says so, in seconds.
WAIT_LOG_S = 30.0

#: How often it asks for the lock, in seconds.
LOCK_POLL_S = 0.2

#: The configurations and tokenizers of every SDXL checkpoint in one file, if `SDXL_CONFIG` names no
#: others.
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"


_SDXL = FAMILIES["sdxl"].weights[0]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one setting names: `place` is its value, and `name` what that means.

    Without weights only the configurations are wanted.
    """

    place: str
    name: HubName | UrlName
    weights: Weights
    has_weights: bool = True

    @property
    def variable(self) -> str:
        return self.weights.setting

    @classmethod
    def of(cls, place: str, weights: Weights, has_weights: bool = True) -> Iterator[Wanted]:
        """What a value of a setting names; nothing if it is a path."""
        if name := names.parse(place):
            yield cls(place, name, weights, has_weights)


# --- what is wanted, and what of it is missing ---


def wanted(settings: Settings) -> Iterator[Wanted]:
    """What the settings of the served families name by a repository or a URL."""
    for weights in settings.wanted_weights:
        is_chats = weights.setting == "WAN_ENHANCER_MODEL" and settings.wan_uses_chat_model
        for place in () if is_chats else settings.places_of(weights):
            yield from Wanted.of(place, weights)
    if config := sdxl_config(settings):
        yield from Wanted.of(config, replace(_SDXL, setting="SDXL_CONFIG"), has_weights=False)


def sdxl_config(settings: Settings) -> str | None:
    """The name of a single file's configurations: `SDXL_CONFIG`, or SDXL's own if it is fetched.

    None if SDXL's checkpoint is a folder, or if it has its configurations beside it.
    """
    place = settings.sdxl_model
    is_file = isinstance(names.parse(place), UrlName) or place.endswith(".safetensors")
    if not is_file or "sdxl" not in settings.families:
        return None
    if settings.sdxl_config:
        return str(settings.sdxl_config)
    return SDXL_BASE if settings.fetch_models and not _has_config(settings) else None


def _has_config(settings: Settings) -> bool:
    try:
        path = checkpoints.find("SDXL_MODEL", settings.sdxl_model, settings.model_dirs)
    except ModelLoadError:
        return False
    return (path.with_suffix("") / "model_index.json").exists()


def missing(settings: Settings) -> list[Wanted]:
    """What is wanted and not there, or not completely; nothing unless `FETCH_MODELS` is set."""
    if not settings.fetch_models:
        return []
    return [each for each in wanted(settings) if not is_there(each, settings.model_dirs)]


def is_there(wish: Wanted, folders: Sequence[Path]) -> bool:
    """Whether a folder has all that a setting names. Of a repository it asks nobody."""
    try:
        path = checkpoints.find(wish.variable, wish.place, folders)
    except ModelLoadError:
        return False
    if isinstance(wish.name, UrlName):
        return True
    has_begun = any(marker.exists() for marker in _markers(wish.name, path, folders))
    return not has_begun and _has_files(path, wish)


def _markers(name: HubName, path: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """The marker of a fetch that has not ended, if the path is in a cache."""
    for folder in folders:
        snapshots = folder / name.cache / "snapshots"
        if path.is_relative_to(snapshots):
            yield _marker(folder / name.cache, path.relative_to(snapshots).parts[0])


def _marker(cache: Path, commit: str) -> Path:
    return cache / f"fetching-{commit}"


def _has_files(path: Path, wish: Wanted) -> bool:
    """Whether a snapshot has what its loader needs, as far as that is known without the Hub.

    An earlier fetch for another setting may have brought other parts of the repository.
    """
    folders, parent = wish.weights.folders, path
    if path.is_file():
        folders, parent = wish.weights.beside, path.parent
    needed = [each for each in wish.weights.others if "*" not in each and not path.is_file()]
    if not all((parent / each).exists() for each in needed):
        return False
    if not wish.has_weights:
        return True
    # Only the first folder is in every checkpoint: some WAN ones have no image encoder.
    return all(
        _has_weights(parent / each)
        for index, each in enumerate(folders)
        if index == 0 or (parent / each).exists()
    )


def _has_weights(folder: Path) -> bool:
    try:
        return bool(checkpoints.files_of(folder))
    except (ValueError, OSError):
        return False


# --- which files of a repository ---


def choose(files: Iterable[str], wish: Wanted, wants_half: bool) -> list[str]:
    """The files of a repository that a setting's loader reads: one format, one precision."""
    assert isinstance(wish.name, HubName)
    files, inside, weights = list(files), wish.name.inside, wish.weights
    if wish.name.is_file:
        base = inside.rpartition("/")[0]
        folders, found = weights.beside, [name for name in files if name == inside]
    else:
        base, folders = inside, weights.folders
        patterns = [_joined(base, pattern) for pattern in weights.others]
        found = [name for name in files if any(_matches(name, each) for each in patterns)]
    for folder in (_joined(base, each) for each in folders):
        # An index names shards, which may be of another format or precision than the chosen one.
        configs = [name for name in files if _matches(name, _joined(folder, "*.json"))]
        found += [name for name in configs if ".index." not in name]
        if wish.has_weights:
            found += _weights_in(folder, files, wants_half and weights.has_variants)
    return list(dict.fromkeys(found))


def _weights_in(folder: str, files: Iterable[str], wants_half: bool) -> list[str]:
    here = [name for name in files if name.rpartition("/")[0] == folder]
    matches = {name: _WEIGHTS.fullmatch(name.rpartition("/")[2]) for name in here}
    found = {name: match for name, match in matches.items() if match}
    half = [name for name, match in found.items() if match["half"] or match["half_index"]]
    full = [name for name in found if name not in half]
    return (half or full) if wants_half else (full or half)


def _joined(base: str, name: str) -> str:
    """A path in a repository, where `.` is the folder itself."""
    return "/".join(part for part in (base, name) if part not in ("", "."))


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, whose `*` does not match a slash."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


# --- fetching, in a process of its own ---


def run(settings: Settings) -> None:
    """Fetch what is missing in a process of its own, which ends with this one.

    Exits with that process's code if it fails. It has logged the reason then.
    """
    package = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "ourvidz_serverless", "fetch", "--with-parent"]
    # Its standard input ends when this process does, even if nothing else can be done any more.
    env = {**os.environ, "PYTHONPATH": path, "LOG_LEVEL": logging.getLevelName(log.level)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=env) as process:
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if code:
        sys.exit(code)


def end_with_parent() -> None:
    """End this process when its standard input ends, even in the middle of a download."""

    def wait() -> None:
        # Not `sys.stdin`, whose lock this thread would hold when the interpreter ends.
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def fetch(settings: Settings) -> None:
    """Bring what is missing. Raises ModelLoadError with one line that names the setting."""
    from ourvidz_serverless.net import hub

    found = missing(settings)
    if not found:
        log.info("fetch: everything is there")
        return
    folder = destination(settings.model_dirs)
    with hub.online():
        for wish in found:
            try:
                with locked(folder / ".locks" / _lock_name(wish.name), str(wish.name)):
                    # Another worker may have fetched it meanwhile.
                    if not is_there(wish, settings.model_dirs):
                        _fetch(wish, folder, settings)
            except hub.FetchError as exc:
                raise ModelLoadError(f"{wish.variable}: {exc}") from exc
            except OSError as exc:
                why = exc.strerror or type(exc).__name__
                raise ModelLoadError(f"FETCH_MODELS: {folder} cannot be used: {why}") from exc


def destination(folders: Sequence[Path]) -> Path:
    """The last of the folders that can be written. Raises ModelLoadError if none can."""
    for folder in reversed(folders):
        # A volume that is not mounted is no place for a new folder.
        if not (folder.exists() or folder.absolute().parent.exists()):
            continue
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as exc:
            log.warning("fetch: %s cannot be written: %s", folder, exc.strerror)
    raise ModelLoadError(f"FETCH_MODELS: none of {', '.join(map(str, folders))} can be written")


def _lock_name(name: HubName | UrlName) -> str:
    return f"{name.cache if isinstance(name, HubName) else name.place.parent.name}.lock"


@contextmanager
def locked(path: Path, what: str, poll_s: float = LOCK_POLL_S) -> Iterator[None]:
    """Hold a lock among the processes that use a folder, on any machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        said = -WAIT_LOG_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said >= WAIT_LOG_S:
                    said = time.monotonic()
                    log.info("fetch: another worker fetches %s, waiting for it", what)
                time.sleep(poll_s)
            except OSError as exc:
                # The file system has no locks. Each worker downloads for itself.
                log.warning("fetch: no lock at %s (%s)", path.parent, exc.strerror)
                break
        yield


def _fetch(wish: Wanted, folder: Path, settings: Settings) -> None:
    started = time.monotonic()
    if isinstance(wish.name, UrlName):
        size = _fetch_url(wish.name, folder, settings)
    else:
        size = _fetch_repository(wish, wish.name, folder, settings)
    seconds = time.monotonic() - started
    log.info("fetch: %s is there, %s in %.0f s", wish.name, _shown(size), seconds)


def _fetch_url(name: UrlName, folder: Path, settings: Settings) -> int:
    from ourvidz_serverless.net import hub

    log.info("fetch: %s to %s", name, folder)
    path = folder / name.place
    token = settings.token_for(name.host)
    hub.fetch_url(name.url, path, name.sha256 or None, token, _progress(str(name)))
    return path.stat().st_size


def _fetch_repository(wish: Wanted, name: HubName, folder: Path, settings: Settings) -> int:
    from ourvidz_serverless.net import hub

    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    listing = hub.list_files(name.repository, name.revision or None, token)
    chosen = choose(listing.files, wish, wants_half_precision(settings))
    _check_chosen(chosen, wish, listing)
    size = listing.missing_bytes(chosen, folder)
    log.info("fetch: %s, %s in %d files, to %s", name, _shown(size), len(chosen), folder)
    if not name.revision:
        log.warning("fetch: %s has no revision; this one is @%s", name, listing.commit)
    cache = listing.cache(folder)
    cache.mkdir(parents=True, exist_ok=True)
    hub.remove_stale(cache)
    marker = _marker(cache, listing.commit)
    marker.touch()
    hub.fetch_files(listing, chosen, folder, token, _progress(str(name), size, len(chosen)))
    if name.revision != listing.commit:
        _write_ref(cache, name.revision or "main", listing.commit)
    marker.unlink()
    return size


def _check_chosen(chosen: Sequence[str], wish: Wanted, listing: hub.Listing) -> None:
    """Raise FetchError if a repository has not what its setting needs."""
    from ourvidz_serverless.net import hub

    if not wish.has_weights or any(name.endswith(".safetensors") for name in chosen):
        return
    repository, single = listing.repository, _single_files(listing)
    if single and "unet" in wish.weights.folders:
        raise hub.FetchError(
            f"{repository} has no folders of diffusers, but a file: try {repository}/{single[0]}"
        )
    raise hub.FetchError(f"{repository} has no .safetensors where {wish.weights.what} has them")


def _single_files(listing: hub.Listing) -> list[str]:
    """The weights in the repository's uppermost folder, the largest first."""
    files = {name: each for name, each in listing.files.items() if "/" not in name}
    found = [name for name in files if name.endswith(".safetensors")]
    return sorted(found, key=lambda name: -files[name].size)


def _write_ref(cache: Path, ref: str, commit: str) -> None:
    """Note which commit a branch or a tag was, in the layout of the Hub's cache."""
    path = cache / "refs" / ref
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(commit)
    partial.replace(path)


def _progress(what: str, size: int = 0, files: int = 0) -> Callable[[int, int], None]:
    """Log each tenth of a download; of one whose size is not known, each gigabyte."""
    step = size / 10 or 1e9
    said = 0

    def report(received: int, done: int) -> None:
        nonlocal said
        if received // step > said and (not size or received < size):
            said = int(received // step)
            of = f" of {_shown(size)}, {done} of {files} files" if size else ""
            log.info("fetch: %s: %s%s", what, _shown(received), of)

    return report


def _shown(size: int) -> str:
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
