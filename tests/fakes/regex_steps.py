"""Counts the steps that a backtracking engine takes to match a regular expression.

Python's own engine does not report its steps, and a time depends on the machine. This engine
walks the same parsed pattern in the same order and counts every node that it tries.
"""

from __future__ import annotations

import re
import re._constants as op
import re._parser as parser
import sys
from collections.abc import Callable, Iterator
from typing import Any

Then = Callable[[int], bool]


class CountedPattern:
    """A pattern that counts its steps. Its results are those of Python's own engine."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._real, self.pattern, self.steps = pattern, pattern.pattern, 0
        self._nodes = list(parser.parse(pattern.pattern, pattern.flags))

    def match(self, text: str, start: int = 0) -> re.Match[str] | None:
        found = self._real.match(text, start)
        assert bool(found) is self._tried(text, start)
        return found

    def search(self, text: str, start: int = 0, end: int = sys.maxsize) -> re.Match[str] | None:
        found, text = self._real.search(text, start, end), text[:end]
        for each in range(start, found.start() + 1 if found else len(text) + 1):
            self._tried(text, each)
        return found

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        position = 0
        while position <= len(text) and (found := self.search(text, position)):
            yield found
            position = max(found.end(), position + 1)

    def sub(self, replacement: str, text: str) -> str:
        for _ in self.finditer(text):
            pass
        return self._real.sub(replacement, text)

    def _tried(self, text: str, start: int) -> bool:
        self._text = text
        return self._all(self._nodes, start, lambda end: True)

    def _all(self, nodes: list[Any], at: int, then: Then) -> bool:
        if not nodes:
            return then(at)
        (kind, given), rest = nodes[0], nodes[1:]
        return self._one(kind, given, at, lambda end: self._all(rest, end, then))

    def _one(self, kind: Any, given: Any, at: int, then: Then) -> bool:
        self.steps += 1
        if kind in (op.LITERAL, op.NOT_LITERAL, op.IN, op.ANY):
            return at < len(self._text) and _fits(kind, given, self._text[at]) and then(at + 1)
        if kind is op.BRANCH:
            return any(self._all(list(each), at, then) for each in given[1])
        if kind is op.SUBPATTERN:
            return self._all(list(given[3]), at, then)
        if kind is op.ATOMIC_GROUP:
            end = self._end(list(given), at)
            return end is not None and then(end)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            ahead, nodes = given
            # The patterns under test look at most one character behind.
            start = at if ahead > 0 else at - 1
            holds = start >= 0 and self._end(list(nodes), start) is not None
            return holds is (kind is op.ASSERT) and then(at)
        if kind is op.AT:
            return at == len(self._text) and then(at)
        assert kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT), kind
        return self._repeat(kind, given, at, then)

    def _repeat(self, kind: Any, given: Any, at: int, then: Then) -> bool:
        least, most, nodes = given
        ends = [at]
        if kind is op.MIN_REPEAT:
            while len(ends) <= least or not then(ends[-1]):
                end = self._end(list(nodes), ends[-1]) if len(ends) <= most else None
                if end is None:
                    return False
                ends.append(end)
            return True
        while len(ends) <= most:
            end = self._end(list(nodes), ends[-1])
            if end is None or end == ends[-1]:
                break
            ends.append(end)
        tried = ends[least:][::-1]
        return any(then(end) for end in (tried[:1] if kind is op.POSSESSIVE_REPEAT else tried))

    def _end(self, nodes: list[Any], at: int) -> int | None:
        ends: list[int] = []
        found = self._all(nodes, at, lambda end: not ends.append(end))  # type: ignore[func-returns-value]
        return ends[-1] if found else None


def _fits(kind: Any, given: Any, character: str) -> bool:
    if kind is op.LITERAL:
        return ord(character) == given
    if kind is op.NOT_LITERAL:
        return ord(character) != given
    if kind is op.ANY:
        return True
    negated = given[0][0] is op.NEGATE
    return negated is not any(_is_in(*each, character) for each in given[negated:])


def _is_in(kind: Any, given: Any, character: str) -> bool:
    if kind is op.RANGE:
        return given[0] <= ord(character) <= given[1]
    if kind is op.CATEGORY:
        classes = {
            op.CATEGORY_SPACE: r"\s",
            op.CATEGORY_NOT_SPACE: r"\S",
            op.CATEGORY_DIGIT: r"\d",
            op.CATEGORY_WORD: r"\w",
        }
        return re.match(classes[given], character) is not None
    return ord(character) == given
