"""Weighted prompts: the two ways in which people write them, read into fragments.

    (sharp:1.3)      A1111: the weight inside
    (sharp)1.3       Compel: the weight behind; `+` is 1.1 and `-` 0.9, once for each sign
    sharp++          the same on a single word
    \\(sharp\\)        parentheses that mean themselves

Nested weights multiply. Parentheses without a weight group and say nothing, as in Compel.
Compel's own parser is not used: it reads `(word:1.3)` as text, gives the pooled embedding the
syntax to read, and its time is exponential in the depth of parentheses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Beyond this a weight makes noise of a picture, whatever the word.
MAX_WEIGHT = 3.0
MAX_DEPTH = 16

_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_INSIDE = re.compile(rf":\s*({_NUMBER})\s*\Z")
_BEHIND = re.compile(rf"({_NUMBER})(?![\w.])|(\++|-+)(?![\w+-])")
_TOKEN = re.compile(r"\\[()\\]|[()]|[^\\()]+|\\")
_SIGNED_WORD = re.compile(r"(?<!\S)([^\s,+-][^\s,+]*?)(\++|--+)(?=[\s,.;]|\Z)")


@dataclass(frozen=True, slots=True)
class Fragment:
    """Words that share a weight; 1 is how a model reads them by itself."""

    text: str
    weight: float = 1.0


#: A prompt as a model takes it.
Prompt = tuple[Fragment, ...]


def plain(text: str) -> Prompt:
    """A prompt whose every character means itself."""
    return (Fragment(text),)


def parse(text: str) -> Prompt:
    """A prompt with its weights, in time linear in its length.

    Raises ValueError, in words for the caller, for a weight above 3 or more than 16 levels of
    parentheses.
    """
    stack: list[list[Fragment]] = [[]]
    position = 0
    while match := _TOKEN.match(text, position):
        token, position = match.group(), match.end()
        if token == "(":
            _check_depth(len(stack))
            stack.append([])
        elif token == ")" and len(stack) > 1:
            group, weight, position = _close(stack.pop(), text, position)
            stack[-1] += [Fragment(part.text, round(part.weight * weight, 4)) for part in group]
        else:
            stack[-1] += _words(token[1:] if len(token) > 1 and token[0] == "\\" else token)
    # A parenthesis that nobody closed was only a character.
    while len(stack) > 1:
        unclosed = stack.pop()
        stack[-1] += [Fragment("("), *unclosed]
    return _merged(stack[0])


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"Parentheses should be at most {MAX_DEPTH} deep")


def _close(group: list[Fragment], text: str, position: int) -> tuple[list[Fragment], float, int]:
    """A group at its closing parenthesis: its weight, and where reading goes on."""
    if group and (inside := _INSIDE.search(group[-1].text)):
        last = Fragment(group[-1].text[: inside.start()], group[-1].weight)
        return [*group[:-1], last], float(inside[1]), position
    if behind := _BEHIND.match(text, position):
        number, signs = behind.groups()
        return group, float(number) if number else _signs(signs), behind.end()
    return group, 1.0, position


def _words(text: str) -> list[Fragment]:
    """Text without parentheses, in which single words may carry signs."""
    fragments, position = [], 0
    for match in _SIGNED_WORD.finditer(text):
        fragments += [
            Fragment(text[position : match.start()]),
            Fragment(match[1], _signs(match[2])),
        ]
        position = match.end()
    return [*fragments, Fragment(text[position:])]


def _signs(signs: str) -> float:
    return round((1.1 if signs[0] == "+" else 0.9) ** len(signs), 4)


def _merged(fragments: list[Fragment]) -> Prompt:
    """Neighbours of one weight made one, the empty ones left out; never no fragment at all."""
    merged: list[tuple[list[str], float]] = []
    for fragment in fragments:
        if not fragment.text:
            continue
        if fragment.weight > MAX_WEIGHT:
            raise ValueError(f"Weights should be less than or equal to {MAX_WEIGHT:g}")
        if merged and merged[-1][1] == fragment.weight:
            merged[-1][0].append(fragment.text)
        else:
            merged.append(([fragment.text], fragment.weight))
    return tuple(Fragment("".join(texts), weight) for texts, weight in merged) or plain("")
