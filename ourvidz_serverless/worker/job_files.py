"""The files of jobs: references that are fetched, and assets that are stored."""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.delivery import upload_urls
from ourvidz_serverless.delivery.content_credentials import Credentials
from ourvidz_serverless.delivery.files import File
from ourvidz_serverless.delivery.inline import Inline, data_uri
from ourvidz_serverless.delivery.storage.base import Storage, locate, read_reference, upload
from ourvidz_serverless.delivery.storage.choose import job_storage, open_storage
from ourvidz_serverless.delivery.storage.inline import InlineStorage
from ourvidz_serverless.delivery.upload_urls import UploadUrls
from ourvidz_serverless.delivery.uploads import Delivery, Send, Uploads
from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.job import Job
from ourvidz_serverless.logs import log
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.references import fetch
from ourvidz_serverless.references.policy import ReferencePolicy
from ourvidz_serverless.settings import Settings, unreachable_storage

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
        upload_policy: Policy | None = None,
    ) -> None:
        self._settings, self._assets, self._credentials = settings, assets, credentials
        self._policy = policy or ReferencePolicy(
            allowed_hosts=frozenset(settings.reference_hosts),
            libraries=frozenset(settings.reference_buckets),
        )
        self._upload_policy = upload_policy or upload_urls.upload_policy()
        self._pool = ThreadPoolExecutor(DELIVERY_THREADS, thread_name_prefix="deliver")

    @classmethod
    def of(cls, settings: Settings) -> JobFiles:
        """The files as the settings say; raises ModelLoadError if the storage cannot be used."""
        if problem := unreachable_storage(settings):
            log.warning("%s", problem)
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
                continue
            reason = found.message.removeprefix("reference: ")
            if job.reference_required:
                raise ReferenceFrameError(f"{role}: {reason}") from found
            context.warnings.append(f"{role}: {reason}; generated without it")
        return images

    def delivery(self, job: Job, context: JobContext) -> Delivery:
        """The delivery of one job's assets: to its own URLs, into its folder, or inline.

        Raises InvalidPrompt if the job's own URLs cannot be used.
        """
        sign = functools.partial(self._signed, warnings=context.warnings)
        if job.upload_urls:
            urls = UploadUrls(job.upload_urls, self._upload_policy)
            put = _traced(lambda file: urls.put(file, context.deadline), context)
            return Uploads(self._pool, _recorded(put, context), sign, has_thumbnails=False)
        store = self.storage(job)
        if job.is_inline or isinstance(store, InlineStorage):
            return Inline(self._pool, _recorded(data_uri, context), sign, context.warnings)
        return Uploads(self._pool, self._storing(store, job, context), sign)

    def _storing(self, store: Storage, job: Job, context: JobContext) -> Send:
        """Stores a file in the job's folder, and says how the caller finds it."""
        style, expiry_s = self._settings.asset_url_style, self._settings.presigned_expiry_s

        def put(file: File) -> str:
            key = f"{job.user_id}/{job.id}/{file.name}"
            upload(store, key, file.data, file.mime, deadline=context.deadline)
            return key

        recorded = _recorded(_traced(put, context), context)
        return lambda file: locate(store, recorded(file), style, expiry_s, context.deadline)

    def _signed(self, data: bytes, mime: str, composite: bool, warnings: list[str]) -> bytes:
        if self._credentials is None:
            return data
        return self._credentials.sign(data, mime, composite, warnings)


def _recorded(put: Send, context: JobContext) -> Send:
    """`put` for a job that may be stopped; the audit gets the digest of each file that was put."""
    digests = context.audit.setdefault("stored_sha256", {})

    def recorded(file: File) -> str:
        context.check()
        place = put(file)
        digests[file.name] = hashlib.sha256(file.data).hexdigest()
        return place

    return recorded


def _traced(put: Send, context: JobContext) -> Send:
    """`put` as a span of the job's trace."""

    def traced(file: File) -> str:
        with context.trace.span("upload", bytes=len(file.data), mime=file.mime):
            return put(file)

    return traced
