"""The device and dtype that a family computes on, and what the device's errors mean."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ourvidz_serverless.errors import (
    DeviceLost,
    InternalError,
    JobError,
    ModelLoadError,
    OutOfMemory,
)
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.memory.pinned import PinnedBlock
from ourvidz_serverless.models.memory.uploads import Fence, Uploads
from ourvidz_serverless.settings import Settings

#: The errors after which, by CUDA's documentation, "the process must be terminated and relaunched",
#: with those of the hardware, the driver and MPS (CUDA Runtime API, `cudaError_t`, 13.0). The words
#: are torch's ("CUDA error: ...", "HIP error: ..."), for errors that come without their number.
LOST_ERRORS = {
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

#: How messages of the device's errors begin, in torch (`C10_CUDA_CHECK`, `C10_CUDA_DRIVER_CHECK`)
#: and in Triton.
DEVICE_ERROR_PREFIXES = (
    "CUDA error",
    "CUDA driver error",
    "HIP error",
    "HIP driver error",
    "Triton Error",
)

#: A library's kernel started and did not finish. Only later calls report the reason.
LIBRARY_FAILURES = ("CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED")

#: CUDA's error number for "out of memory" (`cudaErrorMemoryAllocation`).
OUT_OF_MEMORY = 2

#: The libraries' errors for an allocation that did not fit. "Not initialized" is one of them: a
#: library makes its handle at its first call, and on a full device there is no memory for it.
ALLOCATION_FAILED = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)

#: Held while a CUDA graph is recorded, and for calls that CUDA forbids meanwhile in any thread:
#: waiting for the whole device, and freeing its unused memory.
device_wide_lock = threading.Lock()

#: The size of the matrices that `Device.check` multiplies. bf16 holds integers up to 256 exactly.
CHECK_SIDE = 256

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device, and the dtype of the weights on it.

    `counted` is set if a CPU simulates a device of `VRAM_BUDGET_GB`.
    """

    name: torch.device
    dtype: torch.dtype
    counted: CountedMemory | None = None
    #: The peak of the job's earlier stages.
    past_peak: list[int] = field(default_factory=lambda: [0], compare=False)

    @classmethod
    def choose(cls, settings: Settings, on_gpu: torch.dtype, memory: object = None) -> Device:
        """The device of `DEVICE` and `DTYPE`; `auto` is CUDA with the dtype `on_gpu`, else the CPU.

        `memory` is the ledger's, which all families of a worker share. Raises ModelLoadError if
        `DEVICE` asks for a CUDA device that is not there.
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
        """Multiply two small matrices on the device. Raises RuntimeError if the result is wrong."""
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
        """Whether the device computes in bf16 itself. GPUs before Ampere only emulate it."""
        return not self.is_cuda or torch.cuda.is_bf16_supported(including_emulation=False)

    def reset_peak(self) -> None:
        """Start to measure a job's peak."""
        self.past_peak[0] = 0
        self._reset()

    def begin_stage(self) -> int:
        """Start to measure a stage of a job; returns the bytes that are allocated already."""
        self.past_peak[0] = self.peak_bytes() or 0
        self._reset()
        return self.allocated_bytes()

    def stage_peak_bytes(self, before: int) -> int | None:
        """The most bytes that the stage took, beside those `before` it; None on a CPU."""
        peak = self._peak()
        return None if peak is None else max(peak - before, 0)

    def peak_bytes(self) -> int | None:
        """The most bytes that were allocated since `reset_peak`; None on a CPU."""
        peak = self._peak()
        return None if peak is None else max(peak, self.past_peak[0])

    def _reset(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.name)
        elif self.counted:
            self.counted.reset_peak()

    def _peak(self) -> int | None:
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.name)
        return self.counted.peak_bytes if self.counted else None

    def peak_mb(self) -> int | None:
        """`peak_bytes` in MiB."""
        peak = self.peak_bytes()
        return None if peak is None else peak >> 20

    def allocated_bytes(self) -> int:
        """The bytes that tensors take on the device; 0 on a CPU, which does not count."""
        if self.is_cuda:
            return torch.cuda.memory_allocated(self.name)
        return self.counted.used_bytes if self.counted else 0

    def free_memory(self) -> None:
        """Free the memory that no tensor holds any more."""
        gc.collect()
        if self.is_cuda:
            with device_wide_lock:
                torch.cuda.empty_cache()

    def uncounted(self) -> AbstractContextManager[object]:
        """A context for tensors in the host's memory, which are not counted."""
        return _disable_current_modes() if self.counted else nullcontext()

    def count_bytes(self, num_bytes: int) -> None:
        """Count weights that come to the device; a negative number for those that leave.

        This affects only a simulated device. On a GPU the driver counts.
        """
        if self.counted:
            self.counted.count_bytes(num_bytes)

    def counting(self) -> AbstractContextManager[object]:
        """A context in which a simulated device counts and limits allocations."""
        return self.counted.counting() if self.counted else nullcontext()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A context to compute in: `counting`, and without gradients."""
        with torch.inference_mode(), self.counting(), self._current():
            yield

    def _current(self) -> AbstractContextManager[object]:
        """A context in which a GPU is this thread's current one.

        torch's own operations find their GPU by their tensors. Libraries and compiled code launch
        on the current one, which is the first GPU in each new thread.
        """
        return torch.cuda.device(self.name) if self.name.index else nullcontext()

    def copy_to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's copy in the host's memory."""
        return self.counted.to_host(tensor) if self.counted else tensor.cpu()

    def copy_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor's copy on the device."""
        return tensor.clone() if self.counted else tensor.to(self.name)

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's copy on a GPU. The copy may be incomplete until `wait` returns."""
        return tensor.to(self.name, non_blocking=True)

    def uploads(self) -> Uploads:
        """A context that sends many tensors to a GPU."""
        return Uploads(self)

    def is_pageable(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in host memory that a GPU cannot read by itself."""
        return tensor.device.type == "cpu" and not tensor.is_pinned()

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory on the device for a tensor's copy."""
        return torch.empty_like(tensor, device=self.name)

    def begin_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from pinned memory. The copy may be incomplete until `wait` returns."""
        target.copy_(source, non_blocking=True)

    def fence(self) -> Fence:
        """A mark behind the copies that have begun on a GPU."""
        return StreamFence(self.name)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a GPU."""
        return tensor.is_cuda

    def pin(self, num_bytes: int) -> PinnedBlock | None:
        """A block of pinned memory, or None if the system cannot pin so much."""
        try:
            return PinnedBlock(num_bytes, torch.cuda.cudart())
        except (RuntimeError, OSError):
            self._forget_error()
            return None

    def unpin(self, block: PinnedBlock) -> None:
        """Free pinned memory, after all copies from it are complete."""
        with device_wide_lock:
            torch.cuda.synchronize(self.name)
            block.release()

    def _forget_error(self) -> None:
        """Clear the error of a failed call, which torch would raise at the next kernel."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.name)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self.is_cuda:
            with device_wide_lock:
                torch.cuda.synchronize(self.name)


class StreamFence:
    """A mark in a GPU's current stream.

    `torch.cuda.Event.record` takes the stream of the thread's current GPU, which may be another
    one. Copies to the second GPU would not be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


def to_device_async(
    numbers: Sequence[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers as a tensor on a device. The host does not wait for the GPU's earlier work."""
    here = torch.as_tensor(numbers, dtype=dtype)
    return _pinned_for(device, here).to(device, non_blocking=True)


class AsyncTransfers(TorchFunctionMode):
    """A context in which `Tensor.to` sends the host's tensors to a GPU without a wait.

    It is for libraries that make a tensor on the host and send it in the usual way, after which
    the host waits for all of the GPU's earlier work.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and args[0].device.type == "cpu":
            target = next(
                (each for each in (*args[1:], *kwargs.values()) if _is_device(each)), None
            )
            if target is not None:
                here = _pinned_for(torch.device(target), args[0])
                return func(here, *args[1:], **{**kwargs, "non_blocking": True})
        return func(*args, **kwargs)


def _is_device(argument: Any) -> bool:
    return isinstance(argument, (torch.device, str))


def _pinned_for(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor from which a GPU copies while the host goes on; the same one for other devices."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def select_rows(rows: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
    """`index_select`, without a copy if the rows are 0 to n-1."""
    if list(which) == list(range(len(which))):
        return rows[: len(which)]
    return rows.index_select(0, to_device_async(which, rows.device))


@contextmanager
def translate_out_of_memory() -> Iterator[None]:
    """Raise our OutOfMemory instead of torch's errors for an allocation that did not fit."""
    try:
        yield
    except RuntimeError as exc:
        if is_out_of_memory(exc):
            raise OutOfMemory("the job does not fit the device's memory") from exc
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation did not fit.

    torch's allocator raises OutOfMemoryError on a GPU, and on a CPU an error with certain words.
    The driver and the libraries allocate by themselves: torch raises a RuntimeError with their
    message.
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
    """Whether an error, or its cause, means that this process can no longer use the device.

    torch raises AcceleratorError with the driver's error number, and RuntimeError for errors of the
    libraries. An error that concerns one job only, such as an invalid argument, is none.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and _is_lost(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_lost(error: RuntimeError) -> bool:
    first = _first_line(error)
    if any(name in first for name in LIBRARY_FAILURES):
        return True
    is_known = getattr(error, "error_code", None) in LOST_ERRORS or any(
        words in first for words in LOST_ERRORS.values()
    )
    return is_known and _is_of_the_device(error)


def _is_of_the_device(error: RuntimeError) -> bool:
    is_numbered = isinstance(error, torch.AcceleratorError)
    return is_numbered or _first_line(error).startswith(DEVICE_ERROR_PREFIXES)


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n", 1)[0]


def as_job_error(error: BaseException) -> JobError:
    """The JobError for an unforeseen error: a lost device, out of memory, or an internal error."""
    if is_lost(error):
        return DeviceLost("the device failed, and with it this worker; another one can do the job")
    if is_out_of_memory(error):
        return OutOfMemory("the job does not fit the device's memory")
    return InternalError("an internal error; the worker's log says where")
