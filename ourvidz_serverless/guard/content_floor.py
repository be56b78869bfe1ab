"""The content floor: no sexual content involving minors, whatever any caller says.

A text is refused that holds a sign of a minor together with a sexual sign; in adult mode the
sign of a minor is enough. The signs of one job add up over all of its texts. There is no
setting and no switch, and nothing is read or written.

    prohibitions         "No school or minor context applies.", in a system message only
    unescaped, folded    HTML references, compatibility forms, marks, look-alikes, case
    read again           without punctuation in words, without leet, without spelling out
    tokens               words, numbers, and a comma for every pause
    masked               set phrases that only look like a sign ("minor key")
    signs                words and phrases, ages, words that were glued together or cut apart

It is a floor and not a classifier: `docs/content-floor.md` has what it catches, what it misses
and where it errs, measured. Whoever changes a table changes `LIST_VERSION`, adds the case to
`tests/data/safety_cases.json` and measures again.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, takewhile

from ourvidz_serverless.errors import ContentRefused
from ourvidz_serverless.job import CheckedText, Role, Signs

LIST_VERSION = "2026-11-4"

# In the tables a comma parts the entries, and `*` stands for an "s" that may follow. They are
# folded as the texts are, so they are written with their accents and in their own scripts. Every
# phrase is also known as one word ("littlegirl").

# What names a person under 18 by itself. Claims of age do not clear it ("teen, 19").
# Not to be generalised to girl, boy, young, petite, baby, babe, student, pupil, daughter, little
# sister: in this field, and of adults anywhere, these are everyday words. Nor to stems, for the
# sake of kidney, minority, teensy and childhood friends.
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

# What makes a text sexual, in clinical and in common words.
# Not to be generalised to what children do and wear (bath, swimsuit, bare feet, kiss, diaper), to
# virgin and madonna, or to breast and nursing: with them a nativity would be refused. Nor to what
# Chinese finds in the middle of other words (性的, 性交, 做爱). Adult mode needs none of these, so
# the table can stay short of the ambiguous ones.
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

# Set phrases that hold a sign and mean something else. Nothing between their words but blanks,
# hyphens and apostrophes: "a minor, key light" is no "minor key". Never add one that could as well
# describe a minor or a character who is one ("wild child", "in a minor", "Teen Titans"), and to the
# things that have an age no animal ("a 12 year old cat girl").
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
doodle, black cock, anal retentive, bottomless pit*, sex pistols, sex and the city
"""

# A clause that forbids is no wish: "never depict minors", "no one under 18", "refuse sexual
# content". After a negation, and through these fillers, three legal words fall silent, and
# "sexual" before "content". Not to be extended to children, teens, ages, nude: an image model reads
# "no child" as "child". A refusal that is denied forbids nothing: "never refuse minors".
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
PATIENCE = 10  # fillers between a negation and what it forbids

# A whole sentence of a system message that forbids: a negation, a list of these nouns, a verb or
# none ("No school settings or minor context applies."). In it the nouns that are also in FORBIDDEN
# are no signs; nothing else changes. Every word of the sentence must be in these tables, so that it
# cannot ask for anything: "No rules or minor context applies." and "No, minor context applies." are
# not recognised. Do not add adult, rule, limit, restriction, or another verb ("is refused").
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

# What follows a number and makes it an age at once. Not to be generalised to bare years, which are
# more often a time ("15 years of experience", "hace 10 años"): those are in YEARS, and need a lead.
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
# What stands before a number and makes it an age, whatever follows but another measure.
AGE_LEADS = """
aged, age, ages, age of, age is, alter von, edad de, edad, idade de, idade, età di, возраст,
возрасте
"""
NOT_AGES = """
years in oak, years in cask*, years in barrel*, years in bottle, hour*, day*, week*, month*,
minute*, percent
"""
# Years that are an age where a person, or having them, is said just before; no "de" after them,
# which makes them a time again ("tiene 10 años de experiencia").
YEARS = "years, yrs, yr, años, ans, anni, jahre, jahren, jaar, лет, года"
YEAR_LEADS = """
tiene, tengo, tenía, cumple, tem, tenho, tinha, elle a, il a, j ai, jai, âgée de, âgé de, âgées de,
ha, ho, ей, ему, мне
"""
OF_TIME = "de, di, d, of, ago, experience, later, назад, опыта"
PERSON = """
girl*, boy*, woman, women, man, men, female*, male*, lady, daughter*, son*, sister*, brother*,
student*, chica*, chico*, niña*, niño*, muchacha*, muchacho*, mujer, hija, hijo, fille*, garçon*,
femme, élève*, mädchen, junge, frau, tochter, sohn, meisje, jongen, menina*, menino*, garota*,
garoto*, moça, mulher, filha, filho, ragazza, ragazze, ragazzo, donna, figlia, figlio, девочка,
девочки, девушка, мальчик, дочь, сын
"""
LINKS = {",", "de", "di", "of", "von", "mit", "con", "com", "with", "is"}
# A number alone is an age after these, where the clause ends with it: digits and English words
# only, from FIRST_BARE on. "Elf" is eleven in German, and a tag.
BARE_LEADS = """
she is, he is, she s, he s, shes, hes, i am, i m, im, who is, who s, they are, they re, both are,
you are, you re, youre, turned, turning, turns, looks, looks like, look, appears, under, not even,
not yet
"""
HEDGES = "only, just, about, around, almost, nearly, barely, still, maybe, like"
FIRST_BARE = 4
CLAUSE_ENDS = {",", "and", "but", "last", "this", "today", "yesterday", "now", "when", "so"}

