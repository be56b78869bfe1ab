"""Conversations as tokens, in ChatML.

The conversation is written here, not by a tokenizer's template: templates put words of their own
before a conversation without a system prompt. Each message is encoded by itself, and control tokens
in it are mere letters, so that no message can end its turn and speak as somebody else.
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
    """One model's tokenizer; `pretrained` is transformers'. Safe to call from any thread.

    It works with the library's own tokenizer under transformers': to encode through that one
    changes its state. Raises ValueError in words for a tokenizer that has no ChatML.
    """

    def __init__(self, pretrained: Any) -> None:
        #: As the checkpoint has it.
        self.own: Tokenizer = pretrained.backend_tokenizer
        if None in map(self.own.token_to_id, (START, END)):
            raise ValueError(f"its tokenizer has no {START} and {END}")
        self._start, self._end = map(self.own.token_to_id, (START, END))
        #: What stands before a text, and before a conversation: begin-of-text, if anything.
        self.text_lead = _text_lead(pretrained)
        self.chat_lead = _chat_lead(pretrained, self._start, self.text_lead)
        self._without_control = _without_control(self.own, pretrained.all_special_tokens)
        for name in (START, END, *OTHER_ENDS):
            if self.own.token_to_id(name) in self.encode(name):
                raise ValueError(f"its tokenizer takes {name} in a message for a control token")

    @property
    def ends(self) -> list[int]:
        """The tokens that end a reply."""
        known = [self.own.token_to_id(name) for name in (END, *OTHER_ENDS)]
        return [token for token in known if token is not None]

    def turn(self, role: str, text: str) -> list[int]:
        """The tokens of one message of a conversation."""
        return [self._start, *self.encode(f"{role}\n{text}"), self._end, *self.encode("\n")]

    def answer(self) -> list[int]:
        """The tokens after which an instruct model answers."""
        return [self._start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, in which control tokens are mere letters."""
        ids: list[int] = self._without_control.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.own.decode(ids, skip_special_tokens=True)
        return text


def _text_lead(pretrained: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text, as Llama's does."""
    text: list[int] = pretrained.encode("a", add_special_tokens=False)
    whole: list[int] = pretrained.encode("a")
    before = range(len(whole) - len(text) + 1)
    return whole[: next((at for at in before if whole[at : at + len(text)] == text), 0)]


def _chat_lead(pretrained: Any, start: int, text_lead: list[int]) -> list[int]:
    """The tokens that the model's own template puts before the first turn of a conversation."""
    if not pretrained.chat_template:
        return text_lead
    conversation = [{"role": "user", "content": "a"}]
    try:
        ids: list[int] = pretrained.apply_chat_template(conversation, return_dict=False)
    except TemplateError:
        # It is for conversations of another kind.
        return text_lead
    return ids[: ids.index(start)] if start in ids else text_lead


def _without_control(own: Tokenizer, names: Container[str]) -> Tokenizer:
    """The tokenizer without control tokens, also where a checkpoint calls them ordinary ones."""
    described = json.loads(own.to_str())
    for added in described["added_tokens"]:
        content = added["content"]
        added["special"] = added["special"] or content in names or _is_control(content)
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_control(content: str) -> bool:
    """Whether an added token is like `<tool_call>` or `[INST]`, and no word and no blanks."""
    visible = content.strip()
    return bool(visible) and not visible[0].isalnum() and not visible[-1].isalnum()
