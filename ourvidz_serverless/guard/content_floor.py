"""The content floor: no sexual content involving minors, whatever any caller says.

It refuses a text with a sign of a minor and a sexual sign; in adult mode the sign of a minor is
enough. The signs in all texts of one job count together. It has no setting and no switch, and it
reads and writes nothing. A text goes through these steps:

    prohibitions         "No school or minor context applies.", in a system message only
    unescaped, folded    HTML references, compatibility forms, marks, look-alikes, case
    decoded              escapes and Base64, as a reading of their own
    read again           without punctuation in words, leet, spelling out, camel case
    tokens               words, numbers, and a comma for every pause
    masked               set phrases that only look like a sign ("minor key")
    signs                words and phrases, ages, limits, words that were glued or cut apart

It is a floor and not a classifier: `docs/content-floor.md` says what it catches, what it misses and
where it errs, measured. The words are in `content_lexicon`. To change one, also change
`LIST_VERSION`, add the case to `tests/data/safety_cases.json`, and measure again.
"""

from __future__ import annotations

import binascii
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, filterfalse, takewhile

from ourvidz_serverless.errors import ContentRefused
from ourvidz_serverless.guard import content_lexicon as lexicon
from ourvidz_serverless.guard.content_folding import LEET, REPEATED, SAME_STROKE, fold
from ourvidz_serverless.guard.content_lexicon import PAUSE, Index, Tokens
from ourvidz_serverless.job import CheckedText, Role, Signs

#: The token in place of words that are no sign where they stand.
MASK = "·"

#: Rounds in which nested HTML references and other escapes are replaced.
MAX_UNESCAPES = 4

#: In letters: longer words are not looked up as disguised or glued words.
MAX_WORD_LETTERS = 30

#: In letters: shorter words are not read backwards.
MIN_REVERSED_LETTERS = 5

#: In words.
PHRASE_LENGTHS = range(1, 7)

#: Tag characters are invisible, and language models read them as the letters that they stand for.
TAGS = {0xE0000 + code: code for code in range(0x20, 0x7F)}
TAG = re.compile("[\U000e0020-\U000e007e]")

#: Words between a comparison and 18 ("under the age of 18").
MAX_LIMIT_FILLERS = 3

#: A person, a link and two hedges stand before a number; a span, a half and a unit from it on.
WORDS_BEFORE_AGE, WORDS_OF_AGE = 4, 8

# HTML references.
AMPERSANDS = re.compile(r"&(?:amp;)+")
ZEROS = re.compile(r"&#0+(?=\d)")
HUGE_REFERENCE = re.compile(r"&#\d{8,}")  # no character; Python refuses to parse such a number

# Escapes of URLs and of programming languages, and Base64 (RFC 4648, with either alphabet).
PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
BACKSLASH = re.compile(
    r"\\u\{([0-9A-Fa-f]{1,5})\}|\\u([0-9A-Fa-f]{4})|\\U000([0-9A-Fa-f]{5})|\\x([0-9A-Fa-f]{2})"
)
BASE64 = re.compile(r"(?<![\w+/-])[\w+/-]{12,}", re.ASCII)
URL_ALPHABET = str.maketrans("-_", "+/")

# "littleGirl", "ALittleGirl"
SMALL = "".join(filter(str.islower, map(chr, (*range(0x180), *range(0x400, 0x500)))))
LARGE = "".join(filter(str.isupper, map(chr, (*range(0x180), *range(0x400, 0x500)))))
CAMEL_WORD = re.compile(r"(?<!\w)\w{2,40}(?!\w)")
CAMEL = re.compile(f"(?<=[{SMALL}])(?=[{LARGE}])|(?<=[{LARGE}])(?=[{LARGE}][{SMALL}])")

# "niña" is also searched as "ninya".
TILDE = re.compile("[ñÑ]|[nN]\u0303")

