"""The repeated blocks of a denoising network, compiled in the background while it serves.

Compiling takes minutes, so no job waits for it. A network starts eager. When a shape of a block's
call comes again in a second job, the block is compiled for that shape in a thread of its own, and
jobs that begin after that use the compiled code. Every other shape stays eager, and so does a block
that a LoRA or an adapter has changed, by torch's own guards. If the compiler fails, the worker logs
one warning and stays eager.

Compiling never moves a model. If the network has left the device, or if a job waits for another
model, its shapes stay queued until its next job. If compiling runs out of memory, the shape is
forgotten, and may come again.

Compiled code is kept in `COMPILE_CACHE_DIR`, by the machine and the versions that made it, and the
next worker finds it there. Whoever can write there can run code in the worker.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.memory.device import Device, is_out_of_memory
from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.settings import Settings

#: How many shapes are compiled for one network. SDXL has two for each size and number of images.
MAX_SHAPES = 16

#: How many shapes are remembered that came only once.
SEEN_SHAPES = 256

#: Held by a job that uses compiled code, or by the thread that compiles: torch's stance holds for
#: the whole process. A job that does not get the lock is eager.
_stance_lock = threading.Lock()


#: The thread that compiles now, if any; `_stance_lock` allows one.
_compiler: int | None = None


@contextmanager
def isolated_tracing() -> Iterator[None]:
    """Let other threads call modules while this thread compiles.

    torch.fx patches `torch.nn.Module.__call__` for the whole process while it traces. A job that
    calls a module at that moment fails with "module is not installed as a submodule" (torch 2.13,
    `torch/fx/_symbolic_trace.py`). Inductor traces in each compilation.
    """
    global _compiler
    _patch_tracer()
    _compiler = threading.get_ident()
    try:
        yield
    finally:
        _compiler = None


@functools.cache
def _patch_tracer() -> None:
    trace_module = torch.fx.Tracer.call_module

    def call_module(tracer: Any, module: Any, forward: Any, args: Any, options: Any) -> Any:
        if _compiler in (None, threading.get_ident()):
            return trace_module(tracer, module, forward, args, options)
        return forward(*args, **options)

    torch.fx.Tracer.call_module = call_module


def repeated_blocks(network: Any) -> Iterator[Any]:
    """The blocks that a denoising network consists of, by diffusers' own list."""
    names = frozenset(network._repeated_blocks)
    return (
        each
        for each in network.modules()
        if not names.isdisjoint(kind.__name__ for kind in type(each).__mro__)
    )


class CompiledBlocks:
    """One network's repeated blocks, compiled for the shapes that come again.

    `num_calls` counts calls that compiled code answered. `is_broken`: the compiler failed.
    """

    def __init__(self, network: Any, handle: ModelHandle) -> None:
        self._handle, self._network = handle, network
        self._compiled: dict[type, Callable[..., Any]] = {}
        self._ready: set[Hashable] = set()
        self._usable: frozenset[Hashable] | None = None
        # The job in which each shape came first.
        self._first_job: dict[Hashable, int] = {}
        self._requested: set[Hashable] = set()
        self._queue: list[tuple[Hashable, Callable[[], Any]]] = []
        self._lock = threading.Lock()
        self._is_compiling = False
        self._jobs = self.num_calls = 0
        self.is_broken = False
        for block in repeated_blocks(network):
            own = type(block).forward
            self._compiled.setdefault(
                type(block), torch.compile(own, dynamic=False, fullgraph=True)
            )
            kind = (type(block), tuple(each.shape for each in block.parameters()))
            block.forward = functools.partial(self._call, block, own, kind)

    @property
    def is_compiling(self) -> bool:
        """Whether a shape is compiled now, or waits for that."""
        return self._is_compiling

    @property
    def num_ready(self) -> int:
        """How many shapes are compiled."""
        return len(self._ready)

    @contextmanager
    def job(self, use_compiled: bool = True) -> Iterator[None]:
        """A job uses the shapes that are compiled when it begins, and records those that are not.

        Without `use_compiled`, as for a job with a LoRA, all is eager and no shape is recorded.
        """
        self._jobs += 1
        with ExitStack() as stack:
            # Last of all, when the lock is free: what had to wait is compiled now.
            stack.callback(self._compile_later)
            has_lock = _stance_lock.acquire(blocking=False)
            if has_lock:
                stack.callback(_stance_lock.release)
                if self._ready:
                    stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            usable = self._ready if has_lock and use_compiled else ()
            self._usable = frozenset(usable) if use_compiled else None
            try:
                yield
            finally:
                self._usable = None

    def _call(self, block: Any, own: Any, kind: Hashable, *args: Any, **options: Any) -> Any:
        usable = self._usable
        if usable is None:
            return own(block, *args, **options)
        shape = (kind, _shape(args), _shape(options))
        if shape in usable:
            self.num_calls += 1
            return self._compiled[type(block)](block, *args, **options)
        self._record(shape, block, args, options)
        return own(block, *args, **options)

    def _record(self, shape: Hashable, block: Any, args: Any, options: Any) -> None:
        """Record a shape. Have it compiled if an earlier job had it too."""
        first = self._first_job.setdefault(shape, self._jobs)
        if len(self._first_job) > SEEN_SHAPES:
            self._first_job.pop(next(iter(self._first_job)))
        is_full = self.is_broken or len(self._requested) == MAX_SHAPES
        if first == self._jobs or shape in self._requested or is_full:
            return
        self._requested.add(shape)
        compiled = self._compiled[type(block)]
        recipe = _recipe((args, options))

        def compute() -> None:
            made_args, made_options = _made(recipe)
            compiled(block, *made_args, **made_options)

        with self._lock:
            self._queue.append((shape, compute))
        self._compile_later()

    def _compile_later(self) -> None:
        """Compile what is queued in a thread of its own, once the running job has ended."""
        with self._lock:
            if self._queue and not self._is_compiling:
                self._is_compiling = True
                threading.Thread(target=self._compile_queue, name="compiler").start()

    def _compile_queue(self) -> None:
        """Compile what is queued, and end. What cannot be compiled now stays queued.

        A process that ends waits for the current compilation and for no other: a thread that is cut
        off inside torch aborts the process.
        """
        while queued := self._next_queued():
            if not self._compile(*queued):
                with self._lock:
                    self._queue.insert(0, queued)
                    self._is_compiling = False
                return

    def _next_queued(self) -> tuple[Hashable, Callable[[], Any]] | None:
        """The next shape to compile, taken off the queue; None ends the thread."""
        with self._lock:
            is_over = self.is_broken or not threading.main_thread().is_alive()
            if is_over or not self._queue:
                self._is_compiling = False
                return None
            return self._queue.pop(0)

    def _compile(self, shape: Hashable, compute: Callable[[], Any]) -> bool:
        """Compile for one shape. False if that must wait until the network's next job."""
        try:
            with _stance_lock, self._handle.using_where_it_is() as is_there:
                if not is_there:
                    return False
                with isolated_tracing(), _compiler_settings(), torch.inference_mode():
                    compute()
            self._ready.add(shape)
        except Exception as exc:
            self._note_failure(shape, exc)
        return True

    def _note_failure(self, shape: Hashable, error: Exception) -> None:
        if is_out_of_memory(error):
            self._requested.discard(shape)
            log.warning("COMPILE: a shape stays eager for now, it did not fit the memory")
            return
        self.is_broken = True
        # In a process that ends, the compiler's own threads end too. That is no failure.
        if threading.main_thread().is_alive():
            why = " ".join(str(error).split())[:200]
            log.warning("COMPILE: eager from now on (%s: %s)", type(error).__name__, why)


