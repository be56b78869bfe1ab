"""The content floor: no sexual content involving minors, whatever any caller says.

It refuses a text with a sign of a minor and a sexual sign; in adult mode the sign of a minor is
enough. The signs in all texts of one job count together. It has no setting and no switch, and it
reads and writes nothing. A text goes through these steps:

    prohibitions         "No school or minor context applies.", in a system message only
    unescaped, folded    HTML references, compatibility forms, marks, look-alikes, case
    read again           without punctuation in words, without leet, without spelling out
    tokens               words, numbers, and a comma for every pause
    masked               set phrases that only look like a sign ("minor key")
    signs                words and phrases, ages, words that were glued together or cut apart

It is a floor and not a classifier: `docs/content-floor.md` says what it catches, what it misses and
where it errs, measured. The words are in `content_lexicon`. To change one, also change
`LIST_VERSION`, add the case to `tests/data/safety_cases.json`, and measure again.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile

from ourvidz_serverless.errors import ContentRefused
from ourvidz_serverless.guard import content_lexicon as lexicon
from ourvidz_serverless.guard.content_folding import LEET, REPEATED, SAME_STROKE, fold
from ourvidz_serverless.guard.content_lexicon import PAUSE, Index, Tokens
from ourvidz_serverless.job import CheckedText, Role, Signs

#: The token in place of words that are no sign where they stand.
MASK = "·"

#: Rounds in which nested HTML references are replaced.
MAX_UNESCAPES = 4

#: In letters: longer words are not looked up as disguised or glued words.
MAX_WORD_LETTERS = 30

#: In words.
PHRASE_LENGTHS = range(1, 7)

#: Tag characters are invisible, and language models read them as the letters that they stand for.
TAGS = {0xE0000 + code: code for code in range(0x20, 0x7F)}
TAG = re.compile("[\U000e0020-\U000e007e]")

# HTML references.
AMPERSANDS = re.compile(r"&(?:amp;)+")
ZEROS = re.compile(r"&#0+(?=\d)")
HUGE_REFERENCE = re.compile(r"&#\d{8,}")  # no character; Python refuses to parse such a number

# "niña" is also searched as "ninya".
TILDE = re.compile("[ñÑ]|[nN]\u0303")

# Numbers, and numbers that are ages.
WEIGHT = re.compile(r":\s{0,2}\d{1,2}(?:\.\d{1,3})?\s{0,2}(?=[)\]>])")  # (word:1.2)
THOUSANDS = re.compile(r"(?<=\d)[,.](?=\d{3}(?!\d))")
DECIMALS = re.compile(r"(?<=\d)\.\d{1,2}(?!\d)")
SPAN = re.compile(r"(?<=\d)\s?-\s?(?=\d)")
SHORT_AGE = re.compile(r"(?<!\w)(\d{1,2})y(?!\w)")
HAN = lexicon.HAN_DIGITS
HAN_AGE = re.compile(rf"(?<![{HAN}两十百千])(?:[{HAN}两]|十[一二三四五六七]?)(?=[歳才岁歲])")

# Words, and how they may be disguised.
TOKEN = re.compile(r"[0-9]+|[ァ-ヺー]+|[^\W\d_ァ-ヺー]+|[,;.!?|\n。、，]")
PAUSES = frozenset(",;.!?|\n。、，")
IN_WORD = re.compile(r"(?<=[^\W_])(?:[^\w\s]|_){1,3}(?=[^\W_])")
SPELLED = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_](?![^\W_])){2,}")
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
    """Every way to read a text, as masked tokens; invisible tags are also read as letters."""
    yield from _visible_readings(text)
    if TAG.search(text):
        yield from _visible_readings(text.translate(TAGS))


def _visible_readings(text: str) -> Iterator[Tokens]:
    """The text as it is, without each disguise, and the words that were cut or glued."""
    unescaped = _unescape(text)
    plain = _plain_numbers(fold(unescaped))
    squeezed = IN_WORD.sub("", plain)
    forms = [plain, squeezed, _join_spelled_words(plain)]
    if TILDE.search(unescaped):
        forms.append(_plain_numbers(fold(TILDE.sub("ny", unescaped))))
    for form in dict.fromkeys(forms):
        yield _masked(_tokens(form))
        restored = _undisguised(form)
        if restored != form:
            yield _masked(_tokens(restored))
    joined, split = _joined_words(_masked(_tokens(plain))), _split_words(_tokens(squeezed))
    yield [*joined, *split, *_unspaced_words(squeezed)]


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
    text = WEIGHT.sub("", text)
    text = DECIMALS.sub("", THOUSANDS.sub("", text))
    return SHORT_AGE.sub(r"\1 yo", SPAN.sub(" to ", text))


def _tokens(text: str) -> Tokens:
    return [PAUSE if token in PAUSES else token for token in TOKEN.findall(text)]


def _join_spelled_words(text: str) -> str:
    """The text with spelled-out words joined ("t e e n"), then the known words inside those."""
    runs = ["".join(filter(str.isalnum, run)) for run in SPELLED.findall(text)]
    if not runs:
        return text
    joined = iter(runs)
    together = " ".join([*runs, *(run.translate(LEET) for run in runs)])
    found = (word for word in lexicon.KNOWN_WORDS if word in together)
    return ", ".join([SPELLED.sub(lambda _: next(joined), text), *found])


def _undisguised(text: str) -> str:
    """The text with known words in place of their leet or stretched forms ("l0li", "teeeen")."""
    # Look up each distinct chunk once: most words of a long text are repeated.
    chunks = {chunk for chunk in set(CHUNK.findall(text)) if len(chunk) <= MAX_WORD_LETTERS}
    known = {chunk: word for chunk in chunks if (word := _undisguised_word(chunk))}
    if not known:
        return text
    return CHUNK.sub(lambda match: known.get(match[0], match[0]), text)


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


def _split_words(tokens: Tokens) -> Iterator[str]:
    """The two known words in each word that was glued together."""
    for token in tokens:
        if token[:3] in lexicon.GLUED_PREFIXES and len(token) <= MAX_WORD_LETTERS:
            for i in range(3, len(token) - 2):
                if token[:i] in lexicon.GLUED_PARTS and token[i:] in lexicon.GLUED_PARTS:
                    yield from (token[:i], token[i:])


def _unspaced_words(text: str) -> Iterator[str]:
    """Known words of scripts without spaces between words."""
    together = "".join(text.split())
    yield from (word for word in lexicon.UNSPACED_WORDS if word in together)
    if HAN_AGE.search(together):
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
        _is_minors_age(tokens, i) for i, token in enumerate(tokens) if token in lexicon.MINOR_AGES
    )


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


def _follows_phrase(tokens: Tokens, i: int, by_last: Index) -> bool:
    """Whether a phrase ends just before `i`."""
    phrases = by_last.get(tokens[i - 1]) if i else None
    if not phrases:
        return False
    return any(tuple(tokens[max(0, i - n) : i]) in phrases for n in PHRASE_LENGTHS)


def _is_minors_age(tokens: Tokens, i: int) -> bool:
    """Whether the number below 18 at `i`, or the span that begins there, is a person's age."""
    if _is_after_tens(tokens, i):
        return False
    end = _end_of_number(tokens, i)
    lead = _start_of_number(tokens, i)
    is_led = _follows_phrase(tokens, lead, lexicon.AGE_LEADS_BY_LAST)
    return (
        _has_unit(tokens, end)
        or (is_led and not _phrase_ends(tokens, end, lexicon.NOT_AGE_PHRASES))
        or _is_years_of_person(tokens, lead, end)
        or (tokens[i] in lexicon.BARE_AGES and _is_bare_age(tokens, lead, end))
    )


