"""A model that paints one flat square a seed, so that a test can read the seed off the pixels."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ourvidz_serverless.models.sdxl.loras import LoraShelf
from tests.fakes.devices import LoadedHandle


class NoDevice:
    """A device that has no memory to speak of."""

    def check(self) -> None: ...

    def reset_peak(self) -> None: ...

    def peak_mb(self) -> None:
        return None


class FakeSdxl:
    """Stands where an SDXL stands. It can be held at a step, and told to fail at one."""

    adapter = None
    loras = LoraShelf(None)
    handle = LoadedHandle()

    def __init__(self) -> None:
        self.device = NoDevice()
        self.calls: list[dict[str, Any]] = []
        self.at_step = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails: list[Exception] = []
        self.most_at_once = self.at_once = 0

    def hold(self) -> None:
        """Stop at the next first step until `go_on` is set."""
        self.at_step.clear()
        self.go_on.clear()

    def generate(
        self,
        *,
        seeds: Sequence[int],
        width: int,
        height: int,
        num_inference_steps: int,
        step: Callable[[int, int], None],
        **rest: Any,
    ) -> Iterator[np.ndarray]:
        self.calls.append({"seeds": list(seeds), "width": width, "height": height, **rest})
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.fails:
                raise self.fails.pop(0)
            for done in range(num_inference_steps):
                self.at_step.set()
                while not self.go_on.wait(0.02):
                    step(done, num_inference_steps)
                step(done + 1, num_inference_steps)
            for seed in seeds:
                yield np.full((height, width, 3), seed % 256, dtype=np.uint8)
        finally:
            self.at_once -= 1
