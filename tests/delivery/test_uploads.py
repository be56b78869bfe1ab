"""Outputs are encoded and stored in any number of threads."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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
            delivery.submit(picture(index))
        assets = delivery.assets(lambda: None)
    return [url for asset in assets for url in (asset.url, asset.thumbnail_url or "")]


class RecordingPool(ThreadPoolExecutor):
    """A pool that remembers the futures of what was submitted, in order."""

    def __init__(self, max_workers: int) -> None:
        super().__init__(max_workers)
        self.futures: list[Future[Any]] = []

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        self.futures.append(super().submit(*args, **options))
        return self.futures[-1]


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
def test_a_job_fails_if_its_picture_or_its_thumbnail_cannot_be_stored(failing: str) -> None:
    def upload(key: str, data: bytes, mime: str) -> None:
        if key.endswith(failing):
            raise UploadError("storage did not take an asset")

    with pytest.raises(UploadError):
        deliver(upload, threads=2)


def test_a_job_that_ends_early_waits_for_the_uploads_that_have_begun() -> None:
    begun, go_on, stored = threading.Event(), threading.Event(), list[str]()

    def upload(key: str, data: bytes, mime: str) -> None:
        begun.set()
        go_on.wait(PATIENCE_S)
        # Code that does not wait for this upload would not see it stored.
        time.sleep(0.05)
        stored.append(key)

    with RecordingPool(1) as pool:
        with Delivery(pool, "user/job", upload, url=lambda key: key) as delivery:
            for index in range(3):
                delivery.submit(picture(index))
            assert begun.wait(PATIENCE_S)
            # At the end the uploads that have not begun are cancelled, the last thumbnail last.
            last_thumbnail, _ = pool.futures[-2:]
            last_thumbnail.add_done_callback(lambda _: go_on.set())

        assert stored == ["user/job/0.thumb.webp"]


def test_a_text_does_not_wait_for_a_thread() -> None:
    go_on, looks = threading.Event(), iter(range(20))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(go_on.wait, PATIENCE_S)
        try:
            with Delivery(pool, "user/job", lambda *file: None, url=lambda key: key) as delivery:
                delivery.submit(Text(0, "a reply", {}))
                (asset,) = delivery.assets(lambda: next(looks) and None)
        finally:
            go_on.set()

    assert asset.url == "data:text/plain;charset=utf-8,a%20reply"
