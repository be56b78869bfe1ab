"""A CUDA device on paper: tensors on it have a shape, a dtype and a size, and no numbers.

torch's FakeTensorMode computes the shapes, and refuses an operation whose tensors are on different
devices. `FakeCuda` sees each operation before it, counts it, and plays the device: a copy to the
host gives zeros, and a number that the host reads is 0 or True. Tensors in the host's memory are
real, so tokenizers, schedulers, numpy and random generators work as they always do.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.cards import CARDS, Card, Precision
from benchmarks.dry_run import attention, guard
from benchmarks.dry_run.counts import Counts

#: torch's allocator rounds each tensor up to a multiple of so many bytes (`kMinBlockSize` in
#: c10/cuda/CUDACachingAllocator.cpp).
BLOCK = 512

#: What a process takes of a card beside its tensors: CUDA's context, and the libraries' workspaces.
#: Assumed, not counted.
RESERVED_BYTES = 3 << 28

#: Operations that CUDA refuses, or that compute wrongly, if their floating-point tensors have
#: different dtypes. FakeTensorMode lets these pass.
STRICT = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "native_layer_norm",
        "native_group_norm",
        "_fused_rms_norm",
        "index_put",
        "index_put_",
    }
)

#: Operations that give a number to the host, which waits for it.
READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal"})

#: Operations that read as much as they write, and not the whole of their input.
GATHERS = frozenset({"embedding", "index", "index_select", "gather"})

#: Operations that allocate or rename, without a kernel.
WITHOUT_KERNEL = frozenset(
    {
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "alias",
        "lift_fresh",
        "set_",
    }
)

#: Operations that CUDA computes in one kernel, and that other devices take apart
#: (`_fused_rms_norm_cuda` in torch's native_functions.yaml). torch calls this one if the weight has
#: the dtype of the input.
FUSED_ON_CUDA = frozenset({"_fused_rms_norm"})

#: The product with weights in four bits, for which torch has no formula of FLOPs.
INT4_PRODUCT = "_weight_int4pack_mm"

OWN_FOLDER = str(Path(__file__).parent)

COMPOSITE = "CompositeImplicitAutograd"

Truth = Callable[[set[str]], bool]

#: The functions that usually read False: a prompt has no weights.
UNTRUE_IN = frozenset({"Rows.is_weighted"})


def usual_truth(readers: set[str]) -> bool:
    """What the host reads as a truth: that numbers are finite, that a mask is all ones."""
    return UNTRUE_IN.isdisjoint(readers)


#: What a handler of one operation returns if the operation takes the usual way.
USUAL = object()


class Call:
    """One operation: torch's overload, its arguments, and what of them matters here.

    `target` is the device that the operation names, if it names one.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = str(func.overloadpacket.__name__)
        leaves = tree_leaves((args, kwargs))
        self.tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
        self.fakes = [each for each in self.tensors if isinstance(each, FakeTensor)]
        self.target = next((each for each in leaves if isinstance(each, torch.device)), None)

    def __call__(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    @property
    def reads_device(self) -> bool:
        return any(each.is_cuda for each in self.fakes)


class FakeCuda(TorchDispatchMode):
    """The device `cuda:0`, which has the memory of a card. Use it in `installed()` and `on()`.

    A tensor that does not fit beside the others and `RESERVED_BYTES` raises torch's error.

    A number that the host reads from the device is 0. A truth is what `truth` returns for the
    qualified names of the functions that read it. Each thread that computes must be in `on()`.
    """

    def __init__(self, card: Card = CARDS["H200"], truth: Truth = usual_truth) -> None:
        guard.load()
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.total_bytes = int(card.memory_gib * 2**30)
        self._usable_bytes = self.total_bytes - RESERVED_BYTES
        self._truth = truth
        self.counts = Counts()
        self.live_bytes = self.device_peak_bytes = 0
        self._function_mode = _Functions(self)
        # A tensor can be freed in any thread at any moment, even inside these methods.
        self._lock = threading.RLock()
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._pinned_blocks: dict[int, int] = {}
        self._pinned_storages: set[int] = set()
        self._thread, self._turn = threading.local(), threading.Lock()

    @contextmanager
    def on(self) -> Iterator[FakeCuda]:
        """A context in which this thread's tensors on CUDA are fake, and counted.

        One thread at a time is in it: FakeTensorMode keeps what it replaced on itself.
        """
        if getattr(self._thread, "is_on", False):
            yield self
            return
        with self._turn:
            self._thread.is_on = True
            try:
                with self.fake, self, self._function_mode:
                    yield self
            finally:
                self._thread.is_on = False

    def take(self) -> Counts:
        """What was counted since the last `take`. From now on the peak is what is there now."""
        with self._lock:
            taken, self.counts = self.counts, Counts(peak_bytes=self.live_bytes)
            return taken

    @property
    def free_bytes(self) -> int:
        return max(self._usable_bytes - self.live_bytes, 0)

    def reset_peak(self) -> None:
        """Begin a peak of the device itself, as `torch.cuda.reset_peak_memory_stats` does."""
        with self._lock:
            self.device_peak_bytes = self.live_bytes

    # --- one operation ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, dict(kwargs or {}))
        if func.namespace == "prim":
            with self.fake:
                return call()
        handler = HANDLERS.get(call.name)
        if handler and (made := handler(self, call)) is not USUAL:
            return made
        is_for_cuda = call.target is not None and call.target.type == "cuda"
        if not is_for_cuda and not call.fakes:
            return self._on_host(call)
        is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)
        if is_composite and call.name not in FUSED_ON_CUDA:
            # In inference mode an operation arrives here before torch has taken it apart. Not
            # `func.decompose`: torch has other rules for its compiler, by which a dropout that does
            # nothing is a copy.
            with self:
                return func._op_dk(
                    torch._C.DispatchKey.CompositeImplicitAutograd, *args, **call.kwargs
                )
        return self._compute(call)

    def _on_host(self, call: Call) -> Any:
        """Compute for real, in the host's memory. Nothing here can pin memory."""
        if call.kwargs.get("pin_memory"):
            call.kwargs["pin_memory"] = False
        with unset_fake_temporarily():
            return call()

    def _compute(self, call: Call) -> Any:
        """Compute shapes, and count the operation and what it allocates on the device."""
        self._note_mixed(call)
        given = {_key(each) for each in call.fakes}
        with self.fake:
            made = call()
        outputs = [each for each in tree_leaves(made) if isinstance(each, FakeTensor)]
        outputs = [each for each in outputs if each.is_cuda]
        fresh = [each for each in outputs if _key(each) not in given]
        for each in fresh:
            self.track(each)
        writes = fresh or call.func._schema.is_mutable
        if outputs and writes and call.name not in WITHOUT_KERNEL:
            self._note_kernel(call, outputs)
        return made

    def _note_kernel(self, call: Call, outputs: list[FakeTensor]) -> None:
        # What an operation is given only to write to is not read.
        target = call.kwargs.get("out")
        tensors = list({id(each): each for each in call.tensors if each is not target}.values())
        written = sum(map(_num_bytes, outputs))
        moved = written + sum(map(_num_bytes, tensors))
        if call.name in GATHERS:
            moved = 2 * written
        elif call.name.startswith("index_put"):
            moved = 2 * call.args[2].nbytes
        elif call.name == "index_copy_":
            moved = 2 * call.args[3].nbytes
        elif call.name == attention.PAGED:
            moved = attention.paged_bytes(call, written)
            self.note_attention(f"flash, paged: {call.args[0].shape[0]} queries")
        self.note_kernel(call.name, moved, _flops(call, outputs), _precision(call.name, tensors))

    def note_kernel(self, name: str, num_bytes: int, flops: int, precision: Precision) -> None:
        with self._lock:
            self.counts.note_kernel(name, num_bytes, flops, precision)

    def note_wait(self, what: str) -> None:
        """Count that the host waits for the device, with the lines that make it wait."""
        with self._lock:
            self.counts.waits[f"{what}: {_lines()}"] += 1

    def note_attention(self, kernel: str) -> None:
        with self._lock:
            self.counts.attention[kernel] += 1

    def _note_mixed(self, call: Call) -> None:
        if call.name not in STRICT:
            return
        dtypes = {each.dtype for each in call.tensors if each.is_floating_point()}
        if len(dtypes) > 1:
            names = " and ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
            with self._lock:
                self.counts.mixed[f"{call.name} of {names}: {_lines()}"] += 1

    # --- memory ---

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory on the device until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        with self._lock:
            if key in self._storages:
                return
            if self.live_bytes + size > self._usable_bytes:
                raise torch.OutOfMemoryError(f"{size} bytes beside {self.live_bytes}")
            self.live_bytes += size
            self.counts.peak_bytes = max(self.counts.peak_bytes, self.live_bytes)
            self.device_peak_bytes = max(self.device_peak_bytes, self.live_bytes)
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        with self._lock:
            if self._storages.pop(key, None) is not None:
                self.live_bytes -= size

    def pin(self, address: int, num_bytes: int) -> None:
        """Treat a part of the host's memory as pinned."""
        with self._lock:
            self._pinned_blocks[address] = num_bytes

    def unpin(self, address: int) -> None:
        with self._lock:
            self._pinned_blocks.pop(address, None)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return _key(tensor) in self._pinned_storages
        address = tensor.untyped_storage().data_ptr()
        with self._lock:
            blocks = list(self._pinned_blocks.items())
        return any(start <= address < start + size for start, size in blocks)

    def as_fake(self, tensor: torch.Tensor) -> FakeTensor:
        """A tensor in the host's memory as a fake one there. It is as pinned as the real one."""
        with _disable_current_modes(), self.fake:
            made: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if self.is_pinned(tensor):
            key = _key(made)
            self._pinned_storages.add(key)
            weakref.finalize(made.untyped_storage(), self._pinned_storages.discard, key)
        return made

    # --- what the device does that a kernel does not ---

    def _read(self, call: Call) -> Any:
        """A number or a truth that the host reads."""
        if not call.reads_device:
            return USUAL
        self.note_wait("reads a number")
        dtype = call.tensors[0].dtype
        if dtype == torch.bool or call.name in ("equal", "is_nonzero"):
            return self._truth(_functions())
        return 0.0 if dtype.is_floating_point else 0

    def _check_errors(self, call: Call) -> Any:
        if not call.reads_device:
            return USUAL
        self.note_wait("reads whether an equation was solved")
        return None

    def _nonzero(self, call: Call) -> Any:
        """The places that are not zero; the host waits for their number, which is 1 here."""
        if not call.reads_device:
            return USUAL
        self.note_wait("reads how many there are")
        tensor = call.tensors[0]
        with self.fake:
            made = torch.zeros((1, max(tensor.dim(), 1)), dtype=torch.long, device=tensor.device)
        self.track(made)
        return made

    def _index(self, call: Call) -> Any:
        """An index that is a mask: the host waits for the number of its places."""
        indices = call.args[1] or ()
        is_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if call.reads_device and is_mask:
            self.note_wait("reads how many there are")
        return USUAL

    def _is_pinned(self, call: Call) -> bool:
        return self.is_pinned(call.args[0])

    def _pin(self, call: Call) -> torch.Tensor:
        with unset_fake_temporarily():
            made = call.args[0].clone()
        storage = made.untyped_storage()
        self.pin(storage.data_ptr(), storage.nbytes())
        weakref.finalize(storage, self.unpin, storage.data_ptr())
        return made

    def _to(self, call: Call) -> Any:
        """A copy of a tensor on another device, if it is another one."""
        source, target = call.args[0], call.target
        if target is None or target.type == source.device.type:
            return USUAL
        dtype = call.kwargs.get("dtype") or source.dtype
        is_async = bool(call.kwargs.get("non_blocking"))
        num_bytes = source.numel() * dtype.itemsize
        if target.type == "cpu" and source.is_cuda:
            # torch makes the host's tensor, in pinned memory if the copy may be asynchronous.
            self._note_down(num_bytes, is_async, is_async)
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=dtype)
        if target.type != "cuda":
            return USUAL
        self._note_up(num_bytes, self.is_pinned(source), is_async)
        with self.fake:
            made = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=target)
        self.track(made)
        return made

    def _copy(self, call: Call) -> Any:
        """A copy into a tensor, which may be on another device."""
        target, source = call.args[:2]
        is_async = bool(call.kwargs.get("non_blocking") or (len(call.args) > 2 and call.args[2]))
        if target.is_cuda and not source.is_cuda:
            self._note_up(source.nbytes, self.is_pinned(source), is_async)
            return target
        if source.is_cuda and not target.is_cuda:
            is_pinned = self.is_pinned(target)
            self._note_down(target.nbytes, is_pinned, is_async)
            # Not pinned memory: evicted weights, which nobody reads, would then take real memory.
            if not is_pinned and not isinstance(target, FakeTensor):
                with unset_fake_temporarily():
                    target.zero_()
            return target
        return USUAL

    def _note_up(self, num_bytes: int, is_pinned: bool, is_async: bool) -> None:
        self.counts.up.note(num_bytes, is_pinned)
        # CUDA waits for the stream before it copies pageable memory, even in an asynchronous call
        # (CUDA Runtime API, "API synchronization behavior").
        if num_bytes and not (is_pinned and is_async):
            self.note_wait(f"copies {'pinned' if is_pinned else 'pageable'} memory up")

    def _note_down(self, num_bytes: int, is_pinned: bool, is_async: bool) -> None:
        self.counts.down.note(num_bytes, is_pinned)
        if num_bytes and not (is_pinned and is_async):
            self.note_wait("copies down")


