"""Downloaded LoRAs in one folder of a limited size, each named by its source.

A source is a URL with its query, since the query may select the file. The query's signature is
left out, since each signed URL of a file has a new one. A user with a signed URL may have a right
that others lack, so a download by a signed URL is used for that user only. Other downloads are
used for all users.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.loading import checkpoints
from ourvidz_serverless.net.signed_urls import unsigned

#: A file that was used within so many seconds is not deleted: a running job may use it.
IN_USE_S = 3600.0

#: Held while old files are deleted and a new one is written.
_storing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Downloads:
    """The folder may hold `max_bytes`; the least recently used file is deleted first."""

    folder: Path
    max_bytes: int

    def path(self, url: str, user_id: str) -> Path:
        """The path of a user's download of a URL. Raises ValueError if it is not a URL."""
        parts = urlsplit(url)
        query, is_signed = unsigned(parts.query)
        owner = user_id if is_signed else None
        source = json.dumps([owner, parts.hostname, parts.path, query])
        return self.folder / f"{hashlib.sha256(source.encode()).hexdigest()}.safetensors"

    @staticmethod
    def use(path: Path) -> bool:
        """Whether a download is stored; if so, it is not deleted for `IN_USE_S` from now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def keep(self, path: Path, data: bytes) -> None:
        """Store a download, and delete the files that were used least recently to make room.

        Raises ModelLoadError, and stores nothing, if the data is not a safetensors file, or if the
        files in use leave too little room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _storing:
            self._make_room(len(data))
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                fresh = Path(file.name)
            try:
                fresh.write_bytes(data)
                checkpoints.header(fresh)
                fresh.replace(path)
            except ValueError as exc:
                raise ModelLoadError("config.loras: the URL leads to no safetensors file") from exc
            finally:
                fresh.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        files = sorted(self._files(), key=lambda file: file[1])
        total, newest = sum(size for _, _, size in files), time.time() - IN_USE_S
        for path, used_at, size in files:
            if total + num_bytes <= self.max_bytes or used_at > newest:
                break
            path.unlink(missing_ok=True)
            total -= size
        if total + num_bytes > self.max_bytes:
            raise ModelLoadError(
                "config.loras: there is no room for this download, see LORA_CACHE_GB"
            )

    def _files(self) -> list[tuple[Path, float, int]]:
        """Each file with the time of its last use and its size in bytes."""
        found = []
        for path in self.folder.iterdir():
            # Another worker on the same volume may delete a file meanwhile.
            with suppress(FileNotFoundError):
                facts = path.stat()
                found.append((path, facts.st_mtime, facts.st_size))
        return found
