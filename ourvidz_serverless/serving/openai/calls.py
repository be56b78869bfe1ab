"""The calls of OpenAI's protocol: each makes a payload, and its answer from the job's document.

    POST /v1/chat/completions      the instruct model
    POST /v1/completions           the base model
    POST /v1/images/generations    SDXL

The fields are OpenAI's (https://platform.openai.com/docs/api-reference). A field of our own payload
may stand beside them, and means what it means there. The payload's own checks apply to all values.
What OpenAI has and this worker has not is refused by its name.
"""

from __future__ import annotations

import hashlib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from ourvidz_serverless.document import Asset, Document, Failure
from ourvidz_serverless.job import KEY_PATTERN
from ourvidz_serverless.jobs.chat import ChatJob
from ourvidz_serverless.jobs.sdxl import SdxlConfig, SdxlJob
from ourvidz_serverless.serving.openai import failures
from ourvidz_serverless.serving.openai.failures import ApiError
from ourvidz_serverless.serving.openai.served import Served

#: What other servers take in a call for a text. An answer without it would look like one with it.
EXTENSIONS = (
    *("allowed_token_ids", "bad_words", "cache_salt", "chat_template", "continue_final_message"),
    *("guided_choice", "guided_grammar", "guided_json", "guided_regex"),
    *("ignore_eos", "length_penalty", "min_tokens", "prompt_logprobs", "stop_token_ids"),
    *("structured_outputs", "use_beam_search"),
)

#: What vLLM and SGLang hand to a chat template. Qwen3's has a switch for thoughts, our `thinking`.
TEMPLATE_FIELDS, THINKING = "chat_template_kwargs", "enable_thinking"

#: What only some of OpenAI's models can do, with the values that ask for nothing.
UNSUPPORTED_IN_TEXT: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(EXTENSIONS, ()),
    "n": (1,),
    "logprobs": (False,),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
UNSUPPORTED_IN_CHAT = {
    **UNSUPPORTED_IN_TEXT,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
UNSUPPORTED_IN_COMPLETIONS = {
    **UNSUPPORTED_IN_TEXT,
    "best_of": (1,),
    TEMPLATE_FIELDS: ({},),
    "echo": (False,),
    "suffix": ("",),
}
UNSUPPORTED_IN_IMAGES = {
    "background": ("auto", "opaque"),
    "complexity": (),
    "frame_count": (1,),
    "frame_duration_ms": (),
    # The content floor is the same for all.
    "moderation": ("auto",),
    "partial_images": (0,),
    "stream": (False,),
    "style": (),
    "svg": (),
}

#: What a message may have beside its role and its content, and what a part may have as its type.
UNSUPPORTED_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
ROLES = {"developer": "system"}
NO_ROLES = ("tool", "function")

#: Parts of one message are lines of its text, as vLLM joins them.
BETWEEN_PARTS = "\n"

#: The two names of the most tokens of a reply.
LIMITS = ("max_completion_tokens", "max_tokens")

#: The tokens of a completion that names no number, as OpenAI has it.
COMPLETION_TOKENS = 16

#: The job type of a picture by OpenAI's `quality`.
TYPE_OF_QUALITY = {
    "auto": "sdxl_image_fast",
    "low": "sdxl_image_fast",
    "medium": "sdxl_image_fast",
    "standard": "sdxl_image_fast",
    "high": "sdxl_image_high",
    "hd": "sdxl_image_high",
}

#: Fields that every payload may have, beside those of its job's class.
IN_EVERY_PAYLOAD = {"api_key", "job_id"}

#: Our fields of a chat, under their own names. The calls make the others.
CHAT_FIELDS = IN_EVERY_PAYLOAD | ChatJob.model_fields.keys() - {
    *("config", "max_tokens", "messages", "model", "prompt", "s3_config", "type")
}
IMAGE_FIELDS = IN_EVERY_PAYLOAD | SdxlJob.model_fields.keys() - {"config", "s3_config", "type"}

#: The fields of a picture's `config` that may stand beside `prompt`, and OpenAI's names of fields.
CONFIG_FIELDS = {"steps"} | SdxlConfig.model_fields.keys() - {
    *("inline", "negative_prompt", "quality")
}
CONFIG_NAMES = {"num_images": "n", "resolution": "size", "quality": "output_compression"}


class Call(ABC):
    """One call: `payload` is its job's, and `answer` the body that OpenAI would send."""

    route: ClassVar[str]
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]]

    def __init__(self, body: Mapping[str, Any], served: Served) -> None:
        """Raises ApiError for a body that asks for what this worker does not have."""
        # As in a payload: null means absent.
        self.body = {name: value for name, value in body.items() if value is not None}
        self.created = int(time.time())
        self.model = served.model_for(self.route, self.body.get("model"))
        _refuse_unsupported(self.body, self.unsupported)
        self.payload = self._payload(served)

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.payload.get("stream") is True

    def error(self, failure: Failure) -> ApiError:
        """The failure of the call's job, with the caller's name of the field."""
        return failures.of_failure(failure, self.name_of)

    def error_of(self, document: Document) -> ApiError | None:
        """Why the call has no answer; None if it has one.

        A call with the `id` of a job that runs gets that job's document, which may be of any kind.
        """
        if document.failure:
            return self.error(document.failure)
        if self._fits(document):
            return None
        return ApiError(failures.ID_IN_USE, "id: another job with this id is running", "id")

    def name_of(self, field: str) -> str:
        """The caller's name of a field of the payload."""
        is_user = field == "user_id" and "user_id" not in self.body
        return "user" if is_user else self._name_of(field)

    @abstractmethod
    def answer(self, document: Document) -> dict[str, Any]:
        """The answer, from the document of a job that completed."""

    @abstractmethod
    def _payload(self, served: Served) -> dict[str, Any]: ...

    @abstractmethod
    def _name_of(self, field: str) -> str: ...

    @abstractmethod
    def _fits(self, document: Document) -> bool: ...

    def _own(self, fields: Iterable[str]) -> dict[str, Any]:
        """Our fields that the call has, under their own names, and the user."""
        own = {name: self.body[name] for name in fields if name in self.body}
        user = self.body.get("user", self.body.get("safety_identifier"))
        if user is not None and "user_id" not in own:
            own["user_id"] = _user_id(user)
        return own


