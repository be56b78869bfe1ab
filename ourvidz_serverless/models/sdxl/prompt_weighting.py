r"""Weighted prompts: a text becomes fragments, each with its weight.

Brackets have A1111's meaning. A weight directly after a group, a quotation or a word has Compel's
meaning.

    prompt    = { group | quotation | word | separator }
    group     = "(" prompt ")"               1.1; also if it is never closed
              | "(" prompt ":" number ")"    A1111: the number
              | "(" prompt ")" behind        Compel: the weight behind it
              | "[" prompt "]"               1 / 1.1
    quotation = '"' prompt '"' behind        Compel; without a weight the quotes are text
    word      = characters [ signs | ".attend(" value ")" ]
    behind    = value | ".attend(" value ")"
    value     = number | signs
    signs     = "+" { "+" } | "-" { "-" }    1.1 or 0.9, once for each sign
    separator = whitespace | "," | ";"

Nested weights multiply. A backslash makes `( ) [ ] \ " + - . , : =` text. A whole number after
another and a colon is a time or a ratio, not a weight: `(at 10:30)`, `(in 16:9)`. After a word that
ends in a digit it is a weight, `(score_9:1)`, unless it is greater than any weight. Everything
else of the two languages is text: `[a:b:0.5]` and `BREAK` of A1111, `.blend()`, `.and()` and
`.swap()` of Compel.

Reading takes time linear in the text's length: every character is matched a bounded number of
times, and no pattern backtracks.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

#: A larger weight turns an image into noise, whatever the word.
MAX_WEIGHT = 3.0
MAX_DEPTH = 16

#: The most in one text. Each fragment with a weight below 1 is one more row for the text encoders.
MAX_WEIGHTED = 256

#: The most digits of the number before a colon, in a time or a ratio.
MAX_DIGITS = 4

#: The weight of a bracket without a number.
_BRACKETS = {"(": 1.1, "[": 1 / 1.1}
_OPENED_BY = {")": "(", "]": "["}

_NUMBER = r"(?:[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)"
_SIGNS = r"(?:\+++|-++)"
_ESCAPED = re.compile(r'\\([()\[\]\\"+\-.,:=])')
_ARGUMENT = re.compile(rf"\(\s*+({_SIGNS}|{_NUMBER})\s*+\)")
# At the end of the searched text. The digits at the end of a longer number do not match.
_WHOLE_NUMBER = re.compile(r"(?<![^\s()\[\],;:])[0-9]+\Z")
_BEHIND = re.compile(
    rf"\.attend{_ARGUMENT.pattern}"
    rf"|({_SIGNS})(?![\w+-])"
    rf"|({_NUMBER})(?!\w|\.[0-9])"
)
_TOKEN = re.compile(
    r"""
      :\s*+ (?P<inside> [+-]?+ (?: [0-9]++ \.?+ [0-9]*+ | \.[0-9]++ ) ) \s*+ (?=\))
    | (?P<bracket> [()\[\]] )
    | (?P<quotation> "(?: \\. | [^"\\] )*+" )
    | (?P<word> (?: \\[()\[\]\\"+\-.,:=] | [^\s,;()\[\]":] )++ )
    | [\s,;]++
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Words that share a weight; 1 changes nothing."""

    text: str
    weight: float = 1.0


#: A prompt as the prompt encoder takes it.
Prompt = tuple[Fragment, ...]


def plain(text: str) -> Prompt:
    """A prompt without weights: every character is text."""
    return (Fragment(text),)


def parse(text: str) -> Prompt:
    """A prompt with its weights.

    Raises ValueError, in words for the caller, for a weight that is not from 0 to 3, more than 16
    levels of parentheses, or more than 256 weighted fragments.
    """
    fragments = _merged(_Reader(text).read())
    weighted = sum(each.weight != 1 and not each.text.isspace() for each in fragments)
    if weighted > MAX_WEIGHTED:
        raise ValueError(f"Weighted parts should be at most {MAX_WEIGHTED}")
    return fragments


def listed(prompts: Iterable[Prompt]) -> Prompt:
    """One prompt of several, with commas between them."""
    pieces: list[tuple[str, float]] = []
    for prompt in prompts:
        pieces += [(", ", 1.0)] if pieces else []
        pieces += [(fragment.text, fragment.weight) for fragment in prompt]
    return _merged(pieces)


class _Reader:
    """One pass over a text: the pieces so far, and where each open bracket began."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._pieces: list[tuple[str, float]] = []
        self._open: dict[str, list[int]] = {bracket: [] for bracket in _BRACKETS}

    def read(self) -> list[tuple[str, float]]:
        """The text's pieces, each with its weight."""
        position = 0
        while match := _TOKEN.match(self._text, position):
            position = self._take(match)
        for bracket, starts in self._open.items():
            while starts:
                self._close(bracket, _BRACKETS[bracket])
        return self._pieces

    def _take(self, match: re.Match[str]) -> int:
        """Read one token; return where the next one begins."""
        token, end = match.group(), match.end()
        if match.lastgroup == "inside" and self._open["("] and not _is_ratio(match):
            self._close("(", _checked(float(match["inside"])))
            return end + 1
        if match.lastgroup == "bracket":
            return self._bracket(token, end)
        if match.lastgroup == "quotation":
            return self._quotation(token, end)
        if match.lastgroup == "word":
            return self._word(token, end)
        self._add(token)
        return end

    def _bracket(self, bracket: str, end: int) -> int:
        opened_by = _OPENED_BY.get(bracket)
        if opened_by is None:
            if len(self._open[bracket]) == MAX_DEPTH:
                raise ValueError(f"Parentheses should be at most {MAX_DEPTH} deep")
            self._open[bracket].append(len(self._pieces))
        elif not self._open[opened_by]:
            self._add(bracket)
        elif bracket == ")" and (behind := _BEHIND.match(self._text, end)):
            self._close("(", _value(behind[behind.lastindex or 0]))
            return behind.end()
        else:
            self._close(opened_by, _BRACKETS[opened_by])
        return end

    def _quotation(self, token: str, end: int) -> int:
        behind = _BEHIND.match(self._text, end)
        if behind is None:
            self._add('"')
            return end - len(token) + 1
        start = len(self._pieces)
        self._pieces += _Reader(token[1:-1]).read()
        self._scale(start, _value(behind[behind.lastindex or 0]))
        return behind.end()

    def _word(self, word: str, end: int) -> int:
        if word.endswith(".attend") and (argument := _ARGUMENT.match(self._text, end)):
            self._add(word.removesuffix(".attend"), _value(argument[1]))
            return argument.end()
        core, signs, tail = _signed(word)
        self._add(core, _value(signs) if signs else 1.0)
        self._add(tail)
        return end

    def _add(self, text: str, weight: float = 1.0) -> None:
        self._pieces.append((_ESCAPED.sub(r"\1", text), weight))

    def _close(self, bracket: str, weight: float) -> None:
        self._scale(self._open[bracket].pop(), weight)

    def _scale(self, start: int, weight: float) -> None:
        # A piece is scaled at most once for each level, and the levels are few.
        self._pieces[start:] = [(text, before * weight) for text, before in self._pieces[start:]]


