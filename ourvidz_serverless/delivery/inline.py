"""Files as a part of the document: each asset's `url` is a `data:` URI with the whole file.

RunPod drops a result that is too large, without an error. So all files of a job are encoded as the
job asks, and if they do not fit, they are encoded again, smaller, until they do.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import NamedTuple

from ourvidz_serverless.delivery import files
from ourvidz_serverless.delivery.files import File, Sign
from ourvidz_serverless.delivery.uploads import Check, Delivery, Send, done, results
from ourvidz_serverless.document import MAX_RESULT_BYTES, Asset
from ourvidz_serverless.errors import UploadError
from ourvidz_serverless.output import Output, Text, Video

#: What is left of a result for everything but its files, in bytes: an enhanced prompt of 20,000
#: characters stands in it twice, and a character takes up to six bytes.
ROOM_BYTES = 400_000

#: The characters that the `data:` URIs of a job may have together.
MAX_CHARS = MAX_RESULT_BYTES - ROOM_BYTES


class Quality(NamedTuple):
    """How files that do not fit are encoded again.

    `picture` is the quality of WebP, which a PNG becomes, or of JPEG; None is lossless WebP.
    `video` is x264's constant rate factor, of which 51 is the worst.
    """

    picture: int | None
    video: int


#: The best first. The first file of a video has the rate factor 18.
QUALITIES = (
    Quality(None, 21),
    Quality(100, 24),
    Quality(95, 27),
    Quality(90, 30),
    Quality(80, 34),
    Quality(60, 38),
    Quality(40, 42),
    Quality(20, 46),
    Quality(5, 51),
)

TOO_LARGE = (
    "the files of this job do not fit into RunPod's result, not even at the lowest quality: "
    "STORAGE_URL should name a bucket, or the job should have config.upload_urls"
)


class Inline(Delivery):
    """Puts the files of a job into its document, all of them at the best quality that fits.

    `max_chars` is the room for them. A quality that the job did not ask for is an entry in
    `warnings`. There are no thumbnails: whoever has the document has the picture.
    """

    def __init__(
        self,
        pool: Executor,
        send: Send,
        sign: Sign,
        warnings: list[str],
        max_chars: int = MAX_CHARS,
    ) -> None:
        super().__init__(pool, send, sign)
        self._warnings, self._max_chars = warnings, max_chars
        self._outputs: list[Output | Text | Video] = []
        self._made: list[Future[File | Asset]] = []

    def submit(self, output: Output | Text | Video) -> None:
        self._outputs.append(output)
        self._made.append(self._encode(output))

    def assets(self, check: Check, poll_s: float = 0.1) -> tuple[Asset, ...]:
        first = results(self._made, check, poll_s)
        made, quality, qualities = first, None, iter(QUALITIES)
        while _num_chars(made) > self._max_chars:
            quality = next(qualities, None)
            if quality is None:
                raise UploadError(TOO_LARGE)
            made = results(self._smaller(first, quality), check, poll_s)
        if quality:
            self._warnings.append(_warning(self._outputs[0], quality))
        return tuple(each if isinstance(each, Asset) else self._delivered(each) for each in made)

    def _encode(self, output: Output | Text | Video) -> Future[File | Asset]:
        if isinstance(output, Text):
            return done(files.text_asset(output))
        if isinstance(output, Video):
            return self._start(files.video, output, self._sign)
        return self._start(files.picture, output, self._sign)

    def _smaller(
        self, first: Sequence[File | Asset], quality: Quality
    ) -> list[Future[File | Asset]]:
        """Every file at another quality. A text, and a file that was worse already, stays."""
        return [
            self._again(output, made, quality)
            for output, made in zip(self._outputs, first, strict=True)
        ]

    def _again(
        self, output: Output | Text | Video, made: File | Asset, quality: Quality
    ) -> Future[File | Asset]:
        if isinstance(made, Asset) or isinstance(output, Text):
            return done(made)
        if isinstance(output, Video):
            return self._start(files.smaller_video, output, made, quality.video, self._sign)
        smaller = _at(output, quality.picture)
        return self._start(files.picture, smaller, self._sign) if smaller else done(made)

    def _delivered(self, file: File) -> Asset:
        return file.asset(self._send(file))


def _at(output: Output, quality: int | None) -> Output | None:
    """The same picture at this quality; None for one whose own quality is no better."""
    if output.format == "png":
        return replace(output, format="webp", quality=quality)
    is_better = quality is not None and (output.quality or 0) > quality
    return replace(output, quality=quality) if is_better else None


def data_uri(file: File) -> str:
    """The file as a URI that holds all of it (RFC 2397)."""
    return f"data:{file.mime};base64,{base64.b64encode(file.data).decode()}"


def _num_chars(made: Iterable[File | Asset]) -> int:
    """The number of characters that the URIs of these files have."""
    return sum(
        len(f"data:{each.mime};base64,") + -(-len(each.data) // 3) * 4
        if isinstance(each, File)
        else len(each.url)
        for each in made
    )


def _warning(output: Output | Text | Video, quality: Quality) -> str:
    """What became of the files of a job with this output, in words."""
    limit = f"the {MAX_RESULT_BYTES // 1_000_000} MB of RunPod's result"
    if not isinstance(output, Output):
        return f"inline: the video would pass {limit}; it was encoded again, at a lower quality"
    if quality.picture is None:
        return f"inline: as PNG the files would pass {limit}; they are WebP, with the same pixels"
    given = "JPEG" if output.format == "jpeg" else "WebP"
    return f"inline: the files would pass {limit}; they are {given} at quality {quality.picture}"
