"""The weights' files into the page cache, front to back, while Python imports.

A start waits for two things, and neither needs the other: some seconds of imports, and as many of
a disk. Whoever maps a file reads it page by page where the first touch falls, at half of what a
disk gives to one long read; so a thread reads all of it once, and the maps find it there.

What can be told of the files without torch is told before it is imported: whether they are there,
whole, and safetensors.
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

#: What is read at once: long for a disk, nothing beside the weights.
CHUNK = 8 << 20

#: How the names end of weights in halves, in one piece or in several.
_HALVES = re.compile(r"\.fp16(-\d+-of-\d+)?\.safetensors$")

#: Where NVIDIA's driver shows itself, so that nobody has to import torch to know.
DRIVER = Path("/dev/nvidiactl")


def files(settings: Settings) -> list[Path]:
    """The files that the families of these settings will load, in about that order.

    Raises ModelLoadError with one line that names the variable for what is not there, or broken.
    """
    return list(dict.fromkeys(_files(settings)))


def _files(settings: Settings) -> Iterator[Path]:
    halves = wants_half_precision(settings)
    for weights in (each for family in settings.served for each in family.weights):
        place = settings.of(weights.setting)
        if place is None or str(place) == "pocket":
            continue
        path = checkpoints.find(weights.setting, place, settings.model_dirs)
        inside = [file for each in weights.folders for file in _weights(path / each, halves)]
        found = [path] if path.is_file() else inside
        with checkpoints.loading(weights.setting, path, weights.what):
            for file in found:
                checkpoints.header(file)
        yield from found


def wants_half_precision(settings: Settings) -> bool:
    """Whether weights are kept in two bytes each, as far as can be known without torch."""
    is_cuda = DRIVER.exists() if settings.device == "auto" else settings.device != "cpu"
    return settings.dtype != "float32" and (settings.dtype != "auto" or is_cuda)


def _weights(folder: Path, wants_half_precision: bool) -> list[Path]:
    """A folder's weights; of those that are there in both sizes, one."""
    found = sorted(folder.glob("*.safetensors"))
    halves = [path for path in found if _HALVES.search(path.name)]
    others = [path for path in found if path not in halves]
    return (halves or others) if wants_half_precision else (others or halves)


class ReadAhead:
    """Reads files in a thread of its own, from `start` on."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self.paths_read: list[Path] = []
        self._is_done = threading.Event()

    @classmethod
    def of(cls, settings: Settings) -> ReadAhead:
        """Of what these settings load. Raises ModelLoadError as `files`."""
        return cls(files(settings))

    def start(self) -> ReadAhead:
        threading.Thread(target=self._read_all, name="read-ahead", daemon=True).start()
        return self

    def wait(self) -> None:
        """Return when all that could be read is read."""
        self._is_done.wait()

    def _read_all(self) -> None:
        try:
            for path in self._paths:
                # Of a file that goes meanwhile its loader tells.
                with suppress(OSError):
                    _read(path)
                    self.paths_read.append(path)
        finally:
            self._is_done.set()


def _read(path: Path) -> None:
    room = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(room):
            pass
