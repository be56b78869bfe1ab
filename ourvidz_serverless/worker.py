"""The life of a job: `Worker.run`, and the steps that it names."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from ourvidz_serverless import __version__, jobs, logs, models
from ourvidz_serverless.context import Emit, JobContext, Report, Stop, to_nobody
from ourvidz_serverless.deduplication import Flights
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.content_credentials import Credentials
from ourvidz_serverless.delivery.outbox import Outbox
from ourvidz_serverless.delivery.storage.base import Storage, locate, read_reference, upload
from ourvidz_serverless.delivery.storage.choose import job_storage, open_storage
from ourvidz_serverless.delivery.uploads import Delivery
from ourvidz_serverless.document import Asset, Document, Failure, check_result
from ourvidz_serverless.errors import DeviceLost, InternalError, JobError, WorkerUnavailable
from ourvidz_serverless.guard.admission import Admission
from ourvidz_serverless.guard.fair_semaphore import FairSemaphore
from ourvidz_serverless.guard.poison_jobs import Pills
from ourvidz_serverless.guard.rate_limits import RateLimits
from ourvidz_serverless.job import Identity, Job
from ourvidz_serverless.job_history import Roster
from ourvidz_serverless.jobs.admin import ANSWERS, AdminJob, Fate, Office
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.loading.readahead import ReadAhead
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.references import fetch as references
from ourvidz_serverless.references.policy import ReferencePolicy
from ourvidz_serverless.settings import Settings

#: Encoders and uploads at once: a batch of six pictures with their thumbnails, and the first two
#: of the next job with theirs.
DELIVERY_THREADS = 16

VERSIONED = ("runpod", "torch", "diffusers", "transformers")


class Worker:
    """Runs jobs on the models it was given, and tells truthfully what became of each."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Any],
        assets: Storage,
        callback: Callback,
        worker_id: str,
        ledger: Ledger | None = None,
        limits: RateLimits | None = None,
        policy: ReferencePolicy | None = None,
        credentials: Credentials | None = None,
        pills: Pills | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._models = models
        self._assets = assets
        self._outbox, self._is_silent = Outbox(callback, self._storage, clock), False
        self._worker_id = worker_id
        self._credentials, self._clock = credentials, clock
        self._policy = policy or ReferencePolicy(
            allowed_hosts=frozenset(settings.reference_hosts),
            libraries=frozenset(settings.reference_buckets),
        )
        self._admission = Admission(settings, limits or RateLimits.of(settings))
        self._pills = pills or Pills(settings.poison_dir)
        self._leaving, self._closing = threading.Event(), threading.Event()
        self._lost = threading.Event()
        # Jobs that take turns: those that are prepared, computed or delivered, and the one of them
        # that computes. Before a job is one of the former it holds nothing but its payload.
        self._at_work = FairSemaphore(max(settings.exclusive_places, 1))
        self._computing = FairSemaphore(1)
        self._flights, self._roster = Flights(), Roster()
        self._office = Office(
            settings, worker_id, tuple(models), versions, self._roster, self._fate, ledger
        )
        self._pool = ThreadPoolExecutor(DELIVERY_THREADS, thread_name_prefix="deliver")

    @classmethod
    def of(cls, settings: Settings, reading: ReadAhead | None = None) -> Worker:
        """The worker that the environment asks for, with its models loaded.

        `reading` is what has been reading their files meanwhile.
        """
        # All before the models, which take minutes, so that an error shows at once.
        parts: dict[str, Any] = {
            "assets": open_storage(settings),
            "callback": Callback.of(settings),
            "credentials": Credentials.of(settings),
            "limits": RateLimits.of(settings, os.environ.get("RUNPOD_ENDPOINT_ID") or "local"),
            "pills": Pills(settings.poison_dir),
        }
        ledger = models.open_ledger(settings)
        if reading:
            ledger.wait_for_files = reading.wait
        worker_id = os.environ.get("RUNPOD_POD_ID") or socket.gethostname()
        loaded = models.load(settings, ledger)
        return cls(settings, loaded, worker_id=worker_id, ledger=ledger, **parts)

    def silent(self) -> Worker:
        """This worker, with the same models, lane and threads, which posts no callbacks."""
        twin = copy.copy(self)
        twin._is_silent = True
        return twin

    def health(self) -> dict[str, Any]:
        """What `admin_utilities` answers to `health`; it is nobody's secret."""
        question = AdminJob(id="health", type="admin_utilities", operation="health")
        return ANSWERS["health"](question, self._office)

    def check_device(self) -> None:
        """Compute something on each model's device; raises RuntimeError if that fails."""
        for model in self._models.values():
            model.device.check()

    @property
    def is_lost(self) -> bool:
        """Whether its device failed, so that it can do no further job."""
        return self._lost.is_set()

    def run(
        self, event: Mapping[str, Any], stop: Stop, report: Report, emit: Emit = to_nobody
    ) -> Document:
        """The document that ends a job: posted, then returned. Never raises.

        `stop` ends the job at its next step; `report` hears its progress, and `emit` what the
        job streams. A second delivery of a job that is under way hears the end of the first.
        """
        job_id = jobs.job_id(event) or jobs.new_id()
        bounds = jobs.bounds(event, self._settings)
        context = JobContext(stop, report, bounds, self._clock, emit)
        # The identity holds user and key: a caller who only knows the id gets nothing.
        identity = jobs.identity(event)
        return self._flights.run(
            identity,
            stop,
            lambda: self._run(event, job_id, identity, context),
            joined=lambda: logs.joined(job_id),
            tell=None if self._is_silent else lambda document: self._tell(event, document, context),
        )

    def _run(
        self, event: Mapping[str, Any], job_id: str, identity: Identity, context: JobContext
    ) -> Document:
        job: Job | None = None
        assets: tuple[Asset, ...] = ()
        failure: Failure | None = None
        with ExitStack() as turn:
            try:
                self._admission.check_key(jobs.api_key(event), context)
                job = jobs.parse(event, self._settings)
                logs.started(job)
                self._roster.began(identity, job.type, context)
                model = self._admit(job, identity, context)
                turn.enter_context(self._turn(self._at_work, job, context))
                assets = self._work(job, identity, model, context)
            except JobError as exc:
                # The failure alone: an exception that lives on pins the tensors of its frames.
                failure = Failure.of(_cause(exc, context))
                # A stop's error is its signal's, which may be remembered for hundreds of jobs.
                exc.__traceback__ = None
            except Exception as exc:
                logs.bug(job_id, exc)
                failure = Failure.of(models.as_job_error(exc))
            if failure and failure.is_the_workers_end:
                # Before the next job may begin.
                self._lose_device()
        document = self._document(job_id, assets, failure, context)
        document = self._post(document, event, job, context)
        logs.ended(document, job, context.elapsed_s, context.audit)
        if job:
            if not (failure and failure.is_the_workers_end):
                self._pills.survived(identity)
            self._roster.ended(identity, job.type, document, context.elapsed_s)
        return document

    def _work(
        self, job: Job, identity: Identity, model: Any, context: JobContext
    ) -> tuple[Asset, ...]:
        """The job's assets: prepared, computed and delivered."""
        self._begin(job, identity)
        self._announce(job, context)
        with context.stage("fetch"):
            images = self._fetch(job, context)
            jobs.prepare(job, model, context)
        with self._delivery(job, context) as delivery:
            with self._turn(self._computing, job, context), context.stage("generate"):
                for output in jobs.run(job, model, images, context):
                    delivery.submit(output)
            with context.stage("deliver"):
                return delivery.assets(context.check)

    def close(self, grace_s: float) -> None:
        """Take no further job, and stop after `grace_s` seconds those that still run."""
        self._closing.set()
        self.close_after(grace_s)

    def close_after(self, grace_s: float) -> None:
        """Take and run jobs for `grace_s` seconds more; then take none, and stop those that run."""
        self._leaving.set()
        log.info("shutting down; what runs has %g s to finish", grace_s)
        timer = threading.Timer(grace_s, self._end_grace)
        timer.daemon = True
        timer.start()

    def _end_grace(self) -> None:
        shutdown = WorkerUnavailable("the worker is shutting down")
        self._closing.set()
        self._outbox.end_grace()
        self._flights.stop_all(lambda stop: stop.set(shutdown))

    def _lose_device(self) -> None:
        if not self._lost.is_set():
            log.error("the device takes no more work from this process, which must be replaced")
        self._lost.set()

    def _fate(self) -> Fate | None:
        """What keeps this worker from taking jobs, if anything does."""
        if self.is_lost:
            return "unhealthy"
        return "shutting_down" if self._leaving.is_set() else None

    def _admit(self, job: Job, identity: Identity, context: JobContext) -> Any:
        """The model that serves a job, once nothing speaks against it."""
        if self._closing.is_set():
            raise WorkerUnavailable("the worker is shutting down")
        if jobs.FAMILY_OF[job.type] == "admin":
            self._admission.check(job, context)
            return replace(self._office, asker_key=identity.api_key)
        model = jobs.model_of(job, self._models)
        if model is None:
            served = ", ".join(self._models)
            raise WorkerUnavailable(f"{job.type} is not served here; this endpoint serves {served}")
        self._check_device_is_there()
        self._admission.check(job, context)
        return model

    def _begin(self, job: Job, identity: Identity) -> None:
        """Mark a job as begun; raises WorkerUnavailable if the device failed while it waited."""
        if jobs.FAMILY_OF[job.type] != "admin":
            self._check_device_is_there()
            self._pills.swallow(identity)

    def _check_device_is_there(self) -> None:
        if self.is_lost:
            raise WorkerUnavailable("this worker's device failed, and it is being replaced")

    def _announce(self, job: Job, context: JobContext) -> None:
        """Post that the job has begun, if that is wanted."""
        if self._settings.callback_processing and not self._is_silent:
            document = Document(job.id, self._worker_id, "processing")
            self._outbox.announce(document, job.callback_url, context)

    def _fetch(self, job: Job, context: JobContext) -> dict[str, Image.Image]:
        """The job's references that could be had; a warning stands for each of the others."""
        store = self._storage(job)
        fetched = references.fetch_all(
            job.references,
            policy=self._policy,
            user_id=job.user_id,
            read_object=lambda key: read_reference(store, key, self._settings.reference_buckets),
            deadline=context.deadline,
        )
        images = {role: image for role, image in fetched.items() if isinstance(image, Image.Image)}
        for role, error in fetched.items():
            if isinstance(error, JobError):
                if job.reference_required:
                    raise error
                why = error.message.removeprefix("reference: ")
                context.warnings.append(f"{role}: {why}; generated without it")
        return images

    @contextmanager
    def _turn(self, places: FairSemaphore, job: Job, context: JobContext) -> Iterator[None]:
        """A place for a job that takes turns, in the order of arrival; others need none."""
        if not jobs.is_exclusive(job.type):
            yield
            return
        with context.waiting() as hear:
            places.acquire(context.arrival, context.stop, hear)
        try:
            yield
        finally:
            places.release()

    def _storage(self, job: Job | None) -> Storage:
        """The job's own bucket, or the worker's storage."""
        if job and job.s3_config:
            region, hosts = self._settings.bucket_region, self._settings.s3_config_hosts
            return job_storage(job.s3_config, region, hosts)
        return self._assets

    def _delivery(self, job: Job, context: JobContext) -> Delivery:
        store, deadline = self._storage(job), context.deadline
        style, expiry_s = self._settings.asset_url_style, self._settings.presigned_expiry_s
        folder, stored = f"{job.user_id}/{job.id}", context.audit.setdefault("stored_sha256", {})

        def put(key: str, data: bytes, mime: str) -> None:
            context.check()
            upload(store, key, data, mime, deadline=deadline)
            stored[key.removeprefix(f"{folder}/")] = hashlib.sha256(data).hexdigest()

        def url(key: str) -> str:
            return locate(store, key, style, expiry_s, deadline)

        def sign(data: bytes, mime: str, composite: bool) -> bytes:
            if self._credentials is None:
                return data
            return self._credentials.sign(data, mime, composite, context.warnings)

        return Delivery(self._pool, folder, put, url, sign)

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

    def _post(
        self,
        document: Document,
        event: Mapping[str, Any],
        job: Job | None,
        context: JobContext,
    ) -> Document:
        if self._is_silent:
            return document
        return self._outbox.post(document, jobs.callback_url(event), job, context)

    def _tell(self, event: Mapping[str, Any], document: Document, context: JobContext) -> Document:
        """Post the end of a job that ran in silence, for a delivery of it that does not."""
        return self._post(document, event, self._read(event), context)

    def _read(self, event: Mapping[str, Any]) -> Job | None:
        """The job that an event asks for; None if its payload is not valid."""
        try:
            return jobs.parse(event, self._settings)
        except JobError:
            return None

    def keep_result(self, event: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
        """Store a job's result, which the platform did not take, beside its assets; its key."""
        job_id = jobs.job_id(event) or jobs.new_id()
        return self._outbox.keep_result(result, job_id, self._read(event))


def _cause(error: JobError, context: JobContext) -> JobError:
    """What ended a job: of one that was stopped the stop, whatever gave way to it first.

    But a lost device is the worker's end, whoever had stopped the job.
    """
    return error if isinstance(error, DeviceLost) else context.over or error


@functools.cache
def versions() -> dict[str, str]:
    """What computed, by package; those that are not installed are left out."""
    found = {"worker": __version__}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
