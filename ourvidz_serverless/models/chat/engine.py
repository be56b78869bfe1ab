"""One causal language model, many requests at once: continuous batching in a thread of its own.

Each step of the loop removes requests that were stopped, admits waiting ones, prefills one bounded
chunk of prompts, and decodes one token of every running reply. So a long prompt delays the next
token of the others by one chunk, not by its whole length, and a cancelled request is gone at the
next token.

A request is its tokens: the prompt, and the reply so far. The cache can be computed again from
them, which is what happens after an out-of-memory, in a smaller batch.

The costs: the cache has one row for each request, as long as the longest (see `kv_cache`), and the
host prepares every forward in Python, except those that `graphs` replays. The gain: transformers'
own models, unchanged except for `norms`, and sampling parameters for each request. A batch of
another size rounds the last bits differently, so a text can differ where two tokens are almost
equally likely.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ourvidz_serverless.errors import JobError, OutOfMemory
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat import norms
from ourvidz_serverless.models.chat.batch_limit import BatchLimit
from ourvidz_serverless.models.chat.cuda_graphs import Capture, GraphReplay, WrongReplay
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.kv_cache import (
    CacheView,
    KVCache,
    PrefixCache,
    bytes_per_token,
    rounded_shape,
)
from ourvidz_serverless.models.chat.sampling import sample
from ourvidz_serverless.models.memory.device import (
    Device,
    as_job_error,
    is_lost,
    is_out_of_memory,
    select_rows,
    to_device_async,
)

#: How often `free_caches` looks whether the last request has left, in seconds.
IDLE_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much is computed and cached at once.

    A request may be longer than `kv_tokens`. It then runs alone.
    """

    max_batch: int = 64
    kv_tokens: int = 65536
    prefill_tokens: int = 512
    prefix_tokens: int = 16384


