"""The log: one line when a job starts, one when it ends, one for anything unusual in between.

A line has the type, the verdict and the time; never a payload, a prompt or a secret.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ourvidz_serverless.document import Document
from ourvidz_serverless.job import Job

log = logging.getLogger("ourvidz")
audit_trail = logging.getLogger("ourvidz.audit")


#: Characters that begin a new line in some viewer of logs.
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _OneLine(logging.Formatter):
    """Writes a record as one line, so that no path or name in it can forge a second line."""

    def format(self, record: logging.LogRecord) -> str:
        return _BREAKS.sub(lambda char: ascii(char[0])[1:-1], super().format(record))


def configure(level: str, audits: bool = True) -> None:
    """Send our lines to stderr at `level`, and keep libraries from printing prompts.

    `audits` is False only for one job of a person at a terminal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(level)
    # The audit trail is complete at every level.
    audit_trail.setLevel(logging.INFO if audits else logging.WARNING)
    # diffusers warns about prompts longer than CLIP's 77 tokens, and quotes them.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def started(job: Job) -> None:
    log.info("→ %s(%s)", job.type, job.id)


def joined(job_id: str) -> None:
    log.info("↻ %s arrived again, and joins itself", job_id)


def ended(document: Document, job: Job | None, seconds: float, audit: Mapping[str, Any]) -> None:
    """Log how the job ended, and write its line of the audit trail.

    `audit` has the verdicts and hashes that the job collected, and no text.
    """
    failure = document.failure
    what = f"{job.type if job else 'payload'}({document.job_id})"
    if failure:
        log.info("%6.2fs ✗ %s %s: %s", seconds, what, failure.code, failure.message)
    else:
        log.info("%6.2fs ← %s %d assets", seconds, what, len(document.assets))
    who = {"user_id": job.user_id, "type": job.type, "adult": job.adult} if job else {}
    facts = {
        "status": document.status,
        "code": failure.code if failure else None,
        "seconds": round(seconds, 3),
        "timings": document.metadata.get("timings", {}),
    }
    audit_trail.info(
        json.dumps({"audit": "job", "job_id": document.job_id, **who, **facts, **audit})
    )


def bug(job_id: str, error: Exception) -> None:
    """Log the place of an unforeseen error, without its message, which may quote a prompt."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
    way = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    log.error("job %s met a bug: %s at %s", job_id, type(error).__name__, way)