# Numbers below 18, in order from one: what an age can be written with.
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
# "Twenty-five years old" does not say five.
TENS = """
twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety, hundred, thousand, million, veinte,
treinta, cuarenta, cincuenta, sesenta, setenta, ochenta, noventa, cien, ciento, mil, vingt, trente,
quarante, cinquante, soixante, cent, mille, vinte, trinta, quarenta, cinquenta, sessenta, oitenta,
cento, двадцать, тридцать, сорок, пятьдесят, шестьдесят, семьдесят, восемьдесят, девяносто, сто
"""
AND = "and, y, e, et"
RANGES = "to, or, and, a, bis, o, ou, y, e"
HAN_DIGITS = "一二三四五六七八九"
# How a word begins that makes the number before it an age. Not 세: 15세기 is the 15th century.
AGE_MARKS = "歳, 才, 岁, 歲, 살, yearold, yearsold"

# Letters that are drawn like Latin ones, each before its twin, where compatibility forms do not
# already say so. Both cases of a Cyrillic letter fold alike, or Russian could not be found.
LOOK_ALIKES = """
аa вb еe ѕs іi їi јj кk мm нh оo рp сc тt уy хx ԁd һh ԛq ԝw Аa Вb Еe Кk Мm Нh Оo Рp Сc Тt Уy Хx αa
βb εe ηn ιi κk νv οo ρp τt υu χx γy ωw Αa Βb Εe Ηh Ιi Κk Μm Νn Οo Ρp Τt Υy Χx Ζz օo սu ոn ցg հh յj
զq Ꭺa Ᏼb Ꮯc Ꭰd Ꭼe Ꮐg Ꮋh Ꭵi Ꭻj Ꮶk Ꮮl Ꮇm Ꮲp Ꭱr Ꮪs Ꭲt Ꮩv Ꮃw Ꮓz ıi łl øo đd ðd ħh ŧt ɑa ɡg ɩi ᴀa ʙb ᴄc
ᴅd ᴇe ꜰf ɢg ʜh ɪi ᴊj ᴋk ʟl ᴍm ɴn ᴏo ᴘp ʀr ꜱs ᴛt ᴜu ᴠv ᴡw ʏy ᴢz
"""
DRAWN = {
    **{pair[0]: pair[1] for pair in LOOK_ALIKES.split()},
    **dict.fromkeys("👶🧒👧👦", " child "),
    **dict.fromkeys("’‘ʼ`´′", "'"),
    **dict.fromkeys("\u115f\u1160\u3164\uffa0\u2800", ""),  # letters and signs without ink
    **{chr(0x1F150 + i): chr(97 + i) for i in range(26)},  # letters in black circles
    **{chr(0x1F170 + i): chr(97 + i) for i in range(26)},  # in black squares
    **{chr(0x1F1E6 + i): chr(97 + i) for i in range(26)},  # in flags
    "🔞": " nsfw ",
    "æ": "ae",
    "œ": "oe",
}
# Nobody sees tag characters, and language models read them as the letters that they stand for.
TAGS = {0xE0000 + code: code for code in range(0x20, 0x7F)}
TAG = re.compile("[\U000e0020-\U000e007e]")
LEET = str.maketrans("0123456789@$!|+€£¡", "oizeasgtbgasiiteli")
ONE_STROKE = str.maketrans("l", "i")  # 1, ! and | are both

