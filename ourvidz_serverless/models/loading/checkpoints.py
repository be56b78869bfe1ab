"""Where weights lie: a name, looked up in one place after the other.

    /models/checkpoint.safetensors              a path, taken as it is
    checkpoint.safetensors                      a file or folder in one of `MODEL_DIRS`
    stabilityai/stable-diffusion-xl-base-1.0    a repository of the hub, in one of `MODEL_DIRS`
    Qwen/Qwen2.5-7B-Instruct@a09a35458c70...    a revision of one
    h94/IP-Adapter/sdxl_models/x.safetensors    a file in one

Repositories lie as in the hub's own cache, `models--{org}--{name}/snapshots/{revision}`, wherever
they come from: baked into the image, RunPod's cached model, or a network volume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ourvidz_serverless.errors import ModelLoadError

#: File systems behind a network. RunPod mounts its volumes, which are MooseFS, by FUSE.
REMOTE = ("fuse", "nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "9p")

#: FUSE on this machine's own disks.
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.mergerfs")

MOUNTS = Path("/proc/self/mounts")

#: The longest table of tensors that safetensors itself reads, in bytes.
MAX_HEADER = 100_000_000


def find(variable: str, name: str | Path, folders: Sequence[Path]) -> Path:
    """The file or folder that the value of a variable means.

    Raises ModelLoadError with one line that names the variable when there is none, or when a
    folder holds several revisions and none of them is its main one.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute():
        raise ModelLoadError(f"{variable}: there is nothing at {path}")
    for folder in folders:
        if (folder / path).exists():
            return folder / path
        cached = _cached(variable, folder, path)
        if cached and cached.exists():
            return cached
    places = ", ".join(map(str, folders))
    raise ModelLoadError(f"{variable}: there is no {path} here nor in {places}")


def _cached(variable: str, folder: Path, name: Path) -> Path | None:
    """Where a repository, or a file in one, lies in a cache of the hub's layout."""
    if len(name.parts) < 2:
        return None
    organisation, repository, *inside = name.parts
    repository, _, revision = repository.partition("@")
    cache = folder / f"models--{organisation}--{repository}"
    snapshot = _snapshot(variable, cache, revision)
    return snapshot.joinpath(*inside) if snapshot else None


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
    """Whatever loading raises becomes ModelLoadError: one line about the variable, without a path.

    It reaches callers too, when a model that had to leave is read anew.
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
    """Raise ValueError in words where a folder has no weights, or not all of them, or broken ones.

    For loaders that say it less clearly, or not at all.
    """
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
    for path in files:
        header(path)


def header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors by name, and where in it their bytes begin.

    Raises ValueError in words where it is no such file, or is cut off
    (https://github.com/huggingface/safetensors#format).
    """
    size, name = path.stat().st_size, f"{path.parent.name}/{path.name}"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= MAX_HEADER else b""
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
    """Whether weights are mapped into memory; `auto` is no where they lie behind a network.

    A map is read page by page in the order of use: the fastest way from a disk, and over a
    network 30 to 50 times slower than one plain read
    (https://github.com/Comfy-Org/ComfyUI/issues/2288).
    """
    # Other systems than Linux have no such table, and no worker but a developer's.
    mounts = MOUNTS.read_text() if MOUNTS.exists() else ""
    return when == "always" or (when == "auto" and not is_remote(path, mounts))


def is_remote(path: Path, mounts: str) -> bool:
    """Whether a path lies behind a network, by a table like that of /proc/mounts."""
    real = Path(os.path.realpath(path))
    kinds = {}
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        # Spaces are written as octal numbers there, and later mounts hide earlier ones.
        kinds[Path(point.replace("\\040", " "))] = kind
    kind = next((kinds[point] for point in (real, *real.parents) if point in kinds), "")
    return kind not in LOCAL_FUSE and kind.split(".")[0] in REMOTE
