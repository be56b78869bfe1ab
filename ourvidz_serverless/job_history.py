"""The last jobs of this worker, by user, key and id: each one's state, never its contents."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.document import Document
from ourvidz_serverless.job import Identity

#: Ended jobs that are remembered; those under way always are.
MOST_REMEMBERED = 1000


class Roster:
    """Safe to read from any thread, and never waits for a job."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[Identity, tuple[str, JobContext]] = {}
        self._ended: OrderedDict[Identity, Mapping[str, Any]] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def began(self, identity: Identity, job_type: str, context: JobContext) -> None:
        """A job is under way from now on."""
        with self._lock:
            self._under_way[identity] = (job_type, context)

    def ended(self, identity: Identity, job_type: str, document: Document, seconds: float) -> None:
        """A job has ended with a document, which is not kept."""
        facts: dict[str, Any] = {"status": document.status, "type": job_type}
        facts["processing_time"] = round(seconds, 3)
        if document.failure:
            facts["error"] = document.failure.as_dict()
        with self._lock:
            self._under_way.pop(identity, None)
            self._ended[identity] = facts
            self._ended.move_to_end(identity)
            self._counts[document.status] += 1
            if len(self._ended) > MOST_REMEMBERED:
                self._ended.popitem(last=False)

    def find(self, identity: Identity) -> Mapping[str, Any] | None:
        """What is known of a job; None if this worker has not had it, or has forgotten it."""
        with self._lock:
            found = self._under_way.get(identity)
            if found is None:
                return self._ended.get(identity)
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
