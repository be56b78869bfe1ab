"""The life of a job: `Worker.run`, and the steps that it names."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ourvidz_serverless import jobs, logs, models
from ourvidz_serverless.administration import Administration, versions
from ourvidz_serverless.context import Emit, JobContext, Report, Stop, discard
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.outbox import Outbox
from ourvidz_serverless.document import Asset, Document, Failure, check_result
from ourvidz_serverless.errors import DeviceLost, InternalError, JobError, WorkerUnavailable
from ourvidz_serverless.guard.admission import Admission
from ourvidz_serverless.guard.fair_semaphore import FairSemaphore
from ourvidz_serverless.guard.poison_jobs import PoisonJobs
from ourvidz_serverless.guard.rate_limits import RateLimits
from ourvidz_serverless.job import Job
from ourvidz_serverless.job_files import JobFiles
from ourvidz_serverless.job_table import JobTable
from ourvidz_serverless.jobs.admin import AdminJob
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.loading.readahead import ReadAhead
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker_state import Phase, WorkerState


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker uses beside its models."""

    files: JobFiles
    callback: Callback
    admission: Admission
    poison_jobs: PoisonJobs

    @classmethod
    def of(cls, settings: Settings) -> Parts:
        """The parts that the environment asks for; raises ModelLoadError for what is invalid."""
        endpoint = os.environ.get("RUNPOD_ENDPOINT_ID") or "local"
        return cls(
            JobFiles.of(settings),
            Callback.of(settings),
            Admission(settings, RateLimits.of(settings, endpoint)),
            PoisonJobs(settings.poison_dir),
        )