Tokens = list[str]
Index = dict[str, set[tuple[str, ...]]]  # phrases by their first word, or by their last
PAUSE = ","
MASK = "·"
NEUTRAL = "excluded"  # a word that is in no table, nor part of one

UNESCAPES = 4
FORMS = 4  # letters that one character may unfold to; only whole Arabic phrases have more
FOLDS = 50_000  # characters whose fold is remembered
LONGEST = 30  # letters of a word worth cutting in two
WORDS = range(1, 7)  # that a phrase may have
SHORTEST_CUT = 5
NOT_CUT = {"minor", "minors", "underage", "penis", "porno", "bambino"}  # 5 min or less; the pen is

AMPERSANDS = re.compile(r"&(?:amp;)+")
ZEROS = re.compile(r"&#0+(?=\d)")
HUGE = re.compile(r"&#\d{8,}")  # no character, and a number that Python refuses to read
TILDE = re.compile("[ñÑ]|[nN]\u0303")

WEIGHT = re.compile(r":\s{0,2}\d{1,2}(?:\.\d{1,3})?\s{0,2}(?=[)\]>])")  # (word:1.2)
THOUSANDS = re.compile(r"(?<=\d)[,.](?=\d{3}(?!\d))")
DECIMALS = re.compile(r"(?<=\d)\.\d{1,2}(?!\d)")
SPAN = re.compile(r"(?<=\d)\s?-\s?(?=\d)")
SHORT_AGE = re.compile(r"(?<!\w)(\d{1,2})y(?!\w)")
HAN_AGE = re.compile(
    rf"(?<![{HAN_DIGITS}两十百千])(?:[{HAN_DIGITS}两]|十[一二三四五六七]?)(?=[歳才岁歲])"
)

TOKEN = re.compile(r"[0-9]+|[ァ-ヺー]+|[^\W\d_ァ-ヺー]+|[,;.!?|\n。、，]")
PAUSES = frozenset(",;.!?|\n。、，")
IN_WORD = re.compile(r"(?<=[^\W_])(?:[^\w\s]|_){1,3}(?=[^\W_])")
SPELLED = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_](?![^\W_])){2,}")
CHUNK = re.compile(r"[a-z0-9@$!|+€£¡]+")
STRETCHED = re.compile(r"(.)\1\1")
REPEATED = re.compile(r"(.)\1+")
KATAKANA = re.compile("[ァ-ヺー]")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether texts are refused, by which rule (for the audit line) of which list, and why."""

    refused: bool
    rule: str | None
    version: str
    signs: Signs


def check(text: str, *, adult: bool = False, role: Role = "user") -> Verdict:
    """What the floor says of one text. Pure, and linear in its length."""
    return judge([CheckedText(text, "text", role)], adult=adult)


def refusal(verdict: Verdict) -> ContentRefused:
    """What a refused job ends with."""
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
    """The verdict on a job: the signs in all of its texts add up.

    `found` are the signs in texts that were judged before. `check_stop` is called at each reading
    of each text; an error that it raises ends the work.
    """
    minor, sexual = bool(found and found.minor), adult or bool(found and found.sexual)
    for tokens in chain.from_iterable(map(_readings, map(_without_prohibitions, texts))):
        check_stop()
        minor = minor or _has_minor(tokens)
        sexual = sexual or _is_sexual(tokens)
        if minor and sexual:
            rule = "minor+adult-mode" if adult else "minor+sexual"
            return Verdict(True, rule, LIST_VERSION, Signs(minor, sexual))
    return Verdict(False, None, LIST_VERSION, Signs(minor, sexual))


def audit_hash(texts: Iterable[CheckedText]) -> str:
    """SHA-256 over the texts and where each ends: says that two jobs are the same, not what."""
    digest = hashlib.sha256()
    for each in texts:
        encoded = each.text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.hexdigest()


def _without_prohibitions(checked: CheckedText) -> str:
    """The text; in a system message the nouns that a prohibition forbids are replaced.

    The rest of the sentence stays, so that the text around it is read as before.
    """
    if checked.role != "system":
        return checked.text
    return _PROHIBITION.sub(lambda match: _FORBIDDEN_NOUN.sub(NEUTRAL, match[0]), checked.text)


def _readings(text: str) -> Iterator[Tokens]:
    """Everything that a text may say to whoever wants to read it so, as masked tokens."""
    yield from _readings_of(text)
    if TAG.search(text):
        yield from _readings_of(text.translate(TAGS))


def _readings_of(text: str) -> Iterator[Tokens]:
    unescaped = _unescape(text)
    plain = _numbers(_fold(unescaped))
    squeezed = IN_WORD.sub("", plain)
    forms = [plain, squeezed, _spelled_out(plain)]
    if TILDE.search(unescaped):
        forms.append(_numbers(_fold(TILDE.sub("ny", unescaped))))
    for form in dict.fromkeys(forms):
        yield _masked(_tokens(form))
        restored = _restored(form)
        if restored != form:
            yield _masked(_tokens(restored))
    yield [*_rejoined(_masked(_tokens(plain))), *_parted(_tokens(squeezed)), *_ideographs(squeezed)]


def _unescape(text: str) -> str:
    """The text without HTML references, nested ones too."""
    for _ in range(UNESCAPES):
        safe = HUGE.sub(" ", ZEROS.sub("&#", AMPERSANDS.sub("&", text)))
        plain = html.unescape(safe)
        if plain == text:
            break
        text = plain
    return text


class _Folds(dict[int, str]):
    """What each character folds to, found out when it is first met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        # One character at a time: the reordering of marks over a whole text is quadratic.
        forms = DRAWN[char] if char in DRAWN else unicodedata.normalize("NFKD", char)[:FORMS]
        folded = "".join(map(_letter, forms))
        if len(self) < FOLDS:
            self[code] = folded
        return folded


