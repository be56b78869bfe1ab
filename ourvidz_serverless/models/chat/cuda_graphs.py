"""A reply's next token without the host: a decode step is recorded once and then replayed.

One token of a 7B model is a thousand small launches from Python, which take a GPU's host several
times as long as the weights' way from memory takes the GPU. A CUDA graph is all of them in one. It
computes on the same addresses each time, so a step is a function of a few tensors that stay where
they are, in a few shapes, its *buckets*: rows are rounded up to a power of two, and so is how far
back they look. Rows that nobody needs write where nothing has been read yet, and are dropped.

A bucket's first step is computed as ever. The second is too, and then recorded; the third is
computed both ways and compared. From then on the recording answers. One that differs, or a
recorder that fails, is a warning and the end of it: everything goes on as it did without.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ourvidz_serverless.models.chat.kv_cache import BLOCK, next_power
from ourvidz_serverless.models.memory.device import (
    Device,
    device_wide_lock,
    select_rows,
    to_device_async,
)

#: Recordings that are kept, the longest unused one leaves first: seven sizes of a batch of up to
#: 64, and six lengths of up to 8192 tokens, are all but two.
MAX_RECORDINGS = 40

#: Runs before a recording, in which libraries load their kernels and take their workspaces.
WARM_UPS = 2

#: Position embeddings that look at the positions on the host, or change their own tables.
MOVING_ROPE = ("dynamic", "longrope")

log = logging.getLogger("ourvidz")

#: Hidden states (rows, hidden) from token ids and places, (rows, 1) each, and how far back to look.
Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]

#: Makes of a function without arguments one that does the same to the same tensors, and returns
#: the same one each time, with new contents.
Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


class Damaged(Exception):
    """A recording was wrong, and what the cache holds may be so too."""


def recorder(asked: Literal["auto", "off"], device: Device, config: Any) -> Record | None:
    """What `CHAT_GRAPHS` asks for; None where nothing is recorded."""
    rope = getattr(config, "rope_parameters", None) or {}
    if asked == "off" or not device.is_cuda or rope.get("rope_type") in MOVING_ROPE:
        return None
    return CudaGraphs(device.name)


class CudaGraphs:
    """Records on one GPU. All recordings share the memory of what lies between their layers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        graph, side = torch.cuda.CUDAGraph(), self._stream
        side.wait_stream(torch.cuda.current_stream(self._device))
        # This `stream` also brings back the former one where a recording fails: torch's does not.
        with device_wide_lock, torch.cuda.device(self._device), torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
            # Only this thread is bound to what can be recorded; other families' go on.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode=mode):
                output = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(slots=True)
class _Recording:
    #: Token ids and places, (2, rows).
    inputs: torch.Tensor
    run: Callable[[], torch.Tensor]
    is_trusted: bool = False

    def __call__(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        self.inputs.copy_(to_device_async(inputs, self.inputs.device))
        return self.run()


class Replay:
    """One model's decode steps. `recorded` and `replayed` count; `is_off` after a failure."""

    def __init__(self, step: Step, device: Device, record: Record) -> None:
        self._step, self._device, self._record = step, device, record
        self._recordings: OrderedDict[tuple[int, int], _Recording] = OrderedDict()
        self._seen: set[tuple[int, int]] = set()
        self._version: object = None
        self.recorded = self.replayed = 0
        self.is_off = False

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Rows and lengths that are recorded now."""
        return list(self._recordings)

    def forget(self) -> None:
        """Give the recordings' memory back; they are made anew when steps come again."""
        self._recordings.clear()
        self._seen.clear()

    def answer(
        self,
        tokens: Sequence[tuple[int, int]],
        wanted: Sequence[int],
        room: int,
        version: object,
        eager: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The hidden states of the `wanted` rows, as `eager` would compute them.

        `tokens` has each row's next token and its place, `room` is the cache's length. Recordings
        of another `version` of the cache are forgotten. Raises Damaged.
        """
        if self.is_off:
            return eager()
        if version != self._version:
            self.forget()
            self._version = version
        bucket, inputs = _bucket(tokens, room)
        recording = self._recordings.get(bucket)
        if recording is not None and recording.is_trusted:
            try:
                hidden = recording(inputs)
            except RuntimeError as exc:
                self._give_up(type(exc).__name__)
                return eager()
            self._recordings.move_to_end(bucket)
            self.replayed += 1
            return select_rows(hidden, wanted)
        hidden = eager()
        if recording is not None:
            self._try(recording, inputs, wanted, hidden)
        elif bucket in self._seen:
            self._make(bucket, inputs)
        self._seen.add(bucket)
        return hidden

    def _make(self, bucket: tuple[int, int], inputs: Sequence[Sequence[int]]) -> None:
        length, there = bucket[1], to_device_async(inputs, self._device.name)
        try:
            run = self._record(lambda: self._step(there[0, :, None], there[1, :, None], length))
        except Exception as exc:
            why = type(exc).__name__
        else:
            self.recorded += 1
            self._recordings[bucket] = _Recording(there, run)
            if len(self._recordings) > MAX_RECORDINGS:
                self._recordings.popitem(last=False)
            return
        # Not inside the `except`: there the traceback still pins what did not fit.
        self._give_up(why)

    def _try(
        self,
        recording: _Recording,
        inputs: Sequence[Sequence[int]],
        wanted: Sequence[int],
        expected: torch.Tensor,
    ) -> None:
        """Trust a recording that gives what was computed, for another step than it was made of."""
        try:
            recording.is_trusted = _are_alike(select_rows(recording(inputs), wanted), expected)
        except RuntimeError as exc:
            self._give_up(type(exc).__name__)
            return
        if not recording.is_trusted:
            self._give_up("it computed something else")
            raise Damaged

    def _give_up(self, why: str) -> None:
        self.is_off = True
        self.forget()
        log.warning("CHAT_GRAPHS: no step is replayed from now on (%s)", why)
        self._device.free_memory()


def _bucket(
    tokens: Sequence[tuple[int, int]], room: int
) -> tuple[tuple[int, int], list[list[int]]]:
    """The shape that a step is computed in, and its ids and places: a row more is a token at 0."""
    ids, places = map(list, zip(*tokens, strict=True))
    blocks = next_power(-(-(max(places) + 1) // BLOCK))
    rows, length = next_power(len(ids)), min(blocks * BLOCK, room)
    spare = [0] * (rows - len(ids))
    return (rows, length), [ids + spare, places + spare]


def _are_alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether each row differs by no more than half of its dtype's digits."""
    allowed = torch.finfo(theirs.dtype).eps ** 0.5
    apart = (ours.float() - theirs.float()).norm(dim=-1)
    return bool((apart <= allowed * theirs.float().norm(dim=-1)).all())
