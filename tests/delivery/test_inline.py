"""Files inside the document: the whole file, at the best quality with which all of them fit."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest

from ourvidz_serverless.context import Bounds, JobContext, Stop, discard
from ourvidz_serverless.delivery import files, images, provenance
from ourvidz_serverless.delivery.inline import MAX_CHARS, Inline, data_uri
from ourvidz_serverless.delivery.png import Pixels
from ourvidz_serverless.document import Asset
from ourvidz_serverless.errors import Cancelled, UploadError
from ourvidz_serverless.output import FrameQueue, Output, Text, Video
from tests.delivery.pictures import noise, opened, seen


def grain(seed: int = 0, side: int = 64) -> Pixels:
    """A slope with a little noise: as WebP it is smaller than as PNG."""
    slope = np.broadcast_to(np.arange(side, dtype=np.uint8)[:, None, None] * 3, (side, side, 3))
    return slope + noise(side, side, colours=8, seed=seed)


def picture(index: int = 0, pixels: Pixels | None = None, **options: Any) -> Output:
    shown = grain(index) if pixels is None else pixels
    return Output(index, shown, {"asset_index": index}, **options)


def deliver(
    outputs: Sequence[Output | Text | Video],
    max_chars: int = MAX_CHARS,
    check: Callable[[], None] = lambda: None,
    sign: files.Sign = lambda data, *_: data,
) -> tuple[tuple[Asset, ...], list[str]]:
    """The assets of these outputs, and the warnings."""
    warnings: list[str] = []
    with ThreadPoolExecutor(2) as pool, Inline(pool, data_uri, sign, warnings, max_chars) as inline:
        for output in outputs:
            inline.submit(output)
        return inline.assets(check, poll_s=0.01), warnings


def data_of(asset: Asset) -> bytes:
    return base64.b64decode(asset.url.partition(";base64,")[2], validate=True)


def chars(*outputs: Output) -> int:
    """The room that these outputs take as they are."""
    return sum(len(asset.url) for asset in deliver(outputs)[0])


def test_a_picture_is_its_whole_file_in_a_data_uri() -> None:
    (asset,), warnings = deliver([picture()])

    assert asset.url.startswith("data:image/png;base64,")
    assert np.array_equal(seen(data_of(asset)), grain())
    assert asset.metadata["file_size_bytes"] == len(data_of(asset))
    assert warnings == []


def test_a_picture_in_the_document_has_no_thumbnail() -> None:
    (asset,), _ = deliver([picture()])

    assert asset.thumbnail_url is None


def test_a_text_stays_what_it_is() -> None:
    (asset,), _ = deliver([Text(0, "a reply", {})])

    assert asset.url == "data:text/plain;charset=utf-8,a%20reply"


def test_a_png_that_does_not_fit_becomes_lossless_webp_with_the_same_pixels() -> None:
    (asset,), warnings = deliver([picture()], chars(picture()) - 1)

    assert asset.url.startswith("data:image/webp;base64,")
    assert np.array_equal(seen(data_of(asset)), grain())
    assert asset.metadata["format"] == "webp"
    assert warnings == [
        "inline: as PNG the files would pass the 10 MB of RunPod's result; they are WebP, "
        "with the same pixels"
    ]


def test_pictures_that_do_not_fit_losslessly_all_have_the_best_quality_that_fits() -> None:
    outputs = [picture(0), picture(1), picture(2)]
    at_90 = [replace(each, format="webp", quality=90) for each in outputs]

    assets, warnings = deliver(outputs, chars(*at_90))

    assert [data_of(asset) for asset in assets] == [
        images.encode_image(each.pixels, "webp", 90).data for each in outputs
    ]
    assert warnings[0].endswith("they are WebP at quality 90")


def test_the_document_says_the_true_size_of_a_smaller_file() -> None:
    (asset,), _ = deliver([picture()], chars(picture()) // 2)

    assert asset.metadata == {
        "asset_index": 0,
        "format": "webp",
        "file_size_bytes": len(data_of(asset)),
    }


def test_a_jpeg_that_does_not_fit_stays_jpeg_at_a_lower_quality() -> None:
    asked = picture(format="jpeg", quality=90)

    (asset,), warnings = deliver([asked], chars(asked) - 1)

    assert data_of(asset) == images.encode_image(grain(), "jpeg", 80).data
    assert warnings[0].endswith("they are JPEG at quality 80")


def test_a_smaller_file_bears_the_mark_of_generated_media() -> None:
    (asset,), _ = deliver([picture(composite=True)], chars(picture()) // 2)

    assert provenance.digital_source_type(data_of(asset)) == provenance.COMPOSITE


def test_the_size_of_a_signed_file_counts_and_each_file_is_signed_once() -> None:
    def sign(data: bytes, mime: str, composite: bool) -> bytes:
        return data + f"|signed {mime}".encode()

    (whole,), _ = deliver([picture()], chars(picture()) + 100, sign=sign)
    (smaller,), _ = deliver([picture()], chars(picture()), sign=sign)

    assert data_of(whole).endswith(b"|signed image/png")
    assert data_of(smaller).count(b"|signed") == 1
    assert data_of(smaller).endswith(b"|signed image/webp")


def test_the_same_job_gives_the_same_document_again() -> None:
    outputs = [picture(0), picture(1)]

    assert deliver(outputs, 4000) == deliver(outputs, 4000)


def film(num_frames: int = 5) -> Video:
    frames = FrameQueue(depth=num_frames)
    for index in range(num_frames):
        frames.put(noise(64, 64, seed=index)[None], check=lambda: None)
    frames.end()
    return Video(0, frames, 64, 64, 8, {"seed": 7}, composite=True)


def test_a_video_that_does_not_fit_is_encoded_again_with_all_its_frames() -> None:
    (whole,), _ = deliver([film()])

    (asset,), warnings = deliver([film()], len(whole.url) // 2)

    with av.open(io.BytesIO(data_of(asset)), "r") as file:
        assert len(list(file.decode(video=0))) == asset.metadata["frame_num"] == 5
        assert file.streams.video[0].average_rate == 8
    assert len(asset.url) <= len(whole.url) // 2
    assert asset.metadata["file_size_bytes"] == len(data_of(asset))
    assert provenance.digital_source_type(data_of(asset)) == provenance.COMPOSITE
    assert warnings == [
        "inline: the video would pass the 10 MB of RunPod's result; it was encoded again, "
        "at a lower quality"
    ]


def test_a_job_whose_files_cannot_fit_says_what_to_set() -> None:
    with pytest.raises(UploadError, match=r"STORAGE_URL .* bucket.* config\.upload_urls") as error:
        deliver([picture()], max_chars=100)

    assert not re.search("inf|nan", error.value.message)


def test_a_picture_of_ten_megabytes_of_noise_fits_into_a_result() -> None:
    large = picture(pixels=noise(1600, 1600))
    context = JobContext(Stop(), discard, Bounds(600))

    assets, warnings = deliver([large])

    assert context.document("job-1", "worker-1", assets).status == "completed"
    assert opened(data_of(assets[0])).size == (1600, 1600)
    assert len(warnings) == 1


def test_a_stop_ends_a_delivery_that_encodes_again() -> None:
    looks = iter(range(3))

    def check() -> None:
        if next(looks, None) is None:
            raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        deliver([picture()], max_chars=100, check=check)