_folds = _Folds()


def _fold(text: str) -> str:
    """The text in small Latin letters where it can be, without marks and what cannot be seen."""
    return text.translate(_folds)


def _letter(char: str) -> str:
    match unicodedata.category(char):
        case "Mn" | "Me" | "Cf" | "Cs":
            return ""
        case "Nd":
            return str(unicodedata.digit(char))
        case "Pd":
            return "-"
        case "Cc" | "Zl" | "Zp":
            return "\n" if char in "\n\r\u2028\u2029" else " " * char.isspace()
    lower = DRAWN.get(char, char).casefold()
    return DRAWN.get(lower, lower)


def _numbers(text: str) -> str:
    """The text with its ages left to be read: no weights, fractions, thousands; spans in words."""
    text = WEIGHT.sub("", text)
    text = DECIMALS.sub("", THOUSANDS.sub("", text))
    return SHORT_AGE.sub(r"\1 yo", SPAN.sub(" to ", text))


def _tokens(text: str) -> Tokens:
    return [PAUSE if token in PAUSES else token for token in TOKEN.findall(text)]


def _spelled_out(text: str) -> str:
    """The text with what is spelled out joined, and the known words in that ("a t e e n")."""
    runs = ["".join(filter(str.isalnum, run)) for run in SPELLED.findall(text)]
    if not runs:
        return text
    joined = iter(runs)
    together = " ".join([*runs, *(run.translate(LEET) for run in runs)])
    found = (word for word in _WORDS if word in together)
    return ", ".join([SPELLED.sub(lambda _: next(joined), text), *found])


def _restored(text: str) -> str:
    """The text with the known words that leet or stretching disguises."""
    # Each distinct chunk is looked up once: most words of a long text are repeated.
    chunks = {chunk for chunk in set(CHUNK.findall(text)) if len(chunk) <= LONGEST}
    known = {chunk: word for chunk in chunks if (word := _undisguised(chunk))}
    if not known:
        return text
    return CHUNK.sub(lambda match: known.get(match[0], match[0]), text)


def _undisguised(chunk: str) -> str | None:
    known = _known(chunk) or _known(chunk.strip("!|+"))
    return f" {known} " if known else None


def _known(word: str) -> str | None:
    # Digits and signs alone stay what they are: 455 is a number.
    is_leet = not word.isalpha() and any(map(str.isalpha, word))
    drawn = (word.translate(LEET) if is_leet else word).translate(ONE_STROKE)
    if is_leet and drawn in _LEET_WORDS:
        return _LEET_WORDS[drawn]
    return _STRETCHED_WORDS.get(REPEATED.sub(r"\1", drawn)) if STRETCHED.search(word) else None


def _rejoined(tokens: Tokens) -> Iterator[str]:
    """Known words that were cut apart ("chi ld")."""
    for one, two, three in zip(tokens, [*tokens[1:], ""], [*tokens[2:], "", ""], strict=False):
        joined = one + two
        if joined in _CUT:
            yield joined
        if joined + three in _CUT:
            yield joined + three


