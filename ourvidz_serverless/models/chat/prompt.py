"""From a conversation to the tokens of a prompt that fits the context."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ourvidz_serverless.errors import PromptTooLong
from ourvidz_serverless.models.chat import truncation
from ourvidz_serverless.models.chat.request import ChatRequest
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt. `num_dropped` messages were removed."""

    token_ids: list[int]
    num_dropped: int


def build_prompt(tokenizer: ChatTokenizer, request: ChatRequest, context: int) -> Prompt:
    """The prompt of a request for a model with a `context` of that many tokens.

    Raises PromptTooLong with the counts if prompt and reply are longer than the context.
    """
    if tokenizer.own_template and request.model != "qwen_base":
        return _build_own_prompt(tokenizer, request, context)
    before, encoded, after = _encode(tokenizer, request)
    limit = context - request.sampling.max_tokens - len(before) - len(after)
    kept = _kept_messages(request, [len(each) for each in encoded], limit)
    return Prompt(
        before + [token for index in kept for token in encoded[index]] + after,
        num_dropped=len(encoded) - len(kept),
    )


def _encode(
    tokenizer: ChatTokenizer, request: ChatRequest
) -> tuple[list[int], list[list[int]], list[int]]:
    """The tokens before the first message, of each message, and after the last message."""
    if request.model != "qwen_base":
        encoded = [tokenizer.encode_message(role, text) for role, text in request.messages]
        return tokenizer.chat_prefix, encoded, tokenizer.generation_prompt(request.thinking)
    *earlier, last = (text for _, text in request.messages)
    texts = [*(f"{text}\n\n" for text in earlier), last]
    return tokenizer.text_prefix, [tokenizer.encode(text) for text in texts], []


def _build_own_prompt(tokenizer: ChatTokenizer, request: ChatRequest, context: int) -> Prompt:
    """The prompt as the model's own template writes it, of as many messages as fit."""
    messages = request.messages
    limit = context - request.sampling.max_tokens

    @functools.cache
    def encoded(kept: tuple[int, ...]) -> list[int]:
        rest = [messages[index] for index in kept]
        return tokenizer.encode_conversation(rest, request.thinking)

    # Each choice has fewer messages than the one before it, and the last one the fewest.
    choices = _choices(request)
    fits = bisect.bisect_left(choices, True, key=lambda kept: len(encoded(kept)) <= limit)
    ids = encoded(choices[min(fits, len(choices) - 1)])
    if len(ids) > limit:
        raise _too_long(len(ids), limit)
    return Prompt(ids, num_dropped=len(messages) - len(choices[fits]))


def _kept_messages(request: ChatRequest, lengths: Sequence[int], limit: int) -> tuple[int, ...]:
    """The indices of the messages that stay, so that they have no more than `limit` tokens."""
    for kept in _choices(request):
        total = sum(lengths[index] for index in kept)
        if total <= limit:
            return kept
    raise _too_long(total, limit)


def _choices(request: ChatRequest) -> list[tuple[int, ...]]:
    """The indices of the messages that may stay together: all of them, and each time fewer."""
    groups = truncation.droppable(request.messages) if request.truncate else []
    counts = range(len(groups) + 1)
    return [tuple(truncation.kept(len(request.messages), groups[:count])) for count in counts]


def _too_long(total: int, limit: int) -> PromptTooLong:
    return PromptTooLong(
        f"messages: {total} tokens, where the context has room for {max(limit, 0)} "
        "beside max_tokens"
    )
