"""One causal language model, many requests: continuous batching in a thread of its own.

Each turn of the loop is four verbs: requests whose time is up leave, waiting ones join, one
bounded piece of prompts is read, and every running reply grows by a token. So a long prompt
delays the others' next token by one piece, never by its whole length, and a cancelled request
is gone with the next token.

A request is its tokens: prompt and reply so far. What the cache holds of them can be computed
again at any time, which is what happens after an out-of-memory, in a smaller batch.

What it costs: the cache has one row a request, each as long as the longest (see `kv_cache`), and
the host prepares every forward in Python, but those that `graphs` has recorded. What it gives: real
transformers models, of which nothing is changed but the `norms`, and every sampling field acts for
each request alone. A batch of another size rounds differently in the last bits, so texts are equal
where no two tokens are that nearly as likely.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ourvidz_serverless.errors import InternalError, JobError, OutOfMemory
from ourvidz_serverless.models.chat import norms
from ourvidz_serverless.models.chat.batch_limit import BatchLimit
from ourvidz_serverless.models.chat.cuda_graphs import Damaged, Record, Replay
from ourvidz_serverless.models.chat.grammar import Matcher
from ourvidz_serverless.models.chat.kv_cache import (
    KVCache,
    PrefixStore,
    View,
    bytes_per_token,
    rounded,
)
from ourvidz_serverless.models.chat.request import FinishReason, SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler, choose
from ourvidz_serverless.models.chat.text_stream import Decode, TextStream
from ourvidz_serverless.models.memory.device import (
    Device,
    as_job_error,
    is_lost,
    is_out_of_memory,
    select_rows,
    to_device_async,
)

#: How soon an engine that was asked to forget sees that it may: a token of an abandoned request.
IDLE_POLL_S = 0.01

log = logging.getLogger("ourvidz")

#: A shorter prefix is read faster than it is looked up and copied.
SHORTEST_PREFIX = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is computed and kept at once.

    The longest request may be longer than `kv_tokens`; it then has the cache for itself.
    """

    max_batch: int = 64
    kv_tokens: int = 65536
    prefill_tokens: int = 512
    prefix_tokens: int = 16384


class Generation:
    """One request and its reply. Iterate over it once for the text, piece by piece.

    `check` is called at each token while the request waits or runs; what it raises ends the
    request, and the iteration with it. The facts about the reply are complete after its last
    piece. To stop iterating is to cancel.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        decode: Decode,
        check: Callable[[], None] = lambda: None,
        num_shared: int = 0,
        grammar: Matcher | None = None,
    ) -> None:
        self.ids = list(prompt)
        self.num_prompt = len(prompt)
        self.sampling = sampling
        self.check = check
        self.num_shared = num_shared if SHORTEST_PREFIX <= num_shared < len(prompt) else 0
        self.num_computed = 0
        self.num_reused = 0
        self.sampler = Sampler(sampling, prompt, grammar)
        self.finish_reason: FinishReason | None = None
        self.is_abandoned = False
        self._text = TextStream(decode, sampling.stop)
        self._pieces: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._submitted = time.monotonic()
        self._first = self._last = self._submitted

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.is_abandoned = True

    @property
    def num_completion(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the cache yet; one, where only the newest is missing."""
        return len(self.ids) - self.num_computed

    @property
    def num_at_most(self) -> int:
        return self.num_prompt + self.sampling.max_tokens

    @property
    def shared(self) -> list[int]:
        """The beginning that other requests have too."""
        return self.ids[: self.num_shared]

    @property
    def time_to_first_token_s(self) -> float:
        return self._first - self._submitted

    @property
    def tokens_per_second(self) -> float | None:
        """The reply's pace after its first token; None where there was no second one."""
        spent = self._last - self._first
        return (self.num_completion - 1) / spent if spent > 0 else None

    def append(self, token: int, is_end: bool) -> None:
        """Take the reply's next token; it may be its last.

        Raises JobError where the request cannot go on, whatever the others of its batch do.
        """
        self._last = time.monotonic()
        if not self.num_completion:
            self._first = self._last
        self.ids.append(token)
        self.sampler.note(token)
        if not is_end:
            self._tell(self._text.push(token))
        if is_end or self._text.is_stopped:
            self._finish("stop")
        elif self.num_completion == self.sampling.max_tokens:
            self._finish("length")

    def restart(self) -> None:
        """Compute anew what was computed on the device so far; the reply stays."""
        self.num_computed = 0
        self.sampler.restart()

    def fail(self, error: Exception) -> None:
        """End the iteration with an error."""
        self._pieces.put(error)

    def _finish(self, reason: FinishReason) -> None:
        self._tell(self._text.finish())
        self.finish_reason = reason
        self._pieces.put(None)

    def _tell(self, text: str) -> None:
        if text:
            self._pieces.put(text)


class Engine:
    """A model and the requests that it is answering; `record` makes its decode steps replayable."""

    def __init__(
        self,
        model: Any,
        device: Device,
        ends: Sequence[int],
        limits: Limits | None = None,
        record: Record | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.num_forwards = self.num_tokens_read = 0
        self._device = device
        norms.fuse(model)
        self._body, self._head = model.base_model, model.get_output_embeddings()
        self._ends = frozenset(ends)
        self._cache = KVCache(model.config, device.name, device.dtype)
        self._token_bytes = bytes_per_token(model.config, device.dtype)
        self._prefixes = PrefixStore(self.limits.prefix_tokens)
        self.replay = record and Replay(self._step_of, device, record)
        self._batch = BatchLimit(self.limits.max_batch)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Answer a request, from the next turn on or as soon as there is room."""
        if generation.num_shared > self.limits.prefix_tokens:
            generation.num_shared = 0
        with self._news:
            self._waiting.append(generation)
            self._news.notify()

    @property
    def cache_bytes(self) -> int:
        """What keys and values may take, kept prefixes included."""
        return self._token_bytes * (self.limits.kv_tokens + self.limits.prefix_tokens)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def forget(self) -> None:
        """Give the cache's memory back, once the last request has left; no other may come."""
        with self._news:
            while self._waiting or self._running:
                self._news.wait(IDLE_POLL_S)
            self._clear()

    def _clear(self) -> None:
        self._cache.clear()
        self._prefixes.clear()
        if self.replay:
            self.replay.forget()

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._running)
            error = self._step()
            # Not inside the `except`: there the traceback still pins the tensors that did not fit.
            if error:
                self._recover(error)

    def _step(self) -> Exception | None:
        try:
            with self._device.computing():
                self._leave()
                self._join()
                self._prefill()
                self._decode()
        except Exception as exc:
            if not is_out_of_memory(exc):
                # Where, and not what: the error's own words may quote a prompt.
                frame = traceback.extract_tb(exc.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
                log.error("the engine met a bug: %s at %s", type(exc).__name__, where)
            return exc.with_traceback(None)
        return None

    def _leave(self) -> None:
        """Requests that were stopped, timed out or abandoned give their place back."""
        with self._news:
            waiting = list(self._waiting)
        for generation in [*waiting, *self._running]:
            error = _why_to_leave(generation)
            if error:
                generation.fail(error)
                self._remove(generation)

    def _join(self) -> None:
        """Waiting requests take rows, in the order of their arrival, as long as they fit."""
        while self._waiting and self._fits(self._waiting[0]):
            with self._news:
                self._running.append(self._waiting.popleft())
        if self._running:
            longest = max(each.num_at_most for each in self._running)
            # What is recorded is good for as long as the cache does not move.
            cells = self.limits.kv_tokens if self.replay else 0
            self._cache.reserve(len(self._running), longest, cells)

    def _fits(self, newcomer: Generation) -> bool:
        if not self._running:
            return True
        rows = len(self._running) + 1
        longest = max(each.num_at_most for each in [newcomer, *self._running])
        cells, (rounded_rows, length) = self.limits.kv_tokens, rounded(rows, longest)
        return rows <= self._batch.size and rounded_rows * length <= cells

    def _prefill(self) -> None:
        """Read one piece of prompts: as many tokens as may come between two of a reply."""
        chosen: list[tuple[Generation, int]] = []
        widest = 0
        for generation in self._running:
            if generation.num_pending == 1 or self._is_read_by_another(generation):
                continue
            count = self._piece(generation)
            if chosen and (len(chosen) + 1) * max(widest, count) > self.limits.prefill_tokens:
                break
            widest = max(widest, count)
            chosen.append((generation, count))
        if chosen:
            batch, counts = [each for each, _ in chosen], [count for _, count in chosen]
            self._grow(batch, counts, self._forward(batch, counts))
        for generation, _ in chosen:
            self._keep_prefix(generation)

    def _decode(self) -> None:
        """Every reply whose prompt is read grows by one token."""
        growing = [each for each in self._running if each.num_pending == 1]
        if not growing:
            return
        ones = [1] * len(growing)
        try:
            hidden = self._replayed(growing) if self.replay else self._forward(growing, ones)
        except Damaged:
            for generation in self._running:
                generation.num_computed = 0
            return
        running = len(self._running)
        self._grow(growing, ones, hidden)
        if self._batch.note_step(running):
            log.info("at most %d requests at once from now on", self._batch.size)

    def _replayed(self, growing: Sequence[Generation]) -> torch.Tensor:
        """The same from a recording of all rows, where there is one.

        A row whose prompt is still read gets its next token too, where that belongs; nothing comes
        of it.
        """
        assert self.replay
        return self.replay.answer(
            [(each.ids[each.num_computed], each.num_computed) for each in self._running],
            [row for row, each in enumerate(self._running) if each.num_pending == 1],
            self._cache.length,
            self._cache.version,
            lambda: self._forward(growing, [1] * len(growing)),
        )

    def _piece(self, generation: Generation) -> int:
        """How many tokens of a prompt are read next; what is shared is copied, or read apart."""
        if generation.num_computed == 0:
            found, prefix = self._prefixes.find(generation.ids[: generation.num_prompt - 1])
            if found:
                self._cache.write(self._running.index(generation), prefix)
                generation.num_computed = generation.num_reused = found
        count = min(generation.num_pending, self.limits.prefill_tokens)
        unread = generation.num_shared - generation.num_computed
        return min(count, unread) if unread > 0 else count

    def _is_read_by_another(self, generation: Generation) -> bool:
        """Whether a request before this one is just reading the same shared beginning."""
        shared = generation.num_shared
        if not shared or generation.num_computed:
            return False
        before = self._running[: self._running.index(generation)]
        return any(
            other.num_computed < shared and other.shared == generation.shared for other in before
        )

    def _keep_prefix(self, generation: Generation) -> None:
        """Remember what others begin with too, at the moment when it is all that is read."""
        shared = generation.num_shared
        if 0 < shared == generation.num_computed > generation.num_reused:
            prefix = self._cache.read(self._running.index(generation), shared)
            self._prefixes.keep(generation.shared, prefix)

    def _forward(self, batch: Sequence[Generation], counts: Sequence[int]) -> torch.Tensor:
        """Read the next `counts` tokens of each; the hidden states of the last ones."""
        width = max(counts)
        rows = [self._running.index(each) for each in batch]
        # A row's last token is repeated at its own place: it writes there what stands there, so
        # nothing has to be hidden behind the end of a row.
        places = [
            [each.num_computed + min(i, count - 1) for i in range(width)]
            for each, count in zip(batch, counts, strict=True)
        ]
        ids = [[each.ids[at] for at in row] for each, row in zip(batch, places, strict=True)]

        self.num_forwards += 1
        return self._hidden(to_device_async(ids, self._device.name), self._cache.view(rows, places))

    def _step_of(self, ids: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
        return self._hidden(ids, self._cache.first_rows(places, length))

    def _hidden(self, ids: torch.Tensor, view: View) -> torch.Tensor:
        out = self._body(
            input_ids=ids,
            position_ids=view.positions,
            attention_mask=view.mask(),
            past_key_values=view,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    def _grow(
        self, batch: Sequence[Generation], counts: Sequence[int], hidden: torch.Tensor
    ) -> None:
        """Count what was read; a reply gets a token where nothing is pending any more."""
        self.num_tokens_read += sum(counts)
        for generation, count in zip(batch, counts, strict=True):
            generation.num_computed += count
        ready = [row for row, each in enumerate(batch) if each.num_pending == 0]
        if not ready:
            return
        growing = [batch[row] for row in ready]
        tokens = choose(self._head(select_rows(hidden, ready)), [each.sampler for each in growing])
        for generation, token in zip(growing, tokens, strict=True):
            self._append(generation, token)

    def _append(self, generation: Generation, token: int) -> None:
        """Give one reply its token. What is wrong with this request alone ends it alone."""
        try:
            generation.append(token, token in self._ends)
        except JobError as exc:
            generation.fail(exc)
            self._remove(generation)
            return
        if generation.finish_reason:
            self._remove(generation)

    def _remove(self, generation: Generation) -> None:
        with self._news:
            if generation in self._waiting:
                self._waiting.remove(generation)
                return
        row, last = self._running.index(generation), len(self._running) - 1
        if row != last:
            self._cache.move(last, row)
            self._running[row] = self._running[last]
        self._running.pop()

    def _recover(self, error: Exception) -> None:
        """After an out-of-memory, the same requests in a smaller batch; after a bug, none."""
        try:
            self._clear()
            self._device.free_memory()
        except Exception as exc:
            # A lost device refuses this too; whoever waits must hear of it all the same.
            error = error if is_lost(error) else exc.with_traceback(None)
        stranded, self._running = self._running, []
        if is_out_of_memory(error) and len(stranded) > 1:
            self._batch.shrink(len(stranded))
            log.warning("out of memory: at most %d requests at once for now", self._batch.size)
            for generation in stranded:
                generation.restart()
            with self._news:
                self._waiting.extendleft(reversed(stranded))
            return
        for generation in stranded:
            generation.fail(_as_job_error(error))


def _why_to_leave(generation: Generation) -> Exception | None:
    try:
        generation.check()
    except Exception as exc:
        return exc
    return InternalError("nobody listens any more") if generation.is_abandoned else None


def _as_job_error(error: Exception) -> JobError:
    if is_out_of_memory(error):
        return OutOfMemory("one conversation of this length does not fit the device's memory")
    return as_job_error(error)
