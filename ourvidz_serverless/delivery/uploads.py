"""From a model's output to a stored asset, in threads, while the next output is being made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any
from urllib.parse import quote

from ourvidz_serverless.delivery import images
from ourvidz_serverless.document import Asset
from ourvidz_serverless.output import Output, Text, Video

#: Stores one object: key, bytes, MIME type. Raises UploadError after its retries.
Upload = Callable[[str, bytes, str], None]

#: The file as it goes out: bytes, MIME type, whether a given picture is part of it.
Sign = Callable[[bytes, str, bool], bytes]


class Delivery:
    """One job's assets on their way. As a context manager it leaves no upload behind."""

    def __init__(
        self,
        pool: Executor,
        folder: str,
        upload: Upload,
        url: Callable[[str], str],
        sign: Sign = lambda data, mime, composite: data,
    ) -> None:
        self._pool, self._folder = pool, folder
        self._upload, self._url, self._sign = upload, url, sign
        self._under_way: list[Future[Asset]] = []
        self._thumbnails: list[Future[str]] = []

    def send(self, output: Output | Text | Video) -> None:
        """Encode and upload an output, without waiting for it; a thumbnail beside its picture."""
        submit = self._pool.submit
        if isinstance(output, Text):
            # Here and now: it stores nothing, and waits for nobody who does.
            written: Future[Asset] = Future()
            written.set_result(self._write(output))
            self._under_way.append(written)
        elif isinstance(output, Video):
            self._under_way.append(submit(self._film, output))
        else:
            # The thumbnail first: then it has begun when its picture's thread waits for it, and
            # threads that wait for one another are never all there are.
            self._thumbnails.append(submit(self._shrink, output, output.pixels))
            self._under_way.append(submit(self._paint, output, self._thumbnails[-1]))

    def assets(self, check: Callable[[], None], poll_s: float = 0.1) -> tuple[Asset, ...]:
        """All assets in order, once they are stored; `check` may raise meanwhile."""
        waiting = set(self._under_way)
        while waiting:
            done, waiting = wait(waiting, timeout=poll_s, return_when="FIRST_EXCEPTION")
            check()  # first, since a stop is what makes uploads fail
            for future in done:
                future.result()
        return tuple(future.result() for future in self._under_way)

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # An upload that has begun is waited for: nothing is stored after the job's last word.
        begun: list[Future[Any]] = [*self._under_way, *self._thumbnails]
        for future in begun:
            future.cancel()
        wait(begun)

    def _paint(self, output: Output, thumbnail: Future[str]) -> Asset:
        image = images.encode_image(output.pixels, output.format, output.quality, output.composite)
        key = f"{self._folder}/{output.index}.{image.extension}"
        data = self._sign(image.data, image.mime, output.composite)
        self._upload(key, data, image.mime)
        facts: dict[str, Any] = {"format": image.format, "file_size_bytes": len(data)}
        return Asset("image", self._url(key), thumbnail.result(), {**output.metadata, **facts})

    def _shrink(self, output: Output | Video, pixels: Any) -> str:
        """Store the thumbnail of a picture; gives its URL."""
        small = images.thumbnail(pixels, composite=output.composite)
        key = f"{self._folder}/{output.index}.thumb.{small.extension}"
        self._upload(key, small.data, small.mime)
        return self._url(key)

    def _film(self, output: Video) -> Asset:
        # Here, since most families make no videos.
        from ourvidz_serverless.delivery import video

        try:
            film = video.encode_video(
                output.frames, output.width, output.height, output.fps, output.composite
            )
        finally:
            output.frames.close()
        key = f"{self._folder}/{output.index}.mp4"
        data = self._sign(film.data, "video/mp4", output.composite)
        self._upload(key, data, "video/mp4")
        thumbnail_url = self._shrink(output, film.poster)
        facts: dict[str, Any] = {
            "format": "mp4",
            "frame_num": film.num_frames,
            "fps": output.fps,
            "duration_seconds": round(film.num_frames / output.fps, 3),
            "file_size_bytes": len(data),
        }
        return Asset("video", self._url(key), thumbnail_url, {**output.metadata, **facts})

    def _write(self, output: Text) -> Asset:
        # Not uploaded: the text travels in the document, and a bucket for pictures takes no text.
        facts: dict[str, Any] = {"format": "txt", "file_size_bytes": len(output.text.encode())}
        url = f"data:text/plain;charset=utf-8,{quote(output.text)}"
        return Asset("text", url, None, {**output.metadata, **facts})
