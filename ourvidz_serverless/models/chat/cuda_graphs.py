"""Decode steps without Python: a step is captured once as a CUDA graph, and then replayed.

One token of a 7B model is a thousand small kernel launches from Python. The host needs several
times as long for them as the GPU needs to read the weights. A CUDA graph is all of them in one
launch. A graph computes on the same addresses each time. So a step is a function of a few tensors
that never move, in a few shapes, the *buckets*: the number of rows, and the length that they read,
are rounded up to powers of two. Spare rows write at position 0, where nothing is computed yet, and
their results are dropped.

The first step of a bucket is computed without a graph. The second one too, and then it is captured.
The third one is computed in both ways and compared. From then on the graph replaces the forward. If
a graph computes something else, or if capturing fails, there is one warning and no graph any more:
replies go on without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat.kv_cache import BLOCK, next_power_of_two
from ourvidz_serverless.models.memory.device import (
    Device,
    device_wide_lock,
    select_rows,
    to_device_async,
)

#: The most graphs that are kept; the one that was not used longest is dropped. Seven sizes of a
#: batch of up to 64, times six lengths of up to 8192 tokens, are two more.
MAX_GRAPHS = 40

#: Runs before a capture, in which libraries load their kernels and allocate their workspaces.
WARM_UPS = 2

#: Position embeddings that read the positions on the host, or change their own tables.
UNSUPPORTED_ROPE = ("dynamic", "longrope")

#: Hidden states (rows, hidden) from token ids and positions, (rows, 1) each, and the cache length.
Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

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


@dataclass(slots=True)
class _Graph:
    #: Token ids and positions, (2, rows), which `replay` reads.
    inputs: torch.Tensor
    replay: Callable[[], torch.Tensor]
    is_trusted: bool = False

    def __call__(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        self.inputs.copy_(to_device_async(inputs, self.inputs.device))
        return self.replay()


class GraphReplay:
    """The graphs of one network's decode steps, by bucket.

    `num_captured` and `num_replayed` count. After a failure `is_off` is true, for good.
    """

    def __init__(self, step: Step, device: Device, capture: Capture) -> None:
        self._step, self._device, self._capture = step, device, capture
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._seen: set[tuple[int, int]] = set()
        self._version: object = None
        self.num_captured = self.num_replayed = 0
        self.is_off = False

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The rows and lengths that are captured now."""
        return list(self._graphs)

    def clear(self) -> None:
        """Free the graphs. Later steps are captured again."""
        self._graphs.clear()
        self._seen.clear()

    def hidden_states(
        self,
        tokens: Sequence[tuple[int, int]],
        wanted: Sequence[int],
        cache_length: int,
        cache_version: object,
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The hidden states of the `wanted` rows, by a graph, or else by `compute`.

        `tokens` are each row's next token and its position. Graphs of another version of the cache
        are dropped. Raises WrongReplay.
        """
        if self.is_off:
            return compute()
        if cache_version != self._version:
            self.clear()
            self._version = cache_version
        bucket, inputs = bucket_of(tokens, cache_length)
        graph = self._graphs.get(bucket)
        if graph is not None and graph.is_trusted:
            try:
                hidden = graph(inputs)
            except RuntimeError as exc:
                self._turn_off(type(exc).__name__)
                return compute()
            self._graphs.move_to_end(bucket)
            self.num_replayed += 1
            return select_rows(hidden, wanted)
        hidden = compute()
        if graph is not None:
            self._compare(graph, inputs, wanted, hidden)
        elif bucket in self._seen:
            self._add(bucket, inputs)
        self._seen.add(bucket)
        return hidden

    def _add(self, bucket: tuple[int, int], inputs: Sequence[Sequence[int]]) -> None:
        length, on_device = bucket[1], to_device_async(inputs, self._device.name)
        try:
            replay = self._capture(
                lambda: self._step(on_device[0, :, None], on_device[1, :, None], length)
            )
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

    def _compare(
        self,
        graph: _Graph,
        inputs: Sequence[Sequence[int]],
        wanted: Sequence[int],
        expected: torch.Tensor,
    ) -> None:
        """Trust a graph if it computes what was expected, for another step than the captured."""
        try:
            graph.is_trusted = _are_close(select_rows(graph(inputs), wanted), expected)
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


def bucket_of(
    tokens: Sequence[tuple[int, int]], cache_length: int
) -> tuple[tuple[int, int], list[list[int]]]:
    """The rows and length of a step's bucket, and its inputs: ids and positions, 0 in spare rows.

    `tokens` are each row's token id and position.
    """
    ids, positions = map(list, zip(*tokens, strict=True))
    blocks = next_power_of_two(-(-(max(positions) + 1) // BLOCK))
    rows, length = next_power_of_two(len(ids)), min(blocks * BLOCK, cache_length)
    spare = [0] * (rows - len(ids))
    return (rows, length), [ids + spare, positions + spare]


def _are_close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether the rows agree in at least half of the digits of their dtype."""
    allowed = torch.finfo(theirs.dtype).eps ** 0.5
    distance = (ours.float() - theirs.float()).norm(dim=-1)
    return bool((distance <= allowed * theirs.float().norm(dim=-1)).all())
