"""JSON that parses: which tokens a reply may go on with so that it fits a schema (llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer

from ourvidz_serverless.errors import InternalError, InvalidPrompt
from ourvidz_serverless.models.memory.device import to_device_async

#: Between JSON's tokens. Without a bound a small model can go on with spaces for ever.
SPACE = r"[ \n]{0,8}"

UNSUPPORTED = "response_format: Input should be a JSON schema that is supported"

#: llguidance bounds what a schema may take of time and memory, and stops where one takes more.
TOO_COMPLEX = "response_format: this schema is too complex"


class Grammars:
    """Makes matchers for one tokenizer. Its own index takes a second, at the first request."""

    def __init__(self, tokenizer: Any, num_logits: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._num_logits, self._ends = tokenizer, num_logits, list(ends)

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A matcher at the beginning of a reply; raises InvalidPrompt where no reply can fit."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": SPACE}
            )
        except ValueError:
            # Its parser of JSON is stricter than Python's.
            raise InvalidPrompt(UNSUPPORTED) from None
        matcher = LLMatcher(self._index, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidPrompt(UNSUPPORTED)
        return Matcher(matcher)

    @functools.cached_property
    def _index(self) -> LLTokenizer:
        text = self._tokenizer.to_str()
        return LLTokenizer(text, n_vocab=self._num_logits, eos_token=self._ends)


class Matcher:
    """Where one reply stands in its schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def forbid(self, logits: torch.Tensor) -> None:
        """Make impossible, in one row of logits, what would not fit."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        logits.masked_fill_(to_device_async(allowed[: len(logits)] == 0, logits.device), -torch.inf)

    def note(self, token: int) -> None:
        """Go on by a token; raises InvalidPrompt where the schema was too much for its matcher."""
        is_taken = self._matcher.consume_token(token)
        # A matcher that has stopped takes the end of a reply, and nothing else.
        if self._matcher.is_error():
            raise InvalidPrompt(TOO_COMPLEX)
        if not is_taken:
            raise InternalError("a reply left its schema")
