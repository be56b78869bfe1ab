"""Step caches: what a denoising network computed at one step is used again at the next ones.

The networks themselves stay unchanged. While a job computes, the forwards of some modules are
patched to answer from the cache; the patches and the cache end with the job. Both caches are
approximations, so only presets of `config.speed` enable them.

diffusers has a first-block cache too. Ours differs for VACE, whose hints are added between blocks:
diffusers 0.42 adds them a second time when it skips blocks (a test shows it).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: A replacement for a module's `forward`, called with (the original forward, *args, **kwargs).
Patch = Callable[..., Any]


@contextmanager
def patched_forward(patches: Mapping[Any, Patch]) -> Iterator[None]:
    """Replace the `forward` of modules while the context lasts."""
    before = {module: vars(module).get("forward") for module in patches}
    try:
        for module, patch in patches.items():
            module.forward = functools.partial(patch, module.forward)
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


class DeepCache:
    """A UNet that computes its deep blocks at one forward in `interval` (arXiv:2312.00858).

    The `warmup` first forwards are full. A forward that is not full computes only the outermost
    blocks, down and up, with the last output of the deep blocks.
    """

    def __init__(self, unet: Any, interval: int, warmup: int = 0) -> None:
        self._interval, self._warmup = interval if len(unet.up_blocks) > 1 else 1, warmup
        self._down, self._middle = list(unet.down_blocks[1:]), unet.mid_block
        self._up = list(unet.up_blocks[:-1])
        self._cached = torch.empty(0)
        self.is_full = True

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Patch the UNet while a job computes."""
        if self._interval == 1:
            yield
            return
        patches: dict[Any, Patch] = {
            **{block: functools.partial(self._skip_down, block) for block in self._down},
            **dict.fromkeys((self._middle, *self._up), self._skip),
            self._up[-1]: self._cache,
        }
        with patched_forward(patches):
            yield

    def begin_forward(self, index: int) -> None:
        """Decide whether the next forward, of step `index`, is a full one."""
        later = index - self._warmup
        self.is_full = later < 0 or later % self._interval == 0

    def _skip_down(self, block: Any, forward: Patch, *args: Any, **options: Any) -> Any:
        if self.is_full:
            return forward(*args, **options)
        hidden = _hidden(args, options)
        # The UNet does not compute with these, but it counts them and reads their sizes.
        skipped = len(block.resnets) + len(block.downsamplers or ())
        return hidden, (hidden,) * skipped

    def _skip(self, forward: Patch, *args: Any, **options: Any) -> Any:
        return forward(*args, **options) if self.is_full else _hidden(args, options)

    def _cache(self, forward: Patch, *args: Any, **options: Any) -> Any:
        if self.is_full:
            self._cached = forward(*args, **options)
        return self._cached


def _hidden(args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return options.get("hidden_states", args[0] if args else None)


@dataclass(slots=True)
class BranchCache:
    """What one branch of guidance computed last: what the first block added, and all the others."""

    first: torch.Tensor | None = None
    rest: torch.Tensor | None = None


class FirstBlockCache:
    """A WAN network that skips its other blocks if the first one changed little.

    "Little" is less than `threshold`, as a share of what the first block added in the last full
    forward.
    """

    def __init__(self, transformer: Any, threshold: float) -> None:
        self._threshold = threshold
        self._blocks, self._norm = list(transformer.blocks), transformer.norm_out
        self._branches: dict[str, BranchCache] = {}
        self._branch, self._after_first = "", torch.empty(0)
        self.is_full = True

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Patch the network while a job computes."""
        if not self._threshold:
            yield
            return
        patches: dict[Any, Patch] = {
            **dict.fromkeys(self._blocks, self._skip),
            self._blocks[0]: self._decide,
            self._norm: self._join,
        }
        with patched_forward(patches):
            yield

    def begin_forward(self, branch: str) -> None:
        """Name the branch of guidance that the next forward computes."""
        self._branch = branch
        self._branches.setdefault(branch, BranchCache())

    def _decide(self, forward: Patch, hidden: torch.Tensor, *rest: Any) -> Any:
        made, cache = forward(hidden, *rest), self._branches[self._branch]
        added = made - hidden
        self.is_full = cache.first is None or _change(added, cache.first) > self._threshold
        if self.is_full:
            cache.first = added
        self._after_first = made
        return made

    def _skip(self, forward: Patch, hidden: torch.Tensor, *rest: Any) -> Any:
        return forward(hidden, *rest) if self.is_full else hidden

    def _join(self, forward: Patch, hidden: torch.Tensor) -> Any:
        cache, first = self._branches[self._branch], self._after_first.to(hidden.dtype)
        if self.is_full:
            cache.rest = hidden - first
            return forward(hidden)
        return forward(first + cache.rest)


def _change(now: torch.Tensor, before: torch.Tensor) -> float:
    """By how much a tensor changed, as a share of what it was."""
    return float((now - before).abs().mean() / before.abs().mean())
