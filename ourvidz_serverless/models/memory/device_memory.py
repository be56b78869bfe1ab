"""How much memory the device and the host really have, and have left.

`VRAM_BUDGET_GB` makes a worker behave as if its device had that much: on CUDA torch's allocator
enforces it, on a CPU a `CountedMemory` does, which counts what tensors allocate and says "out of
memory" in torch's words. So a rehearsal without a GPU runs out of memory for real.
"""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ourvidz_serverless.models.memory.ledger import Home, Ledger, Levels, Movable
from ourvidz_serverless.settings import Settings

#: What the host keeps for itself when models wait in its memory: the interpreter, pictures, PNGs.
HOST_RESERVE = 2 << 30

#: Where a container is told its limit, newer kernels first; what can be given up counts as free.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def open_ledger(settings: Settings) -> Ledger:
    """A ledger of the device that `DEVICE` asks for, with `PRESSURE_*` as its levels."""
    levels = Levels(settings.pressure_medium, settings.pressure_high, settings.pressure_critical)
    return Ledger(open_memory(settings), levels)


def alone(model: Movable) -> Home:
    """The home of a model that shares the host with no other."""
    return Ledger(HostMemory()).register(model, "model", "none")


def open_memory(settings: Settings) -> Any:
    """The memory of the device that `DEVICE` asks for, within `VRAM_BUDGET_GB`."""
    budget = int((settings.vram_budget_gb or 0) * (1 << 30))
    asked = settings.device if settings.device != "auto" else "cuda"
    if asked.startswith("cuda") and torch.cuda.is_available():
        return CudaMemory(torch.device(asked), budget)
    return CountedMemory(budget) if budget else HostMemory()


def host_memory() -> tuple[int, int]:
    """Bytes of the host in all, and those that are left: the machine's, or the container's."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for paths in CGROUPS:
        try:
            limit, used, stat = (Path(path).read_text() for path in paths)
        except OSError:
            continue
        if limit.strip().isdigit():
            facts = dict(line.split() for line in stat.splitlines())
            left = int(limit) - int(used) + int(facts.get("inactive_file", 0))
            total, free = min(total, int(limit)), min(free, left)
        break
    return total, max(free, 0)


class HostMemory:
    """A CPU: what models take on the device, they take of the host."""

    name = "cpu"
    is_host = True

    def __init__(self) -> None:
        self.total_bytes = host_memory()[0]

    def free_bytes(self) -> int:
        return host_memory()[1]

    def host_free_bytes(self) -> int:
        return max(host_memory()[1] - HOST_RESERVE, 0)


class CudaMemory:
    """A GPU, as its driver tells and torch's allocator uses it."""

    is_host = False

    def __init__(self, device: torch.device, budget: int) -> None:
        self.name = str(torch.device("cuda", device.index or 0))
        self._device = torch.device(self.name)
        total = torch.cuda.mem_get_info(self._device)[1]
        self.total_bytes = min(budget or total, total)
        if budget:
            torch.cuda.set_per_process_memory_fraction(self.total_bytes / total, self._device)

    def free_bytes(self) -> int:
        # What the allocator keeps without a tensor in it is as good as free.
        allocated = torch.cuda.memory_allocated(self._device)
        kept = torch.cuda.memory_reserved(self._device) - allocated
        free = torch.cuda.mem_get_info(self._device)[0] + kept
        return max(min(free, self.total_bytes - allocated), 0)

    def host_free_bytes(self) -> int:
        return max(host_memory()[1] - HOST_RESERVE, 0)


class CountedMemory:
    """A CPU that plays a small card: what its tensors allocate is counted, and is limited.

    Weights count from `hold`, everything else from the moment at which an operation under
    `limited` has made it. Space that a kernel uses inside is not seen.
    """

    name = "cpu"
    is_host = False

    def __init__(self, budget: int) -> None:
        self.total_bytes = budget
        self.used_bytes = self.peak_bytes = 0
        # Tensors die in whichever thread, in the middle of anything, even of this.
        self._lock = threading.RLock()
        self._storages: dict[int, weakref.ref[Any]] = {}

    def free_bytes(self) -> int:
        return max(self.total_bytes - self.used_bytes, 0)

    def host_free_bytes(self) -> int:
        return max(host_memory()[1] - HOST_RESERVE, 0)

    def reset_peak(self) -> None:
        self.peak_bytes = self.used_bytes

    def hold(self, num_bytes: int) -> None:
        """Count bytes that no operation made; fewer, where negative. Raises torch's error."""
        with self._lock:
            if num_bytes > 0 and self.used_bytes + num_bytes > self.total_bytes:
                raise torch.OutOfMemoryError(
                    f"{num_bytes} bytes beside {self.used_bytes} of {self.total_bytes}"
                )
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor that an operation made, until it is gone. Raises torch's error."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._storages:
                return
            self.hold(size)
            self._storages[key] = weakref.ref(storage, lambda _: self.forget(key, size))

    def forget(self, key: int, size: int) -> None:
        with self._lock:
            if self._storages.pop(key, None) is not None:
                self.used_bytes -= size

    def park(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, as if it had been copied to the host."""
        storage = tensor.untyped_storage()
        self.forget(storage._cdata, storage.nbytes())
        return tensor

    def limited(self) -> TorchDispatchMode:
        """A context in which what this thread computes is counted."""
        return _Counting(self)


class _Counting(TorchDispatchMode):
    def __init__(self, memory: CountedMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            each.untyped_storage()._cdata
            for each in tree_leaves((args, kwargs))
            if type(each) in PLAIN
        }
        made = func(*args, **kwargs)
        for each in tree_leaves(made):
            # A view of a weight is the weight, which `hold` has counted.
            if type(each) in PLAIN and each.untyped_storage()._cdata not in given:
                self._memory.note(each)
        return made


PLAIN = (torch.Tensor, torch.nn.Parameter)
