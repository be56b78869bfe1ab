"""Ways to hide a word that cost nothing. Each function takes a text and gives it back in disguise.

Numbers keep their digits in their order, since "31" instead of "13" is another age. A function
returns a text unchanged where its disguise does not apply: Chinese has no camel case."""

import base64
import itertools
import unicodedata
from collections.abc import Callable
from urllib.parse import quote

Disguise = Callable[[str], str]

LEET = str.maketrans("aeiostAEIOST", "431057431057")
VOWELS = frozenset("aeiouyAEIOUYаеиоуыэюяіїєАЕИОУЫЭЮЯІЇЄ")
# Pairs that most fonts draw alike; Unicode's confusables.txt (UTS 39) has them all.
LATIN = "aceopxyAEOPCXHKMT"
CYRILLIC = "асеорхуАЕОРСХНКМТ"
HOMOGLYPHS = str.maketrans(LATIN + CYRILLIC, CYRILLIC + LATIN)
FULL_WIDTH = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)} | {ord(" "): 0x3000}
ZERO_WIDTH_SPACE = "\u200b"
ACUTE = "\u0301"


def _clusters(text: str) -> list[str]:
    """The characters of a text, each with its combining marks: they are one letter in Hindi."""
    found: list[str] = []
    for character in text:
        if found and unicodedata.category(character).startswith("M"):
            found[-1] += character
        else:
            found.append(character)
    return found


def _in_each_word(change: Callable[[list[str]], str]) -> Disguise:
    """A disguise that changes each run of letters and leaves digits and punctuation alone."""

    def disguise(text: str) -> str:
        runs = itertools.groupby(_clusters(text), key=lambda cluster: cluster[0].isalpha())
        return "".join(change(list(run)) if word else "".join(run) for word, run in runs)

    return disguise


def _halved(by: str) -> Disguise:
    def change(letters: list[str]) -> str:
        middle = len(letters) // 2
        return (
            by.join(["".join(letters[:middle]), "".join(letters[middle:])])
            if middle
            else letters[0]
        )

    return _in_each_word(change)


def spaced(text: str) -> str:
    return _in_each_word(" ".join)(text.replace(" ", "   "))


def camel_case(text: str) -> str:
    words = text.split()
    cased = text.lower() != text.upper()
    return "".join(word[:1].upper() + word[1:] for word in words) if cased and words[1:] else text


def alternating_capitals(text: str) -> str:
    return "".join(c.upper() if place % 2 else c.lower() for place, c in enumerate(text))


def doubled_vowels(text: str) -> str:
    return "".join(c * 2 if c in VOWELS else c for c in text)


def without_accents(text: str) -> str:
    """Latin letters without their marks, as many people type them. "ñ" becomes "n", "ł" stays."""
    if not any("LATIN" in unicodedata.name(c, "") for c in text):
        return text
    bare = unicodedata.normalize("NFD", text)
    return "".join(c for c in bare if not unicodedata.combining(c))


def percent_escapes(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def percent_escapes_as_in_a_url(text: str) -> str:
    return quote(text)


def unicode_escapes(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


def base64_of_the_text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


DISGUISES: dict[str, Disguise] = {
    "leetspeak": lambda text: text.translate(LEET),
    "spaces between letters": spaced,
    "full stops between letters": _in_each_word(".".join),
    "zero-width spaces": lambda text: ZERO_WIDTH_SPACE.join(_clusters(text)),
    "homoglyphs": lambda text: text.translate(HOMOGLYPHS),
    "full width": lambda text: text.translate(FULL_WIDTH),
    "combining marks": _in_each_word(lambda letters: "".join(c + ACUTE for c in letters)),
    "line breaks inside words": _halved("\n"),
    "BREAK inside words": _halved(" BREAK "),
    "alternating capitals": alternating_capitals,
    "camel case": camel_case,
    "doubled vowels": doubled_vowels,
    "without accents": without_accents,
    "reversed words": _in_each_word(lambda letters: "".join(reversed(letters))),
    "percent escapes": percent_escapes,
    "percent escapes, as in a URL": percent_escapes_as_in_a_url,
    "\\u escapes": unicode_escapes,
    "base64 of the text": base64_of_the_text,
}


def disguised(texts: list[str], disguise: Disguise) -> list[str]:
    """The texts that the disguise changes, in disguise."""
    return [hidden for text in texts if (hidden := disguise(text)) != text]
