"""A store for benchmarks: Supabase's, each of whose uploads takes as long as it is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.servers.local_server import Answer, Request
from tests.servers.supabase import SupabaseStorage

BUCKET = "workspace-temp"


@dataclass(frozen=True, slots=True)
class Upload:
    """One file that was taken; the times are the clock's, in seconds."""

    path: str
    arrived: float
    answered: float


class Store(SupabaseStorage):
    """Storage that takes its time for each file, and notes when."""

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
        """The files of a job, in the order of their arrival."""
        with self.changed:
            found = [upload for upload in self._uploads if f"/{job}/" in upload.path]
        return sorted(found, key=lambda upload: upload.arrived)


def union_s(uploads: Sequence[Upload]) -> float:
    """The seconds in which at least one of them was under way."""
    total, until = 0.0, 0.0
    for upload in uploads:
        total += max(0.0, upload.answered - max(upload.arrived, until))
        until = max(until, upload.answered)
    return total
