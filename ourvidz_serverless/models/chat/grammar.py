"""Replies that are valid JSON: the tokens that a schema allows next (llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer

from ourvidz_serverless.errors import InternalError, InvalidPrompt

#: White space between JSON's tokens. Without a bound a small model may write spaces for ever.
SPACE = r"[ \n]{0,8}"

UNSUPPORTED = "response_format: Input should be a JSON schema that is supported"

#: llguidance bounds the time and memory of a schema, and stops if a schema needs more.
TOO_COMPLEX = "response_format: this schema is too complex"


class Grammars:
    """Makes matchers for one tokenizer. The first one takes a second: it builds an index."""

    def __init__(self, tokenizer: Any, num_logits: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._num_logits, self._eos_ids = tokenizer, num_logits, list(eos_ids)

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A matcher at the beginning of a reply. Raises InvalidPrompt if no reply can fit."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": SPACE}
            )
        except ValueError:
            # llguidance's JSON parser is stricter than Python's.
            raise InvalidPrompt(UNSUPPORTED) from None
        matcher = LLMatcher(self._index, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidPrompt(UNSUPPORTED)
        return Matcher(matcher)

    @functools.cached_property
    def _index(self) -> LLTokenizer:
        text = self._tokenizer.to_str()
        return LLTokenizer(text, n_vocab=self._num_logits, eos_token=self._eos_ids)


class Matcher:
    """The position of one reply in its schema."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def forbidden(self, vocabulary: int) -> torch.Tensor:
        """Which of the first `vocabulary` tokens do not fit next, in the host's memory."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return allowed[:vocabulary] == 0

    def accept(self, token: int) -> None:
        """Move on by a token. Raises InvalidPrompt if the schema is too complex to go on."""
        is_accepted = self._matcher.consume_token(token)
        # Checked first: a matcher that has stopped accepts an end-of-reply token.
        if self._matcher.is_error():
            raise InvalidPrompt(TOO_COMPLEX)
        if not is_accepted:
            raise InternalError("a reply left its schema")
