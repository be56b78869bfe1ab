"""Poison pills: a job that takes its process with it is not swallowed for ever.

Each job in flight has a file in a folder that outlives the process, one byte for each time that
it was begun and not ended. Whoever ends, however it ends, removes the file. So what is left was
in flight when a process died; after the second death the job is refused.

It is refused as INVALID_PROMPT: the one code that says of the payload itself that sending it
again will not help. Every code that stands for the worker's trouble asks for a retry, which is
what made it a poison pill.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.job import Identity
from ourvidz_serverless.logs import log

DEATHS = 2

#: A mark's file name: a digest.
MARK = re.compile("[0-9a-f]{64}")

#: What is left of a job that nobody sent again is forgotten after a day.
FORGET_S = 24 * 3600


class Pills:
    """The marks of the jobs in flight; without a folder, none."""

    def __init__(self, folder: Path | None, clock: Callable[[], float] = time.time) -> None:
        """Raises ModelLoadError if the folder cannot be used."""
        self._folder, self._clock = folder, clock
        self._swallowed: set[Path] = set()
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                self._forget()
        except OSError as exc:
            why = exc.strerror or type(exc).__name__
            raise ModelLoadError(f"POISON_DIR: the folder cannot be used: {why}") from exc

    def swallow(self, identity: Identity) -> None:
        """Mark a job as begun; raises InvalidPrompt for one that killed its process twice."""
        mark = self._mark(identity)
        if mark is None:
            return
        try:
            if self._deaths(mark) >= DEATHS:
                raise InvalidPrompt(
                    "id: this job has ended its worker twice; it is not tried again"
                )
            with mark.open("ab") as file:
                file.write(b".")
            self._swallowed.add(mark)
        except OSError as exc:
            log.warning("job %s could not be marked: %s", identity.job_id, type(exc).__name__)

    def survived(self, identity: Identity) -> None:
        """Say that a job has ended, well or not; one that was never swallowed keeps its mark."""
        mark = self._mark(identity)
        if mark in self._swallowed:
            self._swallowed.discard(mark)
            with suppress(OSError):
                mark.unlink()

    def _mark(self, identity: Identity) -> Path | None:
        # A digest, so that no user's name and no key is written to the disk.
        parts = (identity.user_id, identity.api_key, identity.job_id)
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self._folder / name if self._folder else None

    def _deaths(self, mark: Path) -> int:
        """How many processes died with the job in flight, by a mark that is not too old."""
        if not mark.exists():
            return 0
        if self._is_old(mark.stat()):
            mark.unlink(missing_ok=True)
            return 0
        return mark.stat().st_size

    def _is_old(self, mark: os.stat_result) -> bool:
        return mark.st_mtime < self._clock() - FORGET_S

    def _forget(self) -> None:
        assert self._folder
        with os.scandir(self._folder) as marks, suppress(FileNotFoundError):
            for mark in marks:
                # Delete only marks: the folder may hold files of others.
                if MARK.fullmatch(mark.name) and self._is_old(mark.stat()):
                    os.unlink(mark)
