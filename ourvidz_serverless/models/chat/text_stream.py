"""Tokens in, text out: no character before it is whole, and never a letter of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: What an incomplete character decodes to.
BROKEN = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """One reply's text as it grows; what `push` and `finish` return adds up to the reply."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        # Tokens before `_told` are out; those from `_context` on are decoded again with each new
        # one, since how a token is written depends on the one before it.
        self._context = self._told = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain since this token, often none; `is_stopped` may turn true."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(BROKEN):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return self._before_stop(text)

    def finish(self) -> str:
        """What was held back for a stop string that did not come, or for the rest of a character.

        A character without its rest is U+FFFD, as in transformers' own decoding. A reply may end
        with a real one too, which looks the same.
        """
        if self.is_stopped:
            return ""
        text = self._before_stop(self._new_text())
        held, self._held = self._held, ""
        return text + ("" if self.is_stopped else held)

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._told])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _before_stop(self, text: str) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        self.is_stopped = bool(found)
        sure = min(found) if found else len(self._held) - self._doubtful()
        text, self._held = self._held[:sure], self._held[sure:]
        return text

    def _doubtful(self) -> int:
        """How many of the last letters may be the beginning of a stop string."""
        lengths = [
            length
            for stop in self._stop
            for length in range(1, len(stop))
            if self._held.endswith(stop[:length])
        ]
        return max(lengths, default=0)