# Numbers, and numbers that are ages.
WEIGHT = re.compile(r":\s{0,2}\d{1,2}(?:\.\d{1,3})?\s{0,2}(?=[)\]>])")  # (word:1.2)
THOUSANDS = re.compile(r"(?<=\d)[,.](?=\d{3}(?!\d))")
DECIMALS = re.compile(r"(?<=\d)\.\d{1,2}(?!\d)")
SPAN = re.compile(r"(?<=\d)\s?-\s?(?=\d)")
SHORT_AGE = re.compile(r"(?<!\w)(\d{1,2})y(?!\w)")
NUMBER_ENDING = re.compile(fold(r"(?<=\d)-(?:ти|ми|х|го|й|му)(?=\s)"))  # 13-ти
NUMBER_DOT = re.compile(r"(?<=\d)\.(?=\s(?:geburtstag|lebensjahr|dogum|yas|urodz))")
YEARS_LETTER = re.compile(r"(?<=\d)\s?[ajr]\.(?=\s(?:alt|de idade|de edad))")  # 16 J. alt
LIMIT_SIGN = re.compile(r"(?<!\w)(?:<\s?|u[ -]?)(?=18(?!\w))")  # <18, U18
MINUS_LIMIT = re.compile(r"(?<![^\s(])-\s?(?=18\s(?:years|ans|jahre|jaar|anni|anos|лет|lat)(?!\w))")

# Chinese, Japanese and Korean.
UNSPACED_SCRIPT = re.compile("[\u3040-\u9fff\uac00-\ud7a3]")

# Words, and how they may be disguised.
TOKEN = re.compile(r"[0-9]+|[ァ-ヺー]+|[^\W\d_ァ-ヺー]+|[,;.!?|\n。、，]")
PAUSES = frozenset(",;.!?|\n。、，")
IN_WORD = re.compile(r"(?<=[^\W_])(?:[^\w\s]|_){1,3}(?=[^\W_])")
SPELLED = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_](?![^\W_])){2,}")
SPELLED_BY_ONE = re.compile(r"(?<![^\W_])[^\W_][आ-औ]?(?:[\W_][^\W_][आ-औ]?(?![^\W_]))+")
DOUBLED_VOWEL = re.compile(r"([aeiouyиыэюяє])\1")
VOWELS = re.compile("[aeiouyиыэюяє]{1,30}")
WORD = re.compile(r"[^\W\d_]+")
BREAKS = frozenset([PAUSE, "break"])
BREAK = re.compile(r"\sbreak\s")
CHUNK = re.compile(r"[a-z0-9@$!|+€£¡]+")
STRETCHED = re.compile(r"(.)\1\1")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether texts are refused, by which rule of which version of the list, and their signs."""

    refused: bool
    rule: str | None
    version: str
    signs: Signs


def check(text: str, *, adult: bool = False, role: Role = "user") -> Verdict:
    """The verdict on one text. A pure function, in time linear in the text's length."""
    return judge([CheckedText(text, "text", role)], adult=adult)


def refusal(verdict: Verdict) -> ContentRefused:
    """The error that ends a refused job."""
    return ContentRefused(
        f"refused under the content policy (rule {verdict.rule}, list {verdict.version})"
    )


