"""SDXL's forwards without Python: a forward is captured once as a CUDA graph, and then replayed.

A forward of the UNet is some 1,500 launches, for which the host of a fast card needs about as long
as the card computes. A graph is one launch. It computes on the same addresses each time: inputs are
copied into tensors that never move, and the result is copied out of one.

The first job of a shape runs without a graph. The first step of the second one is captured, and its
second step is computed in both ways and compared. If a graph computes something else, or if
capturing fails, there is one warning and no graph any more. Graphs are dropped with the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat.cuda_graphs import Capture

#: The most graphs that are kept. Each shape is a size and a number of pictures.
MAX_GRAPHS = 4

#: How many shapes are remembered that came only once.
MAX_SEEN = 64


@dataclass(slots=True)
class StepGraph:
    """One captured forward: the tensors that it reads, and its replay."""

    inputs: Any
    replay: Callable[[], torch.Tensor]
    is_trusted: bool = False

    def __call__(self, inputs: Any) -> torch.Tensor:
        for static, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(static, torch.Tensor) and static is not given:
                static.copy_(given)
        # The next replay overwrites its result, and a scheduler may keep this one.
        return self.replay().clone()


class StepGraphs:
    """The graphs of one UNet by the shapes of its inputs.

    `num_captured` and `num_replayed` count. After a failure `is_off` is true, for good.
    """

    def __init__(self, unet: Any, capture: Capture) -> None:
        self._unet, self._capture = unet, capture
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()
        # The job in which each shape came first.
        self._first_job: OrderedDict[Hashable, int] = OrderedDict()
        self._job = self.num_captured = self.num_replayed = 0
        self.is_off = False

    def begin_job(self) -> None:
        self._job += 1

    def clear(self) -> None:
        """Free the graphs. Later forwards are captured again."""
        self._graphs.clear()

    def forward(
        self, rows: torch.Tensor, timestep: torch.Tensor, options: Mapping[str, Any]
    ) -> torch.Tensor:
        """The UNet's prediction, by a graph if there is one for these shapes."""
        # Some schedulers have whole timesteps. The UNet begins with the same conversion.
        inputs = (rows, timestep.float(), dict(options))
        if self.is_off:
            return self._compute(inputs)
        shape = tuple(map(_facts, tree_leaves(inputs)))
        graph = self._graphs.get(shape)
        if graph is None:
            return self._first(shape, inputs)
        self._graphs.move_to_end(shape)
        if graph.is_trusted:
            self.num_replayed += 1
            return graph(inputs)
        expected = self._compute(inputs)
        graph.is_trusted = _are_close(graph(inputs), expected)
        if not graph.is_trusted:
            self._turn_off("it computed something else")
        return expected

    def _first(self, shape: Hashable, inputs: Any) -> torch.Tensor:
        """Compute without a graph. Capture the forward if an earlier job had this shape."""
        first = self._first_job.setdefault(shape, self._job)
        if len(self._first_job) > MAX_SEEN:
            self._first_job.popitem(last=False)
        made = self._compute(inputs)
        if first != self._job:
            self._add(shape, inputs)
        return made

    def _add(self, shape: Hashable, inputs: Any) -> None:
        static = tree_map(_copied, inputs)
        try:
            replay = self._capture(lambda: self._compute(static))
        except Exception as exc:
            why = type(exc).__name__
        else:
            self.num_captured += 1
            self._graphs[shape] = StepGraph(static, replay)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return
        # Not inside the `except`: there the traceback still pins the tensors that did not fit.
        self._turn_off(why)

    def _compute(self, inputs: Any) -> torch.Tensor:
        rows, timestep, options = inputs
        made: torch.Tensor = self._unet(rows, timestep, **options, return_dict=False)[0]
        return made

    def _turn_off(self, why: str) -> None:
        self.is_off = True
        self.clear()
        log.warning("SDXL_GRAPHS: no step is replayed from now on (%s)", why)


def _facts(each: Any) -> Hashable:
    if isinstance(each, torch.Tensor):
        return each.shape, each.stride(), each.dtype
    return type(each), each


def _copied(each: Any) -> Any:
    return each.clone() if isinstance(each, torch.Tensor) else each


def _are_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two predictions agree in at least half of the digits of their dtype."""
    allowed = torch.finfo(theirs.dtype).eps ** 0.5
    return bool((ours.float() - theirs.float()).norm() <= allowed * theirs.float().norm())
