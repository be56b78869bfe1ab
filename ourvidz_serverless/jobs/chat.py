"""The payloads `chat_enhance`, `chat_conversation` and `chat_unrestricted`, and how they run.

{"id": "job_1", "type": "chat_conversation", "user_id": "user_1",
 "messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}],
 "max_tokens": 512, "temperature": 0.7, "top_p": 0.9, "stream": false}

The older shape is `prompt` and `config.system_prompt`, and means the same two messages. The worker
adds no text to either shape. There is one exception: a call for an enhanced prompt for WAN,
`{"prompt": "...", "config": {"job_type": "video_fast"}}`, gets WAN's system prompt if it has none.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from PIL import Image
from pydantic import AliasChoices, AliasPath, ConfigDict, Field, field_validator, model_validator

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.guard.admission import check_generated
from ourvidz_serverless.job import (
    JSON_NUMBER,
    CheckedText,
    Flag,
    Job,
    JsonObject,
    Role,
    Wire,
    has_adult_label,
)
from ourvidz_serverless.jobs import enhancement, wan
from ourvidz_serverless.models.chat.request import (
    ChatRequest,
    ModelName,
    ReplyStats,
    SamplingParams,
    TextModel,
)
from ourvidz_serverless.output import Text
from ourvidz_serverless.settings import Settings

#: The field of the document that holds the reply, and the tokens of a reply if the job sets none.
REPLY_FIELD = {"chat_enhance": "enhanced_prompt"}
MAX_TOKENS = {"chat_enhance": 200, "chat_conversation": 512, "chat_unrestricted": 512}

#: Seconds between two deltas of a streamed reply. The content floor reads each delta: to read each
#: word of many streams would take all of the worker's time.
STREAM_INTERVAL_S = 0.2

#: Letters before a delta that the content floor reads with it: a sentence or two. It reads the
#: whole reply at the end.
CHECKED_LETTERS = 300

#: A longer run of letters is not a word, and may be split.
LONGEST_WORD = 40
LAST_WORD = re.compile(rf"[^\W_]{{1,{LONGEST_WORD}}}\Z", re.ASCII)

#: Explicit words, which `sfw_mode` removes from a reply.
EXPLICIT = re.compile(
    r"\b(?:nsfw|nud(?:e|es|ity|ist)|naked(?:ness)?|topless|porn\w*|erotic\w*|sex|sexy|sexual\w*|"
    r"orgasm\w*|masturbat\w*|genital\w*|penis(?:es)?|vagina\w*|nipples?|breasts?|fetish\w*)\b",
    re.IGNORECASE,
)
FILTERED = "[filtered]"


def _either(name: str) -> Any:
    """The field's name in the payload, or in the `config` of the older shape."""
    return AliasChoices(name, AliasPath("config", name))


class Message(Wire):
    role: Role
    content: str = Field(max_length=100_000)


class ChatConfig(Wire):
    system_prompt: str | None = Field(None, max_length=100_000)
    #: For `chat_enhance`: the type of the job that gets the prompt.
    job_type: str | None = Field(None, max_length=100)


class ChatMetadata(Wire):
    unrestricted_mode: Flag = False
    nsfw_optimization: Flag = False


MaxTokens = Annotated[int, Field(ge=1, le=2048), JSON_NUMBER]
Temperature = Annotated[float, Field(ge=0, le=2), JSON_NUMBER]
TopP = Annotated[float, Field(gt=0, le=1), JSON_NUMBER]
TopK = Annotated[int, Field(ge=0, le=1000), JSON_NUMBER]
MinP = Annotated[float, Field(ge=0, le=1), JSON_NUMBER]
Penalty = Annotated[float, Field(ge=-2, le=2), JSON_NUMBER]
Repetition = Annotated[float, Field(ge=0.1, le=2), JSON_NUMBER]
Seed = Annotated[int, Field(ge=0, lt=2**63), JSON_NUMBER]

#: What is added to the logits of tokens: by token id, which is a text as all keys of JSON are.
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100), JSON_NUMBER]
LogitBias = Annotated[
    dict[TokenId, Bias],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]

#: A text that ends a reply, and how many of them a job may name.
StopText = Annotated[str, Field(min_length=1, max_length=100)]
StopTexts = Annotated[tuple[StopText, ...], Field(max_length=8)]

#: For the contract: conditions on several fields together.
SCHEMA_WITH_ITS_TYPE: dict[str, Any] = {
    "if": {"required": ["type"], "properties": {"type": {"const": "json_schema"}}},
    "then": {"required": ["json_schema"], "properties": {"json_schema": {"type": "object"}}},
}
# Python's white space, which is more than a browser's `\\s`.
SOME_TEXT: dict[str, Any] = {"type": "string", "pattern": r"[^\s\x1c-\x1f\x85]"}
NO_MESSAGES: dict[str, Any] = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}
SOMETHING_TO_ANSWER: dict[str, Any] = {
    "anyOf": [
        {
            "required": ["prompt"],
            "properties": {"prompt": SOME_TEXT, "messages": NO_MESSAGES},
        },
        {
            "required": ["config"],
            "properties": {
                "messages": NO_MESSAGES,
                "config": {
                    "type": "object",
                    "required": ["system_prompt"],
                    "properties": {"system_prompt": SOME_TEXT},
                },
            },
        },
        {
            "required": ["messages"],
            "properties": {
                "messages": {
                    "type": "array",
                    "contains": {"required": ["content"], "properties": {"content": SOME_TEXT}},
                }
            },
        },
    ]
}