def judge(
    texts: Iterable[CheckedText],
    *,
    adult: bool = False,
    found: Signs | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Verdict:
    """The verdict on a job, from the signs in all of its texts together.

    `found` are the signs in texts that were judged before. `check_stop` is called at each reading
    of each text; an error that it raises ends the judgement.
    """
    minor, sexual = bool(found and found.minor), adult or bool(found and found.sexual)
    for tokens in chain.from_iterable(map(_readings, map(_without_prohibitions, texts))):
        check_stop()
        minor = minor or _has_minor(tokens)
        sexual = sexual or _is_sexual(tokens)
        if minor and sexual:
            rule = "minor+adult-mode" if adult else "minor+sexual"
            return Verdict(True, rule, lexicon.LIST_VERSION, Signs(minor, sexual))
    return Verdict(False, None, lexicon.LIST_VERSION, Signs(minor, sexual))


def audit_hash(texts: Iterable[CheckedText]) -> str:
    """SHA-256 over the texts and their lengths: it shows equal texts without showing a text."""
    digest = hashlib.sha256()
    for each in texts:
        encoded = each.text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()


def _without_prohibitions(checked: CheckedText) -> str:
    """The text. In a system message, a neutral word replaces the nouns that a prohibition forbids.

    The rest of the sentence stays, so that the text around it is read as before.
    """
    if checked.role != "system":
        return checked.text
    nouns, neutral = lexicon.FORBIDDEN_NOUN_PATTERN, lexicon.NEUTRAL
    return lexicon.PROHIBITION_PATTERN.sub(lambda m: nouns.sub(neutral, m[0]), checked.text)


def _readings(text: str) -> Iterator[Tokens]:
    """Every way to read a text, as masked tokens; tags and escapes are also read as letters."""
    yield from _visible_readings(text)
    tagless = text.translate(TAGS) if TAG.search(text) else text
    for other in dict.fromkeys((tagless, _decoded(tagless))):
        if other != text:
            yield from _visible_readings(other)


def _visible_readings(text: str) -> Iterator[Tokens]:
    """The text as it is, without each disguise, and the words that were cut or glued."""
    unescaped = _unescape(text)
    plain = _plain_numbers(fold(unescaped))
    squeezed = IN_WORD.sub("", plain)
    forms = [plain, squeezed, *_joined_letters(plain)]
    if TILDE.search(unescaped):
        forms.append(_plain_numbers(fold(TILDE.sub("ny", unescaped))))
    if CAMEL.search(unescaped):
        forms.append(_plain_numbers(fold(CAMEL_WORD.sub(_from_camel_case, unescaped))))
    for form in dict.fromkeys(forms):
        yield _masked(_tokens(form))
        restored = _undisguised(form)
        if restored != form:
            yield _masked(_tokens(restored))
    tokens = _masked(_tokens(plain))
    if _is_cut(tokens):
        yield _masked(_rejoined(tokens))
    joined, split = _joined_words(tokens), _split_words(_tokens(squeezed))
    yield [*joined, *split, *_unspaced_words(squeezed)]


def _from_camel_case(word: re.Match[str]) -> str:
    """The word in its parts, if one of them is a part of a sign."""
    apart = CAMEL.sub(" ", word[0])
    return word[0] if lexicon.CAMEL_PARTS.isdisjoint(WORD.findall(fold(apart))) else apart


def _decoded(text: str) -> str:
    """The text without escapes of URLs and of programming languages, and without Base64."""
    text = _unescape(text)
    for _ in range(MAX_UNESCAPES):
        plain = BACKSLASH.sub(_from_backslash, PERCENT.sub(_from_percent, text))
        plain = BASE64.sub(_from_base64, plain)
        if plain == text:
            break
        text = plain
    return text


def _from_percent(escapes: re.Match[str]) -> str:
    return bytes.fromhex(escapes[0].replace("%", "")).decode("utf-8", "replace")


def _from_backslash(escape: re.Match[str]) -> str:
    return chr(int(escape[escape.lastindex or 0], 16))


def _from_base64(word: re.Match[str]) -> str:
    """The text that the word encodes, or the word itself if it encodes none."""
    digits = word[0].translate(URL_ALPHABET)
    try:
        decoded = binascii.a2b_base64(digits + "=" * (-len(digits) % 4)).decode()
    except ValueError:
        return word[0]
    return decoded if decoded.replace("\n", " ").isprintable() else word[0]


def _unescape(text: str) -> str:
    """The text without HTML references, nested ones too."""
    for _ in range(MAX_UNESCAPES):
        safe = HUGE_REFERENCE.sub(" ", ZEROS.sub("&#", AMPERSANDS.sub("&", text)))
        plain = html.unescape(safe)
        if plain == text:
            break
        text = plain
    return text


def _plain_numbers(text: str) -> str:
    """The text without weights, fractions and separators of thousands; "12-14" as "12 to 14"."""
    text = MINUS_LIMIT.sub("under ", LIMIT_SIGN.sub("under ", WEIGHT.sub("", text)))
    text = DECIMALS.sub("", THOUSANDS.sub("", text))
    text = YEARS_LETTER.sub(" yo", NUMBER_DOT.sub("", NUMBER_ENDING.sub("", text)))
    text = SHORT_AGE.sub(r"\1 yo", SPAN.sub(" to ", text))
    return lexicon.COMPOUND_NUMBER.sub(r"\1\2", text)


def _tokens(text: str) -> Tokens:
    return [PAUSE if token in PAUSES else token for token in TOKEN.findall(text)]


def _joined_letters(text: str) -> list[str]:
    """The text with spelled-out words joined ("t e e n"), if it has any.

    First each run of letters as one word, and the known words inside; then with words where two
    signs stand between two letters.
    """
    runs = ["".join(filter(str.isalnum, run)) for run in SPELLED.findall(text)]
    by_one = SPELLED_BY_ONE.sub(lambda run: "".join(filter(str.isalnum, run[0])), text)
    if not runs:
        return [by_one]
    joined = iter(runs)
    together = " ".join([*runs, *(run.translate(LEET) for run in runs)])
    found = dict.fromkeys(lexicon.KNOWN_WORD_STARTS.findall(together))
    return [", ".join([SPELLED.sub(lambda _: next(joined), text), *found]), by_one]


def _undisguised(text: str) -> str:
    """The text with known words in place of their leet, stretched and other disguised forms."""
    # Look up each distinct chunk once: most words of a long text are repeated.
    chunks = {chunk for chunk in set(CHUNK.findall(text)) if len(chunk) <= MAX_WORD_LETTERS}
    known = {chunk: word for chunk in chunks if (word := _undisguised_word(chunk))}
    if known:
        text = CHUNK.sub(lambda match: known.get(match[0], match[0]), text)
    words = {word for word in set(WORD.findall(text)) if len(word) <= MAX_WORD_LETTERS}
    turned = {word: sign for word in words if (sign := _turned(word))}
    return WORD.sub(lambda match: turned.get(match[0], match[0]), text) if turned else text


def _turned(word: str) -> str | None:
    """The known word that is written backwards, or with each vowel twice, if any."""
    single = DOUBLED_VOWEL.sub(r"\1", word)
    if any(len(run) % 2 for run in VOWELS.findall(word)):
        single = word  # a word of its own: "nuée"
    if single != word and word not in lexicon.PARTS and single in lexicon.PARTS:
        return single
    backwards = word[::-1] if len(word) >= MIN_REVERSED_LETTERS else ""
    return backwards if backwards in lexicon.PARTS and word not in lexicon.PARTS else None


def _undisguised_word(chunk: str) -> str | None:
    known = _known(chunk) or _known(chunk.strip("!|+"))
    return f" {known} " if known else None


def _known(word: str) -> str | None:
    """The known word that a leet or stretched form stands for, if any."""
    # Digits and signs alone are no word: 455 is a number.
    is_leet = not word.isalpha() and any(map(str.isalpha, word))
    drawn = (word.translate(LEET) if is_leet else word).translate(SAME_STROKE)
    if is_leet and drawn in lexicon.LEET_WORDS:
        return lexicon.LEET_WORDS[drawn]
    is_stretched = STRETCHED.search(word)
    return lexicon.STRETCHED_WORDS.get(REPEATED.sub(r"\1", drawn)) if is_stretched else None


def _joined_words(tokens: Tokens) -> Iterator[str]:
    """Known words that were cut apart ("chi ld")."""
    for one, two, three in zip(tokens, [*tokens[1:], ""], [*tokens[2:], "", ""], strict=False):
        joined = one + two
        if joined in lexicon.CUT_WORDS:
            yield joined
        if joined + three in lexicon.CUT_WORDS:
            yield joined + three


def _is_cut(tokens: Tokens) -> bool:
    """Whether two words that follow each other are the halves of a known one."""
    words = [*filterfalse(BREAKS.__contains__, tokens)]
    return not lexicon.CUT_PARTS.isdisjoint(map(str.__add__, words, words[1:]))


def _rejoined(tokens: Tokens) -> Tokens:
    """The tokens with words that a space, a new line or BREAK cut in two: known words and parts."""
    whole, i = [], 0
    while i < len(tokens):
        after = i + 2 if not BREAKS.isdisjoint(tokens[i + 1 : i + 2]) else i + 1
        joined = tokens[i] + tokens[after] if after < len(tokens) else ""
        is_cut = len(joined) <= MAX_WORD_LETTERS and joined in lexicon.CUT_PARTS
        whole.append(joined if is_cut else tokens[i])
        i = after + 1 if is_cut else i + 1
    return whole


def _split_words(tokens: Tokens) -> Iterator[str]:
    """The two known words in each word that was glued together."""
    for token in tokens:
        if token[:3] in lexicon.GLUED_PREFIXES and len(token) <= MAX_WORD_LETTERS:
            for i in range(3, len(token) - 2):
                if token[:i] in lexicon.GLUED_PARTS and token[i:] in lexicon.GLUED_PARTS:
                    yield from (token[:i], token[i:])


def _unspaced_words(text: str) -> Iterator[str]:
    """Known words and ages of scripts without spaces between words."""
    if not UNSPACED_SCRIPT.search(text):
        return
    together = "".join(BREAK.sub("", text).split())
    yield from lexicon.UNSPACED_WORD.findall(together)
    yield from (word for word in lexicon.SEX_WORDS if word in together)
    yield from (word.replace(" ", "") for word in lexicon.KOREAN_WORD.findall(text))
    if lexicon.UNSPACED_AGE.search(together) or lexicon.UNSPACED_SCHOOL_YEAR.search(text):
        yield fold("未成年")


def _masked(tokens: Tokens) -> Tokens:
    """The tokens without set phrases that only look like a sign, and without disclaimers."""
    for place in list(_matches(tokens, lexicon.BENIGN_PHRASES)):
        tokens[place.start : place.stop] = [MASK] * len(place)
    return _mask_disclaimers(tokens)


def _mask_disclaimers(tokens: Tokens) -> Tokens:
    """The tokens without what a clause forbids: "never depict minors", "no sexual content"."""
    if lexicon.NEGATION_WORDS.isdisjoint(tokens):
        return tokens
    masked = tokens.copy()
    fillers_left, forbids, is_denied = 0, False, False
    for i, token in enumerate(tokens):
        if token in lexicon.NEGATION_WORDS:
            # A refusal that was denied stays denied: "never refuse or avoid minors".
            is_denied_refusal = is_denied and token in lexicon.REFUSAL_WORDS
            forbids = not fillers_left or (forbids and not is_denied_refusal)
            fillers_left, is_denied = lexicon.MAX_FILLERS, token in lexicon.DENIAL_WORDS
        elif fillers_left and (token in lexicon.FORBIDDEN_WORDS or _is_material(tokens, i)):
            if forbids:
                masked[i] = MASK
        else:
            is_filler = fillers_left and token in lexicon.FILLER_WORDS
            fillers_left = fillers_left - 1 if is_filler else 0
    return masked


def _is_material(tokens: Tokens, i: int) -> bool:
    return tokens[i] == "sexual" and not lexicon.MATERIAL_WORDS.isdisjoint(tokens[i + 1 : i + 2])


def _has_minor(tokens: Tokens) -> bool:
    return _contains(tokens, lexicon.MINOR_PHRASES) or any(
        _is_age_of_minor(tokens, i) for i, token in enumerate(tokens) if token in lexicon.AGES
    )


def _is_age_of_minor(tokens: Tokens, i: int) -> bool:
    if tokens[i] in lexicon.EIGHTEENS:
        return _is_limit(tokens, i)
    return _is_minors_age(tokens, i)


def _is_sexual(tokens: Tokens) -> bool:
    return _contains(tokens, lexicon.SEXUAL_PHRASES)


def _contains(tokens: Tokens, index: Index) -> bool:
    """Whether the tokens hold a phrase. Pauses are ignored: commas separate tags."""
    if index.keys().isdisjoint(tokens):
        return False
    words = [token for token in tokens if token != PAUSE]
    return any(True for _ in _matches(words, index))


def _matches(tokens: Tokens, index: Index) -> Iterator[range]:
    """The ranges of tokens that are phrases."""
    for i, token in enumerate(tokens):
        if token in index:
            yield from (range(i, end) for end in _phrase_ends(tokens, i, index))


def _phrase_ends(tokens: Tokens, i: int, by_first: Index) -> list[int]:
    """The ends of the phrases that begin at `i`."""
    phrases = by_first.get(tokens[i]) if i < len(tokens) else None
    if not phrases:
        return []
    return [i + n for n in PHRASE_LENGTHS if tuple(tokens[i : i + n]) in phrases]


def _phrase_starts(tokens: Tokens, i: int, by_last: Index) -> list[int]:
    """The starts of the phrases that end just before `i`."""
    phrases = by_last.get(tokens[i - 1]) if i else None
    if not phrases:
        return []
    return [i - n for n in PHRASE_LENGTHS if n <= i and tuple(tokens[i - n : i]) in phrases]


def _follows_phrase(tokens: Tokens, i: int, by_last: Index) -> bool:
    """Whether a phrase ends just before `i`."""
    return bool(_phrase_starts(tokens, i, by_last))


def _is_minors_age(tokens: Tokens, i: int) -> bool:
    """Whether the number below 18 at `i`, or the span that begins there, is a person's age."""
    if _has_no_age_near(tokens, i) or _is_after_tens(tokens, i):
        return False
    end = _end_of_number(tokens, i)
    lead = _start_of_number(tokens, i)
    is_led = _follows_phrase(tokens, lead, lexicon.AGE_LEADS_BY_LAST)
    return (
        _has_unit(tokens, end)
        or (
            tokens[i] in lexicon.LED_AGES
            and is_led
            and not _phrase_ends(tokens, end, lexicon.NOT_AGE_PHRASES)
        )
        or _is_years_of_person(tokens, lead, end)
        or _is_tag(tokens, lead, end, is_span=end > i + 2)
        or (tokens[i] in lexicon.BARE_AGES and _is_bare_age(tokens, lead, end))
    )


def _has_no_age_near(tokens: Tokens, i: int) -> bool:
    """Whether no word that makes a number an age is near `i`. Nearly all numbers end here."""
    return (
        lexicon.AGE_WORDS.isdisjoint(tokens[max(0, i - WORDS_BEFORE_AGE) : i + WORDS_OF_AGE])
        and not "".join(tokens[i + 1 : i + 2]).startswith(lexicon.AGE_MARK_PREFIXES)
        and not "".join(tokens[i + 3 : i + 4]).startswith(lexicon.AGE_MARK_PREFIXES)
    )


def _is_after_tens(tokens: Tokens, i: int) -> bool:
    """Whether "twenty" or "twenty and" stands before `i`; of other languages, only beside words."""
    before = i - 2 if i and tokens[i - 1] in lexicon.AND_WORDS else i - 1
    tens = lexicon.TENS_BEFORE.get(tokens[i], ())
    return before >= 0 and (tokens[before] in lexicon.TENS_WORDS or tokens[before] in tens)


def _start_of_number(tokens: Tokens, i: int) -> int:
    """The start of "13" and of "only just 13", where the 13 is at `i`."""
    hedges = takewhile(lexicon.HEDGE_WORDS.__contains__, (tokens[i - n] for n in (1, 2) if n <= i))
    return i - len(list(hedges))


def _end_of_number(tokens: Tokens, i: int) -> int:
    """The end of "13", of "13 to 19" and of "13 and a half", where the 13 is at `i`."""
    match tokens[i + 1 : i + 3]:
        case [link, number] if link in lexicon.RANGE_WORDS:
            if number.isdigit() or number in lexicon.RANGE_ENDS:
                return i + 3
    return max([i + 1, *_phrase_ends(tokens, i + 1, lexicon.HALF_PHRASES)])


def _has_unit(tokens: Tokens, end: int) -> bool:
    """Whether a unit of age follows the number ("years old"), and no thing of that age does."""
    unit_ends = _phrase_ends(tokens, end, lexicon.AGE_UNIT_PHRASES)
    if any(token.startswith(lexicon.AGE_MARK_PREFIXES) for token in tokens[end : end + 1]):
        unit_ends.append(end + 1)
    return any(not _is_thing(tokens[after : after + 1]) for after in unit_ends)


def _is_thing(word: Tokens) -> bool:
    """Whether a word, if there is one, names a thing that has an age, such as whisky."""
    return any(
        token in lexicon.AGED_THING_WORDS or token.endswith(lexicon.AGED_THING_ENDINGS)
        for token in word
    )


def _is_years_of_person(tokens: Tokens, lead: int, end: int) -> bool:
    """Whether bare years follow the number, and a person stands before it ("girl, 13 years")."""
    unit, following = tokens[end : end + 1], tokens[end + 1 : end + 2]
    if lexicon.YEAR_WORDS.isdisjoint(unit) or not lexicon.TIME_WORDS.isdisjoint(following):
        return False
    is_led = _follows_phrase(tokens, lead, lexicon.YEAR_LEADS_BY_LAST) or (
        _follows_phrase(tokens, lead, lexicon.AGE_LEADS_BY_LAST)
        and not _phrase_ends(tokens, end, lexicon.NOT_AGE_PHRASES)
    )
    if unit == ["anni"]:
        is_led = is_led or _follows_phrase(tokens, lead, lexicon.ITALIAN_LEADS_BY_LAST)
    return is_led or _is_after_person(tokens, lead)


def _is_tag(tokens: Tokens, lead: int, end: int, is_span: bool) -> bool:
    """Whether the number and bare years form a whole tag or text ("nude, 13 ans")."""
    if lexicon.TAG_YEAR_WORDS.isdisjoint(tokens[end : end + 1]):
        return False
    leads = lexicon.SPAN_LEADS_BY_LAST if is_span else lexicon.TAG_LEADS_BY_LAST
    starts = [lead, *_phrase_starts(tokens, lead, leads)]
    ends = [end + 1, *_phrase_ends(tokens, end + 1, lexicon.HALF_PHRASES)]
    return any(start == 0 or tokens[start - 1] == PAUSE for start in starts) and any(
        tokens[stop : stop + 1] in ([], [PAUSE]) for stop in ends
    )


def _is_limit(tokens: Tokens, i: int) -> bool:
    """Whether the 18 at `i` is an age that somebody has not reached ("jünger als 18")."""
    if lexicon.LIMIT_WORDS.isdisjoint(tokens[max(0, i - WORDS_BEFORE_AGE) : i + WORDS_OF_AGE]):
        return False
    lead = i
    while lead > max(0, i - MAX_LIMIT_FILLERS) and tokens[lead - 1] in lexicon.LIMIT_FILLERS:
        lead -= 1
    is_led = any(_follows_phrase(tokens, at, lexicon.LIMITS_BY_LAST) for at in range(lead, i + 1))
    years_end = _end_of_years(tokens, i + 1)
    if years_end and not is_led:
        is_led = _follows_phrase(tokens, i, lexicon.LIMITS_OF_YEARS_BY_LAST)
    if is_led and (years_end or tokens[i + 1 : i + 2] in ([], [PAUSE])):
        return True
    return any(
        _is_of_person(tokens, i + 1, end)
        for at in {i + 1, years_end or i + 1}
        for end in _phrase_ends(tokens, at, lexicon.LIMIT_END_PHRASES)
    )


def _is_of_person(tokens: Tokens, start: int, end: int) -> bool:
    """Whether the comparison after 18 names years, a person, or nothing else ("18 से कम")."""
    is_end = tokens[end : end + 1] in ([], [PAUSE])
    return is_end or not lexicon.LIMITED_WORDS.isdisjoint(tokens[start : end + 1])


def _end_of_years(tokens: Tokens, i: int) -> int | None:
    """The end of the unit of age at `i`, if there is one and it is no time."""
    ends = _phrase_ends(tokens, i, lexicon.AGE_UNIT_PHRASES)
    if tokens[i : i + 1] and tokens[i] in lexicon.YEAR_WORDS:
        ends.append(i + 1)
    after = max(ends, default=i)
    is_time = not lexicon.TIME_WORDS.isdisjoint(tokens[after : after + 1])
    return after if ends and not is_time else None


def _is_bare_age(tokens: Tokens, lead: int, end: int) -> bool:
    """Whether the number ends its clause, and a person stands before it ("she is 13")."""
    if not lexicon.CLAUSE_ENDS.issuperset(tokens[end : end + 1]):
        return False
    is_led = _follows_phrase(tokens, lead, lexicon.BARE_LEADS_BY_LAST)
    return is_led or _is_after_person(tokens, lead)


def _is_after_person(tokens: Tokens, lead: int) -> bool:
    """Whether "girl", "girl, " or "girl of" stands before `lead`."""
    before = lead - 2 if lead and tokens[lead - 1] in lexicon.LINK_WORDS else lead - 1
    return before >= 0 and tokens[before] in lexicon.PERSON_WORDS
