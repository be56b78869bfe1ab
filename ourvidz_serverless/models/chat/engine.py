"""One causal language model, many requests at once: continuous batching in a thread of its own.

Each step of the loop removes requests that were stopped, admits waiting ones, and computes one
packed batch: the next token of every running reply, and a bounded number of tokens of prompts. So a
long prompt delays the next token of the others by one batch, not by its whole length, the weights
are read once for both, and a cancelled request is gone at the next token.

A request is its tokens: the prompt, and the reply so far. Keys and values can be computed again
from them, which is what happens after an out-of-memory, in a smaller batch.

A request has pages for the tokens that are computed, not for those that its limit allows (see
`pages`). It is admitted when the pages that are left hold its tokens, and one page more of each
running request. When a running request needs a page and none is left, the request that was admitted
last gives its pages back and waits, before all others that wait. It keeps the tokens of its reply,
and goes on where it was as soon as its tokens fit again. If it is itself the last one, it waits
with its pages. The request that was admitted first never waits. A request that is longer than the
whole cache is admitted when nothing else runs, and runs alone.

Requests that begin alike compute that beginning once. A request whose beginning another one is
about to compute waits until it can share it: whole pages in the same forward, a part of a page,
which it copies, one step later.

A batch of another size rounds the last bits differently, so a text can differ where two tokens are
almost equally likely.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ourvidz_serverless.errors import JobError, OutOfMemory
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat import attention, norms
from ourvidz_serverless.models.chat.batch_limit import BatchLimit
from ourvidz_serverless.models.chat.cuda_graphs import Buckets, Capture, GraphReplay, WrongReplay
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.kv_cache import (
    BLOCK,
    Batch,
    KVCache,
    Span,
    bytes_per_token,
    one_token_each,
    packed,
)
from ourvidz_serverless.models.chat.pages import Found, Page, Pages, common_length
from ourvidz_serverless.models.chat.sampling import sample
from ourvidz_serverless.models.memory.device import (
    Device,
    as_job_error,
    is_lost,
    is_out_of_memory,
    select_rows,
)

#: How often `free_caches` looks whether the last request has left, in seconds.
IDLE_POLL_S = 0.01

#: transformers takes a mask of four dimensions as it is, and makes none of its own. The attention
#: over pages reads none.
NO_MASK = torch.zeros(1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much is computed and cached at once.

    Running requests have pages for `kv_tokens` together. A request may be longer, and then runs
    alone. Pages of `prefix_tokens` that no request uses any more are kept for later ones. A forward
    computes at most `prefill_tokens` of prompts.
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
        attention.install(network)
        #: The network without its last layer, from token ids to hidden states.
        self.decoder = network.base_model
        self._head = network.get_output_embeddings()
        self._device = device
        self._eos_ids = frozenset(eos_ids)
        self._context = network.config.max_position_embeddings
        self._attention = attention.choose(network.config, device)
        size = self._attention.page_tokens
        self._cache = KVCache(network.config, device.name, device.dtype, size)
        self._token_bytes = bytes_per_token(network.config, device.dtype)
        kept = self.limits.prefix_tokens // size
        self.pages = Pages(size, max(self.limits.kv_tokens // size, 1), kept)
        self.graphs = capture and GraphReplay(self._graph_step, device, capture, self._buckets())
        self.batch_limit = BatchLimit(self.limits.max_batch)
        self._records = False
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Answer a request, from the next step on or as soon as it fits."""
        with self._changed:
            self._waiting.append(generation)
            self._changed.notify()

    @property
    def cache_bytes(self) -> int:
        """The most that keys and values may take, those that are kept for later included."""
        return self._token_bytes * (self.limits.kv_tokens + self.limits.prefix_tokens)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def record_graphs(self) -> None:
        """Capture all decode steps before the next one is computed, if the engine replays steps."""
        self._records = self.graphs is not None

    def free_caches(self) -> None:
        """Free the caches when the last request has left. Nobody may submit meanwhile."""
        with self._changed:
            while self._waiting or self._running:
                self._changed.wait(IDLE_POLL_S)
            self._clear_caches()

    def _clear_caches(self) -> None:
        self._forget_pages()
        self._attention.clear()
        self._cache.clear()
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
                self._compute()
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

    def _compute(self) -> None:
        """Compute one batch, and draw the next token of every text that is computed then."""
        batch, counts = self._next_tokens()
        if not batch:
            return
        is_replayable = self.graphs and max(counts) == 1
        try:
            hidden = self._replay(batch) if is_replayable else self._forward(batch, counts)
        except WrongReplay:
            self._forget_pages()
            return
        num_running = len(self._running)
        self._advance(batch, counts, hidden)
        if self.batch_limit.note_step(num_running):
            log.info("at most %d requests at once from now on", self.batch_limit.size)

    def _next_tokens(self) -> tuple[list[Generation], list[int]]:
        """The requests of the next batch, with their pages, and how many tokens of each.

        One token of every reply, and of prompts as many as may delay the replies. A prompt that is
        longer than that is computed in parts. Others are not cut.
        """
        batch: list[Generation] = []
        counts: list[int] = []
        num_left = self.limits.prefill_tokens
        for generation in list(self._running):
            count = self._num_next(generation, num_left)
            if count and self._reserve(generation, count):
                batch.append(generation)
                counts.append(count)
                # A reply's token is no part of the bound.
                num_left -= count if generation.num_pending > 1 else 0
        return batch, counts

    def _num_next(self, generation: Generation, num_left: int) -> int:
        """How many tokens of a request to compute, if `num_left` of prompts may be; 0 if it waits.

        It has left if an earlier request took its pages.
        """
        if generation not in self._running:
            return 0
        is_new = generation.num_pending > 1 and not generation.pages
        if is_new and not self._begin(generation):
            return 0
        num_pending = generation.num_pending
        if num_pending == 1:
            return 1
        is_first = num_left == self.limits.prefill_tokens
        return min(num_pending, num_left) if is_first or num_pending <= num_left else 0

    # --- admission and pages ---

    def _fits(self, newcomer: Generation) -> bool:
        if self._running and len(self._running) >= self.batch_limit.size:
            return False
        expected = newcomer.num_expected_pages = self._num_expected(newcomer)
        num_left = self.pages.num_left - sum(map(self._num_promised, self._running))
        return not self._running or expected + len(self._running) <= num_left

    def _num_expected(self, newcomer: Generation) -> int:
        """The pages that a request will take for its tokens, beside those that others use."""
        found = self._find(newcomer)
        in_use = sum(page.num_users > 0 for page in found.pages)
        being_read = max(
            (self._common(newcomer, other) for other in self._running if other.num_pending > 1),
            default=0,
        )
        num_shared = max(in_use, being_read // self.pages.size)
        return self.pages.count(len(newcomer.ids) + 1) - num_shared

    def _num_promised(self, generation: Generation) -> int:
        """The pages that a running request has not taken yet for the tokens that it has."""
        if not generation.pages:
            return generation.num_expected_pages
        return max(self.pages.count(len(generation.ids)) - len(generation.pages), 0)

    def _common(self, one: Generation, other: Generation) -> int:
        """The tokens that one request can have from the pages of another."""
        if one.cache_salt != other.cache_salt:
            return 0
        return self.pages.shareable(common_length(one.ids[:-1], other.ids))

    def _begin(self, generation: Generation) -> bool:
        """Share the pages of an equal beginning. Returns False if the request has to wait.

        It waits for a request before it that is about to compute more of that beginning, or for
        pages.
        """
        found = self._find(generation)
        earlier = self._running[: self._running.index(generation)]
        if any(
            other.num_pending > 1 and self._common(generation, other) > found.num_tokens
            for other in earlier
        ):
            return False
        if not self._make_room(generation, self.pages.num_new(found)):
            return False
        # To make room may have dropped pages that were found; the rest is computed.
        self._share(generation, self._find(generation))
        return True

    def _find(self, generation: Generation) -> Found:
        """What the cache holds of a request, without its last token, which is always computed."""
        return self.pages.find(generation.ids[:-1], generation.cache_salt)

    def _share(self, generation: Generation, found: Found) -> None:
        generation.pages = self.pages.share(found.pages)
        if found.tail:
            page = self._take_page(generation)
            self._cache.reserve(*self._cache_size)
            self._cache.copy_page(found.tail.index, page.index)
            page.tokens = found.tail.tokens[: found.num_tail]
            page.num_written = found.num_tail
        generation.num_computed = found.num_tokens
        if not generation.num_completion:
            generation.num_reused = found.num_tokens

    def _reserve(self, generation: Generation, count: int) -> bool:
        """Take the pages of a request's next tokens. Returns False if it has to wait for them."""
        length = generation.num_computed + count
        num_new = self.pages.count(length) - len(generation.pages)
        if not self._make_room(generation, num_new):
            return False
        for _ in range(num_new):
            self._take_page(generation)
        # From now on these tokens can be shared, by requests in the same forward too.
        size = self.pages.size
        for at in range(generation.num_computed // size, len(generation.pages)):
            generation.pages[at].tokens = generation.ids[at * size : min(length, (at + 1) * size)]
        return True

    def _take_page(self, generation: Generation) -> Page:
        parent = generation.pages[-1] if generation.pages else None
        page = self.pages.take(parent, generation.cache_salt)
        generation.pages.append(page)
        return page

    def _make_room(self, generation: Generation, num_pages: int) -> bool:
        """Let the requests after this one give pages back until so many are left.

        Returns False if that is not enough. A request that runs alone may have all it needs.
        """
        while num_pages > self.pages.num_left and len(self._running) > 1:
            last = self._running[-1]
            if last is generation:
                return False
            self._running.pop()
            self._give_back(last)
            with self._changed:
                self._waiting.appendleft(last)
        return True

    def _give_back(self, generation: Generation) -> None:
        """Take all pages from a request, which then has to be computed again."""
        self.pages.release(generation.pages)
        generation.pages = []
        generation.recompute()

    def _forget_pages(self) -> None:
        """Compute all requests again, and share nothing that is in the cache now."""
        for generation in self._running:
            generation.pages = []
            generation.recompute()
        self.pages.clear()

    # --- forwards ---

    @property
    def _cache_size(self) -> tuple[int, int, bool]:
        """The pages that the cache needs now, those it may have, and whether to take all now."""
        most = 1 + self.pages.max_used + self.pages.max_kept
        # A graph is valid only until the cache moves, so the cache should never move.
        return self.pages.num_made, most, self.graphs is not None

    def _forward(self, batch: Sequence[Generation], counts: Sequence[int]) -> torch.Tensor:
        """The hidden states of the last tokens, after the next `counts` tokens of each request."""
        self._cache.reserve(*self._cache_size)
        spans = [
            Span(
                each.ids[each.num_computed : each.num_computed + count],
                each.num_computed,
                [page.index for page in each.pages],
            )
            for each, count in zip(batch, counts, strict=True)
        ]
        return self._hidden_states(packed(spans, self.pages.size, self._device.name))

    def _replay(self, growing: Sequence[Generation]) -> torch.Tensor:
        """The hidden states of a decode step, by a CUDA graph if there is one."""
        assert self.graphs
        self._cache.reserve(*self._cache_size)
        if self._records:
            self._records = False
            self.graphs.record(self._cache.version)
        rows = [
            [each.ids[each.num_computed], each.num_computed, *(page.index for page in each.pages)]
            for each in growing
        ]
        compute = partial(self._forward, growing, [1] * len(growing))
        return self.graphs.hidden_states(rows, self._cache.version, compute)

    def _graph_step(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._hidden_states(one_token_each(inputs, self.pages.size))

    def _buckets(self) -> Buckets:
        """The shapes of decode steps: lengths matter only where attention reads whole tables."""
        limits = self.limits
        longest = max(min(limits.kv_tokens, self._context), BLOCK)
        least = longest if self._attention.reads_only_used else BLOCK
        return Buckets(limits.max_batch, self.pages.count(least), self.pages.count(longest))

    def _hidden_states(self, batch: Batch) -> torch.Tensor:
        out = self.decoder(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=NO_MASK,
            use_cache=False,
            pages=attention.Forward(self._attention, self._cache, batch),
        )
        return out.last_hidden_state[0].index_select(0, batch.last)

    # --- what a forward changes ---

    def _advance(
        self, batch: Sequence[Generation], counts: Sequence[int], hidden: torch.Tensor
    ) -> None:
        """Count the computed tokens, and sample one for each request with none left to compute."""
        self.num_computed += sum(counts)
        for generation, count in zip(batch, counts, strict=True):
            first = generation.num_computed // self.pages.size
            generation.num_computed += count
            for page in generation.pages[first:]:
                page.num_written = len(page.tokens)
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
        self._running.remove(generation)
        self.pages.release(generation.pages)
        generation.pages = []

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
            with self._changed:
                self._waiting.extendleft(reversed(failed))
            return
        for generation in failed:
            generation.fail(_as_job_error(error))


def _as_job_error(error: Exception) -> JobError:
    if is_out_of_memory(error):
        return OutOfMemory("one conversation of this length does not fit the device's memory")
    return as_job_error(error)