def _is_ratio(match: re.Match[str]) -> bool:
    """Whether a colon is that of a time or a ratio: as in 10:30 or 16:9, and not in score_9:1."""
    start, inside = match.start(), match["inside"]
    if not (match.string[start - 1 : start].isdigit() and inside.isdigit()):
        return False
    before = _WHOLE_NUMBER.search(match.string, max(start - MAX_DIGITS, 0), start)
    return before is not None or float(inside) > MAX_WEIGHT


def _signed(word: str) -> tuple[str, str, str]:
    """A word, the signs at its end, and the full stop after them."""
    body = word.rstrip(".!?")
    core = body.rstrip(body[-1]) if body.endswith(("+", "-")) else body
    if core.endswith("\\"):
        # The first of the signs is escaped.
        core = body[: len(core) + 1]
    elif core.endswith(("+", "-")) or not core.strip(string.punctuation):
        core = body
    if core == body:
        return word, "", ""
    return core, body[len(core) :], word[len(body) :]


def _value(text: str) -> float:
    """A number, or signs; more than a thousand signs weigh the same as a thousand."""
    if text.startswith(("+", "-")):
        return _checked((1.1 if text[0] == "+" else 0.9) ** min(len(text), 1000))
    return _checked(float(text))


def _checked(weight: float) -> float:
    if weight < 0:
        raise ValueError("Weights should be greater than or equal to 0")
    if weight > MAX_WEIGHT:
        raise ValueError(f"Weights should be less than or equal to {MAX_WEIGHT:g}")
    return weight


def _merged(pieces: list[tuple[str, float]]) -> Prompt:
    """Join neighbours of one weight, and drop empty ones; at least one fragment stays.

    Blank space between two fragments of one weight joins them, whatever its own weight is.
    """
    merged: list[tuple[list[str], float]] = []
    for text, exact in pieces:
        if not text:
            continue
        weight = _checked(round(exact, 4))
        if len(merged) > 1 and merged[-2][1] == weight and all(map(str.isspace, merged[-1][0])):
            merged[-2][0].extend(merged.pop()[0])
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(text)
        else:
            merged.append(([text], weight))
    return tuple(Fragment("".join(texts), weight) for texts, weight in merged) or plain("")
