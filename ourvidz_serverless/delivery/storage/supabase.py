"""Supabase Storage, by its REST interface."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from ourvidz_serverless.delivery.storage.base import MAX_BYTES, RETRY, folder
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.retries import Fault, Retry
from ourvidz_serverless.net.supabase import Project, key_headers
from ourvidz_serverless.net.transport import Answer, Transport
from ourvidz_serverless.settings import Settings

#: The characters that JavaScript's `encodeURI` does not quote, and the percent sign.
URL_MARKS = ";,/?:@&=+$-_.!~*'()#%"

#: How many entries of a folder one request lists.
PAGE = 100


class SupabaseStorage:
    """A Supabase bucket by its REST interface, with the service key."""

    def __init__(
        self, url: str, key: str, bucket: str, prefix: str = "", policy: Retry = RETRY
    ) -> None:
        self._url = f"{url.rstrip('/')}/storage/v1/object"
        self._bucket, self._prefix = bucket, folder(prefix)
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
        """The keys in a folder (its name ends in a slash, or is empty) and below it."""
        for page in itertools.count():
            query = {"prefix": self._prefix + folder, "limit": PAGE, "offset": page * PAGE}
            entries = self._post_json(f"list/{self._bucket}", query)
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
        answer = self._post_json(f"sign/{self._path(key)}", {"expiresIn": expiry_s})
        path = answer.get("signedURL") if isinstance(answer, dict) else None
        if not isinstance(path, str):
            raise Fault(None)
        # The answer holds the key unquoted. Supabase's own clients quote it by `encodeURI`.
        return quote(path, safe=URL_MARKS)

    def _post_json(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        return self._call("POST", path, data=json.dumps(body).encode(), headers=headers).json()

    def _call(self, method: str, path: str, **options: Any) -> Answer:
        try:
            return self._transport.send(
                method, f"{self._url}/{path}", within_s=self.policy.try_s, **options
            )
        except Fault as exc:
            raise Fault(_status(exc), body=exc.body, retry_after=exc.asked) from exc


def _status(fault: Fault) -> int | None:
    """The status in the answer's JSON. Supabase answers 400 for other statuses too."""
    try:
        return int(json.loads(fault.body)["statusCode"])
    except (ValueError, KeyError, TypeError):
        return fault.status
