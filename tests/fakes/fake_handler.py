"""`handler.py` with a fake model: the real worker and loop, ready in a second or two.

It runs as `python -m tests.fakes.fake_handler`. If `FAMILIES` names chat, a `FakeChat` answers
chats, and if it names wan, a `GreyWan` makes videos; the start then takes longer, since they
import torch.

The variable `HOLD` is a path. Files at that path hold a job at a stage:

- While `HOLD` exists, no step ends.
- While `HOLD.pixels` exists, the pixels of an image cannot be read, so its encoder waits. A
  waiting encoder creates `HOLD.waits`.
- While `HOLD.later` exists, the worker's clock is `LATER_S` ahead.
"""

import os
import time
from collections.abc import Generator
from typing import Any

import numpy as np

from ourvidz_serverless import logs, settings
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.serving import runpod_queue
from ourvidz_serverless.worker import Parts, Worker

#: Longer than any job may take.
LATER_S = 100_000.0


class BlockingPixels(np.ndarray):
    """Pixels that block their reader, as a memory page that is still on a disk does."""

    def __array_finalize__(self, source: Any) -> None:
        # Every way to read the pixels starts with a new view of them.
        hold = f"{os.environ['HOLD']}.pixels"
        while isinstance(source, BlockingPixels) and os.path.exists(hold):
            open(f"{os.environ['HOLD']}.waits", "w").close()
            time.sleep(0.02)


class BlockingSdxl:
    """Makes images slowly. It is not a FakeSdxl, because FakeSdxl's LoraStore imports torch."""

    has_ip_adapter = False
    is_inpainting_checkpoint = False
    loras = None

    def __init__(self, hold: str) -> None:
        self.device = self
        self._hold = hold

    def prefetch(self) -> None: ...

    def check(self) -> None: ...

    def reset_peak(self) -> None: ...

    def peak_mb(self) -> None:
        return None

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        for done in range(request.steps):
            while os.path.exists(self._hold):
                time.sleep(0.02)
                progress.step(done, request.steps)
            progress.step(done + 1, request.steps)
        width, height = request.size
        for seed in request.seeds:
            yield np.full((height, width, 3), seed % 256, dtype=np.uint8).view(BlockingPixels)


def grey_wan() -> Any:
    """A WAN model whose videos are grey."""
    from tests.fakes.fake_wan import FakeWan

    class GreyWan(FakeWan):
        def generate(self, request: Any, progress: Progress) -> Generator[np.ndarray]:
            width, height = request.size
            yield np.full((request.num_frames, height, width, 3), 128, dtype=np.uint8)

    return GreyWan()


def clock() -> float:
    return time.monotonic() + LATER_S * os.path.exists(f"{os.environ['HOLD']}.later")


def main() -> None:
    config = settings.read()
    logs.configure(config.log_level)
    models: dict[str, Any] = {"sdxl": BlockingSdxl(os.environ["HOLD"])}
    if "chat" in config.families:
        from tests.fakes.fake_chat import FakeChat

        models["chat"] = FakeChat("Water.")
    if "wan" in config.families:
        models["wan"] = grey_wan()
    worker = Worker(config, models, Parts.of(config), "worker-1", clock=clock)
    runpod_queue.serve(worker, config)


if __name__ == "__main__":
    main()
