"""The repeated blocks of a denoising network, compiled while it serves.

Compiling takes minutes, so no job ever waits for it. A network begins eager. Calls of its blocks
whose shapes come a second time, in another job, are compiled in a thread of their own, and the next
job that begins after that uses what is ready; a shape that was never compiled stays eager, and
what a LoRA or an adapter has changed is eager again, by torch's own guards. A compiler that fails
is a warning, and the end of the attempt.

What was compiled is kept in `COMPILE_CACHE_DIR`, by the machine and the versions that made it, and
found there by the next worker; whoever can write there can run code here.
"""

from __future__ import annotations

import functools
import logging
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
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Home
from ourvidz_serverless.models.speed.blocks import repeated_blocks
from ourvidz_serverless.settings import Settings

log = logging.getLogger("ourvidz")

#: Shapes of calls that are compiled, of one network. SDXL has two for each size of picture.
MAX_SHAPES = 16

#: Shapes that came once and are remembered, in case that they come again.
SEEN_SHAPES = 256

#: torch keeps a stance for the whole process: in a job nothing is compiled, and while something is
#: compiled no job uses what is. A job that does not get it is eager.
_turn = threading.Lock()


#: The thread that compiles, while it does; `_turn` allows one.
_compiler: int | None = None


@contextmanager
def own_traces() -> Iterator[None]:
    """Keep what the compiler traces apart from the modules that other threads call.

    While torch.fx traces, `torch.nn.Module.__call__` is the tracer's for the whole process: a job
    that calls a module at that moment ends in "module is not installed as a submodule" (torch
    2.13, `torch/fx/_symbolic_trace.py`). Inductor traces so in each compilation.
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


class Regions:
    """One network's repeated blocks; `calls` counts those that were answered by compiled code."""

    def __init__(self, network: Any, home: Home) -> None:
        self._home, self._network = home, network
        self._compiled: dict[type, Callable[..., Any]] = {}
        self._ready: set[Hashable] = set()
        self._usable: frozenset[Hashable] | None = None
        # The job in which a shape came first, and the shapes that have come again.
        self._seen: dict[Hashable, int] = {}
        self._asked: set[Hashable] = set()
        self._wanted: list[tuple[Hashable, Callable[[], Any]]] = []
        self._lock = threading.Lock()
        self._is_working = False
        self._jobs = self.calls = 0
        self.is_broken = False
        for block in repeated_blocks(network):
            own = type(block).forward
            self._compiled.setdefault(
                type(block), torch.compile(own, dynamic=False, fullgraph=True)
            )
            kind = (type(block), tuple(each.shape for each in block.parameters()))
            block.forward = functools.partial(self._call, block, own, kind)

    @property
    def ready(self) -> int:
        """How many shapes are compiled."""
        return len(self._ready)

    @contextmanager
    def job(self, is_plain: bool = True) -> Iterator[None]:
        """For as long as a job computes: what is ready now is used, and what is not is noted.

        A job that is not `is_plain`, such as one with a LoRA, is eager and teaches nothing.
        """
        self._jobs += 1
        with ExitStack() as stack:
            has_turn = _turn.acquire(blocking=False)
            if has_turn:
                stack.callback(_turn.release)
                if self._ready:
                    stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            usable = self._ready if has_turn and is_plain else ()
            self._usable = frozenset(usable) if is_plain else None
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
            self.calls += 1
            return self._compiled[type(block)](block, *args, **options)
        self._note(shape, block, args, options)
        return own(block, *args, **options)

    def _note(self, shape: Hashable, block: Any, args: Any, options: Any) -> None:
        """Have a shape compiled when another job than its first has it."""
        first = self._seen.setdefault(shape, self._jobs)
        if len(self._seen) > SEEN_SHAPES:
            self._seen.pop(next(iter(self._seen)))
        is_full = self.is_broken or len(self._asked) == MAX_SHAPES
        if first == self._jobs or shape in self._asked or is_full:
            return
        self._asked.add(shape)
        compiled = self._compiled[type(block)]
        like = _like((args, options))

        def compute() -> None:
            given, named = _made(like)
            compiled(block, *given, **named)

        with self._lock:
            self._wanted.append((shape, compute))
            if not self._is_working:
                self._is_working = True
                threading.Thread(target=self._work, name="compiler").start()

    def _work(self) -> None:
        """Compile what is wanted, and end.

        A process that ends waits for what is just being compiled, and for no more: a thread that is
        cut off inside torch aborts it.
        """
        while True:
            with self._lock:
                is_over = self.is_broken or not threading.main_thread().is_alive()
                if is_over or not self._wanted:
                    self._is_working = False
                    return
                shape, compute = self._wanted.pop(0)
            try:
                with _turn, own_traces(), self._home.using(), torch.inference_mode():
                    compute()
                self._ready.add(shape)
            except Exception as exc:
                self.is_broken = True
                if not threading.main_thread().is_alive():
                    # The process ends, and the compiler's own threads with it: no fault of its.
                    return
                why = " ".join(str(exc).split())[:200]
                log.warning("COMPILE: eager from now on (%s: %s)", type(exc).__name__, why)


def _shape(each: Any) -> Hashable:
    """What code is compiled for: the shapes, strides and dtypes of tensors, anything else as is."""
    if isinstance(each, torch.Tensor):
        return each.shape, each.stride(), each.dtype, each.is_inference()
    if isinstance(each, tuple | list):
        return tuple(_shape(part) for part in each)
    if isinstance(each, dict):
        return tuple((name, _shape(part)) for name, part in each.items())
    return type(each), each if isinstance(each, bool | int | float | str) else None


def _like(each: Any) -> Any:
    """Arguments without their contents: tensors become recipes for others of the same make."""
    if isinstance(each, torch.Tensor):
        facts = (each.shape, each.stride(), each.dtype, each.device)
        return functools.partial(_zeros, *facts, is_inference=each.is_inference())
    if isinstance(each, tuple | list):
        return type(each)(_like(part) for part in each)
    if isinstance(each, dict):
        return {name: _like(part) for name, part in each.items()}
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


def regions(network: Any, home: Home, device: Device, settings: Settings) -> Regions | None:
    """The blocks of a network as `COMPILE` asks for; None where that is `off`."""
    # What counts allocations on a CPU sees none of a compiled block's.
    if settings.compile == "off" or device.counted:
        return None
    _configure(settings.compile_cache_dir, device)
    return Regions(network, home)


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


@functools.cache
def _configure(folder: Path | None, device: Device) -> None:
    import torch._dynamo.config
    import torch._inductor.config

    # One entry for each shape of each kind of block; beyond the limit torch gives up on a function.
    torch._dynamo.config.recompile_limit = 4 * MAX_SHAPES
    # In this process: a pool of compilers would be forked from one that has threads and a GPU.
    torch._inductor.config.compile_threads = 1
    if folder is not None:
        place = folder / key(device)
        place.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)


def key(device: Device) -> str:
    """What compiled code is good for: an architecture, and the versions that made it."""
    if device.is_cuda:
        major, minor = torch.cuda.get_device_capability(device.name)
        machine = f"sm{major}{minor}"
    else:
        machine = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}".lower()
    return f"{machine}-torch{torch.__version__}-diffusers{diffusers.__version__}"
