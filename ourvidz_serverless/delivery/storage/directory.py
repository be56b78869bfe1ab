"""A directory as storage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from ourvidz_serverless.delivery.storage.base import RETRY
from ourvidz_serverless.net.retries import Fault, Retry


class DirectoryStorage:
    """A folder on this machine, or on a mounted volume."""

    def __init__(self, root: Path, policy: Retry = RETRY) -> None:
        self._root, self.policy = root, policy

    def put(self, key: str, data: bytes, mime: str) -> None:
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written to a new file and renamed, so that nobody reads half a picture.
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                fresh = Path(file.name)
            try:
                fresh.write_bytes(data)
                fresh.chmod(0o644)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
        except OSError as exc:
            raise Fault(507) from exc

    def get(self, key: str, bucket: str | None = None) -> bytes:
        try:
            return (self._root / (bucket or "") / key).read_bytes()
        except OSError as exc:
            raise Fault(404) from exc

    def find(self, key: str) -> Path | None:
        """The file of a key; None if there is none, or if the key leads out of the folder."""
        root = self._root.resolve()
        try:
            path = (root / key).resolve()
            return path if path.is_relative_to(root) and path.is_file() else None
        except (OSError, ValueError):  # too long a name, or one with a zero byte
            return None

    def keys(self) -> Iterator[str]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        yield from (path.relative_to(self._root).as_posix() for path in files)

    def delete(self, key: str) -> None:
        try:
            (self._root / key).unlink()
        except OSError as exc:
            raise Fault(404) from exc

    def url(self, key: str, style: str, expiry_s: int) -> str:
        return key if style == "path" else (self._root / key).resolve().as_uri()
