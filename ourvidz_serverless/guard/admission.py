"""Whether a job is accepted, checked before anything is fetched or computed.

Each check writes its verdict to `context.audit`, which becomes the job's line of the audit trail.
"""

from __future__ import annotations

from collections.abc import Sequence

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import (
    ContentRefused,
    InvalidPrompt,
    RateLimited,
    WorkerUnavailable,
)
from ourvidz_serverless.guard import access, content_floor
from ourvidz_serverless.guard.rate_limits import RateLimits
from ourvidz_serverless.job import CheckedText, Job, Signs
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.settings import Settings

#: The most characters in all texts of one job, since the content floor reads each text several
#: times. A context of 32,768 tokens holds about 150,000 characters of English.
MAX_CHARACTERS = 200_000


#: Follows a verdict on the rate while Redis is away.
OWN_COUNT = ", by this worker's own count"


class Admission:
    """The checks that a job must pass before a worker runs it."""

    def __init__(self, settings: Settings, limits: RateLimits) -> None:
        self._settings, self._limits = settings, limits

    def check_key(self, api_key: str | None, context: JobContext) -> None:
        """Raise Unauthorized if the worker has keys and the job has none of them."""
        keys = self._settings.worker_api_key
        access.check(api_key, keys)
        if keys:
            context.audit["key"] = "accepted"

    def check(self, job: Job, context: JobContext) -> None:
        """Raise InvalidPrompt, RateLimited or ContentRefused if the job must be refused.

        Raises WorkerUnavailable if it cannot be counted, not even by this worker.
        """
        _check_length(job)
        if self._limits.rates and job.is_counted:
            self._check_rate(job, context)
        context.needs_consent = self._settings.require_reference_consent and bool(job.references)
        context.signs = _judge(job.texts, job, context)

    def _check_rate(self, job: Job, context: JobContext) -> None:
        try:
            self._limits.check(job.user_id, context.deadline)
            context.audit["rate"] = f"within{OWN_COUNT if self._limits.is_away else ''}"
        except RateLimited:
            context.audit["rate"] = f"over{OWN_COUNT if self._limits.is_away else ''}"
            raise
        except Fault as exc:
            context.audit["rate"] = f"not counted: {exc}"
            raise WorkerUnavailable("jobs cannot be counted at the moment") from exc


def check_generated(texts: Sequence[CheckedText], job: Job, context: JobContext) -> Signs:
    """The signs in texts from a model together with the job's own.

    Raises ContentRefused if they are refused.
    """
    if context.signs is None:
        context.signs = _judge(job.texts, job, context)
    return _judge([*job.texts, *texts], job, context, num_judged=len(job.texts))


def _judge(
    texts: Sequence[CheckedText], job: Job, context: JobContext, num_judged: int = 0
) -> Signs:
    """The signs in all texts together. The first `num_judged` texts were judged before.

    Raises ContentRefused if the texts are refused or lack consent, and the job's error if it was
    stopped.
    """
    verdict = content_floor.judge(
        texts[num_judged:],
        adult=job.adult,
        found=context.signs,
        check_stop=context.check,
    )
    context.audit |= {
        "content": verdict.rule or "passed",
        "content_list": verdict.version,
        "texts_sha256": content_floor.audit_hash(texts),
    }
    if verdict.refused:
        raise content_floor.refusal(verdict)
    if verdict.signs.sexual and context.needs_consent:
        _check_consent(job, context)
    return verdict.signs


def _check_consent(job: Job, context: JobContext) -> None:
    context.audit["consent"] = "given" if job.reference_consent else "missing"
    if not job.reference_consent:
        raise ContentRefused(
            "content policy: metadata.reference_consent must be true for a reference image in "
            "adult mode or beside a sexual text"
        )


def _check_length(job: Job) -> None:
    total = sum(len(each.text) for each in job.texts)
    if total > MAX_CHARACTERS:
        longest = max(job.texts, key=lambda each: len(each.text))
        raise InvalidPrompt(
            f"{longest.field}: the texts of a job should have at most {MAX_CHARACTERS} characters "
            f"together, and these have {total}"
        )