class _Functions(TorchFunctionMode):
    """Attention, which torch takes apart in another way on CUDA, and `torch.tensor`.

    `torch.tensor` reads the tensors in a list by a way that no dispatch sees.
    """

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("query")
        is_fake = isinstance(first, FakeTensor) and first.is_cuda
        if is_fake and func is F.scaled_dot_product_attention:
            self._device.note_attention(attention.described(*args, **kwargs))
            return attention.attend(*args, **kwargs)
        if func is torch.tensor and isinstance(first, list):
            args = ([each.item() if isinstance(each, FakeTensor) else each for each in first],)
        return func(*args, **kwargs)


HANDLERS: dict[str, Callable[[FakeCuda, Call], Any]] = {
    **dict.fromkeys(READS, FakeCuda._read),
    "_linalg_check_errors": FakeCuda._check_errors,
    "nonzero": FakeCuda._nonzero,
    **dict.fromkeys(("index", "index_put", "index_put_"), FakeCuda._index),
    "is_pinned": FakeCuda._is_pinned,
    **dict.fromkeys(("pin_memory", "_pin_memory"), FakeCuda._pin),
    "_to_copy": FakeCuda._to,
    "copy_": FakeCuda._copy,
}


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _num_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's own elements. Those that it repeats by `expand` count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.itemsize


