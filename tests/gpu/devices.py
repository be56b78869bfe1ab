"""The device of these tests, and the marks of a module or of a test that needs one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.fakes.recorded_progress import RecordedProgress

#: `cuda`, or `cpu` to try the tests.
DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")

HAS_CUDA = torch.cuda.is_available()

ON_A_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu" and not HAS_CUDA, reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu" or not HAS_CUDA, reason="needs a CUDA device")

#: The largest mean difference that other kernels may cause, in grey levels, by dtype.
MAX_DIFFERENCE = {"float32": 1.0, "float16": 3.0, "bfloat16": 6.0}


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference of pixels, in grey levels."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@contextmanager
def filled(left_mb: int) -> Iterator[None]:
    """Fill the memory of the device except for `left_mb` MiB."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - (left_mb << 20)
    held = torch.empty(free, dtype=torch.uint8, device="cuda")
    yield
    del held
    torch.cuda.empty_cache()


@contextmanager
def noted_waits() -> Iterator[list[warnings.WarningMessage]]:
    """The moments at which the host waits for the device, by torch's own warnings."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_in_steps(render: Callable[[RecordedProgress], object]) -> list[str]:
    """The files in which the host waits for the device between the first step and the last."""
    noted: list[int] = []

    class Noting(RecordedProgress):
        def step(self, done: int, total: int) -> None:
            noted.append(len(waits))

    with noted_waits() as waits:
        render(Noting())
    return [str(each.filename) for each in waits[noted[0] : noted[-1]]]
