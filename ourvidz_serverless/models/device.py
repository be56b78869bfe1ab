"""Where a family computes, and in which number format."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ourvidz_serverless.errors import ModelLoadError, OutOfMemory
from ourvidz_serverless.settings import Settings

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device and the dtype that weights are kept in on it."""

    name: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, settings: Settings, on_gpu: torch.dtype) -> Device:
        """The device that `DEVICE` and `DTYPE` ask for; `auto` is CUDA in `on_gpu`, else the CPU.

        Raises ModelLoadError when CUDA is asked for and there is none.
        """
        cuda = torch.cuda.is_available()
        asked = settings.device if settings.device != "auto" else "cuda" if cuda else "cpu"
        name = torch.device(asked)
        if name.type == "cuda" and not cuda:
            raise ModelLoadError("DEVICE: cuda is asked for, and this machine has none")
        auto = on_gpu if name.type == "cuda" else torch.float32
        return cls(name, DTYPES.get(settings.dtype, auto))

    @property
    def is_cuda(self) -> bool:
        return self.name.type == "cuda"

    def reset_peak(self) -> None:
        """Begin to measure `peak_mb` anew."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.name)

    def peak_mb(self) -> int | None:
        """The most device memory that was allocated since `reset_peak`, in MiB; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.name) >> 20 if self.is_cuda else None

    def free_bytes(self) -> int | None:
        """Device memory that nobody holds; None on a CPU."""
        return torch.cuda.mem_get_info(self.name)[0] if self.is_cuda else None

    def free_memory(self) -> None:
        """Give back what no tensor holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


@contextmanager
def out_of_memory_is_ours() -> Iterator[None]:
    """Raise our OutOfMemory where torch says that an allocation did not fit."""
    try:
        yield
    except RuntimeError as exc:
        if is_out_of_memory(exc):
            raise OutOfMemory("the job does not fit the device's memory") from exc
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that an allocation did not fit; on a CPU it says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
