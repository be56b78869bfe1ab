"""Messages as tokens: in ChatML, or as the model's own chat template writes them.

A conversation in ChatML is written by this module, not by the tokenizer's own template: such
templates add words of their own to a conversation without a system prompt. Control tokens in a
message become ordinary letters. So no message can end itself and begin a message of another role.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from tokenizers import Tokenizer

from ourvidz_serverless.models.chat.request import Message
from ourvidz_serverless.models.chat.template import ChatTemplate

START, END = "<|im_start|>", "<|im_end|>"
OTHER_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")

#: The control tokens around a model's thoughts: those of Qwen3, DeepSeek-R1, SmolLM3 and others.
THINK, END_THINK = "<think>", "</think>"


class Thoughts(NamedTuple):
    """The tokens around a model's thoughts, and whether a reply begins after the first of them."""

    begin: int
    end: int
    is_open: bool = False


class ChatTokenizer:
    """The tokenizer of one model, made of `pretrained`, the one of transformers.

    Safe to call from any thread: it uses the Rust tokenizer inside `pretrained`, because encoding
    with `pretrained` itself changes its state. Raises ValueError for a tokenizer that has neither
    ChatML nor a chat template, unless the model only continues texts (`is_plain`).
    """

    def __init__(self, pretrained: Any, is_plain: bool = False) -> None:
        #: The Rust tokenizer, unchanged.
        self.backend: Tokenizer = pretrained.backend_tokenizer
        #: The tokens before a plain text: begin-of-text, or none.
        self.text_prefix = _text_prefix(pretrained)
        self._text_tokenizer = _without_control(self.backend, pretrained.all_special_tokens)
        control = _control_tokens(self.backend, pretrained.all_special_tokens)
        self._check_control(control)
        template = ChatTemplate(pretrained, control) if pretrained.chat_template else None
        has_chatml = None not in map(self.backend.token_to_id, (START, END))
        if not (has_chatml or template or is_plain):
            raise ValueError(f"its tokenizer has neither {START} and {END} nor a chat template")
        is_own = template is not None and not (has_chatml and _writes_chatml(template))
        #: The model's own template; None for ChatML.
        self.own_template = template if is_own and not is_plain else None
        self._end_of_reply = self.own_template and self.own_template.end_of_reply
        if self.own_template:
            # Not by the first request.
            self.own_template.encode_text("")
        self._own_eos: int | None = pretrained.eos_token_id
        self._begin_reply = _begin_reply(template)
        if has_chatml:
            self._start, self._end = map(self.backend.token_to_id, (START, END))
            #: The tokens before a conversation in ChatML: begin-of-text, or none.
            self.chat_prefix = _chat_prefix(pretrained, self._start, self.text_prefix)

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a reply."""
        names = [END, *OTHER_ENDS, self._end_of_reply or END]
        known = [*map(self.backend.token_to_id, names), self._own_eos]
        return list(dict.fromkeys(token for token in known if token is not None))

    @property
    def thinks(self) -> Literal["never", "optional", "always"]:
        """Whether the model thinks before it replies, as its template says."""
        if self.thoughts(False) is None:
            return "never"
        off, on = (self._begin_reply[flag] for flag in (False, True))
        is_open = _is_open(off)
        return "always" if is_open else "never" if on == off else "optional"

    def thoughts(self, thinking: bool) -> Thoughts | None:
        """The tokens around the thoughts of a reply; None if the tokenizer has no such tokens."""
        begin, end = map(self.backend.token_to_id, (THINK, END_THINK))
        if begin is None or end is None:
            return None
        return Thoughts(begin, end, _is_open(self._begin_reply[thinking]))

    def encode_message(self, role: str, text: str) -> list[int]:
        """The tokens of one message of a conversation in ChatML."""
        return [self._start, *self.encode(f"{role}\n{text}"), self._end, *self.encode("\n")]

    def generation_prompt(self, thinking: bool = False) -> list[int]:
        """The tokens after the last message in ChatML, after which a model writes its reply."""
        return [self._start, *self.encode("assistant\n"), *self._begin_reply[thinking].ids]

    def encode_conversation(self, messages: Sequence[Message], thinking: bool) -> list[int]:
        """The whole prompt of a model with a template of its own. Raises as `ChatTemplate`."""
        assert self.own_template
        return self.own_template.encode(messages, thinking)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Control tokens in it are encoded as ordinary letters."""
        ids: list[int] = self._text_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    def _check_control(self, control: Sequence[str]) -> None:
        for name in control:
            if self.backend.token_to_id(name) in self.encode(name):
                raise ValueError(f"its tokenizer takes {name} in a message for a control token")


class _BeginReply(NamedTuple):
    """What a template writes before a reply about thoughts, as text and as tokens."""

    text: str = ""
    ids: tuple[int, ...] = ()


def _begin_reply(template: ChatTemplate | None) -> dict[bool, _BeginReply]:
    """What the template writes about thoughts before a reply, by whether the model thinks."""
    if template is None:
        return {False: _BeginReply(), True: _BeginReply()}
    return {thinking: _begin_reply_of(template, thinking) for thinking in (False, True)}


def _begin_reply_of(template: ChatTemplate, thinking: bool) -> _BeginReply:
    try:
        text = template.write(["user"], thinking)
    except TemplateError:
        return _BeginReply()
    found = text.rfind(THINK)
    # An example in a system prompt stands before the message, and begins no reply.
    if found < 0 or found < text.rfind(START) or found < template.last_placeholder(text):
        return _BeginReply()
    return _BeginReply(text[found:], tuple(template.encode_text(text[found:])))


def _is_open(begin: _BeginReply) -> bool:
    return THINK in begin.text and END_THINK not in begin.text


def _writes_chatml(template: ChatTemplate) -> bool:
    try:
        return START in template.write(["user"])
    except TemplateError:
        return True


def _text_prefix(pretrained: Any) -> list[int]:
    """The tokens that the tokenizer itself adds before a text, such as Llama's begin-of-text."""
    text: list[int] = pretrained.encode("a", add_special_tokens=False)
    encoded: list[int] = pretrained.encode("a")
    starts = range(len(encoded) - len(text) + 1)
    return encoded[: next((at for at in starts if encoded[at : at + len(text)] == text), 0)]


def _chat_prefix(pretrained: Any, start: int, text_prefix: list[int]) -> list[int]:
    """The tokens that the model's own template adds before the first message."""
    if not pretrained.chat_template:
        return text_prefix
    conversation = [{"role": "user", "content": "a"}]
    try:
        ids: list[int] = pretrained.apply_chat_template(conversation, return_dict=False)
    except TemplateError:
        # The template refuses such a conversation.
        return text_prefix
    return ids[: ids.index(start)] if start in ids else text_prefix


def _control_tokens(backend: Tokenizer, names: Container[str]) -> list[str]:
    """The names of added tokens that are control tokens, also of those not marked as special."""
    return [
        added.content
        for added in backend.get_added_tokens_decoder().values()
        if added.special or added.content in names or _is_control(added.content)
    ]


def _without_control(backend: Tokenizer, names: Container[str]) -> Tokenizer:
    """A copy that encodes control tokens as letters, also those not marked as special."""
    described = json.loads(backend.to_str())
    for added in described["added_tokens"]:
        content = added["content"]
        added["special"] = added["special"] or content in names or _is_control(content)
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_control(content: str) -> bool:
    """Whether an added token looks like `<tool_call>` or `[INST]`, not like a word or blanks."""
    visible = content.strip()
    return bool(visible) and not visible[0].isalnum() and not visible[-1].isalnum()