class Engine:
    """A network and the requests that it answers. With `capture` it replays decode steps."""

    def __init__(
        self,
        network: Any,
        device: Device,
        eos_ids: Sequence[int],
        limits: EngineLimits | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.limits = limits or EngineLimits()
        self.num_computed = 0
        norms.fuse(network)
        #: The network without its last layer, from token ids to hidden states.
        self.decoder = network.base_model
        self._head = network.get_output_embeddings()
        self._device = device
        self._eos_ids = frozenset(eos_ids)
        self._cache = KVCache(network.config, device.name, device.dtype)
        self._token_bytes = bytes_per_token(network.config, device.dtype)
        self._prefixes = PrefixCache(self.limits.prefix_tokens)
        self.graphs = capture and GraphReplay(self._graph_step, device, capture)
        self.batch_limit = BatchLimit(self.limits.max_batch)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Answer a request, from the next step on or as soon as it fits."""
        if generation.num_shared > self.limits.prefix_tokens:
            generation.num_shared = 0
        with self._changed:
            self._waiting.append(generation)
            self._changed.notify()

    @property
    def cache_bytes(self) -> int:
        """The most that keys and values may take, those of the prefix cache included."""
        return self._token_bytes * (self.limits.kv_tokens + self.limits.prefix_tokens)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def free_caches(self) -> None:
        """Free the caches when the last request has left. Nobody may submit meanwhile."""
        with self._changed:
            while self._waiting or self._running:
                self._changed.wait(IDLE_POLL_S)
            self._clear_caches()

    def _clear_caches(self) -> None:
        self._cache.clear()
        self._prefixes.clear()
        if self.graphs:
            self.graphs.clear()

    # --- the loop ---

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running)
            error = self._step()
            # Not inside the `except`: there the traceback still pins the tensors that did not fit.
            if error:
                self._recover(error)

    def _step(self) -> Exception | None:
        try:
            with self._device.computing():
                self._remove_stopped()
                self._admit_waiting()
                self._prefill()
                self._decode()
        except Exception as exc:
            if not is_out_of_memory(exc):
                # The place, not the message: the error's own words may quote a prompt.
                frame = traceback.extract_tb(exc.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
                log.error("the engine met a bug: %s at %s", type(exc).__name__, where)
            return exc.with_traceback(None)
        return None

    def _remove_stopped(self) -> None:
        """Remove requests that were stopped, whose time is over, or that nobody iterates over."""
        with self._changed:
            waiting = list(self._waiting)
        for generation in [*waiting, *self._running]:
            if reason := generation.stop_reason():
                generation.fail(reason)
                self._remove(generation)

    def _admit_waiting(self) -> None:
        """Add waiting requests to the batch, in the order of their arrival, while they fit."""
        while self._waiting and self._fits(self._waiting[0]):
            with self._changed:
                self._running.append(self._waiting.popleft())
        if self._running:
            longest = max(each.max_length for each in self._running)
            # A graph is valid only until the cache moves, so the cache should move seldom.
            spare_tokens = self.limits.kv_tokens if self.graphs else 0
            self._cache.reserve(len(self._running), longest, spare_tokens)

    def _prefill(self) -> None:
        """Compute one chunk of prompts: as many tokens as may delay the running replies."""
        batch: list[Generation] = []
        counts: list[int] = []
        for generation in self._running:
            if generation.num_pending == 1 or self._waits_for_prefix(generation):
                continue
            count = self._next_chunk(generation)
            if batch and (len(batch) + 1) * max(*counts, count) > self.limits.prefill_tokens:
                break
            batch.append(generation)
            counts.append(count)
        if batch:
            self._advance(batch, counts, self._forward(batch, counts))
        for generation in batch:
            self._cache_prefix(generation)

    def _decode(self) -> None:
        """Compute the next token of every reply whose prompt is computed."""
        growing = [each for each in self._running if each.num_pending == 1]
        if not growing:
            return
        ones = [1] * len(growing)
        try:
            hidden = self._replay(growing) if self.graphs else self._forward(growing, ones)
        except WrongReplay:
            for generation in self._running:
                generation.num_computed = 0
            return
        num_running = len(self._running)
        self._advance(growing, ones, hidden)
        if self.batch_limit.note_step(num_running):
            log.info("at most %d requests at once from now on", self.batch_limit.size)

    # --- admission and prefixes ---

    def _fits(self, newcomer: Generation) -> bool:
        if not self._running:
            return True
        num_rows = len(self._running) + 1
        longest = max(each.max_length for each in [newcomer, *self._running])
        rows, length = rounded_shape(num_rows, longest)
        return num_rows <= self.batch_limit.size and rows * length <= self.limits.kv_tokens

    def _next_chunk(self, generation: Generation) -> int:
        """How many tokens to compute next. A shared prefix is copied, or is a chunk of its own."""
        if generation.num_computed == 0:
            found, prefix = self._prefixes.find(generation.ids[: generation.num_prompt - 1])
            if found:
                self._cache.write_prefix(self._running.index(generation), prefix)
                generation.num_computed = generation.num_reused = found
        count = min(generation.num_pending, self.limits.prefill_tokens)
        num_shared_left = generation.num_shared - generation.num_computed
        return min(count, num_shared_left) if num_shared_left > 0 else count

    def _waits_for_prefix(self, generation: Generation) -> bool:
        """Whether an earlier request is computing the same shared prefix now."""
        num_shared = generation.num_shared
        if not num_shared or generation.num_computed:
            return False
        return any(
            other.num_computed < num_shared and other.shared_prefix == generation.shared_prefix
            for other in self._running[: self._running.index(generation)]
        )

    def _cache_prefix(self, generation: Generation) -> None:
        """Copy a shared prefix to the prefix cache when it is computed, and nothing after it."""
        num_shared = generation.num_shared
        if 0 < num_shared == generation.num_computed > generation.num_reused:
            prefix = self._cache.read_prefix(self._running.index(generation), num_shared)
            self._prefixes.add(generation.shared_prefix, prefix)

    # --- forwards ---

    def _forward(self, batch: Sequence[Generation], counts: Sequence[int]) -> torch.Tensor:
        """The hidden states of the last tokens, after the next `counts` tokens of each request."""
        width = max(counts)
        rows = [self._running.index(each) for each in batch]
        # Shorter rows are padded with their last token at its own position. It writes there what
        # is there already, so no mask has to hide the padding.
        positions = [
            [each.num_computed + min(i, count - 1) for i in range(width)]
            for each, count in zip(batch, counts, strict=True)
        ]
        ids = [[each.ids[at] for at in row] for each, row in zip(batch, positions, strict=True)]

        view = self._cache.view(rows, positions)
        return self._hidden_states(to_device_async(ids, self._device.name), view)

    def _replay(self, growing: Sequence[Generation]) -> torch.Tensor:
        """The hidden states of a decode step, by a CUDA graph if there is one.

        A graph computes all rows. A row whose prompt is not computed yet gets its next token too,
        at its own position, which does no harm.
        """
        assert self.graphs
        return self.graphs.hidden_states(
            [(each.ids[each.num_computed], each.num_computed) for each in self._running],
            [row for row, each in enumerate(self._running) if each.num_pending == 1],
            self._cache.length,
            self._cache.version,
            lambda: self._forward(growing, [1] * len(growing)),
        )

    def _graph_step(self, ids: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        return self._hidden_states(ids, self._cache.view_of_first_rows(positions, length))

    def _hidden_states(self, ids: torch.Tensor, view: CacheView) -> torch.Tensor:
        out = self.decoder(
            input_ids=ids,
            position_ids=view.positions,
            attention_mask=view.mask(),
            past_key_values=view,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    # --- what a forward changes ---

    def _advance(
        self, batch: Sequence[Generation], counts: Sequence[int], hidden: torch.Tensor
    ) -> None:
        """Count the computed tokens, and sample one for each request with none left to compute."""
        self.num_computed += sum(counts)
        for generation, count in zip(batch, counts, strict=True):
            generation.num_computed += count
        ready = [row for row, each in enumerate(batch) if each.num_pending == 0]
        if not ready:
            return
        growing = [batch[row] for row in ready]
        tokens = sample(self._head(select_rows(hidden, ready)), [each.sampler for each in growing])
        for generation, token in zip(growing, tokens, strict=True):
            self._append(generation, token)

    def _append(self, generation: Generation, token: int) -> None:
        """Add a token to one reply. An error of this request ends this request alone."""
        try:
            generation.append(token, token in self._eos_ids)
        except JobError as exc:
            generation.fail(exc)
            self._remove(generation)
            return
        if generation.finish_reason:
            self._remove(generation)

    def _remove(self, generation: Generation) -> None:
        with self._changed:
            if generation in self._waiting:
                self._waiting.remove(generation)
                return
        row, last = self._running.index(generation), len(self._running) - 1
        if row != last:
            self._cache.copy_row(last, row)
            self._running[row] = self._running[last]
        self._running.pop()

    def _recover(self, error: Exception) -> None:
        """After an out-of-memory run the same requests in a smaller batch; else fail them."""
        try:
            self._clear_caches()
            self._device.free_memory()
        except Exception as exc:
            # A lost device refuses this too. The requests must get an error all the same.
            error = error if is_lost(error) else exc.with_traceback(None)
        failed, self._running = self._running, []
        if is_out_of_memory(error) and len(failed) > 1:
            self.batch_limit.shrink(len(failed))
            log.warning("out of memory: at most %d requests at once for now", self.batch_limit.size)
            for generation in failed:
                generation.recompute()
            with self._changed:
                self._waiting.extendleft(reversed(failed))
            return
        for generation in failed:
            generation.fail(_as_job_error(error))


def _as_job_error(error: Exception) -> JobError:
    if is_out_of_memory(error):
        return OutOfMemory("one conversation of this length does not fit the device's memory")
    return as_job_error(error)