def _parted(tokens: Tokens) -> Iterator[str]:
    """The two known words of each that was glued together."""
    for token in tokens:
        if token[:3] in _OPENINGS and len(token) <= LONGEST:
            for i in range(3, len(token) - 2):
                if token[:i] in _PARTS and token[i:] in _PARTS:
                    yield from (token[:i], token[i:])


def _ideographs(text: str) -> Iterator[str]:
    """Known words of scripts that do not part their words."""
    together = "".join(text.split())
    yield from (word for word in _UNPARTED if word in together)
    if HAN_AGE.search(together):
        yield _fold("未成年")


def _masked(tokens: Tokens) -> Tokens:
    """The tokens without set phrases that only look like a sign, and without disclaimers."""
    for place in list(_matches(tokens, _BENIGN)):
        tokens[place.start : place.stop] = [MASK] * len(place)
    return _disclaimed(tokens)


def _disclaimed(tokens: Tokens) -> Tokens:
    if _NEGATIONS.isdisjoint(tokens):
        return tokens
    patience, forbids, is_denied = 0, False, False
    heard = tokens.copy()
    for i, token in enumerate(tokens):
        if token in _NEGATIONS:
            # A refusal that was denied stays denied: "never refuse or avoid minors".
            forbids = not patience or (forbids and not (is_denied and token in _REFUSALS))
            patience, is_denied = PATIENCE, token in _DENIALS
        elif patience and (token in _FORBIDDEN or _is_material(tokens, i)):
            if forbids:
                heard[i] = MASK
        else:
            patience = patience - 1 if patience and token in _FILLERS else 0
    return heard


def _is_material(tokens: Tokens, i: int) -> bool:
    return tokens[i] == "sexual" and not _MATERIAL.isdisjoint(tokens[i + 1 : i + 2])


def _has_minor(tokens: Tokens) -> bool:
    return _holds(tokens, _MINOR) or any(
        _is_young(tokens, i) for i, token in enumerate(tokens) if token in _YOUNG
    )


def _is_sexual(tokens: Tokens) -> bool:
    return _holds(tokens, _SEXUAL)


def _holds(tokens: Tokens, index: Index) -> bool:
    """Whether a phrase stands there, pauses or none: tags are parted by commas."""
    if index.keys().isdisjoint(tokens):
        return False
    words = [token for token in tokens if token != PAUSE]
    return any(True for _ in _matches(words, index))


def _matches(tokens: Tokens, index: Index) -> Iterator[range]:
    """Where phrases stand."""
    for i, token in enumerate(tokens):
        if token in index:
            yield from (range(i, end) for end in _starts(tokens, i, index))


def _starts(tokens: Tokens, i: int, by_first: Index) -> list[int]:
    """Where the phrases end that begin at `i`."""
    phrases = by_first.get(tokens[i]) if i < len(tokens) else None
    if not phrases:
        return []
    return [i + n for n in WORDS if tuple(tokens[i : i + n]) in phrases]


def _ends(tokens: Tokens, i: int, by_last: Index) -> bool:
    """Whether a phrase ends just before `i`."""
    phrases = by_last.get(tokens[i - 1]) if i else None
    if not phrases:
        return False
    return any(tuple(tokens[max(0, i - n) : i]) in phrases for n in WORDS)


def _is_young(tokens: Tokens, i: int) -> bool:
    """Whether the number below 18 at `i`, or the span it opens, is somebody's age."""
    if _is_in_tens(tokens, i):
        return False
    end = _end_of_number(tokens, i)
    lead = _start_of_number(tokens, i)
    return (
        _has_unit(tokens, end)
        or (_ends(tokens, lead, _AGE_LEADS) and not _starts(tokens, end, _NOT_AGES))
        or _has_led_years(tokens, lead, end)
        or (tokens[i] in _BARE and _is_bare_age(tokens, lead, end))
    )


def _is_in_tens(tokens: Tokens, i: int) -> bool:
    before = i - 2 if i and tokens[i - 1] in _AND else i - 1
    return before >= 0 and tokens[before] in _TENS


def _start_of_number(tokens: Tokens, i: int) -> int:
    """Before "13", and before "only just 13"."""
    hedges = takewhile(_HEDGES.__contains__, (tokens[i - n] for n in (1, 2) if n <= i))
    return i - len(list(hedges))


def _end_of_number(tokens: Tokens, i: int) -> int:
    """Past "13", and past "13 to 19"."""
    match tokens[i + 1 : i + 3]:
        case [link, number] if link in _RANGES and (number.isdigit() or number in _YOUNG):
            return i + 3
    return i + 1


