"""Where assets go: a directory, an S3-compatible bucket, or Supabase Storage by REST.

Keys are deterministic, `{user_id}/{job_id}/{index}.png`, and a put overwrites: that is what
makes a retry, and a second delivery of the same job, safe.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import requests

from ourvidz_serverless.errors import ModelLoadError, UploadError
from ourvidz_serverless.payloads import S3Config
from ourvidz_serverless.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.settings import Settings

#: To connect, and between two bytes of an answer.
TIMEOUT_S = (5, 60)

RETRY = Retry()


class Storage(Protocol):
    """A place for assets. `put` and `get` make one try and raise Fault."""

    def put(self, key: str, data: bytes, mime: str) -> None: ...

    def get(self, key: str, bucket: str | None = None) -> bytes:
        """A stored object; with a `bucket`, one of that other bucket of the same store."""
        ...

    def url(self, key: str, style: str, expiry_s: int) -> str:
        """How the caller finds a stored key: its `path` in the bucket, or a URL."""
        ...


def open_storage(settings: Settings) -> Storage:
    """The storage that `STORAGE_URL` names.

    Raises ModelLoadError, at start, when its own variables do not hold.
    """
    scheme, _, rest = settings.storage_url.partition(":")
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if scheme == "file" and rest:
        return DirectoryStorage(Path(rest.removeprefix("//")))
    if scheme == "s3" and bucket:
        return S3Storage.of(settings, bucket, prefix)
    if scheme == "supabase" and bucket:
        return SupabaseStorage.of(settings, bucket, prefix)
    raise ModelLoadError(
        "STORAGE_URL: Input should be file:FOLDER, s3://BUCKET or supabase://BUCKET"
    )


@functools.lru_cache(maxsize=8)
def of_job(config: S3Config, region: str) -> Storage:
    """The bucket that a job brings in its `s3Config`; a client takes a tenth of a second."""
    return S3Storage(
        bucket=config.bucketName,
        endpoint=config.endpointUrl,
        key_id=config.accessId.get_secret_value(),
        secret=config.accessSecret.get_secret_value(),
        region=region,
    )


def upload(storage: Storage, key: str, data: bytes, mime: str, policy: Retry = RETRY) -> None:
    """Put an object, in as many tries as the policy has.

    Raises UploadError, which tells the last try's HTTP status and nothing else.
    """
    try:
        retry(lambda: storage.put(key, data, mime), on=is_transient, policy=policy)
    except Fault as exc:
        raise UploadError(f"storage did not take an asset ({exc})") from exc


def read_reference(storage: Storage, key: str, buckets: Collection[str]) -> bytes:
    """A stored picture by the path that the application knows it by.

    That is a key, or a key behind the name of one of `buckets`. One try; raises Fault.
    """
    first, _, rest = key.partition("/")
    return storage.get(rest, bucket=first) if first in buckets else storage.get(key)


class DirectoryStorage:
    """A folder on this machine: what a laptop, or a mounted volume, has."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, key: str, data: bytes, mime: str) -> None:
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written beside and renamed, so that nobody ever reads half a picture.
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(data)
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError as exc:
            raise Fault(507) from exc

    def get(self, key: str, bucket: str | None = None) -> bytes:
        try:
            return (self._root / (bucket or "") / key).read_bytes()
        except OSError as exc:
            raise Fault(404) from exc

    def url(self, key: str, style: str, expiry_s: int) -> str:
        return key if style == "path" else (self._root / key).resolve().as_uri()


