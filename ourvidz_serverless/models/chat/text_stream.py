"""From tokens to text: complete characters only, no thoughts, and no letter of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ourvidz_serverless.models.chat.tokenizer import Thoughts

#: The decoding of an incomplete character.
REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one reply while it grows. All that `push` and `finish` return is the reply.

    A reply that begins with the token before thoughts, or inside them, has no text until the token
    after them, and no white space behind that. A stop string does not count there.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), thoughts: Thoughts | None = None
    ) -> None:
        self._decode = decode
        self._thoughts = thoughts
        self._is_thinking = thoughts is not None and thoughts.is_open
        self._is_blank = False
        #: The tokens of the thoughts, with those around them.
        self.num_thought = 0
        self._stop = stop
        self._ids: list[int] = []
        # The text of the tokens before `_num_decoded` was returned or is held. Tokens from
        # `_context` on are decoded again with each new one: how a token is written depends on the
        # token before it.
        self._context = self._num_decoded = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token, often none. May set `is_stopped`."""
        if self._is_thought(token):
            return ""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT):
            return ""
        self._context, self._num_decoded = self._num_decoded, len(self._ids)
        return self._before_stop(text)

    def finish(self) -> str:
        """The text that `push` held back, at the end of the reply.

        An incomplete last character is U+FFFD, as in transformers' own decoding. `push` also held
        back a real U+FFFD, which looks the same.
        """
        if self.is_stopped:
            return ""
        text = self._before_stop(self._new_text())
        held, self._held = self._held, ""
        return text + ("" if self.is_stopped else held)

    def _is_thought(self, token: int) -> bool:
        """Count a token if it belongs to the thoughts."""
        if self._thoughts is None:
            return False
        if token == self._thoughts.begin and not self._ids and not self.num_thought:
            self._is_thinking = True
        is_thought = self._is_thinking
        if is_thought:
            self.num_thought += 1
            if token == self._thoughts.end:
                self._is_thinking, self._is_blank = False, True
        return is_thought

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._num_decoded])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _before_stop(self, text: str) -> str:
        if self._is_blank:
            text = text.lstrip()
            self._is_blank = not text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        self.is_stopped = bool(found)
        certain = min(found) if found else len(self._held) - self._num_uncertain()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def _num_uncertain(self) -> int:
        """The number of last letters that may be the beginning of a stop string."""
        lengths = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if self._held.endswith(stop[:length])
        ]
        return max(lengths, default=0)
