"""What the content floor knows: its words and phrases, and how they are looked up.

In the tables a comma separates the entries, and `*` stands for an "s" that may follow. The tables
are folded as the texts are, so they are written with accents and in their own scripts. Each phrase
is also known as one word ("littlegirl").

Change `LIST_VERSION` with every change of a table; `docs/content-floor.md` says how.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from ourvidz_serverless.guard import content_languages as languages
from ourvidz_serverless.guard.content_folding import REPEATED, SAME_STROKE, fold

LIST_VERSION = "2026-11-7"

# Words that by themselves mean a person under 18. A claim of age does not clear them ("teen, 19").
# Do not add girl, boy, young, petite, baby, babe, student, pupil, daughter, little sister: these
# are everyday words for adults. Do not add stems: kidney, minority, teensy and childhood friends
# would match.
MINOR = """
child*, children*, childlike, kid*, kiddie*, kiddo*, minor*, underage, underaged, under age girl*,
under age boy*, juvenile*, youngster*, teen*, teenage, teenaged, teenager*, tween*, preteen*, pre
teen*, adolescent*, pubescent, prepubescent, pre pubescent, prepub*, infant*, newborn*, toddler*,
preschooler*, kindergartner*, kindergartener*, kindergarten, preschool, pre school, nursery school,
elementary school, elementary schooler*, primary school, grade school, grade schooler*, middle
school, middle schooler*, secondary school, junior high, high school, high schooler*, school girl*,
school boy*, school child, school children, school kid*, school age, school aged, school uniform*,
girl scout*, boy scout*, little girl*, little boy*, little child*, young girl*, young boy*, small
girl*, small boy*, little daughter*, little son*, young daughter*, young son*, a baby girl, a baby
boy, of a baby, sweet sixteen, sweet 16, under 18, under eighteen, below 18, below eighteen, not yet
18, not yet eighteen, younger than 18, younger than eighteen, under the age of 18, under the age of
eighteen, jailbait, jail bait, nymphet*, aged down, de aged, age regression, age regressed, age
play, teen girl*, teen boy*, very young, nude baby, nude babies, naked baby, naked babies, not of
legal age, below legal age, under the age of consent, below the age of consent,

loli*, lolis, lolicon, lolita*, shota*, shotacon, toddlercon, rorikon, pedo*, pedophile*,
pedophilia, paedophile*, paedophilia, csam, pthc,

ninya*, ninyo*, ninyita*, ninyito*, menor de edad, menores de edad, colegiala*, adolescente*,
quinceañera*, chiquilla*, pornografía infantil, enfant*, mineure*, fillette*, gamines, une gamine,
petite gamine, petite fille, petites filles, petit garçon, petits garçons, écolière*, écolier*,
collégienne*, collégien*, lycéenne*, lycéen*, nourrisson*, bambin*, ein kind, das kind, kleines
kind, kleine kinder, kindern, kindes, kleinkind, kleinkinder, schulkind, schulkinder, kindlich,
minderjährig, minderjährige*, minderjähriger, minderjährigen, minderjähriges, schülerin,
schülerinnen, schulmädchen, kleines mädchen, kleine mädchen, junges mädchen, jugendliche,
jugendlicher, jugendlichen, säugling*, kinderen, minderjarig, minderjarige*, criança*, menor de
idade, menores de idade, menininha*, garotinha*, garotinho*, bambina, bambine, bambino, bambini,
minorenne, minorenni, ragazzina, ragazzine, ragazzino, ragazzini, neonato, neonata, undicenne,
dodicenne, tredicenne, quattordicenne, quindicenne, sedicenne, diciassettenne, dziecko, dzieci,
nieletni, nieletnia, ребенок, ребенка, дети, детей, детская порнография, подросток, подростка,
подростки, школьница, школьницы, школьник, школьницу, малолетка, малолетки, малолетняя, малолетний,
несовершеннолетняя, несовершеннолетний, несовершеннолетние, маленькая девочка, маленький мальчик,