def _is_after_tens(tokens: Tokens, i: int) -> bool:
    """Whether "twenty" or "twenty and" stands before `i`."""
    before = i - 2 if i and tokens[i - 1] in lexicon.AND_WORDS else i - 1
    return before >= 0 and tokens[before] in lexicon.TENS_WORDS


def _start_of_number(tokens: Tokens, i: int) -> int:
    """The start of "13" and of "only just 13", where the 13 is at `i`."""
    hedges = takewhile(lexicon.HEDGE_WORDS.__contains__, (tokens[i - n] for n in (1, 2) if n <= i))
    return i - len(list(hedges))


def _end_of_number(tokens: Tokens, i: int) -> int:
    """The end of "13" and of "13 to 19", where the 13 is at `i`."""
    match tokens[i + 1 : i + 3]:
        case [link, number] if link in lexicon.RANGE_WORDS:
            is_range = number.isdigit() or number in lexicon.RANGE_ENDS
            return i + 3 if is_range else i + 1
    return i + 1


def _has_unit(tokens: Tokens, end: int) -> bool:
    """Whether a unit of age follows the number ("years old"), and no thing of that age does."""
    unit_ends = _phrase_ends(tokens, end, lexicon.AGE_UNIT_PHRASES)
    if any(token.startswith(lexicon.AGE_MARK_PREFIXES) for token in tokens[end : end + 1]):
        unit_ends.append(end + 1)
    return any(
        lexicon.AGED_THING_WORDS.isdisjoint(tokens[after : after + 1]) for after in unit_ends
    )


def _is_years_of_person(tokens: Tokens, lead: int, end: int) -> bool:
    """Whether bare years follow the number, and a person stands before it ("girl, 13 years")."""
    unit, following = tokens[end : end + 1], tokens[end + 1 : end + 2]
    if lexicon.YEAR_WORDS.isdisjoint(unit) or not lexicon.TIME_WORDS.isdisjoint(following):
        return False
    is_led = _follows_phrase(tokens, lead, lexicon.YEAR_LEADS_BY_LAST)
    return is_led or _is_after_person(tokens, lead)


def _is_bare_age(tokens: Tokens, lead: int, end: int) -> bool:
    """Whether the number ends its clause, and a person stands before it ("she is 13")."""
    if not lexicon.CLAUSE_ENDS.issuperset(tokens[end : end + 1]):
        return False
    is_led = _follows_phrase(tokens, lead, lexicon.BARE_LEADS_BY_LAST)
    return is_led or _is_after_person(tokens, lead)


def _is_after_person(tokens: Tokens, lead: int) -> bool:
    """Whether "girl", "girl, " or "girl of" stands before `lead`."""
    before = lead - 2 if lead and tokens[lead - 1] in lexicon.LINKS else lead - 1
    return before >= 0 and tokens[before] in lexicon.PERSON_WORDS
