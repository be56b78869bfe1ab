"""Finds weights by a name, in one place after the other.

    /models/checkpoint.safetensors              a path, taken as it is
    checkpoint.safetensors                      a file or folder in one of `MODEL_DIRS`
    stabilityai/stable-diffusion-xl-base-1.0    a repository of the hub, in one of `MODEL_DIRS`
    Qwen/Qwen2.5-7B-Instruct@a09a35458c70...    a revision of one
    h94/IP-Adapter/sdxl_models/x.safetensors    a file in one
    https://example.com/x.safetensors           what `FETCH_MODELS` has brought from a URL

Repositories have the layout of the hub's own cache, `models--{org}--{name}/snapshots/{revision}`,
whether they are in the image, in RunPod's model cache, or on a network volume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.loading import names
from ourvidz_serverless.models.loading.names import HubName, UrlName

#: Network file systems. RunPod's volumes are MooseFS, mounted by FUSE.
REMOTE_FILESYSTEMS = (
    "fuse",
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "lustre",
    "glusterfs",
    "beegfs",
    "9p",
)

#: FUSE file systems on the machine's own disks.
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.mergerfs")

MOUNTS = Path("/proc/self/mounts")

#: The longest header, in bytes, that the safetensors library reads.
MAX_HEADER_BYTES = 100_000_000


def find(variable: str, name: str | Path, folders: Sequence[Path]) -> Path:
    """The file or folder that the value of a variable names.

    Raises ModelLoadError with one line that names the variable if there is none, or if a repository
    has several revisions and no main one.
    """
    parsed = names.parse(name)
    # A URL is no path: as one it would lose a slash.
    path = parsed.place if isinstance(parsed, UrlName) else Path(name)
    if path.exists():
        return path
    if path.is_absolute():
        raise ModelLoadError(f"{variable}: there is nothing at {path}")
    for folder in folders:
        if (folder / path).exists():
            return folder / path
        cached = _cached(variable, folder, parsed) if isinstance(parsed, HubName) else None
        if cached and cached.exists():
            return cached
    places = ", ".join(map(str, folders))
    raise ModelLoadError(f"{variable}: there is no {names.public(name)} here nor in {places}")


def _cached(variable: str, folder: Path, name: HubName) -> Path | None:
    """The path of a repository, or of a file in one, in a cache of the hub's layout."""
    snapshot = _snapshot(variable, folder / name.cache, name.revision)
    return snapshot / name.inside if snapshot else None


def _snapshot(variable: str, cache: Path, revision: str) -> Path | None:
    snapshots = cache / "snapshots"
    ref = cache / "refs" / (revision or "main")
    if ref.is_file():
        return snapshots / ref.read_text().strip()
    if revision:
        return snapshots / revision
    found = list(snapshots.iterdir()) if snapshots.is_dir() else []
    if len(found) > 1:
        raise ModelLoadError(f"{variable}: {cache} has several revisions, name one with @")
    return found[0] if found else None


@contextmanager
def loading(variable: str, path: Path, what: str) -> Iterator[None]:
    """Turn any error of loading into a ModelLoadError: one line with the variable, without a path.

    Callers get this line too, if an evicted model does not load again.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as exc:
        why = " ".join(str(exc).replace(str(path), path.name).split())[:200]
        kind = "" if isinstance(exc, ValueError) else f"{type(exc).__name__}: "
        raise ModelLoadError(
            f"{variable}: {path.name} does not load as {what} ({kind}{why})"
        ) from exc


def check(folder: Path) -> None:
    """Raise ValueError with a clear message if weights are missing, incomplete or broken.

    For libraries whose loaders have no clear message.
    """
    for path in files_of(folder):
        header(path)


def files_of(folder: Path) -> list[Path]:
    """A folder's files of weights; raises ValueError if there are none, or not all of an index."""
    files = sorted(folder.glob("*.safetensors"))
    named = {
        folder / name
        for index in folder.glob("*.safetensors.index.json")
        for name in json.loads(index.read_text())["weight_map"].values()
    }
    for path in sorted(named.difference(files)):
        raise ValueError(f"there is no {path.name} in {folder.name}")
    if not files:
        raise ValueError(f"there are no .safetensors in {folder.name}")
    return files


def header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors by name, and the offset of their bytes in the file.

    Raises ValueError with a clear message if the file is corrupt or cut off
    (https://github.com/huggingface/safetensors#format).
    """
    size, name = path.stat().st_size, f"{path.parent.name}/{path.name}"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if not raw.startswith(b"{"):
        raise ValueError(f"{name} is not a safetensors file, or is corrupt")
    try:
        table = json.loads(raw) if len(raw) == length else None
        ends = [] if table is None else [each["data_offsets"][1] for each in _entries(table)]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{name} is not a safetensors file, or is corrupt") from None
    end = 8 + length + max(ends, default=0)
    if table is None or size < end:
        raise ValueError(f"{name} is cut off: it has {size} bytes of {end} or more")
    table.pop("__metadata__", None)
    return table, 8 + length


def _entries(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in table.items() if name != "__metadata__"]


def is_mapped(path: Path, when: Literal["auto", "always", "never"]) -> bool:
    """Whether weights are mapped into memory; `auto` maps files that are not behind a network.

    A map is read page by page in the order of use. That is the fastest way to read from a disk, and
    30 to 50 times slower than one plain read over a network
    (https://github.com/Comfy-Org/ComfyUI/issues/2288).
    """
    # Only Linux has this table. Other systems run only a developer's worker.
    mounts = MOUNTS.read_text() if MOUNTS.exists() else ""
    return when == "always" or (when == "auto" and not is_remote(path, mounts))


def is_remote(path: Path, mounts: str) -> bool:
    """Whether a path is on a network file system, by a table in the format of /proc/mounts."""
    real = Path(os.path.realpath(path))
    kinds = {}
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        # The table writes spaces as octal numbers. Later mounts hide earlier ones.
        kinds[Path(point.replace("\\040", " "))] = kind
    kind = next((kinds[point] for point in (real, *real.parents) if point in kinds), "")
    return kind not in LOCAL_FUSE and kind.split(".")[0] in REMOTE_FILESYSTEMS
