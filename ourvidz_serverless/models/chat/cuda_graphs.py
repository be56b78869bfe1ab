"""Decode steps without Python: a step is captured once as a CUDA graph, and then replayed.

One token of a 7B model is a thousand small kernel launches from Python. The host needs several
times as long for them as the GPU needs to read the weights. A CUDA graph is all of them in one
launch. A graph computes on the same addresses each time. So a step is a function of one tensor that
never moves, in a few shapes, the *buckets*: the number of rows, and where attention reads whole
tables of pages also their width, are rounded up to powers of two. Spare rows write to page 0, which
holds no text, and their results are dropped.

`record` captures all buckets, which the warm-up asks for; after that nothing is captured and
nothing is dropped while requests are answered. Graphs are dropped with the weights, and when the
cache moves. From then on a bucket is captured again when it is needed: its first step is computed
without a graph, the second one too, and then it is captured. The third one is computed in both ways
and compared. From then on the graph replaces the forward. If a graph computes something else, or if
capturing fails, there is one warning and no graph any more: replies go on without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat.kv_cache import next_power_of_two
from ourvidz_serverless.models.memory.device import (
    Device,
    device_wide_lock,
    to_device_async,
)

#: The most graphs that are kept; the one that was not used longest is dropped. A batch of up to 64
#: has seven sizes; where the width of tables matters, times six lengths of up to 8192 tokens.
MAX_GRAPHS = 42

#: Runs before a capture, in which libraries load their kernels and allocate their workspaces.
WARM_UPS = 2

#: Position embeddings that read the positions on the host, or change their own tables.
UNSUPPORTED_ROPE = ("dynamic", "longrope")

#: Hidden states (rows, hidden) from (rows, 2 + pages): each row's token id, position and pages.
Step = Callable[[torch.Tensor], torch.Tensor]

#: The inputs of one row.
Row = Sequence[int]

#: From a function without arguments to its replay, which computes the same on the same tensors. A
#: replay returns the same tensor each time, with new contents.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


class WrongReplay(Exception):
    """A graph computed something else, and may have written wrong values to the cache."""


def choose_capture(asked: Literal["auto", "off"], device: Device, config: Any) -> Capture | None:
    """The capture that `CHAT_GRAPHS` asks for; None for none."""
    rope = getattr(config, "rope_parameters", None) or {}
    if asked == "off" or not device.is_cuda or rope.get("rope_type") in UNSUPPORTED_ROPE:
        return None
    return CudaGraphs(device.name)


class CudaGraphs:
    """Captures on one GPU. All graphs share the memory of their intermediate tensors."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph, side = torch.cuda.CUDAGraph(), self._stream
        side.wait_stream(torch.cuda.current_stream(self._device))
        # This `stream` also restores the former stream if a capture fails. `graph` does not.
        with device_wide_lock, torch.cuda.device(self._device), torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
            # Only this thread is restricted to what can be captured. Other families go on.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode=mode):
                output = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes of steps: up to `max_rows` rows, with `least` to `most` pages each."""

    max_rows: int
    least: int
    most: int

    def of(self, rows: Sequence[Row]) -> tuple[int, int] | None:
        """The rows and pages of the smallest bucket; None if a row has more pages than `most`."""
        pages = max(map(len, rows)) - 2
        if pages > self.most or len(rows) > next_power_of_two(self.max_rows):
            return None
        width = self.least * next_power_of_two(-(-pages // self.least))
        return next_power_of_two(len(rows)), min(width, self.most)

    def all(self) -> list[tuple[int, int]]:
        """Every bucket, those of few rows and short texts first."""
        rows = 1 << torch.arange(next_power_of_two(self.max_rows).bit_length())
        widths = [self.least]
        while widths[-1] < self.most:
            widths.append(min(2 * widths[-1], self.most))
        return [(count, width) for width in widths for count in rows.tolist()]


@dataclass(slots=True)
class _Graph:
    #: The rows that `replay` reads, (rows, 2 + pages).
    inputs: torch.Tensor
    replay: Callable[[], torch.Tensor]
    is_trusted: bool = False

    def __call__(self, rows: Sequence[Row]) -> torch.Tensor:
        self.inputs.copy_(to_device_async(rows, self.inputs.device))
        return self.replay()


class GraphReplay:
    """The graphs of one network's decode steps, by bucket.

    `num_captured` and `num_replayed` count. After a failure `is_off` is true, for good.
    """

    def __init__(self, step: Step, device: Device, capture: Capture, shapes: Buckets) -> None:
        self._step, self._device, self._capture = step, device, capture
        self.shapes = shapes
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._seen: set[tuple[int, int]] = set()
        self._version: object = None
        self.num_captured = self.num_replayed = 0
        self.is_off = False

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The rows and pages that are captured now."""
        return list(self._graphs)

    def clear(self) -> None:
        """Free the graphs. Later steps are captured again."""
        self._graphs.clear()
        self._seen.clear()

    def record(self, cache_version: object) -> None:
        """Capture every bucket, and compare it with the step that it replaces.

        The steps write to page 0, which holds no text.
        """
        self.clear()
        self._version = cache_version
        for rows, width in self.shapes.all()[:MAX_GRAPHS]:
            if self.is_off:
                return
            self._add((rows, width), padded([[0, 0, 0]], rows, width))
            # Other numbers than those that were captured.
            other = padded([[1, 1, 0]] * rows, rows, width)
            if graph := self._graphs.get((rows, width)):
                expected = self._step(to_device_async(other, self._device.name))
                self._compare(graph, other, expected)

    def hidden_states(
        self, rows: Sequence[Row], cache_version: object, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The hidden states of the rows, by a graph, or else by `compute`.

        Graphs of another version of the cache are dropped. Raises WrongReplay.
        """
        bucket = self.shapes.of(rows)
        if self.is_off or bucket is None:
            return compute()
        if cache_version != self._version:
            self.clear()
            self._version = cache_version
        inputs = padded(rows, *bucket)
        graph = self._graphs.get(bucket)
        if graph is not None and graph.is_trusted:
            try:
                hidden = graph(inputs)
            except RuntimeError as exc:
                self._turn_off(type(exc).__name__)
                return compute()
            self._graphs.move_to_end(bucket)
            self.num_replayed += 1
            return hidden[: len(rows)]
        hidden = compute()
        if graph is not None:
            self._compare(graph, inputs, hidden)
        elif bucket in self._seen:
            self._add(bucket, inputs)
        self._seen.add(bucket)
        return hidden

    def _add(self, bucket: tuple[int, int], inputs: Sequence[Row]) -> None:
        on_device = to_device_async(inputs, self._device.name)
        try:
            replay = self._capture(lambda: self._step(on_device))
        except Exception as exc:
            why = type(exc).__name__
        else:
            self.num_captured += 1
            self._graphs[bucket] = _Graph(on_device, replay)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return
        # Not inside the `except`: there the traceback still pins the tensors that did not fit.
        self._turn_off(why)

    def _compare(self, graph: _Graph, inputs: Sequence[Row], expected: torch.Tensor) -> None:
        """Trust a graph if it computes what was expected, for another step than the captured."""
        try:
            graph.is_trusted = _are_close(graph(inputs)[: len(expected)], expected)
        except RuntimeError as exc:
            self._turn_off(type(exc).__name__)
            return
        if not graph.is_trusted:
            self._turn_off("it computed something else")
            raise WrongReplay

    def _turn_off(self, why: str) -> None:
        self.is_off = True
        self.clear()
        log.warning("CHAT_GRAPHS: no step is replayed from now on (%s)", why)
        self._device.free_memory()


def padded(rows: Sequence[Row], num_rows: int, width: int) -> list[list[int]]:
    """The rows as the inputs of a bucket: spare numbers are 0, so spare pages are page 0."""
    spare = [[0] * (2 + width)] * (num_rows - len(rows))
    return [[*row, *[0] * (2 + width - len(row))] for row in rows] + spare


def _are_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether the rows agree in at least half of the digits of their dtype."""
    allowed = torch.finfo(theirs.dtype).eps ** 0.5
    distance = (ours.float() - theirs.float()).norm(dim=-1)
    return bool((distance <= allowed * theirs.float().norm(dim=-1)).all())