def _flops(call: Call, outputs: list[FakeTensor]) -> int:
    """The FLOPs of products, convolutions and attention, as torch's FlopCounterMode counts them."""
    if call.name in attention.KERNELS:
        return attention.flops(*call.args[:3])
    if call.name == attention.PAGED:
        return attention.paged_flops(call)
    if call.name == INT4_PRODUCT:
        return 2 * outputs[0].numel() * int(call.args[0].shape[-1])
    formula = flop_registry.get(call.func.overloadpacket)
    made = outputs[0] if len(outputs) == 1 else tuple(outputs)
    return int(formula(*call.args, **call.kwargs, out_val=made)) if formula else 0


def _precision(name: str, tensors: list[torch.Tensor]) -> Precision:
    """How the tensor cores compute an operation. torch allows TF32 in convolutions alone."""
    floating = next((each.dtype for each in tensors if each.is_floating_point()), torch.float32)
    if floating.itemsize == 2:
        return "half"
    return "tf32" if "conv" in name else "fp32"


def _frames() -> Iterator[Any]:
    """The frames of the call, the innermost first, without torch's and this module's."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.startswith(OWN_FOLDER):
            yield frame
        frame = frame.f_back


def _functions() -> set[str]:
    return {frame.f_code.co_qualname for frame in _frames()}


def _lines() -> str:
    """The line of an operation, and the line of the worker that led there, if that is another."""
    frames = list(_frames())
    ours = [each for each in frames if "/ourvidz_serverless/" in each.f_code.co_filename]
    lines = [_line(each) for each in (*frames[:1], *ours[:1])]
    return " from ".join(dict.fromkeys(lines))


def _line(frame: Any) -> str:
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