未成年, 幼女, 女児, 男児, 児童, 小学生, 中学生, 高校生, 女子高生, 子供, 子ども, ロリ, ロリコン,
ロリータ, ショタ, ショタコン, 萝莉, 蘿莉, 小正太, 正太控, 儿童, 兒童, 初中生, 高中生, 小女孩,
小男孩, 小孩, 幼童, 미성년자, 초등학생, 중학생, 고등학생, 여고생, 여중생, 어린이
"""

# Words that make a text sexual, clinical and common ones. Do not add what children do and wear
# (bath, swimsuit, bare feet, kiss, diaper), virgin and madonna, breast and nursing: a nativity
# scene would be refused. Do not add what occurs inside other Chinese words (性的), unless
# `languages.UNSPACED_BENIGN` has those words.
# Adult mode needs none of these words, so ambiguous ones can be left out.
SEXUAL = """
sex, sexy, sexier, sexual, sexually, sexuality, sexualize, sexualized, sexualised, sexting, nude*,
nudity, naked, nekkid, nakedness, unclothed, undressed, undressing, undress, topless, bottomless,
without clothes, no clothes, wearing nothing, nsfw, porn, porno, porns, pornographic, pornography,
xxx, hentai, ecchi, rating explicit, explicit content, erotic, erotica, eroticism, erotically, lewd,
lewds, lustful, lustfully, horny, aroused, arousing, arousal, seductive, seductively, seduce,
seducing, sensual, sensually, kinky, fetish, fetishes, bdsm, bondage, intercourse, masturbate*,
masturbating, masturbation, orgasm*, orgasmic, fellatio, cunnilingus, blowjob*, blow job*, handjob*,
cum, cumshot*, creampie*, ejaculate*, ejaculation, anal, foreplay, orgy, orgies, threesome*,
gangbang*, making love, make love, rape*, raped, raping, molest*, molested, grope*, groped, groping,
fondle*, fondling, incest, prostitute*, prostitution, striptease, strip tease, stripper*, upskirt,
cameltoe, camel toe, ahegao, futanari, genital*, genitalia, penis, penises, vagina*, vaginal,
vulva*, clitoris, anus, scrotum, testicle*, pubic, breasts, bare breast, nipple*, areola*, buttock*,
bare bottom, bare butt, bare ass, boob*, tit, tits, titties, ass, dick*, cock*, pussy, cunt*, cunny,
fuck*, fucked, fucking, slut*, slutty, cleavage, lingerie, underwear, panties, panty, thong, bra,
dildo*, vibrator*, spread legs, legs spread, onlyfans, csam, pthc,

