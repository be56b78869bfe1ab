"""A fake SDXL model: it has no networks, and each image has one flat colour, its seed."""

import threading
from collections.abc import Generator

import numpy as np

from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.loras import LoraStore
from ourvidz_serverless.models.sdxl.request import ImageModel, ImageRequest


class NoDevice:
    """A device without memory."""

    def check(self) -> None: ...

    def reset_peak(self) -> None: ...

    def peak_mb(self) -> None:
        return None


class FakeSdxl(ImageModel):
    """An SDXL model without networks. A test can hold it at a step, or make it raise `fails`."""

    loras = LoraStore(None)
    has_ip_adapter = False
    is_inpainting_checkpoint = False

    def __init__(self) -> None:
        self.device = NoDevice()
        self.requests: list[ImageRequest] = []
        self.at_step = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails: list[Exception] = []
        self.most_at_once = self.at_once = 0

    def hold(self) -> None:
        """Make the next generation wait at its first step until `go_on` is set."""
        self.at_step.clear()
        self.go_on.clear()

    def prefetch(self) -> None: ...

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.fails:
                raise self.fails.pop(0)
            for done in range(request.steps):
                self.at_step.set()
                while not self.go_on.wait(0.02):
                    progress.step(done, request.steps)
                progress.step(done + 1, request.steps)
            width, height = request.size
            for seed in request.seeds:
                yield np.full((height, width, 3), seed % 256, dtype=np.uint8)
        finally:
            self.at_once -= 1
