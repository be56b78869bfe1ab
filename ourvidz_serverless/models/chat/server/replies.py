"""One reply of a chat server: it grows while the server streams it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

from ourvidz_serverless.errors import InternalError
from ourvidz_serverless.models.chat.request import FinishReason, ReplyStats
from ourvidz_serverless.models.chat.server.client import events_of
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.net.transport import Stream

#: Opens the stream of a reply; returns it with the number of messages that `truncate` removed.
Open = Callable[[], tuple[Stream, int]]

FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    # TGI's two other words for a reply that ended by itself.
    "eos_token": "stop",
    "stop_sequence": "stop",
}


class ServerReply:
    """A `ChatReply`. The request is sent when the iteration begins.

    What `check` raises ends it. `raise_failure` raises the JobError for a Fault.
    """

    def __init__(
        self, open_stream: Open, check: Check, raise_failure: Callable[[Fault], None]
    ) -> None:
        self._open, self._check, self._raise_failure = open_stream, check, raise_failure
        self._finish_reason: FinishReason | None = None
        self._usage: Mapping[str, Any] = {}
        self._num_dropped = 0
        self._started = self._first = self._last = time.monotonic()

    def __iter__(self) -> Iterator[str]:
        try:
            stream, self._num_dropped = self._open()
            with closing(stream):
                for event in events_of(stream):
                    # The connection checks too, but only while nothing arrives.
                    self._check()
                    yield from self._texts(event)
        except Fault as fault:
            self._raise_failure(fault)
        if self._finish_reason is None:
            # The end of a connection may look like the end of a stream.
            self._raise_failure(Fault(None))

    @property
    def stats(self) -> ReplyStats:
        usage = self._usage
        details = usage.get("prompt_tokens_details") or {}
        num_completion, seconds = usage.get("completion_tokens", 0), self._last - self._first
        return ReplyStats(
            num_prompt=usage.get("prompt_tokens", 0),
            num_completion=num_completion,
            num_reused=details.get("cached_tokens") or 0,
            num_dropped=self._num_dropped,
            finish_reason=self._finish_reason,
            time_to_first_token_s=self._first - self._started,
            tokens_per_second=(num_completion - 1) / seconds if seconds > 0 else None,
            swap_s=0.0,
            engine="openai",
        )

    def _texts(self, event: Mapping[str, Any]) -> Iterator[str]:
        """The text of one event, if it has any."""
        if "error" in event:
            raise _fault_of(event)
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
                self._note_time()
                yield text
            if reason := choice.get("finish_reason"):
                self._finish(reason)

    def _note_time(self) -> None:
        now = time.monotonic()
        if self._first == self._started:
            self._first = now
        self._last = now

    def _finish(self, reason: str) -> None:
        if reason not in FINISH_REASONS:
            raise InternalError("the model ended the reply before its end")
        self._finish_reason = FINISH_REASONS[reason]


def _fault_of(event: Mapping[str, Any]) -> Fault:
    """The Fault of an error within a stream: vLLM refuses some values only there."""
    error = event["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return Fault(code if isinstance(code, int) else 500, body=json.dumps(event).encode())