desnuda*, desnudo*, desnudez, sexo, erótica*, erótico*, pornografía, tetas, nue*, dénudée*,
déshabillée*, sexe, sexuelle*, sexuel*, érotique*, seins, nackt, nackte*, nackter, nackten, nacktes,
sexuell, sexuelle, erotisch, erotische, brüste, naakt, nua*, sem roupa, pornográfico*, nuda, nudo,
nudi, sesso, sessuale, erotico, erotiche, голая, голый, голые, голую, голой, обнаженная, обнаженный,
обнаженные, нагая, секс, порно, эротика, эротическая, эротический, сексуальная, сексуальный, детская
порнография, 裸, ヌード, セックス, エロ, エッチ, ポルノ, 全裸, 性行為, 色情, 情色, 性感内衣, 淫,
나체, 누드, 알몸, 섹스, 포르노
"""

# Set phrases that contain a sign and mean something else. Only spaces, hyphens and apostrophes may
# stand between their words: "a minor, key light" is no "minor key". Never add a phrase that can
# also describe a minor or a character who is one ("wild child", "in a minor", "Teen Titans"). Never
# add an animal to the things that have an age ("a 12 year old cat girl").
BENIGN = """
minor key*, minor chord*, minor scale*, minor third*, minor sixth*, minor seventh*, minor detail*,
minor change*, minor adjustment*, minor edit*, minor tweak*, minor fix, minor fixes, minor flaw*,
minor imperfection*, minor skin imperfection*, minor blemish, minor blemishes, minor scratch, minor
scratches, minor scuff*, minor scar*, minor wrinkle*, minor injury, minor injuries, minor issue*,
minor problem*, minor role*, minor variation*, minor difference*, minor version*, minor release*,
minor league*, minor arcana, minor surgery, minor planet*, minor deity, minor deities, minor film
grain, minor damage, b minor, c minor, d minor, e minor, f minor, g minor, sharp minor, flat minor,
ursa minor, canis minor, leo minor, asia minor, asie mineure, vinca minor, kid glove*, kid leather,
kid skin, kid goat*, billy the kid, sundance kid, cisco kid, i kid you not, kid cudi, kid rock, kid
icarus, new kids on the block, child s pose, childs pose, child bearing, childbearing, inner child,
destiny s child, destinys child, child free, child process, child processes, child class, child
node*, child element*, child support, teen vogue, teenage mutant ninja turtle*, mutant ninja
turtle*, gothic lolita, lolita fashion, girl scout cookie*, high school teacher*, high school
principal, high school reunion*, middle school teacher*, elementary school teacher*, primary school
teacher*, secondary school teacher*, kindergarten teacher*, preschool teacher*, dragon age, ice age,
stone age, bronze age, iron age, middle age, dix huit, dix neuf, infant formula, enfant terrible, 18
minute*, 18 second*, 18 hour*, 18 day*, 18 degree*, 18 percent, 18 dollar*, 18 euro*, 18 inch, 18
inches, 18 pound*, 18 kg, 18 cm, 18 mm, 18 miles, 18 km, sex ed, sex education, same sex, opposite
sex, fair sex, biological sex, sex of the baby, nude color*, nude colour*, nude colored, nude
coloured, nude tone*, nude lipstick, nude lip*, nude heel*, nude pump*, nude makeup, nude palette,
nude nail*, nude shade*, naked eye*, naked mole, moby dick, dick tracy, dick van dyke, cum laude,
kick ass, pussy willow*, pussy cat*, blue tits, great tits, coal tits, bottle nipple*, cock a
doodle, black cock, anal retentive, bottomless pit*, sex pistols, sex and the city, sexual education
"""

# A clause that forbids asks for nothing: "never depict minors", "no one under 18", "refuse sexual
# content". After a negation and any of these fillers, the legal words in FORBIDDEN are no signs,
# nor is "sexual" before "content". Do not add children, teens, ages, nude: an image model reads "no
# child" as "child". A refusal that is denied forbids nothing: "never refuse minors".
DENIALS = "no, not, never, without, cannot, dont, mustnt, nobody, t"
REFUSALS = "refuse, refuses, decline, reject, avoid, exclude, forbid, prohibit"
FILLERS = """
a, about, age, an, and, any, anybody, anyone, anything, are, as, be, character, characters, contain,
contains, content, create, depict, depicting, depicts, describe, describing, discuss, engage,
eighteen, feature, featuring, for, generate, generating, if, in, include, including, involve,
involves, involving, is, material, of, one, or, people, person, persons, portray, portraying,
produce, provide, request, requests, roleplay, sexual, sexualize, sexualise, show, someone, than,
that, the, themes, to, under, who, with, write, writing, years, old, younger, ever
"""
FORBIDDEN = "minor, minors, underage, underaged, 18, eighteen"
MATERIAL = "content, material, themes, acts, activity"
MAX_FILLERS = 10  # between a negation and what it forbids

# A complete sentence of a system message that forbids: a negation, a list of these nouns, and
# perhaps a verb ("No school settings or minor context applies."). In such a sentence the nouns that
# are also in FORBIDDEN are no signs; nothing else changes. Every word of the sentence must be in
# these tables, so that it cannot ask for anything: "No rules or minor context applies." and "No,
# minor context applies." are not recognised. Do not add adult, rule, limit, restriction, or another
# verb ("is refused").
PROHIBITIONS = "no, never any, not any"
PROHIBITED = """
school, schools, college, colleges, classroom, classrooms, campus, minor, minors, underage,
underaged
"""
KINDS = """
context, contexts, setting, settings, content, scenario, scenarios, theme, themes, character,
characters
"""
PROHIBITED_VERBS = "applies, apply, is allowed, are allowed"

# What follows a number and by itself makes it an age. Do not add bare years, which are more often a
# time ("15 years of experience", "hace 10 años"): those are in YEARS, and need a lead, which is a
# phrase before the number.
AGE_UNITS = """
years old, year old, year olds, yrs old, yr old, yr olds, yo, yos, y o,
세, years young, years of age, year of age, months old, month old, month olds, th birthday, st
birthday, nd birthday, rd birthday, th grade, th grader*, st grade, st grader*, nd grade, nd
grader*, rd grade, rd grader*, year girl*, year boy*, yr girl*, yr boy*, años de edad, anos de
idade, añitos, aninhos, ans d âge, ans dâge, jahre alt, jahre jung, jährig, jährige, jähriger,
jähriges, jährigen, jaehrige, jaehriger, jaehriges, jaar oud, anni di età, лет от роду, летняя,
летний, летние, летней, летнюю, летнего
"""
AGED_THINGS = """
whisky, whiskey, scotch, bourbon, rum, wine, cognac, brandy, cheese, car, truck, house, building,
tree, company, tradition, mystery, yo, yos
"""
# What stands before a number and makes it an age, unless another measure follows.
AGE_LEADS = """
aged, age, ages, age of, age is, alter von, edad de, edad, idade de, idade, età di, возраст,
возрасте
"""
NOT_AGES = """
years in oak, years in cask*, years in barrel*, years in bottle, hour*, day*, week*, month*,
minute*, percent
"""
# Years that are an age if a person or "has" stands just before the number, and no "de" follows:
# that makes them a time ("tiene 10 años de experiencia").
YEARS = "years, yrs, yr, años, ans, anni, jahre, jahren, jaar, лет, года"
YEAR_LEADS = """
tiene, tengo, tenía, cumple, tem, tenho, tinha, elle a, il a, j ai, jai, âgée de, âgé de, âgées de,
ей, ему, мне
"""
OF_TIME = "de, di, d, of, ago, experience, later, назад, опыта"
PERSON = """
girl*, boy*, woman, women, man, men, female*, male*, lady, daughter*, son*, sister*, brother*,
student*, chica*, chico*, niña*, niño*, muchacha*, muchacho*, mujer, hija, hijo, fille*, garçon*,
femme, élève*, mädchen, junge, frau, tochter, sohn, meisje, jongen, menina*, menino*, garota*,
garoto*, moça, mulher, filha, filho, ragazza, ragazze, ragazzo, donna, figlia, figlio, девочка,
девочки, девушка, мальчик, дочь, сын
"""
LINKS = "de, di, of, von, mit, con, com, with, is"
# After these, a number alone is an age if its clause ends with it. Only digits and English words
# count, from FIRST_BARE on: "elf" is eleven in German, and a common tag.
BARE_LEADS = """
she is, he is, she s, he s, shes, hes, i am, i m, im, who is, who s, they are, they re, both are,
you are, you re, youre, turned, turning, turns, looks, looks like, look, appears, under, not even,
not yet
"""
HEDGES = "only, just, about, around, almost, nearly, barely, still, maybe, like"
FIRST_BARE = 4
CLAUSE_ENDS = {",", "and", "but", "last", "this", "today", "yesterday", "now", "when", "so"}

# Numbers below 18, in order from one, as an age can be written.
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen",
    "un dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis"
    " diecisiete",
    "une deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize"
    " dixsept",
    "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn"
    " sechzehn siebzehn",
    "um dois três quatro cinco seis sete oito nove dez onze doze treze quatorze quinze dezesseis"
    " dezessete",
    "uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici"
    " quindici sedici diciassette",
    "один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать"
    " четырнадцать пятнадцать шестнадцать семнадцать",
)
SCHOOL_YEARS = """
first, second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth, eleventh, twelfth
"""
RUSSIAN_STEMS = """
пяти, шести, семи, восьми, девяти, десяти, одиннадцати, двенадцати, тринадцати, четырнадцати,
пятнадцати, шестнадцати, семнадцати
"""
# A number after one of these is a part of a larger number: "twenty-five years old".
TENS = """
twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety, hundred, thousand, million, veinte,
treinta, cuarenta, cincuenta, sesenta, setenta, ochenta, noventa, cien, ciento, mil, vingt, trente,
quarante, cinquante, soixante, cent, mille, vinte, trinta, quarenta, cinquenta, sessenta, oitenta,
cento, двадцать, тридцать, сорок, пятьдесят, шестьдесят, семьдесят, восемьдесят, девяносто, сто
"""
AND = "and, y, e, et"
RANGES = "to, or, and, a, bis, o, ou, y, e"
# Words for 18 and 19. With the numbers below 18 and the tens, they end a span that begins below 18:
# "twelve to nineteen years old".
TOP_TEENS = """
eighteen, nineteen, dieciocho, diecinueve, achtzehn, neunzehn, dezoito, dezenove, diciotto,
diciannove, восемнадцать, девятнадцать
"""
# A word that begins with one of these makes the number before it an age. Not 세: 15세기 is the 15th
# century.
AGE_MARKS = "歳, 才, 岁, 歲, 周岁, 周歲, さい, 살, yearold, yearsold"

Tokens = list[str]

#: Phrases by their first word, or by their last one.
Index = dict[str, set[tuple[str, ...]]]

#: The token for a pause: a comma, an end of a sentence, a new line.
PAUSE = ","

#: A word that is in no table, and no part of an entry.
NEUTRAL = "excluded"

#: In letters: shorter words are not recognised in two parts. Nor are the words in NOT_CUT, whose
#: parts occur in other texts: "5 min or less", "the pen is".
MIN_CUT_LETTERS = 5
NOT_CUT = {"minor", "minors", "underage", "penis", "porno", "bambino"}

UMLAUT = re.compile("[äöü]")
WITHOUT_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})

KATAKANA = re.compile("[ァ-ヺー]")


def _entries(table: str) -> Iterator[Tokens]:
    """The folded phrases of a table; a phrase with `*` occurs without and with its "s"."""
    for entry in _spellings(table):
        words = fold(entry).replace("*", "").split()
        yield words
        if "*" in entry:
            yield [*words[:-1], words[-1] + "s"]


def _spellings(table: str) -> Iterator[str]:
    """The entries of a table; those with an umlaut also without ("maedchen")."""
    for entry in table.split(","):
        yield entry
        if UMLAUT.search(entry):
            yield entry.translate(WITHOUT_UMLAUTS)


def _words(table: str) -> frozenset[str]:
    return frozenset(" ".join(words) for words in _entries(table))


def _index(table: str, key: int = 0) -> Index:
    index: Index = {}
    for words in _entries(table):
        index.setdefault(words[key], set()).add(tuple(words))
    return index


def _prohibition() -> re.Pattern[str]:
    """The sentences that `PROHIBITIONS` describes, in their plain spelling only."""
    noun = rf"(?:{_either(PROHIBITED)})(?: (?:{_either(KINDS)}))?"
    by_and = rf"(?: and {noun}){{1,6}}"
    by_or = rf"(?:, {noun}){{0,6}}(?:,? n?or {noun}){{1,6}}"
    start = r"(?:\A|(?<=\n)|(?<=\n- )|(?<=[.!?] ))"
    end = r"(?=[.!](?:\s|\Z)|\n\n|\n- |\s*\Z)"
    sentence = rf"(?:{_either(PROHIBITIONS)}) {noun}(?:{by_and}|{by_or})?"
    return re.compile(
        rf"{start}{sentence}(?: (?:{_either(PROHIBITED_VERBS)}))?{end}", re.ASCII | re.IGNORECASE
    )


def _either(table: str) -> str:
    return "|".join(sorted(_words(table)))


def _ages_in_a_word() -> str:
    german = [f"{n}jährig{e}" for n in NUMBERS[3].split() for e in ("", "e", "er", "es", "en")]
    russian = [
        f"{n}летн{e}" for n in _words(RUSSIAN_STEMS) for e in ("яя", "ий", "ей", "юю", "его", "ие")
    ]
    grades = [f"{year} {grade}" for year in _words(SCHOOL_YEARS) for grade in ("grade", "grader*")]
    infants = [f"{n} {month} old" for n in range(18, 37) for month in ("month", "months")]
    schools = (("小学", "一二三四五六123456"), ("中学", "一二三123"), ("高校", "一二三123"))
    japanese = [f"{school}{year}年" for school, years in schools for year in years]
    return ", ".join([*german, *russian, *grades, *infants, *japanese])


def _keys_in_a_word() -> str:
    """The minor keys after the punctuation in "B-flat minor" has been left out."""
    return ", ".join(f"{note}{sign} minor" for note in "abcdefg" for sign in ("flat", "sharp"))


def _parts(*tables: str) -> Iterator[str]:
    """The single words of all entries."""
    for table in tables:
        yield from (word for words in _entries(table) for word in words)


def _one_of(words: Iterable[str]) -> str:
    """A pattern of the longest of these words, as a tree of their letters: time per letter."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(tree)


