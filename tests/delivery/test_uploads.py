"""Assets on their way to storage, in however many threads there are."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ourvidz_serverless.delivery.uploads import Delivery
from ourvidz_serverless.errors import UploadError
from ourvidz_serverless.output import Output, Text
from tests.patience import PATIENCE_S


def picture(index: int = 0) -> Output:
    return Output(index, np.full((8, 8, 3), index, np.uint8), {"seed": index})


def deliver(upload: Callable[[str, bytes, str], None], threads: int, count: int = 1) -> list[str]:
    """The URLs of so many pictures and their thumbnails."""
    with (
        ThreadPoolExecutor(threads) as pool,
        Delivery(pool, "user/job", upload, url=lambda key: key) as delivery,
    ):
        for index in range(count):
            delivery.send(picture(index))
        assets = delivery.assets(lambda: None)
    return [url for asset in assets for url in (asset.url, asset.thumbnail_url or "")]


def test_a_picture_and_its_thumbnail_are_stored_side_by_side() -> None:
    both = threading.Barrier(2, timeout=PATIENCE_S)

    urls = deliver(lambda *file: both.wait() and None, threads=2)

    assert urls == ["user/job/0.png", "user/job/0.thumb.webp"]


def test_one_thread_is_enough_for_any_number_of_pictures() -> None:
    stored: list[str] = []

    urls = deliver(lambda key, data, mime: stored.append(key), threads=1, count=6)

    assert sorted(urls) == sorted(stored)
    assert len(urls) == 12


@pytest.mark.parametrize("failing", ["0.png", "0.thumb.webp"])
def test_neither_is_dispensable(failing: str) -> None:
    def upload(key: str, data: bytes, mime: str) -> None:
        if key.endswith(failing):
            raise UploadError("storage did not take an asset")

    with pytest.raises(UploadError):
        deliver(upload, threads=2)


def test_what_has_begun_is_waited_for_when_a_job_ends_early() -> None:
    begun, go_on, stored = threading.Event(), threading.Event(), list[str]()

    def upload(key: str, data: bytes, mime: str) -> None:
        begun.set()
        go_on.wait(PATIENCE_S)
        # Who did not wait for it would not see it stored.
        time.sleep(0.05)
        stored.append(key)

    with ThreadPoolExecutor(1) as pool:
        with Delivery(pool, "user/job", upload, url=lambda key: key) as delivery:
            for index in range(3):
                delivery.send(picture(index))
            assert begun.wait(PATIENCE_S)
            # What has not begun is cancelled at the end, and this last of all.
            delivery._thumbnails[-1].add_done_callback(lambda _: go_on.set())

        assert stored == ["user/job/0.thumb.webp"]


def test_a_reply_waits_for_no_upload() -> None:
    go_on, looks = threading.Event(), iter(range(20))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(go_on.wait, PATIENCE_S)
        try:
            with Delivery(pool, "user/job", lambda *file: None, url=lambda key: key) as delivery:
                delivery.send(Text(0, "a reply", {}))
                (asset,) = delivery.assets(lambda: next(looks) and None)
        finally:
            go_on.set()

    assert asset.url == "data:text/plain;charset=utf-8,a%20reply"
