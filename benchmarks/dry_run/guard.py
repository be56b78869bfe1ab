"""The device guard without which torch's build for CPUs refuses to index a fake CUDA tensor.

It is three lines of C++ (`guard.cpp`), compiled once for each version of torch and kept in the
user's cache. `NoOpDeviceGuardImpl` is torch's own, in c10/core/impl/DeviceGuardImplInterface.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")

#: The compilers that are tried, in this order.
COMPILERS = ("g++", "clang++", "c++")


def missing() -> str | None:
    """Why no fake CUDA device can be had here, in one line; None if one can."""
    if torch.version.cuda and not torch.cuda.is_available():
        return "torch is a build for CUDA, and there is no CUDA device"
    if not torch.version.cuda and _compiler() is None and not _library().exists():
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    return None


@functools.cache
def load() -> None:
    """Register the guard, for the rest of the process. A build for CUDA has its own.

    Raises RuntimeError, with the reason, if `missing` gives one or the compiler fails.
    """
    if why := missing():
        raise RuntimeError(why)
    if torch.version.cuda:
        return
    library = _library()
    if not library.exists():
        _compile(library)
    ctypes.CDLL(str(library))


def _library() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ourvidz-dry-run" / f"guard-torch{torch.__version__}.so"


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _compile(library: Path) -> None:
    compiler, root = _compiler(), Path(torch.__file__).parent
    assert compiler
    library.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may compile at the same time. Each renames a finished file of its own.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / "guard.so"
        command = [compiler, "-std=c++20", "-fPIC", "-shared", str(SOURCE), "-o", str(made)]
        command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {ended.stderr[-2000:]}")
        made.replace(library)
