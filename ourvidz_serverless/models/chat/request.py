"""What a chat model is asked for, and what it returns. Jobs import this, so it imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ourvidz_serverless.models.memory.types import Check

#: A message of a conversation: its role and its text.
Message = tuple[str, str]

ModelName = Literal["qwen_instruct", "qwen_base"]
FinishReason = Literal["stop", "length"]
EngineName = Literal["builtin", "openai"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a reply are chosen, and where the reply ends."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # a share of the likeliest token's probability
    presence_penalty: float = 0.0  # counts the tokens of the reply
    frequency_penalty: float = 0.0  # counts the tokens of the reply
    repetition_penalty: float = 1.0  # counts the tokens of prompt and reply
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    stop: tuple[str, ...] = ()  # end the reply, and are not part of it
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        neutral = (0.0, 0.0, 1.0)
        return neutral != (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)

    @property
    def changes_logits(self) -> bool:
        return self.has_penalties or bool(self.logit_bias)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation, and how one model answers it.

    The instruct model reads the conversation in its chat format, the base model only the texts.
    `truncate` lets the oldest messages go if the conversation is longer than the model's context.
    With a JSON `schema` the reply is JSON that fits the schema. With `thinking` the model thinks
    before it replies, if it can; its thoughts are no part of the reply. `user` is who asks: with
    `CHAT_CACHE_SALT=user` users share nothing in the cache.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    model: ModelName = "qwen_instruct"
    truncate: Literal["oldest"] | None = None
    schema: Mapping[str, Any] | None = None
    thinking: bool = False
    user: str = ""


@dataclass(frozen=True, slots=True)
class ReplyStats:
    """Facts about a reply: tokens, seconds, and tokens a second."""

    num_prompt: int
    num_completion: int
    num_reused: int  # tokens of the prompt that the prefix cache held
    num_dropped: int  # messages that `truncate` removed
    finish_reason: FinishReason | None  # None until the reply has ended
    time_to_first_token_s: float
    tokens_per_second: float | None  # after the first token; None if there was no second one
    swap_s: float  # the time it took to bring the model to the device
    engine: EngineName = "builtin"  # which of `CHAT_ENGINE` wrote the reply
    num_thought: int = 0  # tokens of the completion that are thoughts


class ChatReply(Protocol):
    """A reply that grows while a job iterates over its pieces of text, once.

    To stop the iteration is to cancel the reply.
    """

    def __iter__(self) -> Iterator[str]: ...

    @property
    def stats(self) -> ReplyStats:
        """Facts that are complete after the last piece."""


class TextModel(Protocol):
    """The chat models of a worker, as jobs call them."""

    def generate(self, request: ChatRequest, check: Check) -> ChatReply:
        """Begin a reply. What `check` raises, at any token, ends the reply and the iteration.

        Raises here, or when the iteration begins: PromptTooLong if the conversation and
        `max_tokens` are longer than the context, InvalidPrompt for what the engine does not have,
        or if no reply can fit the schema; WorkerUnavailable if the worker does not have the model.
        """
