"""CUDA graphs for a CPU: one kind behaves as CUDA's graphs do, the others fail in different ways.

A fake graph is a list of operations on tensors. A replay computes them again, into the same memory,
and runs no line of the captured Python. An operation that makes the host wait for the device cannot
be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that a stream refuses during a capture: they move numbers to or from the host.
WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "_pin_memory")

Compute = Callable[[], torch.Tensor]


class OperationLog(TorchDispatchMode):
    """The operations that run under it. `waits` names those for which a GPU's host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, made))
        if func.overloadpacket.__name__ in WAITS:
            self.waits.append(func.overloadpacket.__name__)
        return made


class FakeCudaGraphs:
    """Captures and replays as CUDA does, and counts both."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        with OperationLog() as operations:
            output = compute()
        if operations.waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operations}")
        self.num_captured += 1

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            for each in operations.done:
                compute_again(*each)
            return output

        return replay


def compute_again(func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """Compute an operation again, into its old result; views and in-place results need no copy."""
    inputs = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
    for old, new in zip(tensors(made), tensors(func(*args, **kwargs)), strict=True):
        if old.untyped_storage().data_ptr() not in inputs:
            old.copy_(new)


def num_computed(compute: Compute) -> int:
    """The number of operations in a function that compute something; views do not count."""
    with OperationLog() as operations:
        compute()
    return sum(
        func.overloadpacket.__name__.endswith("_")
        or not {each.untyped_storage().data_ptr() for each in tensors(made)}
        <= {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        for func, args, kwargs, made in operations.done
    )


def tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def capture_result(compute: Compute) -> Compute:
    """Captures the result instead of the computation: every replay returns the same numbers."""
    output = compute().clone()
    return lambda: output


class FixedPositions:
    """Captures the positions too, so every replay writes to the same place in the cache."""

    def __init__(self) -> None:
        self.num_replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        (inputs,) = [
            cell.cell_contents
            for cell in compute.__closure__ or ()
            if isinstance(cell.cell_contents, torch.Tensor)
        ]
        positions, run = inputs[:, 1].clone(), FakeCudaGraphs()(compute)

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            inputs[:, 1].copy_(positions)
            return run()

        return replay


def failing_capture(error: Exception, after: int = 0) -> Callable[[Compute], Compute]:
    """A capture that raises an error: at once, or after `after` replays."""

    def capture(compute: Compute) -> Compute:
        if not after:
            raise error
        run, left = FakeCudaGraphs()(compute), [after]

        def replay() -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise error
            return run()

        return replay

    return capture
