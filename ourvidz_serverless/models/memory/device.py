"""Where a family computes, and in which number format."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ourvidz_serverless.errors import (
    DeviceLost,
    InternalError,
    JobError,
    ModelLoadError,
    OutOfMemory,
)
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.memory.pinned import Block
from ourvidz_serverless.settings import Settings

#: The errors after which, by CUDA's documentation, "the process must be terminated and relaunched",
#: with those of the hardware, the driver and MPS (CUDA Runtime API, `cudaError_t`, 13.0): how torch
#: words them ("CUDA error: ...", "HIP error: ...") where it does not tell their number.
LOST = {
    4: "driver shutting down",
    46: "all CUDA-capable devices are busy or unavailable",
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    700: "an illegal memory access was encountered",
    702: "the launch timed out and was terminated",
    709: "context is destroyed",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    717: "operation not supported on global/shared address space",
    718: "invalid program counter",
    719: "unspecified launch failure",
    721: "tensor memory not completely freed",
    805: "MPS client failed to connect to the MPS control daemon or the MPS server",
    807: "MPS server",
    810: "MPS client terminated",
    999: "unknown error",
}

#: The beginnings of the device's errors in torch (`C10_CUDA_CHECK`, `C10_CUDA_DRIVER_CHECK`) and in
#: Triton.
OF_THE_DEVICE = ("CUDA error", "CUDA driver error", "HIP error", "HIP driver error", "Triton Error")

#: A library's kernel that began and did not end; what was wrong is told to later calls only.
LIBRARIES = ("CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED")

#: CUDA's error number for "out of memory" (`cudaErrorMemoryAllocation`).
OUT_OF_MEMORY = 2

#: The libraries' errors for an allocation that did not fit. "Not initialized" is one: a library
#: makes its handle at its first call, and on a full device there is no memory for the handle.
ALLOCATION_FAILED = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)

#: Held while a graph is recorded, and for what CUDA forbids meanwhile in whichever thread: to wait
#: for all that a device does, and to give its unused memory back.
whole_device = threading.Lock()

#: The side of the matrices that `Device.check` multiplies. bf16 holds integers up to 256 exactly.
CHECK_SIDE = 256

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device and the dtype that weights are kept in on it.

    `counted` is there where a CPU plays a card of `VRAM_BUDGET_GB`.
    """

    name: torch.device
    dtype: torch.dtype
    counted: CountedMemory | None = None
    #: The peak of the job's stages that are over.
    past: list[int] = field(default_factory=lambda: [0], compare=False)

    @classmethod
    def choose(cls, settings: Settings, on_gpu: torch.dtype, memory: object = None) -> Device:
        """The device that `DEVICE` and `DTYPE` ask for; `auto` is CUDA in `on_gpu`, else the CPU.

        `memory` is the ledger's, which all families of a worker share. Raises ModelLoadError when
        CUDA is asked for and there is none.
        """
        cuda = torch.cuda.is_available()
        asked = settings.device if settings.device != "auto" else "cuda" if cuda else "cpu"
        name = torch.device(asked)
        if name.type == "cuda" and not cuda:
            raise ModelLoadError("DEVICE: cuda is asked for, and this machine has none")
        if name.type == "cuda" and (name.index or 0) >= torch.cuda.device_count():
            raise ModelLoadError(f"DEVICE: this machine has no {name}")
        auto = on_gpu if name.type == "cuda" else torch.float32
        counted = memory if isinstance(memory, CountedMemory) else None
        return cls(name, DTYPES.get(settings.dtype, auto), counted)

    @property
    def is_cuda(self) -> bool:
        return self.name.type == "cuda"

    def check(self) -> None:
        """Multiply two small matrices on the device; raises RuntimeError if the result is wrong."""
        side = torch.arange(CHECK_SIDE)
        # Integers that bf16 holds exactly, and a matrix that moves each row down by one.
        numbers = ((side[:, None] + side) % CHECK_SIDE).to(self.dtype)
        shift = torch.eye(CHECK_SIDE, dtype=self.dtype).roll(1, 0)
        with self.computing():
            product = torch.matmul(shift.to(self.name), numbers.to(self.name)).cpu()
        if not torch.equal(product, numbers.roll(1, 0)):
            raise RuntimeError("the device computes wrong numbers")

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16, and does not only act it, as CUDA before Ampere does."""
        return not self.is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)

    def reset_peak(self) -> None:
        """Begin to measure a job's peak anew."""
        self.past[0] = 0
        self._reset()

    def begin_stage(self) -> int:
        """Begin to measure a stage of a job; what is allocated already."""
        self.past[0] = self.peak_bytes() or 0
        self._reset()
        return self.allocated_bytes()

    def stage_took(self, before: int) -> int | None:
        """What the stage took at most beside that; None on a CPU."""
        peak = self._peak()
        return None if peak is None else max(peak - before, 0)

    def _reset(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.name)
        elif self.counted:
            self.counted.reset_peak()

    def peak_bytes(self) -> int | None:
        """The most device memory that was allocated since `reset_peak`; None on a CPU."""
        peak = self._peak()
        return None if peak is None else max(peak, self.past[0])

    def _peak(self) -> int | None:
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.name)
        return self.counted.peak_bytes if self.counted else None

    def peak_mb(self) -> int | None:
        """The same in MiB."""
        peak = self.peak_bytes()
        return None if peak is None else peak >> 20

    def allocated_bytes(self) -> int:
        """What tensors hold of the device now; 0 on a CPU, which does not count."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.name)
        return self.counted.used_bytes if self.counted else 0

    def free_bytes(self) -> int | None:
        """Device memory that nobody holds; None on a CPU."""
        if self.counted:
            return self.counted.free_bytes()
        return torch.cuda.mem_get_info(self.name)[0] if self.is_cuda else None

    def free_memory(self) -> None:
        """Give back what no tensor holds any more."""
        gc.collect()
        if self.is_cuda:
            with whole_device:
                torch.cuda.empty_cache()

    def uncounted(self) -> AbstractContextManager[object]:
        """A context for what is allocated in the host's memory."""
        return _disable_current_modes() if self.counted else nullcontext()

    def hold(self, num_bytes: int) -> None:
        """Count weights that arrive, or leave where negative; a GPU's driver does by itself."""
        if self.counted:
            self.counted.hold(num_bytes)

    def limited(self) -> AbstractContextManager[object]:
        """A context to allocate in, within what the device has."""
        return self.counted.limited() if self.counted else nullcontext()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The same, without gradients."""
        with torch.inference_mode(), self.limited():
            yield

    def parked(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the host's memory."""
        return self.counted.park(tensor) if self.counted else tensor.cpu()

    def brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor of the host's on the device, counted as such."""
        return tensor.clone() if self.counted else tensor.to(self.name)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on a GPU. The copy may be under way until `wait` returns."""
        return tensor.to(self.name, non_blocking=True)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a GPU."""
        return tensor.is_cuda

    def pin(self, num_bytes: int) -> Block | None:
        """A block of pinned memory, or None if the system cannot pin so much."""
        try:
            return Block(num_bytes, torch.cuda.cudart())
        except (RuntimeError, OSError):
            self._forget_error()
            return None

    def unpin(self, block: Block) -> None:
        """Give pinned memory back, once no copy from it is under way."""
        with whole_device:
            torch.cuda.synchronize(self.name)
            block.release()

    def _forget_error(self) -> None:
        """The runtime keeps a failed call's error, and torch raises it at the next kernel."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.name)

    def wait(self) -> None:
        """Return when copies that were begun have arrived."""
        if self.is_cuda:
            with whole_device:
                torch.cuda.synchronize(self.name)


def sent(
    numbers: Sequence[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The host's numbers on a device. A GPU's host goes on at once, whatever is computed there."""
    here = torch.as_tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return here.to(device)
    return here.pin_memory().to(device, non_blocking=True)


