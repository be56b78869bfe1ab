"""A model's own chat template, as tokens in which no text can forge a message.

A template (jinja, in the checkpoint) writes a conversation as one text with control tokens in it.
This module lets it write placeholders in place of the messages. What it writes around them is its
own, so only there control tokens count. In the messages they are ordinary letters.

The text is encoded at once, as transformers does, because some tokenizers encode the beginning of
a text in another way than the rest. To tell the two kinds of control tokens apart, the template's
have secret names in a copy of the tokenizer.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.models.chat.request import Message

#: Conversations in which a template takes a message of each role.
WITH_ROLE: Mapping[str, Sequence[str]] = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
}


class ChatTemplate:
    """The template of `pretrained`, a tokenizer of transformers. `control` names its tokens.

    Safe to call from any thread.
    """

    def __init__(self, pretrained: Any, control: Sequence[str]) -> None:
        self._pretrained = pretrained
        self._secret = f"q{secrets.token_hex(16)}q"
        self._names = {name: f"{self._secret}c{i}q" for i, name in enumerate(control)}
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._placeholder = re.compile(rf"{self._secret}m(\d+)q")
        self._stripped = {role: self._strips(role) for role in WITH_ROLE}

    def encode(self, messages: Sequence[Message], thinking: bool = False) -> list[int]:
        """The tokens of a conversation, up to where the reply begins.

        Raises InvalidPrompt if the template refuses the roles of the messages, or leaves one out.
        """
        try:
            text = self.write([role for role, _ in messages], thinking)
        except TemplateError:
            raise InvalidPrompt(
                "messages: the chat template of this model does not take these roles in this order"
            ) from None
        found = [int(each) for each in self._placeholder.findall(text)]
        if sorted(found) != list(range(len(messages))):
            raise InvalidPrompt(
                "messages: the chat template of this model has no place for one of these roles"
            )
        texts = [self._strip(role, text) for role, text in messages]
        return self.encode_text(text, texts)

    def write(self, roles: Sequence[str], thinking: bool = False) -> str:
        """What the template writes for messages of these roles, with placeholders for their texts.

        Raises jinja2's TemplateError.
        """
        return self._write(
            [(role, f"{self._secret}m{i}q") for i, role in enumerate(roles)], thinking
        )

    def encode_text(self, text: str, messages: Sequence[str] = ()) -> list[int]:
        """The tokens of a template's text, in which messages replace their placeholders."""
        named = self._control.sub(lambda found: self._names[found.group()], text)
        whole = self._placeholder.sub(lambda found: messages[int(found[1])], named)
        tokenizer, original = self._renamed
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        return [original.get(token, token) for token in ids]

    def last_placeholder(self, text: str) -> int:
        """Where the last placeholder of a template's text begins; -1 for none."""
        return text.rfind(f"{self._secret}m")

    @property
    def end_of_reply(self) -> str | None:
        """The control token that the template writes after a reply; None for none."""
        try:
            text = self.write(WITH_ROLE["assistant"])
        except TemplateError:
            return None
        rest = text.partition(f"{self._secret}m1q")[2].lstrip()
        end = self._control.match(rest)
        return end.group() if end else None

    @functools.cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        """Made when it is needed: ChatML needs none, and a large vocabulary takes half a second."""
        return _renamed(self._pretrained.backend_tokenizer, self._names)

    def _write(self, messages: Sequence[Message], thinking: bool) -> str:
        text: str = self._pretrained.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        return text

    def _strips(self, role: str) -> tuple[bool, bool]:
        """Whether the template removes white space before and after the texts of a role."""
        messages = [(each, f" {self._secret}m{i}q ") for i, each in enumerate(WITH_ROLE[role])]
        try:
            text = self._write(messages, thinking=False)
        except TemplateError:
            return False, False
        name = messages[WITH_ROLE[role].index(role)][1].strip()
        return f" {name}" not in text, f"{name} " not in text

    def _strip(self, role: str, text: str) -> str:
        before, after = self._stripped[role]
        text = text.lstrip() if before else text
        return text.rstrip() if after else text


def _renamed(backend: Tokenizer, names: Mapping[str, str]) -> tuple[Tokenizer, dict[int, int]]:
    """A copy whose added tokens have other names, and their ids in the original by those there."""
    described = json.loads(backend.to_str())
    described["post_processor"] = None
    original = {}
    for added in described["added_tokens"]:
        if added["content"] in names:
            added.update(content=names[added["content"]], special=True, normalized=False)
        original[added["content"]] = added["id"]
    copy: Tokenizer = Tokenizer.from_str(json.dumps(described))
    # The copy may have numbered its added tokens anew.
    ids = copy.get_added_tokens_decoder()
    return copy, {token: original[added.content] for token, added in ids.items()}
