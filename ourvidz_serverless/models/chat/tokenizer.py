"""Messages as tokens, in ChatML.

This module writes the conversation, not the tokenizer's own template: templates add words of their
own to a conversation without a system prompt. Each message is encoded alone, and control tokens in
its text become ordinary letters. So no message can end itself and begin a message of another role.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
OTHER_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")


class ChatTokenizer:
    """The tokenizer of one model, made of `pretrained`, the one of transformers.

    Safe to call from any thread: it uses the Rust tokenizer inside `pretrained`, because encoding
    with `pretrained` itself changes its state. Raises ValueError for a tokenizer without ChatML.
    """

    def __init__(self, pretrained: Any) -> None:
        #: The Rust tokenizer, unchanged.
        self.backend: Tokenizer = pretrained.backend_tokenizer
        if None in map(self.backend.token_to_id, (START, END)):
            raise ValueError(f"its tokenizer has no {START} and {END}")
        self._start, self._end = map(self.backend.token_to_id, (START, END))
        #: The tokens before a plain text and before a conversation: begin-of-text, or none.
        self.text_prefix = _text_prefix(pretrained)
        self.chat_prefix = _chat_prefix(pretrained, self._start, self.text_prefix)
        self._text_tokenizer = _without_control(self.backend, pretrained.all_special_tokens)
        for name in (START, END, *OTHER_ENDS):
            if self.backend.token_to_id(name) in self.encode(name):
                raise ValueError(f"its tokenizer takes {name} in a message for a control token")

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a reply."""
        known = [self.backend.token_to_id(name) for name in (END, *OTHER_ENDS)]
        return [token for token in known if token is not None]

    def encode_message(self, role: str, text: str) -> list[int]:
        """The tokens of one message of a conversation."""
        return [self._start, *self.encode(f"{role}\n{text}"), self._end, *self.encode("\n")]

    def generation_prompt(self) -> list[int]:
        """The tokens after the last message, after which an instruct model writes its reply."""
        return [self._start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Control tokens in it are encoded as ordinary letters."""
        ids: list[int] = self._text_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text


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
