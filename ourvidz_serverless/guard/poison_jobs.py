"""Poison jobs, which kill their process: a job that did so twice is refused.

Each running job has a file in a folder that outlives the process, with one byte for each time that
the job began. The worker removes the file when the job ends, however it ends. A file that is left
belongs to a job that was running when its process died.

The refusal has the code INVALID_PROMPT, which tells the caller not to send the same payload again.
All codes for a worker's own failures ask for a retry.
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

#: A job that killed this many processes is refused.
MAX_DEATHS = 2

#: A mark's file name: a digest.
MARK = re.compile("[0-9a-f]{64}")

#: A mark that is older than a day is removed. In seconds.
MAX_MARK_AGE_S = 24 * 3600


class PoisonJobs:
    """Marks the running jobs; without a folder it does nothing."""

    def __init__(self, folder: Path | None, clock: Callable[[], float] = time.time) -> None:
        """Raises ModelLoadError if the folder cannot be used."""
        self._folder, self._clock = folder, clock
        self._started: set[Path] = set()
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                self._remove_old_marks()
        except OSError as exc:
            raise ModelLoadError(f"POISON_DIR: the folder cannot be used: {exc.strerror}") from exc

    def mark_started(self, identity: Identity) -> None:
        """Mark a job as begun; raises InvalidPrompt for one that killed its process twice."""
        mark = self._mark(identity)
        if mark is None:
            return
        try:
            if self._deaths(mark) >= MAX_DEATHS:
                raise InvalidPrompt(
                    "id: this job has ended its worker twice; it is not tried again"
                )
            with mark.open("ab") as file:
                file.write(b".")
            self._started.add(mark)
        except OSError as exc:
            log.warning("job %s could not be marked: %s", identity.job_id, type(exc).__name__)

    def mark_finished(self, identity: Identity) -> None:
        """Remove the mark of a job that has ended, whether it completed or failed."""
        mark = self._mark(identity)
        if mark in self._started:
            self._started.discard(mark)
            with suppress(OSError):
                mark.unlink()

    def _mark(self, identity: Identity) -> Path | None:
        # A digest, so that no user id and no key is written to the disk.
        parts = (identity.user_id, identity.api_key, identity.job_id)
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self._folder / name if self._folder else None

    def _deaths(self, mark: Path) -> int:
        """The number of processes that died while the job ran; an old mark counts as none."""
        if not mark.exists():
            return 0
        if self._is_old(mark.stat()):
            mark.unlink(missing_ok=True)
            return 0
        return mark.stat().st_size

    def _is_old(self, mark: os.stat_result) -> bool:
        return mark.st_mtime < self._clock() - MAX_MARK_AGE_S

    def _remove_old_marks(self) -> None:
        assert self._folder
        with os.scandir(self._folder) as marks, suppress(FileNotFoundError):
            for mark in marks:
                # Delete only marks: the folder may hold other files.
                if MARK.fullmatch(mark.name) and self._is_old(mark.stat()):
                    os.unlink(mark)
