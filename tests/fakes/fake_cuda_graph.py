"""Recorders for a CPU that behave as CUDA's graphs do, and some that do not.

A tape is a list of operations on tensors. To replay it computes them again, in the same memory, and
runs no line of the Python that was recorded; what makes the host wait cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What a stream that is being recorded refuses: numbers that go to the host, or come from there.
WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "equal", "_pin_memory")

Compute = Callable[[], torch.Tensor]


class Operations(TorchDispatchMode):
    """What is computed under it, in order; `waits` are those for which a GPU's host would wait."""

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


class Tape:
    """Records as CUDA does; `recorded` counts, `replayed` too."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        with Operations() as operations:
            output = compute()
        if operations.waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operations}")
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            for each in operations.done:
                again(*each)
            return output

        return replay


def again(func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """The same operation, its result where it was; views and changes in place are there already."""
    given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
    for old, new in zip(tensors(made), tensors(func(*args, **kwargs)), strict=True):
        if old.untyped_storage().data_ptr() not in given:
            old.copy_(new)


def num_made(compute: Compute) -> int:
    """How many operations of a function make something new or change something: no views."""
    with Operations() as operations:
        compute()
    return sum(
        func.overloadpacket.__name__.endswith("_")
        or not {each.untyped_storage().data_ptr() for each in tensors(made)}
        <= {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        for func, args, kwargs, made in operations.done
    )


def tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def stale(compute: Compute) -> Compute:
    """Records what came out, and not how."""
    output = compute().clone()
    return lambda: output


class Misplaced:
    """Records as a tape does, and with it the place in the cache at which it was made."""

    def __init__(self) -> None:
        self.replayed = 0

    def __call__(self, compute: Compute) -> Compute:
        inputs = [
            cell.cell_contents
            for cell in compute.__closure__ or ()
            if isinstance(cell.cell_contents, torch.Tensor)
        ]
        (numbers,) = inputs
        places, run = numbers[1].clone(), Tape()(compute)

        def replay() -> torch.Tensor:
            self.replayed += 1
            numbers[1].copy_(places)
            return run()

        return replay


def failing(error: Exception, after: int = 0) -> Callable[[Compute], Compute]:
    """Raises while it records, or after so many replays."""

    def record(compute: Compute) -> Compute:
        if not after:
            raise error
        run, left = Tape()(compute), [after]

        def replay() -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                raise error
            return run()

        return replay

    return record
