"""From a model's output to a stored asset, in threads, while the next output is being made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any
from urllib.parse import quote

from ourvidz_serverless import media
from ourvidz_serverless.payloads import Asset, Output, Text

#: Stores one object: key, bytes, MIME type. Raises UploadError after its retries.
Upload = Callable[[str, bytes, str], None]


class Delivery:
    """One job's assets on their way. As a context manager it leaves no upload behind."""

    def __init__(
        self, pool: Executor, folder: str, upload: Upload, url: Callable[[str], str]
    ) -> None:
        self._pool, self._folder = pool, folder
        self._upload, self._url = upload, url
        self._under_way: list[Future[Asset]] = []

    def send(self, output: Output | Text) -> None:
        """Encode and upload an output, without waiting for it."""
        self._under_way.append(self._pool.submit(self._deliver, output))

    def assets(self, check: Callable[[], None], poll_s: float = 0.1) -> tuple[Asset, ...]:
        """All assets in order, once they are stored; `check` may raise meanwhile."""
        waiting = set(self._under_way)
        while waiting:
            check()
            done, waiting = wait(waiting, timeout=poll_s, return_when="FIRST_EXCEPTION")
            for future in done:
                future.result()
        return tuple(future.result() for future in self._under_way)

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # An upload that has begun is waited for: nothing is stored after the job's last word.
        for future in self._under_way:
            future.cancel()
        wait(self._under_way)

    def _deliver(self, output: Output | Text) -> Asset:
        return self._write(output) if isinstance(output, Text) else self._paint(output)

    def _paint(self, output: Output) -> Asset:
        image = media.encode_image(output.pixels, output.format, output.quality, output.composite)
        thumbnail = media.thumbnail(output.pixels, composite=output.composite)
        stem = f"{self._folder}/{output.index}"
        key, thumbnail_key = f"{stem}.{image.extension}", f"{stem}.thumb.{thumbnail.extension}"
        self._upload(key, image.data, image.mime)
        self._upload(thumbnail_key, thumbnail.data, thumbnail.mime)
        facts: dict[str, Any] = {"format": image.format, "file_size_bytes": len(image.data)}
        return Asset(
            "image", self._url(key), self._url(thumbnail_key), {**output.metadata, **facts}
        )

    def _write(self, output: Text) -> Asset:
        # Not uploaded: the text travels in the document, and a bucket for pictures takes no text.
        facts: dict[str, Any] = {"format": "txt", "file_size_bytes": len(output.text.encode())}
        url = f"data:text/plain;charset=utf-8,{quote(output.text)}"
        return Asset("text", url, None, {**output.metadata, **facts})