class S3Storage:
    """An S3-compatible bucket."""

    def __init__(
        self,
        *,
        bucket: str,
        endpoint: str | None,
        key_id: str | None,
        secret: str | None,
        region: str,
        prefix: str = "",
    ) -> None:
        import boto3  # half a second that no other storage should pay
        from botocore.config import Config

        self._bucket, self._prefix = bucket, _folder(prefix)
        self._endpoint = (endpoint or f"https://s3.{region}.amazonaws.com").rstrip("/")
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=key_id,
            aws_secret_access_key=secret,
            region_name=region,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=TIMEOUT_S[0],
                read_timeout=TIMEOUT_S[1],
                # Its own three attempts last a tenth of a second in all; ours have a backoff.
                retries={"total_max_attempts": 1},
                # Stores that are not Amazon's often refuse the newer checksum trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    @classmethod
    def of(cls, settings: Settings, bucket: str, prefix: str) -> S3Storage:
        return cls(
            bucket=bucket,
            prefix=prefix,
            endpoint=settings.bucket_endpoint_url,
            key_id=_secret(settings.bucket_access_key_id),
            secret=_secret(settings.bucket_secret_access_key),
            region=settings.bucket_region,
        )

    def put(self, key: str, data: bytes, mime: str) -> None:
        place = self._place(key)
        self._call(lambda: self._client.put_object(**place, Body=data, ContentType=mime))

    def get(self, key: str, bucket: str | None = None) -> bytes:
        place = {"Bucket": bucket, "Key": key} if bucket else self._place(key)
        body: bytes = self._call(lambda: self._client.get_object(**place)["Body"].read())
        return body

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def url(self, key: str, style: str, expiry_s: int) -> str:
        if style == "presigned":
            place = self._place(key)
            signed: str = self._client.generate_presigned_url("get_object", place, expiry_s)
            return signed
        path = self._prefix + key
        return path if style == "path" else f"{self._endpoint}/{self._bucket}/{path}"

    @staticmethod
    def _call(call: Callable[[], Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call()
        except ClientError as exc:
            # By status: Supabase's S3 answers reach boto3 with an empty error code.
            response = exc.response.get("ResponseMetadata", {})
            raise Fault(response.get("HTTPStatusCode")) from exc
        except BotoCoreError as exc:
            raise Fault(None) from exc


class SupabaseStorage:
    """A Supabase bucket by its REST interface, with the service key."""

    def __init__(self, url: str, key: str, bucket: str, prefix: str = "") -> None:
        self._url = f"{url.rstrip('/')}/storage/v1/object"
        self._bucket, self._prefix = bucket, _folder(prefix)
        self._session = requests.Session()
        self._session.trust_env = False
        # A new `sb_secret_` key is no token; as a bearer it is refused.
        self._session.headers["apikey"] = key
        if not key.startswith("sb_secret_"):
            self._session.headers["Authorization"] = f"Bearer {key}"

    @classmethod
    def of(cls, settings: Settings, bucket: str, prefix: str) -> SupabaseStorage:
        key = _secret(settings.supabase_service_key)
        if not (settings.supabase_url and key):
            raise ModelLoadError("STORAGE_URL: needs SUPABASE_URL and SUPABASE_SERVICE_KEY")
        return cls(settings.supabase_url, key, bucket, prefix)

    def put(self, key: str, data: bytes, mime: str) -> None:
        headers = {"Content-Type": mime, "x-upsert": "true"}
        self._call("POST", self._path(key), data=data, headers=headers)

    def get(self, key: str, bucket: str | None = None) -> bytes:
        path = f"{bucket}/{key}" if bucket else self._path(key)
        return self._call("GET", f"authenticated/{path}").content

    def url(self, key: str, style: str, expiry_s: int) -> str:
        if style == "presigned":
            answer = self._call("POST", f"sign/{self._path(key)}", json={"expiresIn": expiry_s})
            return f"{self._url.removesuffix('/object')}{answer.json()['signedURL']}"
        return self._prefix + key if style == "path" else f"{self._url}/public/{self._path(key)}"

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._prefix}{key}"

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            answer = self._session.request(
                method, f"{self._url}/{path}", timeout=TIMEOUT_S, allow_redirects=False, **options
            )
        except (OSError, ValueError) as exc:  # of requests, and of a URL or header that is none
            raise Fault(None) from exc
        if not 200 <= answer.status_code < 300:
            raise Fault(_true_status(answer), answer.headers.get("Retry-After"))
        return answer


def _true_status(answer: requests.Response) -> int:
    """The status that Supabase means: it answers 400 and tells the true one in its JSON."""
    try:
        return int(answer.json()["statusCode"])
    except (ValueError, KeyError, TypeError):
        return answer.status_code


def _folder(prefix: str) -> str:
    return f"{prefix.strip('/')}/" if prefix.strip("/") else ""


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value else None