def _branches(node: dict[str, Any]) -> str:
    parts = [re.escape(letter) + _branches(rest) for letter, rest in node.items() if letter]
    return f"(?:{'|'.join(parts)}){'?' if '' in node else ''}" if parts else ""


def _number_rows() -> Iterator[tuple[str, list[str]]]:
    """Each language's numbers from one to 19, folded, as words without spaces."""
    for language, rows in languages.NUMBERS.items():
        for row in rows:
            yield language, [fold(number).replace("_", "") for number in row.split()]


def _compounds() -> tuple[str, str]:
    """Patterns of the first and second words of numbers that are two words ("dix sept")."""
    pairs = {
        tuple(fold(number).split("_"))
        for rows in languages.NUMBERS.values()
        for row in rows
        for number in row.split()
        if "_" in number
    }
    first, second = zip(*pairs, strict=True)
    return _one_of(sorted(set(first))), _one_of(sorted(set(second)))


def _tens_before() -> dict[str, frozenset[str]]:
    """For each number below 18, the tens of its language."""
    tens: dict[str, frozenset[str]] = {}
    for language, numbers in _number_rows():
        for number in numbers[:17]:
            tens[number] = tens.get(number, frozenset()) | _words(languages.TENS[language])
    return tens


def _glued(table: str) -> str:
    """The table, and each of its phrases as one word."""
    return table + "".join(f", {''.join(words)}" for words in _entries(table) if len(words) > 1)