def _shape(each: Any) -> Hashable:
    """What code is compiled for: shapes, strides and dtypes of tensors, and other values as is."""
    if isinstance(each, torch.Tensor):
        return each.shape, each.stride(), each.dtype, each.is_inference()
    if isinstance(each, tuple | list):
        return tuple(_shape(part) for part in each)
    if isinstance(each, dict):
        return tuple((name, _shape(part)) for name, part in each.items())
    return type(each), each if isinstance(each, bool | int | float | str) else None


def _recipe(each: Any) -> Any:
    """Arguments whose tensors are replaced by functions that make tensors like them.

    So the arguments of a job are not kept until they are compiled for.
    """
    if isinstance(each, torch.Tensor):
        facts = (each.shape, each.stride(), each.dtype, each.device)
        return functools.partial(_zeros, *facts, is_inference=each.is_inference())
    if isinstance(each, tuple | list):
        return type(each)(_recipe(part) for part in each)
    if isinstance(each, dict):
        return {name: _recipe(part) for name, part in each.items()}
    return each


def _made(each: Any) -> Any:
    if isinstance(each, functools.partial):
        return each()
    if isinstance(each, tuple | list):
        return type(each)(_made(part) for part in each)
    if isinstance(each, dict):
        return {name: _made(part) for name, part in each.items()}
    return each


def _zeros(
    shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, *, is_inference: bool
) -> torch.Tensor:
    with torch.inference_mode(is_inference):
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()


def compile_blocks(
    network: Any, handle: ModelHandle, device: Device, settings: Settings
) -> CompiledBlocks | None:
    """Have a network's blocks compiled; None if `COMPILE` is `off`."""
    # A `CountedMemory` cannot see the allocations of compiled code.
    if settings.compile == "off" or device.counted:
        return None
    _configure(settings.compile_cache_dir, device)
    return CompiledBlocks(network, handle)


def check_cache_dir(settings: Settings) -> None:
    """Raise ModelLoadError if `COMPILE_CACHE_DIR` is not a folder and cannot be made one."""
    folder = settings.compile_cache_dir
    if settings.compile == "off" or folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        why = exc.strerror or type(exc).__name__
        raise ModelLoadError(f"COMPILE_CACHE_DIR: the folder cannot be used: {why}") from exc


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """torch's settings for this thread, which is to compile: no other thread has them."""
    import torch._dynamo.config
    import torch._inductor.config

    with (
        # One entry for each shape of each kind of block. Beyond the limit torch stops compiling a
        # function.
        torch._dynamo.config.patch(recompile_limit=4 * MAX_SHAPES),
        # A pool of compilers would be forked from a process that has threads and a GPU.
        torch._inductor.config.patch(compile_threads=1),
    ):
        yield


@functools.cache
def _configure(folder: Path | None, device: Device) -> None:
    if folder is not None:
        place = folder / cache_key(device)
        place.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)


def cache_key(device: Device) -> str:
    """The folder name for compiled code: the architecture, and the versions that made the code."""
    if device.is_cuda:
        major, minor = torch.cuda.get_device_capability(device.name)
        machine = f"sm{major}{minor}"
    else:
        machine = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}".lower()
    return f"{machine}-torch{torch.__version__}-diffusers{diffusers.__version__}"
