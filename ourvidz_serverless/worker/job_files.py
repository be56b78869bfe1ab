"""The files of jobs: references that are fetched, and assets that are stored."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.delivery.content_credentials import Credentials
from ourvidz_serverless.delivery.storage.base import Storage, locate, read_reference, upload
from ourvidz_serverless.delivery.storage.choose import job_storage, open_storage
from ourvidz_serverless.delivery.uploads import Delivery
from ourvidz_serverless.job import Job
from ourvidz_serverless.references import fetch
from ourvidz_serverless.references.policy import ReferencePolicy
from ourvidz_serverless.settings import Settings

#: Threads that encode and upload: enough for six pictures with their thumbnails, and the first two
#: pictures of the next job with theirs.
DELIVERY_THREADS = 16


class JobFiles:
    """Fetches the references of a worker's jobs, and stores their assets."""

    def __init__(
        self,
        settings: Settings,
        assets: Storage,
        credentials: Credentials | None = None,
        policy: ReferencePolicy | None = None,
    ) -> None:
        self._settings, self._assets, self._credentials = settings, assets, credentials
        self._policy = policy or ReferencePolicy(
            allowed_hosts=frozenset(settings.reference_hosts),
            libraries=frozenset(settings.reference_buckets),
        )
        self._pool = ThreadPoolExecutor(DELIVERY_THREADS, thread_name_prefix="deliver")

    @classmethod
    def of(cls, settings: Settings) -> JobFiles:
        """The files as the settings say; raises ModelLoadError if the storage cannot be used."""
        return cls(settings, open_storage(settings), Credentials.of(settings))

    def storage(self, job: Job | None) -> Storage:
        """The job's own bucket, or the worker's storage."""
        if job and job.s3_config:
            region, hosts = self._settings.bucket_region, self._settings.s3_config_hosts
            return job_storage(job.s3_config, region, hosts)
        return self._assets

    def references(self, job: Job, context: JobContext) -> dict[str, Image.Image]:
        """The job's references by role, with a warning in the context for each that failed.

        Raises the reference's error if the job requires its references.
        """
        store, buckets = self.storage(job), self._settings.reference_buckets
        fetched = fetch.fetch_all(
            job.references,
            policy=self._policy,
            user_id=job.user_id,
            read_object=lambda key: read_reference(store, key, buckets),
            deadline=context.deadline,
        )
        images = {}
        for role, found in fetched.items():
            if isinstance(found, Image.Image):
                images[role] = found
            elif job.reference_required:
                raise found
            else:
                reason = found.message.removeprefix("reference: ")
                context.warnings.append(f"{role}: {reason}; generated without it")
        return images

    def delivery(self, job: Job, context: JobContext) -> Delivery:
        """The delivery of one job's assets, into the job's folder."""
        store, deadline = self.storage(job), context.deadline
        style, expiry_s = self._settings.asset_url_style, self._settings.presigned_expiry_s
        folder, stored = f"{job.user_id}/{job.id}", context.audit.setdefault("stored_sha256", {})

        def put(key: str, data: bytes, mime: str) -> None:
            context.check()
            with context.trace.span("upload", bytes=len(data), mime=mime):
                upload(store, key, data, mime, deadline=deadline)
            stored[key.removeprefix(f"{folder}/")] = hashlib.sha256(data).hexdigest()

        def url(key: str) -> str:
            return locate(store, key, style, expiry_s, deadline)

        def sign(data: bytes, mime: str, composite: bool) -> bytes:
            if self._credentials is None:
                return data
            return self._credentials.sign(data, mime, composite, context.warnings)

        return Delivery(self._pool, folder, put, url, sign)