# The tables as the floor reads them: words in sets, phrases by their first word.
_OTHER_MINOR, _OTHER_SEXUAL = languages.minor(), languages.sexual()
MINOR_PHRASES = _index(", ".join([_glued(MINOR), _ages_in_a_word(), _glued(_OTHER_MINOR)]))
SEXUAL_PHRASES = _index(", ".join([_glued(SEXUAL), _glued(_OTHER_SEXUAL)]))
BENIGN_PHRASES = _index(
    ", ".join([BENIGN, _keys_in_a_word(), languages.expanded(languages.BENIGN)])
)
DENIAL_WORDS, REFUSAL_WORDS = map(_words, (DENIALS, REFUSALS))
FILLER_WORDS, FORBIDDEN_WORDS = map(_words, (FILLERS, FORBIDDEN))
NEGATION_WORDS = DENIAL_WORDS | REFUSAL_WORDS
PROHIBITION_PATTERN = _prohibition()
FORBIDDEN_NOUN_PATTERN = re.compile(rf"\b(?:{_either(FORBIDDEN)})\b", re.ASCII | re.IGNORECASE)
HEDGE_WORDS = _words(HEDGES)
MATERIAL_WORDS = _words(MATERIAL)
AGED_THING_WORDS = _words(AGED_THINGS) | _words(languages.expanded(languages.AGED_THINGS))
AGED_THING_ENDINGS = tuple(_words(languages.AGED_THING_ENDINGS))
TAG_YEAR_WORDS = _words(languages.YEARS)
YEAR_WORDS = _words(YEARS) | TAG_YEAR_WORDS
TIME_WORDS = _words(OF_TIME) | _words(languages.OF_TIME)
PERSON_WORDS = _words(PERSON) | _words(languages.expanded(languages.PERSON))
LINK_WORDS = _words(LINKS + ", " + languages.LINKS) | {PAUSE}
TENS_WORDS, AND_WORDS = map(_words, (TENS, AND))
RANGE_WORDS = _words(RANGES) | _words(languages.RANGES)
_UNITS = AGE_UNITS + ", " + languages.expanded(languages.AGE_UNITS)
AGE_UNIT_PHRASES, NOT_AGE_PHRASES = map(_index, (_UNITS, NOT_AGES))
HALF_PHRASES = _index(languages.HALVES)
AGE_LEADS_BY_LAST, YEAR_LEADS_BY_LAST, BARE_LEADS_BY_LAST = (
    _index(table, key=-1)
    for table in (
        AGE_LEADS + ", " + languages.AGE_LEADS,
        YEAR_LEADS + ", " + languages.YEAR_LEADS,
        BARE_LEADS + ", " + languages.BARE_LEADS,
    )
)
(
    ITALIAN_LEADS_BY_LAST,
    TAG_LEADS_BY_LAST,
    SPAN_LEADS_BY_LAST,
    LIMITS_BY_LAST,
    LIMITS_OF_YEARS_BY_LAST,
) = (
    _index(languages.expanded(table), key=-1)
    for table in (
        languages.ITALIAN_LEADS,
        languages.TAG_LEADS,
        languages.SPAN_LEADS,
        languages.LIMITS,
        languages.LIMITS_OF_YEARS,
    )
)
#: One of these stands near each number that is an age.
AGE_WORDS = frozenset(
    chain(
        AGE_UNIT_PHRASES,
        YEAR_WORDS,
        PERSON_WORDS,
        AGE_LEADS_BY_LAST,
        YEAR_LEADS_BY_LAST,
        BARE_LEADS_BY_LAST,
    )
)
LIMIT_FILLERS = _words(languages.LIMIT_FILLERS)
LIMIT_END_PHRASES = _index(languages.LIMITS_AFTER)
#: One of these stands near each 18 that is a limit.
LIMIT_WORDS = frozenset(chain(LIMITS_BY_LAST, LIMITS_OF_YEARS_BY_LAST, LIMIT_END_PHRASES))
LIMITED_WORDS = YEAR_WORDS | PERSON_WORDS | {*AGE_LEADS_BY_LAST} | {*AGE_UNIT_PHRASES}
AGE_MARK_PREFIXES = tuple(_words(AGE_MARKS))
_NUMBER_ROWS = list(_number_rows())
#: Numbers that are an age even without a unit, after a lead ("aged twelve").
LED_AGES = frozenset(
    {f"{n:0{digits}}" for n in range(18) for digits in (1, 2)}
    | {word for language in NUMBERS for word in fold(language).split()}
)
MINOR_AGES = LED_AGES | {number for _, row in _NUMBER_ROWS for number in row[:17]}
MINOR_AGES |= {f"{number}einhalb" for number in fold(NUMBERS[3]).split()}
TENS_BEFORE = _tens_before()
EIGHTEENS = _words("18, eighteen, dieciocho, achtzehn, diciotto")
EIGHTEENS |= {row[17] for _, row in _NUMBER_ROWS}
AGES = MINOR_AGES | EIGHTEENS
RANGE_ENDS = (
    MINOR_AGES | _words(TOP_TEENS) | TENS_WORDS | {n for _, row in _NUMBER_ROWS for n in row}
)
BARE_AGES = frozenset(map(str, range(FIRST_BARE, 18))) | set(NUMBERS[0].split()[FIRST_BARE - 1 :])
COMPOUND_NUMBER = re.compile(r"(?<!\w)({})[ -]({})(?!\w)".format(*_compounds()))

