"""The modules inside a denoising network: those that repeat, and others in their stead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: Stands for a module's `forward`: (its own forward, the call's arguments) -> the call's result.
Stand = Callable[..., Any]


def repeated_blocks(network: Any) -> Iterator[Any]:
    """The blocks of which a denoising network has many alike, by diffusers' own list."""
    return (each for each in network.modules() if type(each).__name__ in network._repeated_blocks)


@contextmanager
def standing_in(stands: Mapping[Any, Stand]) -> Iterator[None]:
    """Let calls of modules go to others, which are given the module's own `forward`."""
    before = {module: vars(module).get("forward") for module in stands}
    try:
        for module, stand in stands.items():
            module.forward = functools.partial(stand, module.forward)
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