class JsonSchema(Wire):
    schema_: JsonObject = Field(validation_alias="schema")


class ResponseFormat(Wire):
    """What the reply must parse as, in OpenAI's words; the bare `type` is enough."""

    model_config = ConfigDict(json_schema_extra=SCHEMA_WITH_ITS_TYPE)

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_type(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _a_schema_of_bounded_size(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: Field required")
        if len(json.dumps(self.reply_schema)) > 20_000:
            raise ValueError("json_schema: Input should be at most 20000 characters of JSON")
        return self

    @property
    def reply_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the reply must fit; None for any text."""
        if self.json_schema and self.type == "json_schema":
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatJob(Job):
    model_config = ConfigDict(json_schema_extra=SOMETHING_TO_ANSWER)

    type: Literal["chat_enhance", "chat_conversation", "chat_unrestricted"]
    messages: tuple[Message, ...] = Field((), max_length=500)
    prompt: str | None = Field(None, max_length=100_000)
    config: ChatConfig = ChatConfig()
    metadata: ChatMetadata = ChatMetadata()
    content_tier: str | None = None
    content_type: str | None = None
    sfw_mode: Flag = False
    stream: Flag = False
    truncate: Literal["oldest"] | None = None
    thinking: Flag = False

    model: ModelName = Field("qwen_instruct", validation_alias=_either("model"))
    max_tokens: MaxTokens | None = Field(None, validation_alias=_either("max_tokens"))
    temperature: Temperature = Field(0.7, validation_alias=_either("temperature"))
    top_p: TopP = Field(0.9, validation_alias=_either("top_p"))
    top_k: TopK = Field(0, validation_alias=_either("top_k"))
    min_p: MinP = Field(0, validation_alias=_either("min_p"))
    presence_penalty: Penalty = Field(0, validation_alias=_either("presence_penalty"))
    frequency_penalty: Penalty = Field(0, validation_alias=_either("frequency_penalty"))
    repetition_penalty: Repetition = Field(1, validation_alias=_either("repetition_penalty"))
    logit_bias: LogitBias = Field({}, validation_alias=_either("logit_bias"))
    stop: StopTexts = Field((), validation_alias=_either("stop"))
    seed: Seed | None = Field(None, validation_alias=_either("seed"))
    response_format: ResponseFormat = Field(
        ResponseFormat(), validation_alias=_either("response_format")
    )

    @field_validator("stop", mode="before", json_schema_input_type=StopText | StopTexts)
    @classmethod
    def _one_or_many(cls, stop: object) -> object:
        return (stop,) if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _something_to_answer(self) -> ChatJob:
        if not any(message.content.strip() for message in self.conversation):
            raise ValueError("messages: Field required, with some text")
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages of either payload shape.

        `messages` replaces `prompt`. `config.system_prompt` is the first message, unless a message
        is a system prompt already.
        """
        messages = self.messages
        if not messages and self.prompt is not None:
            messages = (Message(role="user", content=self.prompt),)
        system = self.config.system_prompt
        if system is None or any(message.role == "system" for message in messages):
            return messages
        return (Message(role="system", content=system), *messages)

    @property
    def system_prompt(self) -> str | None:
        """The texts of the system prompts, joined; None if there is none."""
        texts = [each.content for each in self.conversation if each.role == "system"]
        return "\n\n".join(texts) if texts else None

    @property
    def is_for_wan(self) -> bool:
        """Whether this is a call for an enhanced prompt for WAN."""
        kind = (self.config.job_type or "").removeprefix("wan_")
        return self.type == "chat_enhance" and kind in get_args(wan.Type)

    @property
    def texts(self) -> list[CheckedText]:
        return [CheckedText(each.content, "messages", each.role) for each in self.conversation]

    @property
    def adult(self) -> bool:
        # Not `nsfw_optimization`: the application sends it with every ordinary conversation.
        return (
            self.type == "chat_unrestricted"
            or self.metadata.unrestricted_mode
            or has_adult_label(self.content_tier, self.content_type)
        )

    @property
    def request(self) -> ChatRequest:
        """The request for the model."""
        sampling = SamplingParams(
            max_tokens=self.max_tokens or MAX_TOKENS[self.type],
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            stop=self.stop,
            seed=self.seed,
        )
        messages = tuple((message.role, message.content) for message in self.conversation)
        schema = self.response_format.reply_schema
        thinking, user = self.thinking, self.user_id
        return ChatRequest(messages, sampling, self.model, self.truncate, schema, thinking, user)

    @property
    def reply_field(self) -> str:
        return REPLY_FIELD.get(self.type, "response")


def parse(payload: Mapping[str, Any], settings: Settings) -> ChatJob:
    """The job of a payload. Raises pydantic's ValidationError."""
    job = ChatJob.model_validate(payload)
    return _with_wan_defaults(job, settings) if job.is_for_wan else job


def _with_wan_defaults(job: ChatJob, settings: Settings) -> ChatJob:
    """The job with the sampling of WAN's enhanced jobs, in the fields that the job does not set."""
    sampling = {
        name: value
        for name, value in asdict(enhancement.SAMPLING).items()
        if name not in job.model_fields_set
    }
    system = job.system_prompt or _enhancement_prompt(settings.wan_enhancement_prompt)
    config = job.config.model_copy(update={"system_prompt": system})
    return job.model_copy(update={**sampling, "config": config})


@functools.cache
def _enhancement_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise WorkerUnavailable("WAN_ENHANCEMENT_PROMPT: the text cannot be read") from None


def choose_model(job: ChatJob, models: Mapping[str, Any]) -> TextModel | None:
    """The chat model; for a call for WAN the enhancer of WAN's own jobs, if there is one."""
    if job.is_for_wan and "wan" in models:
        return models["wan"].enhancer or models.get("chat")
    return models.get("chat")


def prepare(job: ChatJob, model: TextModel, context: JobContext) -> None:
    """Nothing to do: a conversation needs no preparation."""


def run(
    job: ChatJob,
    model: TextModel,
    references: Mapping[str, Image.Image],
    context: JobContext,
) -> Iterator[Text]:
    """The reply, as one text. A job that streams has emitted it before, some words at a time.

    Raises ContentRefused if the content floor refuses the reply, read with its conversation.
    """
    reply = model.generate(job.request, context.check)
    text = _collect(job, reply, context)
    context.reply.update(_reply_fields(job, text, reply.stats))
    context.metadata.update(_metadata(job, reply.stats))
    yield Text(index=0, text=text, metadata={"batch_size": 1, "asset_index": 0})


def _collect(job: ChatJob, pieces: Iterable[str], context: JobContext) -> str:
    """The whole reply, filtered and checked. A streamed delta is checked before it is emitted."""
    text, num_emitted, emitted_at = "", 0, -STREAM_INTERVAL_S
    for words in _join_words(pieces):
        text += EXPLICIT.sub(FILTERED, words) if job.sfw_mode else words
        if job.stream and context.elapsed_s - emitted_at >= STREAM_INTERVAL_S:
            _check_reply(text[_start_of_check(text, num_emitted) :], job, context)
            context.emit({"delta": text[num_emitted:]})
            num_emitted, emitted_at = len(text), context.elapsed_s
    _check_reply(text, job, context)
    if job.stream and num_emitted < len(text):
        context.emit({"delta": text[num_emitted:]})
    return text


def _start_of_check(text: str, num_emitted: int) -> int:
    """The start of the emitted text that is checked with the next delta: the start of a word."""
    start = max(num_emitted - CHECKED_LETTERS, 0)
    if start <= LONGEST_WORD:
        return 0
    blank = text.rfind(" ", start - LONGEST_WORD, start)
    return blank + 1 if blank >= 0 else start


def _check_reply(text: str, job: ChatJob, context: JobContext) -> None:
    check_generated([CheckedText(text, "reply", "assistant")], job, context)


def _join_words(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end at the end of a word, so that no word is split."""
    held = ""
    for piece in pieces:
        held += piece
        complete = LAST_WORD.sub("", held)
        if complete:
            yield complete
        held = held[len(complete) :]
    if held:
        yield held


def _reply_fields(job: ChatJob, text: str, stats: ReplyStats) -> dict[str, Any]:
    return {
        job.reply_field: text,
        "finish_reason": stats.finish_reason,
        "usage": {
            "prompt_tokens": stats.num_prompt,
            "completion_tokens": stats.num_completion,
            "total_tokens": stats.num_prompt + stats.num_completion,
            "prompt_tokens_reused": stats.num_reused,
        },
    }


def _metadata(job: ChatJob, stats: ReplyStats) -> dict[str, Any]:
    pace = stats.tokens_per_second
    metadata = {
        "batch_size": 1,
        "reference_mode": "none",
        "model": job.model,
        "engine": stats.engine,
        "system_prompt_used": job.system_prompt,
        "unrestricted_mode": job.type == "chat_unrestricted" or job.metadata.unrestricted_mode,
        "nsfw_optimization": job.metadata.nsfw_optimization,
        "sfw_mode": job.sfw_mode,
        "time_to_first_token": round(stats.time_to_first_token_s, 4),
        "tokens_per_second": None if pace is None else round(pace, 2),
    }
    if job.type == "chat_enhance":
        metadata["enhancement_source"] = job.model
    if stats.swap_s:
        metadata["model_swap_time"] = round(stats.swap_s, 3)
    if job.thinking or stats.num_thought:
        metadata["thinking_tokens"] = stats.num_thought
    if job.truncate:
        metadata["messages_dropped"] = stats.num_dropped
    return metadata
