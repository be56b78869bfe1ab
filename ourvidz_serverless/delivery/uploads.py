"""Outputs are encoded and stored in threads, while the model makes the next output."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Any
from urllib.parse import quote

from ourvidz_serverless.delivery import images
from ourvidz_serverless.document import Asset
from ourvidz_serverless.output import Output, Text, Video

#: Stores one object, given its key, bytes and MIME type. Raises UploadError after its tries.
Upload = Callable[[str, bytes, str], None]

#: Signs a file, given its bytes, its MIME type, and whether a picture from the caller is part of
#: it. Returns the bytes to store.
Sign = Callable[[bytes, str, bool], bytes]


class Delivery:
    """The uploads of one job. As a context manager it ends only after each upload has ended."""

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
        self._assets: list[Future[Asset]] = []
        self._thumbnails: list[Future[str]] = []

    def submit(self, output: Output | Text | Video) -> None:
        """Start to encode and store an output, and a thumbnail if it has pixels."""
        if isinstance(output, Text):
            # In this thread: a text is not stored, and must not wait for a thread that stores.
            done: Future[Asset] = Future()
            done.set_result(self._text(output))
            self._assets.append(done)
        elif isinstance(output, Video):
            self._assets.append(self._pool.submit(self._video, output))
        else:
            # The thumbnail first: it has begun when the picture's thread waits for it. So the
            # threads never all wait for one another.
            thumbnail = self._pool.submit(self._thumbnail, output, output.pixels)
            self._thumbnails.append(thumbnail)
            self._assets.append(self._pool.submit(self._image, output, thumbnail))

    def assets(self, check: Callable[[], None], poll_s: float = 0.1) -> tuple[Asset, ...]:
        """All assets in order, once they are stored. `check` is called meanwhile, and may raise."""
        waiting = set(self._assets)
        while waiting:
            done, waiting = wait(waiting, timeout=poll_s, return_when="FIRST_EXCEPTION")
            check()  # first: a stop makes uploads fail, and its error is the cause
            for future in done:
                future.result()
        return tuple(future.result() for future in self._assets)

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Wait for each upload that has begun: nothing may be stored after the job has ended.
        begun: list[Future[Any]] = [*self._assets, *self._thumbnails]
        for future in begun:
            future.cancel()
        wait(begun)

    def _image(self, output: Output, thumbnail: Future[str]) -> Asset:
        image = images.encode_image(output.pixels, output.format, output.quality, output.composite)
        key = f"{self._folder}/{output.index}.{image.extension}"
        data = self._sign(image.data, image.mime, output.composite)
        self._upload(key, data, image.mime)
        facts = {"format": image.format, "file_size_bytes": len(data)}
        return Asset("image", self._url(key), thumbnail.result(), {**output.metadata, **facts})

    def _thumbnail(self, output: Output | Video, pixels: Any) -> str:
        """Store the thumbnail of these pixels. Returns its URL."""
        small = images.thumbnail(pixels, composite=output.composite)
        key = f"{self._folder}/{output.index}.thumb.{small.extension}"
        self._upload(key, small.data, small.mime)
        return self._url(key)

    def _video(self, output: Video) -> Asset:
        # Imported here, since most families make no videos.
        from ourvidz_serverless.delivery import video

        try:
            encoded = video.encode_video(
                output.frames, output.width, output.height, output.fps, output.composite
            )
        finally:
            output.frames.close()
        key = f"{self._folder}/{output.index}.mp4"
        data = self._sign(encoded.data, "video/mp4", output.composite)
        self._upload(key, data, "video/mp4")
        thumbnail_url = self._thumbnail(output, encoded.poster)
        facts: dict[str, Any] = {
            "format": "mp4",
            "frame_num": encoded.num_frames,
            "fps": output.fps,
            "duration_seconds": round(encoded.num_frames / output.fps, 3),
            "file_size_bytes": len(data),
        }
        return Asset("video", self._url(key), thumbnail_url, {**output.metadata, **facts})

    def _text(self, output: Text) -> Asset:
        # Not uploaded: the document holds the text, and a bucket for pictures may refuse text.
        facts: dict[str, Any] = {"format": "txt", "file_size_bytes": len(output.text.encode())}
        url = f"data:text/plain;charset=utf-8,{quote(output.text)}"
        return Asset("text", url, None, {**output.metadata, **facts})
