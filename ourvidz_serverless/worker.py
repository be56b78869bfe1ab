"""The life of a job: `Worker.run`, and the steps that it names."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from ourvidz_serverless import __version__, jobs, logs, references, safety, storage
from ourvidz_serverless.callback import Callback
from ourvidz_serverless.context import Emit, JobContext, Report, Stop, to_nobody
from ourvidz_serverless.delivery import Delivery
from ourvidz_serverless.errors import (
    ContentRefused,
    InternalError,
    JobError,
    WorkerUnavailable,
)
from ourvidz_serverless.flights import Flights
from ourvidz_serverless.logs import log
from ourvidz_serverless.payloads import Asset, Document, Failure, Job, check_result
from ourvidz_serverless.retries import Fault
from ourvidz_serverless.settings import Settings

#: How soon a job that waits for the lane hears that it was stopped.
LANE_POLL_S = 0.05

#: Encoders and uploads at once: a batch of six pictures, and the first two of the next job.
DELIVERY_THREADS = 8

VERSIONED = ("runpod", "torch", "diffusers", "transformers")


class Worker:
    """Runs jobs on the models it was given, and tells truthfully what became of each."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Any],
        assets: storage.Storage,
        callback: Callback,
        worker_id: str,
    ) -> None:
        self._settings = settings
        self._models = models
        self._assets = assets
        self._callback = callback
        self._worker_id = worker_id
        self._policy = references.Policy(
            allowed_hosts=frozenset(settings.reference_hosts),
            libraries=frozenset(settings.reference_buckets),
        )
        self._closing = threading.Event()
        self._computing = threading.Lock()
        self._flights = Flights()
        self._pool = ThreadPoolExecutor(DELIVERY_THREADS, thread_name_prefix="deliver")

    def run(
        self, event: Mapping[str, Any], stop: Stop, report: Report, emit: Emit = to_nobody
    ) -> Document:
        """The document that ends a job: posted, then returned. Never raises.

        `stop` ends the job at its next step; `report` hears its progress, and `emit` what the
        job streams. A second delivery of a job that is under way hears the end of the first.
        """
        job_id = jobs.job_id(event) or f"unnamed-{uuid.uuid4().hex}"
        context = JobContext(stop, report, self._settings.job_timeout_s, emit=emit)
        # Of one user only: nobody hears the end of another's job by its id.
        flight = f"{jobs.user_id(event)}/{job_id}"
        return self._flights.run(flight, stop, lambda: self._run(event, job_id, context))

    def _run(self, event: Mapping[str, Any], job_id: str, context: JobContext) -> Document:
        job: Job | None = None
        assets: tuple[Asset, ...] = ()
        failure: Failure | None = None
        try:
            job = jobs.parse(event, self._settings)
            logs.started(job)
            model = self._admit(job)
            self._announce(job)
            with context.stage("fetch"):
                images = self._fetch(job, context)
                jobs.prepare(job, model, context)
            with self._delivery(job) as delivery:
                with self._lane(job, context), context.stage("generate"):
                    for output in jobs.run(job, model, images, context):
                        delivery.send(output)
                with context.stage("deliver"):
                    assets = delivery.assets(context.check)
        except JobError as exc:
            # The failure alone: an exception that lives on pins the tensors of its frames.
            failure = Failure.of(exc)
        except Exception as exc:
            logs.bug(job_id, exc)
            failure = Failure.of(InternalError("an internal error; the worker's log says where"))
        document = self._document(job_id, assets, failure, context)
        document = self._post(document, job)
        logs.ended(document, job, context.elapsed_s)
        return document

    def close(self, grace_s: float) -> None:
        """Take no further job, and stop after `grace_s` seconds those that still run."""
        self._closing.set()
        shutdown = WorkerUnavailable("the worker is shutting down")
        timer = threading.Timer(grace_s, self._flights.stop_all, (lambda stop: stop.set(shutdown),))
        timer.daemon = True
        timer.start()

    def _admit(self, job: Job) -> Any:
        """The model that serves a job, once nothing speaks against it."""
        if self._closing.is_set():
            raise WorkerUnavailable("the worker is shutting down")
        family = jobs.FAMILY_OF[job.type]
        if family not in self._models:
            served = ", ".join(self._models)
            raise WorkerUnavailable(f"{job.type} is not served here; this endpoint serves {served}")
        self._check_content(job)
        return self._models[family]

    def _check_content(self, job: Job) -> None:
        """Raise ContentRefused when the content floor refuses, or consent is missing."""
        try:
            safety.check_all(job.texts, adult=job.adult)
        except ContentRefused as exc:
            logs.refused(job, exc.message, safety.audit_hash(job.texts))
            raise
        needs_consent = self._settings.require_reference_consent and job.adult and job.references
        if needs_consent and not job.reference_consent:
            raise ContentRefused(
                "content policy: metadata.reference_consent must be true for a reference image "
                "in adult mode"
            )

    def _announce(self, job: Job) -> None:
        """Tell the caller that the job has begun, where that is wanted; nothing depends on it."""
        if self._settings.callback_processing:
            try:
                document = Document(job.id, self._worker_id, "processing")
                self._callback.post(document, job.callback_url)
            except Fault as exc:
                log.warning("job %s could not be announced: %s", job.id, exc)

    def _fetch(self, job: Job, context: JobContext) -> dict[str, Image.Image]:
        """The job's references that could be had; a warning stands for each of the others."""
        store = self._storage(job)
        fetched = references.fetch_all(
            job.references,
            policy=self._policy,
            user_id=job.user_id,
            read_object=lambda key: storage.read_reference(
                store, key, self._settings.reference_buckets
            ),
            remaining_s=lambda: context.remaining_s,
        )
        images = {role: image for role, image in fetched.items() if isinstance(image, Image.Image)}
        for role, error in fetched.items():
            if isinstance(error, JobError):
                if job.reference_required:
                    raise error
                context.warnings.append(f"{role}: {error.message}; generated without it")
        return images

    @contextmanager
    def _lane(self, job: Job, context: JobContext) -> Iterator[None]:
        """The device, to oneself: one job computes, the next prepares, the last one delivers."""
        if not jobs.takes_turns(job):
            yield
            return
        with context.stage("wait"):
            while not self._computing.acquire(timeout=LANE_POLL_S):
                context.check()
        try:
            yield
        finally:
            self._computing.release()

    def _storage(self, job: Job) -> storage.Storage:
        """The job's own bucket, or the worker's storage."""
        if job.s3_config:
            return storage.of_job(job.s3_config, self._settings.bucket_region)
        return self._assets

    def _delivery(self, job: Job) -> Delivery:
        store = self._storage(job)
        style, expiry_s = self._settings.asset_url_style, self._settings.presigned_expiry_s
        return Delivery(
            self._pool,
            folder=f"{job.user_id}/{job.id}",
            upload=functools.partial(storage.upload, store),
            url=lambda key: store.url(key, style, expiry_s),
        )

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

    def _post(self, document: Document, job: Job | None) -> Document:
        """Post a document; one that cannot be delivered is kept beside the assets and says so."""
        try:
            self._callback.post(document, job.callback_url if job else None)
            return document
        except Fault as exc:
            log.warning("callback of job %s was not delivered: %s", document.job_id, exc)
            told = {"delivered": False, "reason": str(exc), "kept": self._keep(document, job)}
            return replace(document, metadata={**document.metadata, "callback": told})

    def _keep(self, document: Document, job: Job | None) -> str | None:
        if job is None:
            return None
        key = f"{job.user_id}/{job.id}/callback.{document.status}.json"
        body = json.dumps(document.callback()).encode()
        try:
            storage.upload(self._storage(job), key, body, "application/json")
        except JobError as exc:
            log.warning("nor could its document be kept: %s", exc.message)
            return None
        return key


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