class TextCall(Call):
    """A call whose answer is a text, at once or as a stream of chunks."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    #: Whether the first chunk has the role of the reply's author, and no text.
    begins_with_role: ClassVar[bool] = False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts the tokens."""
        return self.body.get("stream_options", {}).get("include_usage") is True

    def answer(self, document: Document) -> dict[str, Any]:
        text, reason = document.reply["response"], document.reply["finish_reason"]
        choice = {**self._choice(text), "index": 0, "logprobs": None, "finish_reason": reason}
        return {**self._head(document.job_id, self.kind, [choice]), "usage": usage_of(document)}

    def chunk(
        self, job_id: str, text: str | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        """One chunk of a stream; `text` is None in the one that has the role."""
        part = self._part(text)
        choice = {**part, "index": 0, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk(job_id, [choice], None)

    def usage_chunk(self, document: Document) -> dict[str, Any]:
        """The chunk that counts the tokens: it has no choice."""
        return self._chunk(document.job_id, [], usage_of(document))

    @abstractmethod
    def _choice(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, text: str | None) -> dict[str, Any]: ...

    def _fits(self, document: Document) -> bool:
        return "response" in document.reply

    def _chunk(self, job_id: str, choices: list[Any], usage: object) -> dict[str, Any]:
        head = self._head(job_id, self.chunk_kind, choices)
        return {**head, "usage": usage} if self.includes_usage else head

    def _head(self, job_id: str, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{job_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _text_payload(self, messages: object) -> dict[str, Any]:
        if "stream_options" in self.body:
            _check_stream_options(self.body)
        payload = {"type": "chat_conversation", "model": self.model, "messages": messages}
        return {**self._own(CHAT_FIELDS), **payload}


class ChatCall(TextCall):
    """`POST /v1/chat/completions`."""

    route = "/v1/chat/completions"
    unsupported = UNSUPPORTED_IN_CHAT
    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    begins_with_role = True

    def _name_of(self, field: str) -> str:
        if field == "thinking" and "thinking" not in self.body:
            return f"{TEMPLATE_FIELDS}.{THINKING}"
        is_limit = field == "max_tokens" and "max_completion_tokens" in self.body
        return re.sub(r"\.(\d+)", r"[\1]", "max_completion_tokens" if is_limit else field)

    def _payload(self, served: Served) -> dict[str, Any]:
        messages = self.body.get("messages")
        if messages is None:
            raise ApiError(failures.MISSING, "messages: Field required", "messages")
        if isinstance(messages, list):
            messages = [_message(each, f"messages[{i}]") for i, each in enumerate(messages)]
        payload = self._text_payload(messages)
        limits = [self.body[name] for name in LIMITS if name in self.body]
        if len(limits) > 1:
            raise _invalid("max_tokens", "Input should not come with max_completion_tokens")
        payload |= _thinking(self.body)
        return {**payload, "max_tokens": limits[0]} if limits else payload

    def _choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str | None) -> dict[str, Any]:
        if text is None:
            return {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return {"delta": {"content": text} if text else {}}


class CompletionCall(TextCall):
    """`POST /v1/completions`: the base model continues a text."""

    route = "/v1/completions"
    unsupported = UNSUPPORTED_IN_COMPLETIONS
    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _name_of(self, field: str) -> str:
        return "prompt" if field.startswith("messages") else field

    def _payload(self, served: Served) -> dict[str, Any]:
        prompt = self.body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if prompt is None:
            raise ApiError(failures.MISSING, "prompt: Field required", "prompt")
        if not isinstance(prompt, str):
            raise _unsupported("prompt", "several texts and lists of tokens are not supported")
        payload = self._text_payload([{"role": "user", "content": prompt}])
        return {**payload, "max_tokens": self.body.get("max_tokens", COMPLETION_TOKENS)}

    def _choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}


class ImageCall(Call):
    """`POST /v1/images/generations`."""

    route = "/v1/images/generations"
    unsupported = UNSUPPORTED_IN_IMAGES

    def _name_of(self, field: str) -> str:
        part, _, name = field.partition(".")
        if part != "config" or not name:
            return field
        name = CONFIG_NAMES.get(name, name)
        return name if name.split(".")[0] in self.body else field

    def answer(self, document: Document) -> dict[str, Any]:
        first = document.assets[0].metadata
        return {
            "created": self.created,
            "data": [self._picture(asset) for asset in document.assets],
            "output_format": first["format"],
            "size": f"{first['width']}x{first['height']}",
            "job_id": document.job_id,
            "metadata": dict(document.metadata),
        }

    def _payload(self, served: Served) -> dict[str, Any]:
        quality = self.body.get("quality", "auto")
        if not isinstance(quality, str) or quality not in TYPE_OF_QUALITY:
            raise _unsupported("quality", f"Input should be one of {', '.join(TYPE_OF_QUALITY)}")
        payload = {**self._own(IMAGE_FIELDS), "type": TYPE_OF_QUALITY[quality]}
        given = self.body.get("config", {})
        if not isinstance(given, Mapping):
            raise _invalid("config", "Input should be an object")
        return {**payload, "config": {**given, **self._config(given, served)}}

    def _config(self, given: Mapping[str, Any], served: Served) -> dict[str, Any]:
        names = {name: name for name in CONFIG_FIELDS - CONFIG_NAMES.keys()} | CONFIG_NAMES
        config = {ours: self.body[theirs] for ours, theirs in names.items() if theirs in self.body}
        if config.get("resolution") == "auto":
            del config["resolution"]
        own_urls = "upload_urls" in {**given, **config}
        wanted = self.body.get("response_format", "url" if own_urls else "b64_json")
        if wanted not in ("b64_json", "url"):
            raise _invalid("response_format", "Input should be b64_json or url")
        if wanted == "url" and not (own_urls or served.has_urls):
            raise _unsupported(
                "response_format",
                "this worker has no URLs of its pictures (ASSET_URL_STYLE=path), use b64_json",
            )
        return {**config, "inline": wanted == "b64_json"}

    @property
    def _is_inline(self) -> bool:
        return self.payload["config"]["inline"] is True

    def _fits(self, document: Document) -> bool:
        return all(
            asset.type == "image" and (asset.url.startswith("data:") or not self._is_inline)
            for asset in document.assets
        )

    def _picture(self, asset: Asset) -> dict[str, Any]:
        data = asset.url.partition(",")[2]
        found = {"b64_json": data} if self._is_inline else {"url": asset.url}
        return {**found, "seed": asset.metadata["seed"]}


#: The calls by route.
CALLS: Mapping[str, type[Call]] = {
    each.route: each for each in (ChatCall, CompletionCall, ImageCall)
}


def usage_of(document: Document) -> dict[str, Any]:
    """The tokens of a reply, as OpenAI counts them."""
    usage = dict(document.reply["usage"])
    cached = usage.pop("prompt_tokens_reused")
    return {**usage, "prompt_tokens_details": {"cached_tokens": cached}}


def _message(message: object, place: str) -> object:
    """Our message of one of OpenAI's. The payload's own checks refuse what is no message."""
    if not isinstance(message, Mapping):
        return message
    given = {name: value for name, value in message.items() if value is not None}
    _refuse_unsupported(given, UNSUPPORTED_IN_MESSAGES, f"{place}.")
    role = given.get("role")
    if role in NO_ROLES:
        raise _unsupported(f"{place}.role", f"messages of the role {role} are not supported")
    if isinstance(role, str):
        given["role"] = ROLES.get(role, role)
    if isinstance(given.get("content"), list):
        parts = enumerate(given["content"])
        texts = [_text_of(part, f"{place}.content[{i}]") for i, part in parts]
        given["content"] = BETWEEN_PARTS.join(texts)
    return given


def _text_of(part: object, place: str) -> str:
    """The text of a part of a message."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise _unsupported(f"{place}.type", "only parts of the type text are supported")
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise _invalid(f"{place}.text", "Input should be a valid string")
    return text


def _check_stream_options(body: Mapping[str, Any]) -> None:
    options = body["stream_options"]
    if not isinstance(options, Mapping):
        raise _invalid("stream_options", "Input should be an object")
    if body.get("stream") is not True:
        raise _invalid("stream_options", "Input is allowed only where stream is true")
    if not isinstance(options.get("include_usage", False), bool | None):
        raise _invalid("stream_options.include_usage", "Input should be a valid boolean")


def _thinking(body: Mapping[str, Any]) -> dict[str, Any]:
    """Our `thinking` from the field of Qwen3's template; nothing if the call does not have it."""
    given = body.get(TEMPLATE_FIELDS, {})
    if not isinstance(given, Mapping):
        raise _invalid(TEMPLATE_FIELDS, "Input should be an object")
    given = {name: value for name, value in given.items() if value is not None}
    others = dict.fromkeys(given.keys() - {THINKING}, ())
    _refuse_unsupported(given, others, f"{TEMPLATE_FIELDS}.")
    if THINKING in given and "thinking" in body:
        raise _invalid(TEMPLATE_FIELDS, "Input should not come with thinking")
    return {"thinking": given[THINKING]} if THINKING in given else {}


def _refuse_unsupported(
    given: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]], prefix: str = ""
) -> None:
    for name in (each for each in unsupported if each in given):
        value = given[name]
        # By type too: True equals 1.
        if not any(type(each) is type(value) and each == value for each in unsupported[name]):
            problem = f"{prefix}{name}: not supported by this worker"
            raise ApiError(failures.UNSUPPORTED_PARAMETER, problem, f"{prefix}{name}")


def _user_id(user: object) -> object:
    """A payload's `user_id` for OpenAI's `user`, which may be any text: an address, for example."""
    if not isinstance(user, str) or re.fullmatch(KEY_PATTERN.strip("^$"), user):
        return user
    return f"user-{hashlib.sha256(user.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _invalid(param: str, problem: str) -> ApiError:
    return ApiError(failures.INVALID_VALUE, f"{param}: {problem}", param)


def _unsupported(param: str, problem: str) -> ApiError:
    return ApiError(failures.UNSUPPORTED_VALUE, f"{param}: {problem}", param)