_INDEXES = (MINOR_PHRASES, SEXUAL_PHRASES)
_SINGLE_WORDS = sorted({word for index in _INDEXES for word in index if (word,) in index[word]})
_MAIN_WORDS = _words(_glued(MINOR)) | _words(_glued(SEXUAL))
#: Other languages' words of less than five letters occur in glued words by chance.
KNOWN_WORDS = [word for word in _SINGLE_WORDS if len(word) > (2 if word in _MAIN_WORDS else 4)]
KNOWN_WORD_STARTS = re.compile(f"(?=({_one_of(KNOWN_WORDS)}))")
CUT_WORDS = {word for word in KNOWN_WORDS if len(word) >= MIN_CUT_LETTERS} - NOT_CUT
GLUED_PARTS = {*KNOWN_WORDS, "girl", "girls", "boy", "boys"}
GLUED_PREFIXES = {word[:3] for word in GLUED_PARTS}

_UNSPACED = [word for word in _SINGLE_WORDS if word[0] >= "\u1100" and not KATAKANA.match(word)]
_KOREAN = _words(_glued(languages.KOREAN_MINOR + ", " + languages.KOREAN_SEXUAL))
_BENIGN = _words(languages.UNSPACED_BENIGN) | {f"{char}性" for char in languages.BEFORE_SEX}
#: Words in texts without their spaces. A longer harmless word is found first, and is no sign.
UNSPACED_WORD = re.compile(_one_of([*(set(_UNSPACED) - _KOREAN), *_BENIGN]))
KOREAN_WORD = re.compile(
    "(?<![가-힣])" + _one_of([*_KOREAN, *_words(_glued(languages.KOREAN_BENIGN))])
)
#: 女性 is no sign, but 美女 and 性感内衣 stand in 美女性感内衣.
SEX_WORDS = [word for word in _UNSPACED if word in _MAIN_WORDS and word[0] == "性"]
UNSPACED_AGE = re.compile(fold("|".join(languages.UNSPACED_AGES)))
UNSPACED_SCHOOL_YEAR = re.compile(languages.UNSPACED_SCHOOL_YEARS)
_SIGN_WORDS = {w for index in _INDEXES for phrases in index.values() for ws in phrases for w in ws}
#: All words of signs, of ages and of limits, as parts of what a disguise hides.
PARTS = frozenset(
    word
    for word in (
        *_SIGN_WORDS,
        *(number for _, row in _NUMBER_ROWS for number in row[:18]),
        *MINOR_AGES,
        *EIGHTEENS,
        *YEAR_WORDS,
        *_parts(_UNITS, AGE_LEADS, languages.AGE_LEADS, YEAR_LEADS, languages.YEAR_LEADS),
        *_parts(languages.expanded(languages.LIMITS), languages.LIMITS_AFTER),
        *_parts(BARE_LEADS, languages.BARE_LEADS),
    )
    if len(word) > 2 and word.isalpha()
)
# Of four letters only what needs a number beside it: in Dutch, "t een" is no "teen".
_SHORT_PARTS = {word for word in YEAR_WORDS | MINOR_AGES if len(word) == MIN_CUT_LETTERS - 1}
CUT_PARTS = frozenset(word for word in PARTS if len(word) >= MIN_CUT_LETTERS) - NOT_CUT
CUT_PARTS |= _SHORT_PARTS & PARTS
CAMEL_PARTS = {word for word in PARTS if len(word) > 3} | _MAIN_WORDS | TAG_YEAR_WORDS
_LEET_TABLES = (MINOR, SEXUAL, AGE_UNITS, AGE_LEADS, PERSON, ",".join(NUMBERS[0].split()))
LEET_WORDS = {
    word.translate(SAME_STROKE): word
    for table in _LEET_TABLES
    for words in _entries(_glued(table))
    for word in words
}
for _part in sorted(PARTS):
    LEET_WORDS.setdefault(_part.translate(SAME_STROKE), _part)
# Reversed, so that the first table takes precedence: "teeeen" is teen, not ten.
STRETCHED_WORDS = {REPEATED.sub(r"\1", drawn): word for drawn, word in reversed(LEET_WORDS.items())}