class Worker:
    """Runs jobs on the models it was given, and reports truthfully what became of each."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Any],
        parts: Parts,
        worker_id: str,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._models, self._worker_id = settings, models, worker_id
        self._files, self._admission = parts.files, parts.admission
        self._poison_jobs, self._clock = parts.poison_jobs, clock
        self._outbox = Outbox(parts.callback, parts.files.storage, clock)
        # Jobs that need the device alone: those that are prepared, computed or delivered, and the
        # one of them that computes. Until a job has its place it holds nothing but its payload.
        self._at_work = FairSemaphore(max(settings.exclusive_places, 1))
        self._computing = FairSemaphore(1)
        self._jobs, self._state = JobTable(), WorkerState()
        self._administration = Administration(
            settings, worker_id, tuple(models), self._jobs, self._state, ledger
        )

    @classmethod
    def of(cls, settings: Settings, reading: ReadAhead | None = None) -> Worker:
        """The worker that the environment asks for, with its models loaded.

        `reading` is what has been reading their files meanwhile.
        """
        # Before the models, which take minutes, so that an error shows at once.
        parts, ledger = Parts.of(settings), models.open_ledger(settings)
        if reading:
            ledger.wait_for_files = reading.wait
        worker_id = os.environ.get("RUNPOD_POD_ID") or socket.gethostname()
        return cls(settings, models.load(settings, ledger), parts, worker_id, ledger)

    def run(
        self,
        envelope: Envelope,
        stop: Stop,
        report: Report,
        emit: Emit = discard,
        announces: bool = True,
    ) -> Document:
        """The document that ends a job: posted, then returned. Never raises.

        `stop` ends the job at its next step. `report` is called with its progress, and `emit`
        with what the job streams. With `announces` false no callback is posted. A second delivery
        of a job that is under way returns the first one's document.
        """
        bounds = envelope.bounds(self._settings)
        context = JobContext(stop, report, bounds, self._clock, emit)

        def post(document: Document) -> Document:
            job = envelope.job_or_none(self._settings)
            return self._outbox.post(document, envelope.callback_url, job, context)

        return self._jobs.run(
            envelope.identity,
            stop,
            lambda: self._run(envelope, context, post if announces else None),
            on_join=lambda: logs.joined(envelope.job_id),
            post=post if announces else None,
        )

    def _run(
        self,
        envelope: Envelope,
        context: JobContext,
        post: Callable[[Document], Document] | None,
    ) -> Document:
        job: Job | None = None
        assets: tuple[Asset, ...] = ()
        failure: Failure | None = None
        with ExitStack() as places:
            try:
                self._admission.check_key(envelope.api_key, context)
                job = envelope.job(self._settings)
                logs.started(job)
                self._jobs.began(envelope.identity, job.type, context)
                if isinstance(job, AdminJob):
                    self._administer(job, envelope, context)
                else:
                    model = self._admit(job, context)
                    places.enter_context(self._place(self._at_work, job, context))
                    self._begin(job, envelope, context, announces=post is not None)
                    assets = self._compute(job, model, context)
            except JobError as exc:
                # The failure alone: an exception that lives on pins the tensors of its frames.
                failure = Failure.of(_cause(exc, context))
                # The Stop keeps this exception alive. Drop its traceback, or the job's tensors
                # stay in memory.
                exc.__traceback__ = None
            except Exception as exc:
                logs.bug(envelope.job_id, exc)
                failure = Failure.of(models.as_job_error(exc))
            if failure and failure.ends_worker:
                # Before the next job may begin.
                self._state.lose_device()
        document = self._document(envelope.job_id, assets, failure, context)
        document = post(document) if post else document
        logs.ended(document, job, context.elapsed_s, context.audit)
        if not (failure and failure.ends_worker):
            self._poison_jobs.mark_finished(envelope.identity)
        self._jobs.ended(envelope.identity, document, context.elapsed_s)
        return document

    def _admit(self, job: Job, context: JobContext) -> Any:
        """The model that serves a job, once every check has passed."""
        self._state.check_open()
        model = jobs.model_of(job, self._models)
        if model is None:
            served = ", ".join(self._models)
            raise WorkerUnavailable(f"{job.type} is not served here; this endpoint serves {served}")
        self._state.check_device()
        self._admission.check(job, context)
        return model

    def _begin(self, job: Job, envelope: Envelope, context: JobContext, announces: bool) -> None:
        """Mark a job as begun; raises WorkerUnavailable if the device failed while it waited."""
        self._state.check_device()
        self._poison_jobs.mark_started(envelope.identity)
        if announces and self._settings.callback_processing:
            document = Document(job.id, self._worker_id, "processing")
            self._outbox.announce(document, job.callback_url, context)

    def _compute(self, job: Job, model: Any, context: JobContext) -> tuple[Asset, ...]:
        """The job's assets: prepared, computed and delivered."""
        with context.stage("fetch"):
            images = self._files.references(job, context)
            jobs.prepare(job, model, context)
        with self._files.delivery(job, context) as delivery:
            with self._place(self._computing, job, context), context.stage("generate"):
                for output in jobs.run(job, model, images, context):
                    delivery.submit(output)
            with context.stage("deliver"):
                return delivery.assets(context.check)

    def _administer(self, job: AdminJob, envelope: Envelope, context: JobContext) -> None:
        """Answer an administrator; the answer stands in the document's `result`."""
        self._state.check_open()
        self._admission.check(job, context)
        with context.stage("generate"):
            answer = self._administration.answer(job, envelope.api_key, context)
        context.reply["result"] = answer

    @contextmanager
    def _place(self, places: FairSemaphore, job: Job, context: JobContext) -> Iterator[None]:
        """A place for a job that needs the device alone, in order of arrival; others need none."""
        if not jobs.is_exclusive(job.type):
            yield
            return
        with places.place(context):
            yield

    def _document(
        self,
        job_id: str,
        assets: tuple[Asset, ...],
        failure: Failure | None,
        context: JobContext,
    ) -> Document:
        metadata = {
            **context.metadata,
            "processing_time": round(context.elapsed_s, 3),
            "timings": context.timings,
            "versions": versions(),
        }
        if context.warnings:
            metadata["warnings"] = context.warnings
        if failure:
            return Document(job_id, self._worker_id, "failed", (), metadata, failure)
        document = Document(
            job_id, self._worker_id, "completed", assets, metadata, reply=context.reply
        )
        try:
            check_result(document)
        except InternalError as exc:
            return Document(job_id, self._worker_id, "failed", failure=Failure.of(exc))
        return document

    def keep_result(self, event: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
        """Store a job's result, which the platform did not take, beside its assets; its key."""
        envelope = Envelope.of(event)
        job = envelope.job_or_none(self._settings)
        return self._outbox.keep_result(result, envelope.job_id, job)

    # --- its state ---

    def health(self) -> dict[str, Any]:
        """What `admin_utilities` answers to `health`; it needs no key."""
        return self._administration.health()

    def check_device(self) -> None:
        """Compute something on each model's device; raises RuntimeError if that fails."""
        for model in self._models.values():
            model.device.check()

    @property
    def is_lost(self) -> bool:
        """Whether its device failed, so that it can do no further job."""
        return self._state.is_lost

    def close(self, grace_s: float) -> None:
        """Take no further job, and stop after `grace_s` seconds those that still run."""
        self._state.reach(Phase.CLOSED)
        self.close_after(grace_s)

    def close_after(self, grace_s: float) -> None:
        """Take and run jobs for `grace_s` seconds more; then take none, and stop those that run."""
        self._state.reach(Phase.LEAVING)
        log.info("shutting down; what runs has %g s to finish", grace_s)
        timer = threading.Timer(grace_s, self._end_grace)
        timer.daemon = True
        timer.start()

    def _end_grace(self) -> None:
        self._state.reach(Phase.CLOSED)
        self._outbox.end_grace()
        shutdown = WorkerUnavailable("the worker is shutting down")
        self._jobs.stop_all(lambda stop: stop.set(shutdown))


def _cause(error: JobError, context: JobContext) -> JobError:
    """What ended a job. For a stopped job that is the stop, whatever failed because of it.

    A lost device ends the worker, whoever stopped the job.
    """
    return error if isinstance(error, DeviceLost) else context.stop_reason or error
