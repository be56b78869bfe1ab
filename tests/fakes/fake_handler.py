"""`handler.py` with a fake model: the real worker and loop, ready in a second or two.

Where `FAMILIES` names chat, a `FakeChat` answers chats; that takes torch's import longer.

It runs as `python -m tests.fakes.fake_handler`. While the file `HOLD` exists, no step ends. While
`HOLD.pixels` exists, no picture can be read, so that its encoder waits; `HOLD.waits` says so.
While `HOLD.later` exists, it is `LATER_S` later than it would be.
"""

import os
import time
from collections.abc import Generator
from typing import Any

import numpy as np

from ourvidz_serverless import logs, settings
from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.serving import runpod_queue
from ourvidz_serverless.worker import Worker

#: More than a job may take, however long it is.
LATER_S = 100_000.0


class WetPaint(np.ndarray):
    """Pixels that whoever reads them has to wait for, as for a page of memory that is on a disk."""

    def __array_finalize__(self, given: Any) -> None:
        # Every way to read them begins with another view of them.
        hold = f"{os.environ['HOLD']}.pixels"
        while isinstance(given, WetPaint) and os.path.exists(hold):
            open(f"{os.environ['HOLD']}.waits", "w").close()
            time.sleep(0.02)


class BlockingSdxl:
    """Makes images slowly. It is not a FakeSdxl, whose LoraStore imports torch."""

    has_ip_adapter = False
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
            yield np.full((height, width, 3), seed % 256, dtype=np.uint8).view(WetPaint)


def clock() -> float:
    return time.monotonic() + LATER_S * os.path.exists(f"{os.environ['HOLD']}.later")


def main() -> None:
    config = settings.read()
    logs.configure(config.log_level)
    models: dict[str, Any] = {"sdxl": BlockingSdxl(os.environ["HOLD"])}
    if "chat" in config.families:
        from tests.fakes.fake_chat import FakeChat

        models["chat"] = FakeChat("Water.")
    worker = Worker(
        config,
        models,
        open_storage(config),
        Callback.of(config),
        "worker-1",
        clock=clock,
    )
    runpod_queue.serve(worker, config)


if __name__ == "__main__":
    main()
