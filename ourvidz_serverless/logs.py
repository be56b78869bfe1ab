"""One line when a job starts, one when it ends, one for anything odd between.

No payload, no prompt, no secret: what is logged is the type, the verdict and the time.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

from ourvidz_serverless.payloads import Document, Job

log = logging.getLogger("ourvidz")
audit = logging.getLogger("ourvidz.audit")


def configure(level: str) -> None:
    """Send our lines to stderr at `level`, and let no library print a prompt."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    log.setLevel(level)
    # The audit trail is not a matter of taste.
    audit.setLevel(logging.INFO)
    # diffusers warns with the very words of a prompt that CLIP's 77 tokens would cut off.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def started(job: Job) -> None:
    log.info("→ %s(%s)", job.type, job.id)


def ended(document: Document, job: Job | None, seconds: float) -> None:
    """Say how the job ended, and write its line of the audit trail."""
    failure = document.failure
    what = f"{job.type if job else 'payload'}({document.job_id})"
    if failure:
        log.info("%6.2fs ✗ %s %s: %s", seconds, what, failure.code, failure.message)
    else:
        log.info("%6.2fs ← %s %d assets", seconds, what, len(document.assets))
    _audit(
        "job",
        job,
        job_id=document.job_id,
        status=document.status,
        code=failure.code if failure else None,
        seconds=round(seconds, 3),
    )


def refused(job: Job, verdict: str, text_hash: str) -> None:
    """Write who was refused what by the content floor: a rule and a hash, never the text."""
    _audit("content", job, job_id=job.id, verdict=verdict, sha256=text_hash)


def bug(job_id: str, error: Exception) -> None:
    """Say where an unforeseen error came from, not what it says: that may quote a prompt."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
    way = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    log.error("job %s met a bug: %s at %s", job_id, type(error).__name__, way)


def _audit(event: str, job: Job | None, **facts: object) -> None:
    who = {"user_id": job.user_id, "type": job.type} if job else {}
    audit.info(json.dumps({"audit": event, **who, **facts}))
