"""Letters as the content floor compares them: small Latin ones, without accents and disguises."""

from __future__ import annotations

import re
import unicodedata

#: Letters that look like Latin ones, each before the Latin one, if Unicode's compatibility forms do
#: not name it. Both cases of a Cyrillic letter fold alike, or Russian words would not be found.
LOOK_ALIKES = """
аa вb еe ѕs іi їi јj кk мm нh оo рp сc тt уy хx ԁd һh ԛq ԝw Аa Вb Еe Кk Мm Нh Оo Рp Сc Тt Уy Хx αa
βb εe ηn ιi κk νv οo ρp τt υu χx γy ωw Αa Βb Εe Ηh Ιi Κk Μm Νn Οo Ρp Τt Υy Χx Ζz օo սu ոn ցg հh յj
զq Ꭺa Ᏼb Ꮯc Ꭰd Ꭼe Ꮐg Ꮋh Ꭵi Ꭻj Ꮶk Ꮮl Ꮇm Ꮲp Ꭱr Ꮪs Ꭲt Ꮩv Ꮃw Ꮓz ıi łl øo đd ðd ħh ŧt ɑa ɡg ɩi ᴀa ʙb ᴄc
ᴅd ᴇe ꜰf ɢg ʜh ɪi ᴊj ᴋk ʟl ᴍm ɴn ᴏo ᴘp ʀr ꜱs ᴛt ᴜu ᴠv ᴡw ʏy ᴢz ىي یي ةه کك
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz"

#: The first letters of the alphabets in black circles, in black squares and in flags.
ALPHABETS = "\U0001f150\U0001f170\U0001f1e6"

#: Hindi writes vowels after a consonant as marks. As letters, they keep the word in one piece.
HINDI_MARKS, HINDI_LETTERS = "ािीुूृेैोौॅॉंँ", "आइईउऊऋएऐओऔएऑनन"

LOOK_ALIKE_OF = {
    **{pair[0]: pair[1] for pair in LOOK_ALIKES.split()},
    **dict.fromkeys("👶🧒👧👦", " child "),
    **dict.fromkeys("’‘ʼ`´′", "'"),
    **dict.fromkeys("\u115f\u1160\u3164\uffa0\u2800", ""),  # letters and signs without ink
    **{chr(ord(a) + i): letter for a in ALPHABETS for i, letter in enumerate(LETTERS)},
    **dict(zip(HINDI_MARKS, HINDI_LETTERS, strict=True)),
    **dict.fromkeys("ःـ", ""),  # a breath after a vowel in Hindi, a longer stroke in Arabic
    "🔞": " nsfw ",
    "æ": "ae",
    "œ": "oe",
}

#: Digits and signs that stand for letters.
LEET = str.maketrans("0123456789@$!|+€£¡", "oizeasgtbgasiiteli")
SAME_STROKE = str.maketrans("l", "i")  # "1", "!" and "|" may be either

#: Letters that one character may unfold to. Only whole Arabic phrases have more.
MAX_FORMS = 4

#: Characters whose folded form is cached.
MAX_CACHED_FOLDS = 50_000

#: The letters of Korean, which compose syllables.
JAMO = re.compile("[\u1100-\u11ff]")

#: A character that is repeated.
REPEATED = re.compile(r"(.)\1+")


class _Folds(dict[int, str]):
    """The folded form of each character, computed at its first use."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        # One character at a time: to reorder the marks of a whole text takes quadratic time.
        forms = LOOK_ALIKE_OF.get(char)
        if forms is None:
            forms = unicodedata.normalize("NFKD", char)[:MAX_FORMS]
        folded = "".join(map(_letter, forms))
        if len(self) < MAX_CACHED_FOLDS:
            self[code] = folded
        return folded


_folds = _Folds()


def fold(text: str) -> str:
    """The text in small Latin letters where possible, without marks and invisible characters."""
    folded = text.translate(_folds)
    # No marks are left, so that this takes linear time.
    return unicodedata.normalize("NFC", folded) if JAMO.search(folded) else folded


def _letter(char: str) -> str:
    if char in HINDI_MARKS:
        return LOOK_ALIKE_OF[char]
    match unicodedata.category(char):
        case "Mn" | "Me" | "Cf" | "Cs":
            return ""
        case "Nd":
            return str(unicodedata.digit(char))
        case "Pd":
            return "-"
        case "Cc" | "Zl" | "Zp":
            return "\n" if char in "\n\r\u2028\u2029" else " " * char.isspace()
    lower = LOOK_ALIKE_OF.get(char, char).casefold()
    return LOOK_ALIKE_OF.get(lower, lower)
