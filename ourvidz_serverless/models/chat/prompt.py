"""From a conversation to the tokens of a prompt that fits the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ourvidz_serverless.errors import PromptTooLong
from ourvidz_serverless.models.chat.request import ChatRequest, Message
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt.

    The first `num_shared` of them, up to the end of the system prompts, are those that other
    requests are likely to begin with. `num_dropped` messages were removed.
    """

    token_ids: list[int]
    num_shared: int
    num_dropped: int


def build_prompt(tokenizer: ChatTokenizer, request: ChatRequest, context: int) -> Prompt:
    """The prompt of a request for a model with a `context` of that many tokens.

    Raises PromptTooLong with the counts if prompt and reply are longer than the context.
    """
    messages = request.messages
    before, encoded, after = _encode(tokenizer, messages, is_plain=request.model == "qwen_base")
    limit = context - request.sampling.max_tokens - len(before) - len(after)
    kept = _kept_messages(request, [len(each) for each in encoded], limit)
    num_system = next(
        (count for count, index in enumerate(kept) if messages[index][0] != "system"), len(kept)
    )
    return Prompt(
        before + [token for index in kept for token in encoded[index]] + after,
        num_shared=len(before) + sum(len(encoded[index]) for index in kept[:num_system]),
        num_dropped=len(encoded) - len(kept),
    )


def _encode(
    tokenizer: ChatTokenizer, messages: Sequence[Message], is_plain: bool
) -> tuple[list[int], list[list[int]], list[int]]:
    """The tokens before the first message, of each message, and after the last message."""
    if not is_plain:
        encoded = [tokenizer.encode_message(role, text) for role, text in messages]
        return tokenizer.chat_prefix, encoded, tokenizer.generation_prompt()
    *earlier, last = (text for _, text in messages)
    texts = [*(f"{text}\n\n" for text in earlier), last]
    return tokenizer.text_prefix, [tokenizer.encode(text) for text in texts], []


def _kept_messages(request: ChatRequest, lengths: Sequence[int], limit: int) -> list[int]:
    """The indices of the messages that stay, so that they have no more than `limit` tokens."""
    roles = [role for role, _ in request.messages]
    kept = list(range(len(roles)))
    droppable = (
        [index for index in kept[:-1] if roles[index] != "system"] if request.truncate else []
    )
    total = sum(lengths)
    while total > limit and droppable:
        oldest = [droppable.pop(0)]
        # A conversation does not begin with a reply: replies go with the message before them.
        while droppable and roles[droppable[0]] == "assistant":
            oldest.append(droppable.pop(0))
        kept = [index for index in kept if index not in oldest]
        total -= sum(lengths[index] for index in oldest)
    if total > limit:
        raise PromptTooLong(
            f"messages: {total} tokens, where the context has room for {max(limit, 0)} "
            "beside max_tokens"
        )
    return kept
