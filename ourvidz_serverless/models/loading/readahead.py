"""Reads the weights' files into the page cache while Python imports.

A start waits for some seconds of imports and for about as many seconds of the disk, and the two can
go on at once. A mapped file is read page by page in the order of use, at half the speed of one long
read. So a thread reads each file once from front to back, and the maps find it in the page cache.

The files are checked before torch is imported: whether they exist, are complete, and are
safetensors.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ourvidz_serverless.models.loading import checkpoints
from ourvidz_serverless.settings import Settings

#: Bytes of one read: long for a disk, and little memory.
CHUNK = 8 << 20

#: File names of half-precision weights, in one file or in shards.
_HALF = re.compile(r"\.fp16(-\d+-of-\d+)?\.safetensors$")

#: This file exists if NVIDIA's driver is loaded. The check needs no torch.
DRIVER = Path("/dev/nvidiactl")


def files(settings: Settings) -> list[Path]:
    """The files that the families of these settings will load, in about the order of loading.

    Raises ModelLoadError with one line that names the variable if a file is missing or broken.
    """
    return list(dict.fromkeys(_files(settings)))


def _files(settings: Settings) -> Iterator[Path]:
    is_half = wants_half_precision(settings)
    for weights in settings.wanted_weights:
        for place in settings.places_of(weights):
            if place == "pocket":
                continue
            path = checkpoints.find(weights.setting, place, settings.model_dirs)
            inside = [file for each in weights.folders for file in _weights(path / each, is_half)]
            found = [path] if path.is_file() else inside
            with checkpoints.loading(weights.setting, path, weights.what):
                for file in found:
                    checkpoints.header(file)
            yield from found


def wants_half_precision(settings: Settings) -> bool:
    """Whether weights are loaded in half precision, as far as is known without torch."""
    is_cuda = DRIVER.exists() if settings.device == "auto" else settings.device != "cpu"
    return settings.dtype != "float32" and (settings.dtype != "auto" or is_cuda)


def _weights(folder: Path, wants_half_precision: bool) -> list[Path]:
    """A folder's weights, in half or full precision if it has both."""
    found = sorted(folder.glob("*.safetensors"))
    half = [path for path in found if _HALF.search(path.name)]
    others = [path for path in found if path not in half]
    return (half or others) if wants_half_precision else (others or half)


class ReadAhead:
    """Reads files in a thread of its own. `paths_read` are those that it has read."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self.paths_read: list[Path] = []
        self._is_done = threading.Event()

    @classmethod
    def of(cls, settings: Settings) -> ReadAhead:
        """A read-ahead of the files that these settings load. Raises ModelLoadError as `files`."""
        return cls(files(settings))

    def start(self) -> ReadAhead:
        threading.Thread(target=self._read_all, name="read-ahead", daemon=True).start()
        return self

    def wait(self) -> None:
        """Return when all files are read, except those that cannot be read."""
        self._is_done.wait()

    def _read_all(self) -> None:
        try:
            for path in self._paths:
                # If a file disappears, its loader raises an error later.
                with suppress(OSError):
                    _read(path)
                    self.paths_read.append(path)
        finally:
            self._is_done.set()


def _read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass
