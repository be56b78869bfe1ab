"""One request at work in the engine: its tokens so far, and the text of its reply."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence

from ourvidz_serverless.errors import InternalError
from ourvidz_serverless.models.chat.grammar import Matcher
from ourvidz_serverless.models.chat.pages import Page
from ourvidz_serverless.models.chat.request import FinishReason, SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler
from ourvidz_serverless.models.chat.text_stream import Decode, TextStream
from ourvidz_serverless.models.chat.tokenizer import Thoughts
from ourvidz_serverless.models.memory.types import Check


class Generation:
    """The tokens of one request, prompt and reply. Iterate over it once for the pieces of text.

    The engine calls `check` at each token while the request waits or runs. What `check` raises
    ends the request and the iteration. To stop the iteration is to cancel the request. The counts
    and times are complete after the last piece. Requests share what is computed of them if they
    have the same `cache_salt`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        decode: Decode,
        check: Check = lambda: None,
        grammar: Matcher | None = None,
        thoughts: Thoughts | None = None,
        cache_salt: str = "",
    ) -> None:
        self.ids = list(prompt)
        self.num_prompt = len(prompt)
        self.cache_salt = cache_salt
        self.sampling = sampling
        #: The pages of its tokens in the KV cache. At first, how many it is expected to take.
        self.pages: list[Page] = []
        self.num_expected_pages = 0
        self.num_computed = 0
        self.num_reused = 0
        self.sampler = Sampler(sampling, prompt, grammar)
        self.finish_reason: FinishReason | None = None
        self._check = check
        self._is_abandoned = False
        self._text = TextStream(decode, sampling.stop, thoughts)
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
            self._is_abandoned = True

    @property
    def num_completion(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def num_thought(self) -> int:
        return self._text.num_thought

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the KV cache yet: 1 if only the newest is missing."""
        return len(self.ids) - self.num_computed

    @property
    def time_to_first_token_s(self) -> float:
        return self._first - self._submitted

    @property
    def tokens_per_second(self) -> float | None:
        """The pace of the reply after its first token; None if there was no second one."""
        seconds = self._last - self._first
        return (self.num_completion - 1) / seconds if seconds > 0 else None

    # The engine calls these.

    def stop_reason(self) -> Exception | None:
        """Why the request must not go on: what `check` raises, or that the iteration stopped."""
        try:
            self._check()
        except Exception as exc:
            return exc
        return InternalError("nobody reads the reply any more") if self._is_abandoned else None

    def append(self, token: int, is_eos: bool) -> None:
        """Add the next token of the reply, which may finish the reply.

        Raises JobError if this request cannot go on; the other requests can.
        """
        self._last = time.monotonic()
        if not self.num_completion:
            self._first = self._last
        self.ids.append(token)
        self.sampler.accept(token)
        if not is_eos:
            self._emit(self._text.push(token))
        if is_eos or self._text.is_stopped:
            self._finish("stop")
        elif self.num_completion == self.sampling.max_tokens:
            self._finish("length")

    def recompute(self) -> None:
        """Compute all tokens again, as after an out-of-memory. The reply keeps its tokens."""
        self.num_computed = 0

    def fail(self, error: Exception) -> None:
        """Raise an error in the iteration."""
        self._pieces.put(error)

    def _finish(self, reason: FinishReason) -> None:
        self._emit(self._text.finish())
        self.finish_reason = reason
        self._pieces.put(None)

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.put(text)
