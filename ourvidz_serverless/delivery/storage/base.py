"""Where assets go: a directory, an S3-compatible bucket, or Supabase Storage by REST.

Keys are deterministic, `{user_id}/{job_id}/{index}.png`, and a put overwrites: that is what
makes a retry, and a second delivery of the same job, safe.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

from urllib3 import HTTPResponse

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError, UploadError
from ourvidz_serverless.job import S3Config
from ourvidz_serverless.net.addresses import is_listed, is_public, look_up
from ourvidz_serverless.net.retries import Fault, Retry, is_transient, retry
from ourvidz_serverless.net.supabase import Project, key_headers
from ourvidz_serverless.net.transport import Answer, Gate, Transport
from ourvidz_serverless.settings import Settings, storage_place, storage_problems

T = TypeVar("T")

RETRY = Retry()

#: The largest object that is read back: a reference.
MAX_BYTES = 20_000_000

#: What a payload calls the host of its own bucket, and how long its name is looked up for.
ENDPOINT = "s3Config.endpointUrl"
LOOK_UP_S = 5.0

#: What JavaScript's `encodeURI` leaves alone, and what is quoted already.
URL_MARKS = ";,/?:@&=+$-_.!~*'()#%"

#: Entries of a folder that Supabase is asked for at once.
PAGE = 100


class Storage(Protocol):
    """A place for assets. Each method makes one try and raises Fault."""

    policy: Retry

    def put(self, key: str, data: bytes, mime: str) -> None: ...

    def get(self, key: str, bucket: str | None = None) -> bytes:
        """A stored object; with a `bucket`, one of that other bucket of the same store."""
        ...

    def keys(self) -> Iterator[str]:
        """Every key that is stored here."""
        ...

    def delete(self, key: str) -> None: ...

    def url(self, key: str, style: str, expiry_s: int) -> str:
        """How the caller finds a stored key: its `path` in the bucket, or a URL."""
        ...


def open_storage(settings: Settings) -> Storage:
    """The storage that `STORAGE_URL` names.

    Raises ModelLoadError, at start, when its own variables do not hold.
    """
    for problem in storage_problems(settings):
        raise ModelLoadError(problem)
    scheme, bucket, prefix = storage_place(settings)
    if scheme == "s3":
        return S3Storage.of(settings, bucket, prefix)
    if scheme == "supabase":
        return SupabaseStorage.of(settings, bucket, prefix)
    return DirectoryStorage(Path(settings.storage_url.removeprefix("file:").removeprefix("//")))


@functools.lru_cache(maxsize=8)
def of_job(config: S3Config, region: str, inner_hosts: tuple[str, ...] = ()) -> Storage:
    """The bucket that a job brings in its `s3Config`; a client takes a tenth of a second.

    Whoever queues the job names its host, so every connection to it is gated: to the public
    internet alone, unless it is one of `inner_hosts`. Raises InvalidPrompt for an endpoint that
    is known by now to be none of these, before anything is computed for it.
    """
    try:
        endpoint = urlsplit(config.endpointUrl or "")
        host, _ = endpoint.hostname, endpoint.port  # an impossible port raises ValueError
        gate = None if host and is_listed(host, inner_hosts) else is_public
        if host and gate and not _may_be_passed(host, gate):
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


def _may_be_passed(host: str, gate: Gate) -> bool:
    try:
        return all(map(gate, look_up(host, NEVER.within(LOOK_UP_S))))
    except OSError:
        return True  # a name that is not known now may be later; the upload will say


def upload(
    storage: Storage,
    key: str,
    data: bytes,
    mime: str,
    policy: Retry | None = None,
    deadline: Deadline = NEVER,
) -> None:
    """Put an object, in as many tries as the policy has and the job has time for.

    Raises UploadError, which tells the last try's HTTP status and nothing else.
    """
    _tried(lambda: storage.put(key, data, mime), policy or storage.policy, deadline)


def locate(
    storage: Storage,
    key: str,
    style: str,
    expiry_s: int,
    deadline: Deadline = NEVER,
) -> str:
    """How the caller finds a stored object; tried again, and raises, as `upload` does."""
    return _tried(lambda: storage.url(key, style, expiry_s), storage.policy, deadline)


def _tried(once: Callable[[], T], policy: Retry, deadline: Deadline) -> T:
    try:
        return retry(once, on=is_transient, policy=policy, deadline=deadline)
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

    def __init__(self, root: Path, policy: Retry = RETRY) -> None:
        self._root, self.policy = root, policy

    def put(self, key: str, data: bytes, mime: str) -> None:
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written beside and renamed, so that nobody ever reads half a picture.
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                fresh = Path(file.name)
            try:
                fresh.write_bytes(data)
                fresh.chmod(0o644)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
        except OSError as exc:
            raise Fault(507) from exc

    def get(self, key: str, bucket: str | None = None) -> bytes:
        try:
            return (self._root / (bucket or "") / key).read_bytes()
        except OSError as exc:
            raise Fault(404) from exc

    def find(self, key: str) -> Path | None:
        """The file of a key; None where there is none, or where the key leads out of the folder."""
        root = self._root.resolve()
        try:
            path = (root / key).resolve()
            return path if path.is_relative_to(root) and path.is_file() else None
        except (OSError, ValueError):  # too long a name, or one with a zero byte
            return None

    def keys(self) -> Iterator[str]:
        files = (path for path in self._root.rglob("*") if path.is_file())
        yield from (path.relative_to(self._root).as_posix() for path in files)

    def delete(self, key: str) -> None:
        try:
            (self._root / key).unlink()
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
        policy: Retry = RETRY,
        gate: Gate | None = None,
    ) -> None:
        import boto3  # half a second that no other storage should pay
        from botocore.config import Config

        self._bucket, self._prefix = bucket, _folder(prefix)
        self.policy, self._transport = policy, Transport(gate=gate)
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
                # Its own three attempts last a tenth of a second in all; ours have a backoff.
                retries={"total_max_attempts": 1},
                # Stores that are not Amazon's often refuse the newer checksum trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        # botocore signs and reads answers; its own requests would have no end.
        self._client.meta.events.register("before-send.s3", self._send)

    @classmethod
    def of(cls, settings: Settings, bucket: str, prefix: str) -> S3Storage:
        try:
            return cls(
                bucket=bucket,
                prefix=prefix,
                endpoint=settings.bucket_endpoint_url,
                key_id=_secret(settings.bucket_access_key_id),
                secret=_secret(settings.bucket_secret_access_key),
                region=settings.bucket_region,
            )
        except ValueError as exc:  # botocore raises it for an invalid host
            raise ModelLoadError("BUCKET_ENDPOINT_URL: Input should be the URL of a host") from exc

    def put(self, key: str, data: bytes, mime: str) -> None:
        place = self._place(key)
        self._call(lambda: self._client.put_object(**place, Body=data, ContentType=mime))

    def get(self, key: str, bucket: str | None = None) -> bytes:
        place = {"Bucket": bucket, "Key": key} if bucket else self._place(key)
        body: bytes = self._call(lambda: self._client.get_object(**place)["Body"].read())
        return body

    def keys(self) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self._bucket, Prefix=self._prefix)
        for page in self._call(lambda: list(found)):
            yield from (each["Key"].removeprefix(self._prefix) for each in page.get("Contents", ()))

    def delete(self, key: str) -> None:
        self._call(lambda: self._client.delete_object(**self._place(key)))

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def url(self, key: str, style: str, expiry_s: int) -> str:
        if style == "presigned":
            place = self._place(key)
            signed: str = self._client.generate_presigned_url("get_object", place, expiry_s)
            return signed
        path = self._prefix + key
        return path if style == "path" else f"{self._endpoint}/{self._bucket}/{quote(path)}"

    def _send(self, request: Any, **event: Any) -> Any:
        """What botocore takes for the answer to a request that it has signed."""
        from botocore.awsrequest import AWSResponse

        body = request.body.read() if hasattr(request.body, "read") else request.body
        answer = self._transport.send(
            request.method,
            request.url,
            data=body,
            headers={name: _text(value) for name, value in request.headers.items()},
            within_s=self.policy.try_s,
            max_bytes=MAX_BYTES,
        )
        raw = HTTPResponse(io.BytesIO(answer.body), preload_content=False)
        return AWSResponse(request.url, answer.status, answer.headers, raw)

    @staticmethod
    def _call(call: Callable[[], Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call()
        # What our own requests raise passes by; the rest comes before one or after one.
        except (BotoCoreError, ClientError) as exc:
            raise Fault(None) from exc


class SupabaseStorage:
    """A Supabase bucket by its REST interface, with the service key."""

    def __init__(
        self, url: str, key: str, bucket: str, prefix: str = "", policy: Retry = RETRY
    ) -> None:
        self._url = f"{url.rstrip('/')}/storage/v1/object"
        self._bucket, self._prefix = bucket, _folder(prefix)
        self.policy = policy
        self._transport = Transport(key_headers(key))

    @classmethod
    def of(cls, settings: Settings, bucket: str, prefix: str) -> SupabaseStorage:
        project = Project.of(settings)
        if project is None:
            raise ModelLoadError("STORAGE_URL: needs SUPABASE_URL and SUPABASE_SERVICE_KEY")
        return cls(project.url, project.key, bucket, prefix)

    def put(self, key: str, data: bytes, mime: str) -> None:
        headers = {"Content-Type": mime, "x-upsert": "true"}
        self._call("POST", self._path(key), data=data, headers=headers)

    def get(self, key: str, bucket: str | None = None) -> bytes:
        path = quote(f"{bucket}/{key}") if bucket else self._path(key)
        return self._call("GET", f"authenticated/{path}", max_bytes=MAX_BYTES).body

    def keys(self) -> Iterator[str]:
        yield from self._below("")

    def _below(self, folder: str) -> Iterator[str]:
        """The keys in a folder, which is named with its last slash, and in those below it."""
        for page in itertools.count():
            wish = {"prefix": self._prefix + folder, "limit": PAGE, "offset": page * PAGE}
            entries = self._ask(f"list/{self._bucket}", wish)
            for entry in entries:
                name = f"{folder}{entry['name']}"
                # A folder is an entry without an id.
                yield from [name] if entry.get("id") else self._below(f"{name}/")
            if len(entries) < PAGE:
                return

    def delete(self, key: str) -> None:
        self._call("DELETE", self._path(key))

    def url(self, key: str, style: str, expiry_s: int) -> str:
        if style == "presigned":
            return f"{self._url.removesuffix('/object')}{self._signed(key, expiry_s)}"
        return self._prefix + key if style == "path" else f"{self._url}/public/{self._path(key)}"

    def _path(self, key: str) -> str:
        """A key as a part of URLs."""
        return quote(f"{self._bucket}/{self._prefix}{key}")

    def _signed(self, key: str, expiry_s: int) -> str:
        answer = self._ask(f"sign/{self._path(key)}", {"expiresIn": expiry_s})
        path = answer.get("signedURL") if isinstance(answer, dict) else None
        if not isinstance(path, str):
            raise Fault(None)
        # The document holds the key unquoted; Supabase's own clients quote it by `encodeURI`.
        return quote(path, safe=URL_MARKS)

    def _ask(self, path: str, wish: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._call("POST", path, data=json.dumps(wish).encode(), headers=headers).json()

    def _call(self, method: str, path: str, **options: Any) -> Answer:
        try:
            return self._transport.send(
                method, f"{self._url}/{path}", within_s=self.policy.try_s, **options
            )
        except Fault as exc:
            raise Fault(_true_status(exc), body=exc.body, retry_after=exc.asked) from exc


def _true_status(fault: Fault) -> int | None:
    """The status that Supabase means: it answers 400 and tells the true one in its JSON."""
    try:
        return int(json.loads(fault.body)["statusCode"])
    except (ValueError, KeyError, TypeError):
        return fault.status


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _folder(prefix: str) -> str:
    return f"{prefix.strip('/')}/" if prefix.strip("/") else ""


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value else None
