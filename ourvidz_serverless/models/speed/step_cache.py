"""What a denoising network computed at one step, used again at the next ones.

The networks stay as they are: for as long as a job lasts some of their modules answer from a cache,
and nothing of it outlives the job. Both are approximations, so only presets of `config.speed`
engage them.

diffusers has a first-block cache too. Ours differs for VACE, whose hints are added between blocks:
there diffusers 0.42 adds them a second time wherever it leaves blocks out (a test shows it).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ourvidz_serverless.models.speed.blocks import Stand, standing_in


class DeepCache:
    """A UNet whose deep blocks are computed at each `every`th forward (arXiv:2312.00858).

    The `first` ones are whole, all of them, before that begins. In between only the outermost
    blocks are computed, down and up, on what the deep ones gave last.
    """

    def __init__(self, unet: Any, every: int, first: int = 0) -> None:
        self._every, self._first = every if len(unet.up_blocks) > 1 else 1, first
        self._down, self._middle = list(unet.down_blocks[1:]), unet.mid_block
        self._up = list(unet.up_blocks[:-1])
        self._kept = torch.empty(0)
        self.is_whole = True

    @contextmanager
    def engaged(self) -> Iterator[None]:
        if self._every == 1:
            yield
            return
        stands: dict[Any, Stand] = {
            **{block: functools.partial(self._go_down, block) for block in self._down},
            **dict.fromkeys((self._middle, *self._up), self._pass),
            self._up[-1]: self._keep,
        }
        with standing_in(stands):
            yield

    def turn(self, index: int) -> None:
        """Decide for the next forward whether it is a whole one."""
        later = index - self._first
        self.is_whole = later < 0 or later % self._every == 0

    def _go_down(self, block: Any, forward: Stand, *args: Any, **options: Any) -> Any:
        if self.is_whole:
            return forward(*args, **options)
        hidden = _hidden(args, options)
        # Nobody reads them, but each is counted and asked for its size.
        skipped = len(block.resnets) + len(block.downsamplers or ())
        return hidden, (hidden,) * skipped

    def _pass(self, forward: Stand, *args: Any, **options: Any) -> Any:
        return forward(*args, **options) if self.is_whole else _hidden(args, options)

    def _keep(self, forward: Stand, *args: Any, **options: Any) -> Any:
        if self.is_whole:
            self._kept = forward(*args, **options)
        return self._kept


def _hidden(args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    return options.get("hidden_states", args[0] if args else None)


@dataclass(slots=True)
class Seen:
    """What one branch of guidance computed last: what the first block added, and all the others."""

    first: torch.Tensor | None = None
    rest: torch.Tensor | None = None


class FirstBlockCache:
    """A WAN network that leaves its other blocks out where the first one changes little.

    "Little" is less than `threshold` of what that block added when all were computed last.
    """

    def __init__(self, transformer: Any, threshold: float) -> None:
        self._threshold = threshold
        self._blocks, self._norm = list(transformer.blocks), transformer.norm_out
        self._seen: dict[str, Seen] = {}
        self._branch, self._after_first = "", torch.empty(0)
        self.is_whole = True

    @contextmanager
    def engaged(self) -> Iterator[None]:
        if not self._threshold:
            yield
            return
        stands: dict[Any, Stand] = {
            **dict.fromkeys(self._blocks, self._pass),
            self._blocks[0]: self._decide,
            self._norm: self._join,
        }
        with standing_in(stands):
            yield

    def turn(self, branch: str) -> None:
        """Say which branch of guidance the next forward is of."""
        self._branch = branch
        self._seen.setdefault(branch, Seen())

    def _decide(self, forward: Stand, hidden: torch.Tensor, *rest: Any) -> Any:
        made, seen = forward(hidden, *rest), self._seen[self._branch]
        added = made - hidden
        self.is_whole = seen.first is None or _change(added, seen.first) > self._threshold
        if self.is_whole:
            seen.first = added
        self._after_first = made
        return made

    def _pass(self, forward: Stand, hidden: torch.Tensor, *rest: Any) -> Any:
        return forward(hidden, *rest) if self.is_whole else hidden

    def _join(self, forward: Stand, hidden: torch.Tensor) -> Any:
        seen, first = self._seen[self._branch], self._after_first.to(hidden.dtype)
        if self.is_whole:
            seen.rest = hidden - first
            return forward(hidden)
        return forward(first + seen.rest)


def _change(now: torch.Tensor, before: torch.Tensor) -> float:
    """How much something changed, as a share of what it was."""
    return float((now - before).abs().mean() / before.abs().mean())
