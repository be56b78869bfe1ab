"""The last step of a job: post its document, and store a document that could not be delivered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ourvidz_serverless import logs
from ourvidz_serverless.context import JobContext
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.delivery.callback import DELIVERY_S, Callback
from ourvidz_serverless.delivery.storage.base import Storage, upload
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import JobError, Unauthorized
from ourvidz_serverless.job import Job
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.retries import Fault

#: How long the tries to store an undelivered document may take, in seconds. The job has ended, and
#: its caller gets the result only after that.
KEEP_S = 30.0

#: How long a post, or the storing of a document, may take if the job was stopped, or if its time
#: is over. In seconds.
LAST_WORD_S = 10.0


#: Parses the payload of a job, if that was not done before; None if the payload is not valid.
ReadJob = Callable[[], Job | None]


class Outbox:
    """Posts documents, and stores those that could not be delivered. No method raises.

    `storage_of` gives the storage of a job, or the worker's storage for None: then the payload
    could not be read.
    """

    def __init__(
        self,
        callback: Callback,
        storage_of: Callable[[Job | None], Storage],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callback, self._storage_of, self._clock = callback, storage_of, clock
        self._is_grace_over = threading.Event()

    def end_grace(self) -> None:
        """The worker shuts down: from now on nothing here takes longer than `LAST_WORD_S`."""
        self._is_grace_over.set()

    def announce(self, document: Document, url: str | None, context: JobContext) -> None:
        """Post that a job has begun. A failure does not matter: it is logged.

        The post counts towards the job's time, and ends when the job is stopped.
        """
        reason = _tried(
            document.job_id,
            lambda: self._callback.post(document, url, context.deadline, context.trace),
        )
        if reason:
            log.warning("job %s could not be announced: %s", document.job_id, reason)

    def post(
        self, document: Document, url: str | None, read_job: ReadJob, context: JobContext
    ) -> Document:
        """Post the document that ends a job, to the payload's own `url` if its host is allowed.

        A document that cannot be delivered is stored, and `metadata.callback` says why and where.
        """
        has_no_key = _has_no_key(document.failure and document.failure.code)
        url = None if has_no_key else url
        deadline = self._deadline(context, DELIVERY_S)
        reason = _tried(
            document.job_id, lambda: self._callback.post(document, url, deadline, context.trace)
        )
        if reason is None:
            return document
        log.warning("callback of job %s was not delivered: %s", document.job_id, reason)
        # With the payload's own URL: the command `replay` reads it here.
        body = {**document.callback(), **({"callback_url": url} if url else {})}
        job = None if has_no_key else read_job()
        key = _key(document.job_id, job, f"callback.{document.status}.json")
        kept = self._store(key, body, document.job_id, job, self._deadline(context, KEEP_S))
        facts = {"delivered": False, "reason": reason, "kept": kept}
        return replace(document, metadata={**document.metadata, "callback": facts})

    def keep_result(self, result: Mapping[str, Any], job_id: str, read_job: ReadJob) -> str | None:
        """Store a result that the platform did not take; its key, or None if that failed."""
        has_no_key = _has_no_key((result.get("failure") or {}).get("code"))
        job = None if has_no_key else read_job()
        began = self._clock()

        def remaining_s() -> float:
            most_s = LAST_WORD_S if self._is_grace_over.is_set() else KEEP_S
            return most_s - (self._clock() - began)

        key = _key(job_id, job, f"result.{result.get('status', 'failed')}.json")
        return self._store(key, result, job_id, job, Deadline(remaining_s))

    def _store(
        self,
        key: str,
        document: Mapping[str, Any],
        job_id: str,
        job: Job | None,
        deadline: Deadline,
    ) -> str | None:
        """Store a document under this key. Gives the key, or None if that failed."""

        def put() -> None:
            body = json.dumps(document).encode()
            store = self._storage_of(job)
            upload(store, key, body, "application/json", deadline=deadline)

        reason = _tried(job_id, put)
        if reason:
            log.warning("the document of job %s could not be stored: %s", job_id, reason)
        return None if reason else key

    def _deadline(self, context: JobContext, most_s: float) -> Deadline:
        """The deadline of one step after a job's end: `most_s`, within the job's own time.

        `LAST_WORD_S` if the job was stopped, or if its time or the grace is over.
        """
        began = self._clock()

        def remaining_s() -> float:
            spent_s = self._clock() - began
            own_s = 0.0 if self._is_grace_over.is_set() else context.remaining_s
            return min(most_s - spent_s, max(own_s, LAST_WORD_S - spent_s))

        # A stop ends a wait. A stop that is already set would end every wait at once.
        return Deadline(remaining_s, time.sleep if context.stop.error else context.stop.wait)


def _has_no_key(code: object) -> bool:
    """Whether a job was refused for its key. Its payload must not choose where its refusal goes."""
    return code == Unauthorized.code


def _key(job_id: str, job: Job | None, name: str) -> str:
    """Where a document of this name is stored: beside the job's assets."""
    # A payload that could not be read has no user, and so no user's folder.
    return f"{job.user_id}/{job.id}/{name}" if job else f"undelivered/{job_id}/{name}"


def _tried(job_id: str, call: Callable[[], None]) -> str | None:
    """Why a call failed, in words that a caller may read; None if it did not. Never raises."""
    try:
        call()
    except (Fault, JobError) as exc:
        return str(exc)
    except Exception as exc:
        logs.bug(job_id, exc)
        return "an internal error; the worker's log says where"
    return None
