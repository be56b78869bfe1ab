"""A reply as OpenAI streams it: server-sent events without names, and `[DONE]` last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ourvidz_serverless.document import Document
from ourvidz_serverless.serving.openai.calls import TextCall
from ourvidz_serverless.serving.openai.failures import ApiError

DONE = "data: [DONE]\n\n"


class Chunks:
    """The events of one streamed reply, as texts."""

    def __init__(self, call: TextCall, job_id: str) -> None:
        self._call, self._job_id = call, job_id
        self._has_begun = not call.begins_with_role

    def piece(self, text: str) -> str:
        """The event of the next piece of the reply."""
        return self._beginning() + _event(self._call.chunk(self._job_id, text))

    def end(self, document: Document) -> str:
        """The events that end the stream: of a failure, its error."""
        if error := self._call.error_of(document):
            return error_events(error)
        reason = document.reply["finish_reason"]
        last = _event(self._call.chunk(self._job_id, "", reason))
        usage = _event(self._call.usage_chunk(document)) if self._call.includes_usage else ""
        return self._beginning() + last + usage + DONE

    def _beginning(self) -> str:
        """The chunk before the first piece of a chat, which has the role."""
        if self._has_begun:
            return ""
        self._has_begun = True
        return _event(self._call.chunk(self._job_id, None))


def error_events(error: ApiError) -> str:
    """A stream that ends with an error. OpenAI's clients raise it."""
    return _event(error.body) + DONE


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
