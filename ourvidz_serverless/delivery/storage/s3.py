"""An S3-compatible bucket as storage."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

from urllib3 import HTTPResponse

from ourvidz_serverless.delivery.storage.base import MAX_BYTES, RETRY, folder
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.addresses import Gate
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.net.transport import Transport
from ourvidz_serverless.settings import Settings


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
        import boto3  # here, since it takes half a second
        from botocore.config import Config

        self._bucket, self._prefix = bucket, folder(prefix)
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
                # botocore's three attempts last a tenth of a second in all; `upload` has a backoff.
                retries={"total_max_attempts": 1},
                # Stores that are not Amazon's often refuse the newer checksum trailers.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        # botocore signs requests and reads answers. Its own requests would have no deadline.
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
        """Send a request that botocore has signed; the answer in botocore's own class."""
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
        # `_send` raises Fault, which passes. These two come from before or after the request.
        except (BotoCoreError, ClientError) as exc:
            raise Fault(None) from exc


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _secret(value: Any) -> str | None:
    return value.get_secret_value() if value else None