def _has_unit(tokens: Tokens, end: int) -> bool:
    unit_ends = _starts(tokens, end, _AGE_UNITS)
    if any(token.startswith(_AGE_MARKS) for token in tokens[end : end + 1]):
        unit_ends.append(end + 1)
    return any(_AGED_THINGS.isdisjoint(tokens[after : after + 1]) for after in unit_ends)


def _has_led_years(tokens: Tokens, lead: int, end: int) -> bool:
    if _YEARS.isdisjoint(tokens[end : end + 1]) or _OF_TIME & set(tokens[end + 1 : end + 2]):
        return False
    return _ends(tokens, lead, _YEAR_LEADS) or _is_after_person(tokens, lead)


def _is_bare_age(tokens: Tokens, lead: int, end: int) -> bool:
    if not CLAUSE_ENDS.issuperset(tokens[end : end + 1]):
        return False
    return _ends(tokens, lead, _BARE_LEADS) or _is_after_person(tokens, lead)


def _is_after_person(tokens: Tokens, lead: int) -> bool:
    """Whether "girl", "girl, " or "girl of" stands before `lead`."""
    before = lead - 2 if lead and tokens[lead - 1] in LINKS else lead - 1
    return before >= 0 and tokens[before] in _PERSON


def _entries(table: str) -> Iterator[Tokens]:
    """The phrases of a table, folded, with and without the "s" of those that may have one."""
    for entry in table.split(","):
        words = _fold(entry).replace("*", "").split()
        yield words
        if "*" in entry:
            yield [*words[:-1], words[-1] + "s"]


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


def _glued(table: str) -> str:
    """The table, and each of its phrases as one word."""
    return table + "".join(f", {''.join(words)}" for words in _entries(table) if len(words) > 1)


# The tables as the functions above read them.
_MINOR = _index(_glued(MINOR) + ", " + _ages_in_a_word())
_SEXUAL = _index(_glued(SEXUAL))
_BENIGN = _index(BENIGN)
_DENIALS, _REFUSALS, _FILLERS, _FORBIDDEN = map(_words, (DENIALS, REFUSALS, FILLERS, FORBIDDEN))
_NEGATIONS = _DENIALS | _REFUSALS
_PROHIBITION = _prohibition()
_FORBIDDEN_NOUN = re.compile(rf"\b(?:{_either(FORBIDDEN)})\b", re.ASCII | re.IGNORECASE)
_HEDGES = _words(HEDGES)
_MATERIAL, _AGED_THINGS, _YEARS = map(_words, (MATERIAL, AGED_THINGS, YEARS))
_OF_TIME, _PERSON, _TENS = map(_words, (OF_TIME, PERSON, TENS))
_AND, _RANGES = map(_words, (AND, RANGES))
_AGE_UNITS, _NOT_AGES = map(_index, (AGE_UNITS, NOT_AGES))
_AGE_LEADS, _YEAR_LEADS, _BARE_LEADS = (
    _index(table, key=-1) for table in (AGE_LEADS, YEAR_LEADS, BARE_LEADS)
)
_AGE_MARKS = tuple(_words(AGE_MARKS))
_YOUNG = frozenset(
    {f"{n:0{digits}}" for n in range(18) for digits in (1, 2)}
    | {word for row in NUMBERS for word in _fold(row).split()}
)
_BARE = frozenset(map(str, range(FIRST_BARE, 18))) | set(NUMBERS[0].split()[FIRST_BARE - 1 :])

_SIGNS = sorted({word for index in (_MINOR, _SEXUAL) for word in index if (word,) in index[word]})
_WORDS = [word for word in _SIGNS if len(word) > 2]
_CUT = {word for word in _WORDS if len(word) >= SHORTEST_CUT} - NOT_CUT
_PARTS = {*_WORDS, "girl", "girls", "boy", "boys"}
_OPENINGS = {word[:3] for word in _PARTS}
_UNPARTED = [word for word in _SIGNS if word[0] >= "\u1100" and not KATAKANA.match(word)]
_LEET_WORDS = {
    word.translate(ONE_STROKE): word
    for table in (MINOR, SEXUAL, AGE_UNITS, AGE_LEADS, PERSON, ",".join(NUMBERS[0].split()))
    for words in _entries(_glued(table))
    for word in words
    if len(word) > 2
}
# The tables at the front win: "teeeen" is teen, not ten.
_STRETCHED_WORDS = {
    REPEATED.sub(r"\1", drawn): word for drawn, word in reversed(_LEET_WORDS.items())
}
