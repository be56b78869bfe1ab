"""Outputs are encoded and stored in any number of threads."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ourvidz_serverless.context import Stop
from ourvidz_serverless.delivery.files import File
from ourvidz_serverless.delivery.uploads import Uploads
from ourvidz_serverless.errors import Cancelled, UploadError
from ourvidz_serverless.output import FrameQueue, Output, Text, Video
from tests.patience import PATIENCE_S


def picture(index: int = 0) -> Output:
    return Output(index, np.full((8, 8, 3), index, np.uint8), {"seed": index})


def name_of(file: File) -> str:
    return file.name


def deliver(send: Callable[[File], str], threads: int, count: int = 1) -> list[str]:
    """The URLs of so many pictures and their thumbnails."""
    with (
        ThreadPoolExecutor(threads) as pool,
        Uploads(pool, send) as delivery,
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

    def send(file: File) -> str:
        both.wait()
        return file.name

    urls = deliver(send, threads=2)

    assert urls == ["0.png", "0.thumb.webp"]


def test_one_thread_is_enough_for_any_number_of_pictures() -> None:
    stored: list[str] = []

    def send(file: File) -> str:
        stored.append(file.name)
        return file.name

    urls = deliver(send, threads=1, count=6)

    assert sorted(urls) == sorted(stored)
    assert len(urls) == 12


@pytest.mark.parametrize("failing", ["0.png", "0.thumb.webp"])
def test_a_job_fails_if_its_picture_or_its_thumbnail_cannot_be_stored(failing: str) -> None:
    def send(file: File) -> str:
        if file.name == failing:
            raise UploadError("storage did not take an asset")
        return file.name

    with pytest.raises(UploadError):
        deliver(send, threads=2)


def test_a_job_that_ends_early_waits_for_the_uploads_that_have_begun() -> None:
    begun, go_on, stored = threading.Event(), threading.Event(), list[str]()

    def send(file: File) -> str:
        begun.set()
        go_on.wait(PATIENCE_S)
        # Code that does not wait for this upload would not see it stored.
        time.sleep(0.05)
        stored.append(file.name)
        return file.name

    with RecordingPool(1) as pool:
        with Uploads(pool, send) as delivery:
            for index in range(3):
                delivery.submit(picture(index))
            assert begun.wait(PATIENCE_S)
            # At the end the uploads that have not begun are cancelled, the last thumbnail last.
            last_thumbnail, _ = pool.futures[-2:]
            last_thumbnail.add_done_callback(lambda _: go_on.set())

        assert stored == ["0.thumb.webp"]


def test_a_text_does_not_wait_for_a_thread() -> None:
    go_on, looks = threading.Event(), iter(range(20))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(go_on.wait, PATIENCE_S)
        try:
            with Uploads(pool, name_of) as delivery:
                delivery.submit(Text(0, "a reply", {}))
                (asset,) = delivery.assets(lambda: next(looks) and None)
        finally:
            go_on.set()

    assert asset.url == "data:text/plain;charset=utf-8,a%20reply"


def test_uploads_without_thumbnails_send_the_pictures_alone() -> None:
    with ThreadPoolExecutor(1) as pool, Uploads(pool, name_of, has_thumbnails=False) as delivery:
        delivery.submit(picture())
        delivery.submit(video())
        assets = delivery.assets(lambda: None)

    assert [(asset.url, asset.thumbnail_url) for asset in assets] == [
        ("0.png", None),
        ("0.mp4", None),
    ]


# --- a stop ---


def test_a_stop_is_heard_while_uploads_run() -> None:
    begun, go_on, stored = threading.Event(), threading.Event(), list[str]()

    def send(file: File) -> str:
        begun.set()
        go_on.wait(PATIENCE_S)
        stored.append(file.name)
        return file.name

    def check() -> None:
        if begun.is_set():
            raise Cancelled("the job was cancelled")

    with (
        ThreadPoolExecutor(1) as pool,
        Uploads(pool, send) as delivery,
    ):
        delivery.submit(picture())
        try:
            with pytest.raises(Cancelled):
                delivery.assets(check, poll_s=0.01)
            stored_before_the_stop = list(stored)
        finally:
            go_on.set()

    assert stored_before_the_stop == []


def test_an_upload_that_fails_ends_the_job_while_others_run() -> None:
    running, go_on, stored = threading.Event(), threading.Event(), list[str]()

    def send(file: File) -> str:
        if file.name == "0.png":
            running.wait(PATIENCE_S)
            raise UploadError("storage did not take an asset")
        if file.name == "1.png":
            running.set()
            go_on.wait(PATIENCE_S)
        stored.append(file.name)
        return file.name

    with (
        ThreadPoolExecutor(4) as pool,
        Uploads(pool, send) as delivery,
    ):
        for index in range(2):
            delivery.submit(picture(index))
        try:
            with pytest.raises(UploadError):
                delivery.assets(lambda: None)
            stored_before_the_end = list(stored)
        finally:
            go_on.set()

    assert "1.png" not in stored_before_the_end


def test_a_stop_that_makes_an_upload_fail_is_the_error_of_the_job() -> None:
    stop = Stop()

    def send(file: File) -> str:
        stop.set()
        raise UploadError("storage did not take an asset")

    def check() -> None:
        if stop.error:
            raise stop.error

    with (
        ThreadPoolExecutor(2) as pool,
        Uploads(pool, send) as delivery,
    ):
        delivery.submit(picture())
        with pytest.raises(Cancelled):
            delivery.assets(check)


# --- signatures ---


def video() -> Video:
    frames = FrameQueue()
    frames.put(np.zeros((1, 64, 64, 3), np.uint8), check=lambda: None)
    frames.end()
    return Video(0, frames, 64, 64, 8, {"seed": 7}, composite=True)


@pytest.mark.parametrize(
    ("output", "name", "mime"),
    [
        (lambda: replace(picture(), composite=True), "0.png", "image/png"),
        (video, "0.mp4", "video/mp4"),
    ],
    ids=["picture", "video"],
)
def test_what_is_stored_and_measured_is_the_signed_file(
    output: Callable[[], Output | Video], name: str, mime: str
) -> None:
    stored: dict[str, bytes] = {}

    def send(file: File) -> str:
        stored[file.name] = file.data
        return file.name

    def sign(data: bytes, mime: str, composite: bool) -> bytes:
        return data + f"|{mime}|{composite}".encode()

    with (
        ThreadPoolExecutor(2) as pool,
        Uploads(pool, send, sign) as delivery,
    ):
        delivery.submit(output())
        (asset,) = delivery.assets(lambda: None)

    signed = stored[name]
    assert signed.endswith(f"|{mime}|True".encode())
    assert asset.metadata["file_size_bytes"] == len(signed)
