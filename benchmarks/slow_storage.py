"""Supabase's storage for benchmarks: each upload takes a given time, and its times are recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.servers.local_server import Answer, Request
from tests.servers.supabase import SupabaseStorage

BUCKET = "workspace-temp"


@dataclass(frozen=True, slots=True)
class Upload:
    """One stored file. Times are `time.time()`, in seconds."""

    path: str
    arrived: float
    answered: float


class SlowStorage(SupabaseStorage):
    """Storage that answers each request after `upload_s` seconds and records when."""

    def __init__(self, upload_s: float) -> None:
        super().__init__()
        self.upload_s = upload_s
        self._uploads: list[Upload] = []

    @property
    def objects_url(self) -> str:
        return f"{self.url}/storage/v1/object/{BUCKET}"

    def answer(self, request: Request) -> Answer:
        answer = super().answer(request)
        time.sleep(self.upload_s)
        with self.changed:
            self._uploads.append(Upload(request.path, request.at, time.time()))
        return answer

    def uploads_of(self, job: str) -> list[Upload]:
        """The files of a job, in the order in which they arrived."""
        with self.changed:
            found = [upload for upload in self._uploads if f"/{job}/" in upload.path]
        return sorted(found, key=lambda upload: upload.arrived)


def union_s(uploads: Sequence[Upload]) -> float:
    """The seconds during which at least one upload was running. They are sorted by arrival."""
    total, until = 0.0, 0.0
    for upload in uploads:
        total += max(0.0, upload.answered - max(upload.arrived, until))
        until = max(until, upload.answered)
    return total
