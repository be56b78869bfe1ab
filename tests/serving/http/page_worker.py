"""A worker for all families, with fake models, whose page and storage a test can open."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.fake_wan import FakeWan
from tests.fakes.local_worker import LocalWorker


class GreyFrames(FakeWan):
    """A `FakeWan` whose frames are all grey."""

    def generate(self, request: VideoRequest, progress: Progress) -> Generator[np.ndarray]:
        self.calls.append(request)
        width, height = request.size
        yield np.full((request.num_frames, height, width, 3), 128, dtype=np.uint8)


def page_worker(folder: Path, chat: Any, **settings: Any) -> LocalWorker:
    """A worker for all families, whose storage the page can read."""
    own = {"storage_url": f"file:{folder / 'stored'}", **settings}
    config = Settings(families=("sdxl", "chat", "wan"), host="127.0.0.1", **own)
    fake_sdxl = FakeSdxl()
    models = {"sdxl": fake_sdxl, "chat": chat, "wan": GreyFrames(FakeChat("More."))}
    storage = open_storage(config)
    return LocalWorker(
        folder / "stored", settings=config, fake_sdxl=fake_sdxl, models=models, storage=storage
    )
