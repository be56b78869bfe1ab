"""The last jobs of this worker, by user and id: where each is, never what it holds."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.payloads import Document, Job

#: Ended jobs that are remembered; those under way always are.
MOST_REMEMBERED = 1000


class Roster:
    """Safe to read from any thread, and never waits for a job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[tuple[str, str], tuple[str, JobContext]] = {}
        self._ended: OrderedDict[tuple[str, str], Mapping[str, Any]] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def began(self, job: Job, context: JobContext) -> None:
        """A job is under way from now on."""
        with self._lock:
            self._under_way[job.user_id, job.id] = (job.type, context)

    def ended(self, job: Job, document: Document, seconds: float) -> None:
        """A job has ended with a document, which is not kept."""
        facts: dict[str, Any] = {"status": document.status, "type": job.type}
        facts["processing_time"] = round(seconds, 3)
        if document.failure:
            facts["error"] = document.failure.as_dict()
        with self._lock:
            self._under_way.pop((job.user_id, job.id), None)
            self._ended[job.user_id, job.id] = facts
            self._ended.move_to_end((job.user_id, job.id))
            self._counts[document.status] += 1
            if len(self._ended) > MOST_REMEMBERED:
                self._ended.popitem(last=False)

    def find(self, user_id: str, job_id: str) -> Mapping[str, Any] | None:
        """What is known of a user's job; None where this worker has not had it, or forgot it."""
        with self._lock:
            found = self._under_way.get((user_id, job_id))
            if found is None:
                return self._ended.get((user_id, job_id))
        kind, context = found
        facts: dict[str, Any] = {"status": "processing", "type": kind, **context.progress}
        return {**facts, "processing_time": round(context.elapsed_s, 3)}

    def counts(self) -> dict[str, int]:
        """How many jobs are under way, and how many ended in which way."""
        with self._lock:
            return {
                "processing": len(self._under_way),
                "completed": self._counts["completed"],
                "failed": self._counts["failed"],
            }
