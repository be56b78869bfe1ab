"""The worker's own storage, and the bucket that a job brings."""

from __future__ import annotations

import functools
from pathlib import Path
from urllib.parse import urlsplit

from ourvidz_serverless.delivery.storage.base import Storage
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.delivery.storage.inline import InlineStorage
from ourvidz_serverless.delivery.storage.s3 import S3Storage
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.job import S3Config
from ourvidz_serverless.net.addresses import is_listed, is_public, may_be_public, resolve
from ourvidz_serverless.settings import Settings, storage_place, storage_problems

#: The payload's field for the host of its own bucket.
ENDPOINT = "s3Config.endpointUrl"


def open_storage(settings: Settings) -> Storage:
    """The storage that `STORAGE_URL` names.

    Raises ModelLoadError if the settings of that storage are missing or invalid.
    """
    for problem in storage_problems(settings):
        raise ModelLoadError(problem)
    scheme, bucket, prefix = storage_place(settings)
    if scheme == "inline":
        return InlineStorage()
    if scheme == "s3":
        return S3Storage.of(settings, bucket, prefix)
    if scheme == "supabase":
        return SupabaseStorage.of(settings, bucket, prefix)
    return DirectoryStorage(Path(settings.storage_url.removeprefix("file:").removeprefix("//")))


@functools.lru_cache(maxsize=8)
def job_storage(config: S3Config, region: str, inner_hosts: tuple[str, ...] = ()) -> Storage:
    """The bucket that a job brings in its `s3Config`. Cached: a client takes a tenth of a second.

    The caller chooses the host. So connections go to addresses of the public internet only, unless
    the host is one of `inner_hosts`. Raises InvalidPrompt, before anything is computed, if the
    endpoint is no URL, or if its host is known to have another address.
    """
    try:
        endpoint = urlsplit(config.endpointUrl or "")
        host, _ = endpoint.hostname, endpoint.port  # an impossible port raises ValueError
        gate = None if host and is_listed(host, inner_hosts) else is_public
        if host and gate and not may_be_public(host, gate, resolve):
            raise InvalidPrompt(f"{ENDPOINT}: Input should be a host of the public internet")
        return S3Storage(
            bucket=config.bucketName,
            endpoint=config.endpointUrl,
            key_id=config.accessId.get_secret_value(),
            secret=config.accessSecret.get_secret_value(),
            region=region,
            gate=gate,
        )
    except ValueError as exc:
        raise InvalidPrompt(f"{ENDPOINT}: Input should be the URL of a host") from exc
