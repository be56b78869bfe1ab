"""The life of a job: `Worker.run`, and the steps that it names."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ourvidz_serverless import jobs, logs, models
from ourvidz_serverless.context import Emit, JobContext, Report, Stop, discard
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.outbox import Outbox
from ourvidz_serverless.document import Asset, Document, Failure
from ourvidz_serverless.errors import DeviceLost, JobError, WorkerUnavailable
from ourvidz_serverless.guard.admission import Admission
from ourvidz_serverless.guard.fair_semaphore import FairSemaphore
from ourvidz_serverless.guard.poison_jobs import PoisonJobs
from ourvidz_serverless.guard.rate_limits import RateLimits
from ourvidz_serverless.job import Job
from ourvidz_serverless.jobs.admin import AdminJob
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.logs import log
from ourvidz_serverless.models import Model
from ourvidz_serverless.models.loading.readahead import ReadAhead
from ourvidz_serverless.models.memory import garbage
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.safety import PictureClassifier
from ourvidz_serverless.output import Output, Text, Video
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.telemetry import Observed, open_telemetry
from ourvidz_serverless.worker.administration import Administration
from ourvidz_serverless.worker.device_cost import DeviceCost
from ourvidz_serverless.worker.job_files import JobFiles
from ourvidz_serverless.worker.job_table import JobTable
from ourvidz_serverless.worker.picture_check import PictureCheck
from ourvidz_serverless.worker.state import Phase, WorkerState


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker uses beside its models."""

    files: JobFiles
    callback: Callback
    admission: Admission
    poison_jobs: PoisonJobs
    #: They look at the pictures of jobs.
    classifiers: tuple[PictureClassifier, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Parts:
        """The parts that the settings ask for; raises ModelLoadError if a setting is invalid."""
        endpoint = os.environ.get("RUNPOD_ENDPOINT_ID") or "local"
        return cls(
            JobFiles.of(settings),
            Callback.of(settings),
            Admission(settings, RateLimits.of(settings, endpoint)),
            PoisonJobs(settings.poison_dir),
        )


class Worker:
    """Runs jobs on its models; each job ends in one document, posted and returned."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Model],
        parts: Parts,
        worker_id: str,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._models, self._worker_id = settings, models, worker_id
        self._files, self._admission = parts.files, parts.admission
        self._poison_jobs, self._clock = parts.poison_jobs, clock
        self._classifiers = parts.classifiers
        self._outbox = Outbox(parts.callback, parts.files.storage, clock)
        # Places for jobs that need the device alone: for those between preparation and delivery,
        # and for the one that computes. A job without a place holds nothing but its payload.
        self._active = FairSemaphore(max(settings.exclusive_places, 1))
        self._device = FairSemaphore(1)
        self._cost = DeviceCost(settings.gpu_price_per_second, clock)
        self._jobs, self._state = JobTable(), WorkerState()
        self._telemetry = open_telemetry(
            settings, Observed(worker_id, lambda: self._jobs.counts()["processing"], ledger)
        )
        for model in models.values():
            if on_lost := getattr(model, "on_lost", None):
                on_lost(self._state.lose_device)
        self._administration = Administration(
            settings, worker_id, tuple(models), self._jobs, self._state, ledger
        )

    @classmethod
    def of(cls, settings: Settings, reading: ReadAhead | None = None) -> Worker:
        """The worker that the settings ask for, with its models loaded.

        `reading` reads the models' files in the meantime.
        """
        # Before the models, which take minutes to load, so that an invalid setting shows at once.
        parts, ledger = Parts.of(settings), models.open_ledger(settings)
        if reading:
            ledger.wait_for_files = reading.wait
        worker_id = os.environ.get("RUNPOD_POD_ID") or socket.gethostname()
        parts = replace(parts, classifiers=models.load_classifiers(settings, ledger))
        loaded = models.load(settings, ledger)
        garbage.leave_out_what_lives()
        return cls(settings, loaded, parts, worker_id, ledger)

    def run(
        self,
        envelope: Envelope,
        stop: Stop,
        report: Report,
        emit: Emit = discard,
        announces: bool = True,
    ) -> Document:
        """The document that ends a job: posted, then returned. Never raises.

        `stop` ends the job at its next step. `report` receives its progress, and `emit` the parts
        of its reply. No callback is posted if `announces` is false. A second delivery of a running
        job returns the document of the first.
        """
        bounds = envelope.bounds(self._settings)
        context = JobContext(stop, report, bounds, self._clock, emit)

        def post(document: Document) -> Document:
            read_job = functools.partial(envelope.job_or_none, self._settings)
            return self._outbox.post(document, envelope.callback_url, read_job, context)

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
        outcome: tuple[Asset, ...] | Failure = ()
        announces = post is not None and self._settings.callback_processing
        context.trace = self._telemetry.begin(envelope, context)
        with ExitStack() as places:
            try:
                with context.trace.span("admit"):
                    self._admission.check_key(envelope.api_key, context)
                    job = envelope.job(self._settings)
                    logs.started(job)
                    self._jobs.began(envelope.identity, job.type, context)
                    model = self._admit(job, context)
                if isinstance(job, AdminJob):
                    self._administer(job, envelope, context, announces)
                elif model:
                    places.enter_context(self._place(self._active, job, context))
                    self._begin(job, envelope, context, announces)
                    outcome = self._compute(job, model, context)
            except Exception as exc:
                outcome = _failure(exc, envelope.job_id, context)
            is_last = isinstance(outcome, Failure) and outcome.ends_worker
            if is_last:
                # While this job still has its place, so that no other job begins.
                self._state.lose_device()
        document = context.document(envelope.job_id, self._worker_id, outcome)
        document = post(document) if post else document
        self._telemetry.end(job, document, context)
        logs.ended(document, job, context.elapsed_s, context.audit)
        if not is_last:
            self._poison_jobs.mark_finished(envelope.identity)
        self._jobs.ended(envelope.identity, document, context.elapsed_s)
        return document

    def _admit(self, job: Job, context: JobContext) -> Model | None:
        """The model that serves a job, after every check that may refuse the job.

        None for an administrator's job, which needs no model.
        """
        self._state.check_open()
        model = None
        if not isinstance(job, AdminJob):
            model = jobs.model_of(job, self._models)
            self._state.check_device()
        self._admission.check(job, context)
        return model

    def _begin(self, job: Job, envelope: Envelope, context: JobContext, announces: bool) -> None:
        """Mark a job as begun; raises WorkerUnavailable if the device failed while it waited."""
        self._state.check_device()
        self._poison_jobs.mark_started(envelope.identity)
        if announces:
            self._announce(job, context)

    def _announce(self, job: Job, context: JobContext) -> None:
        document = Document(job.id, self._worker_id, "processing")
        self._outbox.announce(document, job.callback_url, context)

    def _compute(self, job: Job, model: Model, context: JobContext) -> tuple[Asset, ...]:
        """The job's assets: prepared, computed and delivered."""
        with context.stage("fetch"):
            images = self._files.references(job, context)
            jobs.prepare(job, model, context)
        with self._files.delivery(job, context) as delivery:
            with (
                self._place(self._device, job, context),
                context.stage("generate"),
                self._cost.of(context),
            ):
                for output in self._outputs(job, model, images, context):
                    delivery.submit(output)
            with context.stage("deliver"):
                return delivery.assets(context.check)

    def _outputs(
        self, job: Job, model: Model, images: Mapping[str, Image.Image], context: JobContext
    ) -> Iterator[Output | Text | Video]:
        """The job's outputs that may be delivered. Raises ContentRefused for the others."""
        outputs = jobs.run(job, model, images, context)
        if not self._classifiers:
            return outputs
        check = PictureCheck(self._classifiers, self._settings, job, context)
        check.look_at_references(images)
        return check.passed(outputs)

    def _administer(
        self, job: AdminJob, envelope: Envelope, context: JobContext, announces: bool
    ) -> None:
        """Answer an administrator; the document has the answer as its `result`."""
        if announces:
            self._announce(job, context)
        with context.stage("generate"):
            answer = self._administration.answer(job, envelope.api_key, context)
        context.reply["result"] = answer

    def _place(
        self, places: FairSemaphore, job: Job, context: JobContext
    ) -> AbstractContextManager[None]:
        """A place for a job that needs the device alone; other jobs need none."""
        return places.place(context) if jobs.is_exclusive(job.type) else nullcontext()

    def keep_result(self, event: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
        """Store a result that the platform refused beside the job's assets; the key of the file."""
        envelope = Envelope.of(event, self._settings.families)
        read_job = functools.partial(envelope.job_or_none, self._settings)
        return self._outbox.keep_result(result, envelope.job_id, read_job)

    def health(self) -> dict[str, Any]:
        """The answer of `admin_utilities` to `health`; it needs no key."""
        return self._administration.health()

    def check_device(self) -> None:
        """Compute something on each model's device; raises RuntimeError if that fails."""
        for model in self._models.values():
            model.device.check()

    @property
    def is_lost(self) -> bool:
        """Whether the device failed, so that the worker can do no further job."""
        return self._state.is_lost

    def close(self, grace_s: float) -> None:
        """Refuse further jobs, and stop those that still run after `grace_s` seconds."""
        self._state.reach(Phase.CLOSED)
        self.close_after(grace_s)

    def close_after(self, grace_s: float) -> None:
        """Run jobs for `grace_s` more seconds; then refuse new ones, and stop those that run."""
        self._state.reach(Phase.LEAVING)
        log.info("shutting down; what runs has %g s to finish", grace_s)
        timer = threading.Timer(grace_s, self._end_grace)
        timer.daemon = True
        timer.start()

    def flush(self) -> None:
        """Send the telemetry that is left, within a few seconds. Call it after the last job."""
        self._telemetry.close()

    def _end_grace(self) -> None:
        self._state.reach(Phase.CLOSED)
        self._outbox.end_grace()
        shutdown = WorkerUnavailable("the worker is shutting down")
        self._jobs.stop_all(lambda stop: stop.set(shutdown))


def _failure(error: Exception, job_id: str, context: JobContext) -> Failure:
    """How an error ends its job. The Failure does not hold the error, and so none of its frames."""
    if not isinstance(error, JobError):
        logs.bug(job_id, error)
        return Failure.of(models.as_job_error(error))
    # The job's Stop keeps this exception. Drop its traceback, or the job's tensors stay in memory.
    error.__traceback__ = None
    # A stopped job ends with its stop, whatever failed after it. A lost device is always reported.
    is_lost = isinstance(error, DeviceLost)
    return Failure.of(error if is_lost else context.stop_reason or error)