def picked(rows: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
    """Some rows of a tensor, in that order; where they are the first ones, as they lie."""
    if list(which) == list(range(len(which))):
        return rows[: len(which)]
    return rows.index_select(0, sent(which, rows.device))


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
    """Whether an allocation did not fit.

    torch's allocators raise OutOfMemoryError on a GPU and say it in words on a CPU. The driver and
    the libraries allocate by themselves: torch raises a RuntimeError with their message.
    """
    if isinstance(error, (torch.OutOfMemoryError, OutOfMemory)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    first = _first_line(error)
    if "can't allocate memory" in first or any(name in first for name in ALLOCATION_FAILED):
        return True
    is_full = getattr(error, "error_code", None) == OUT_OF_MEMORY or "out of memory" in first
    return is_full and _is_of_the_device(error)


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, means that the device takes no more work from us.

    torch raises AcceleratorError with the driver's number, and RuntimeError for what its libraries
    tell. An error that a job alone has made, such as an invalid argument, is none.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and _is_lost(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_lost(error: RuntimeError) -> bool:
    first = _first_line(error)
    if any(name in first for name in LIBRARIES):
        return True
    is_known = getattr(error, "error_code", None) in LOST or any(
        words in first for words in LOST.values()
    )
    return is_known and _is_of_the_device(error)


def _is_of_the_device(error: RuntimeError) -> bool:
    is_numbered = isinstance(error, torch.AcceleratorError)
    return is_numbered or _first_line(error).startswith(OF_THE_DEVICE)


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n", 1)[0]


def as_job_error(error: BaseException) -> JobError:
    """What an error that nobody foresaw is in our words."""
    if is_lost(error):
        return DeviceLost("the device failed, and with it this worker; another one can do the job")
    if is_out_of_memory(error):
        return OutOfMemory("the job does not fit the device's memory")
    return InternalError("an internal error; the worker's log says where")
