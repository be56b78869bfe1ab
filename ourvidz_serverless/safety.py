"""The content floor: no sexual content involving minors, whatever any caller says.

A text is refused that holds a sign of a minor together with a sexual sign; in adult mode the
sign of a minor is enough. The signs of one job add up over all of its texts. There is no
setting and no switch, and nothing is read or written.

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

LIST_VERSION = "2026-11-1"

# In the tables a comma parts the entries, and `*` stands for an "s" that may follow. They are
# folded as the texts are, so they are written with their accents and in their own scripts. Every
# phrase is also known as one word ("littlegirl").

# What names a person under 18 by itself. Claims of age do not clear it ("teen, 19").
# Not to be generalised to girl, boy, young, petite, baby, babe, student, pupil, daughter, little
# sister: in this field, and of adults anywhere, these are everyday words. Nor to stems, for the
# sake of kidney, minority, teensy and childhood friends.
MINOR = """
child*, children*, childlike, kid*, kiddie*, kiddo*, minor*, underage, underaged, under age girl*,
under age boy*, juvenile*, youngster*, teen*, teenage, teenaged, teenager*, tween*, preteen*,
pre teen*, adolescent*, adolescence, pubescent, prepubescent, pre pubescent, infant*, newborn*,
toddler*, preschooler*, kindergartner*, kindergartener*, kindergarten, preschool, pre school,
nursery school, elementary school, elementary schooler*, primary school, grade school,
grade schooler*, middle school, middle schooler*, secondary school, junior high, high school,
high schooler*, school girl*, school boy*, school child, school children, school kid*, school age,
school aged, school uniform*, girl scout*, boy scout*, little girl*, little boy*, little child*,
young girl*, young boy*, small girl*, small boy*, little daughter*, little son*, young daughter*,
young son*, a baby girl, a baby boy, of a baby, sweet sixteen, sweet 16, under 18, under eighteen,
below 18, below eighteen, not yet 18, not yet eighteen, younger than 18, younger than eighteen,
under the age of 18, under the age of eighteen, jailbait, jail bait, nymphet*, aged down,
de aged, age regression, age regressed, age play, teen girl*, teen boy*,

loli*, lolis, lolicon, lolita*, shota*, shotacon, toddlercon, rorikon, pedo*, pedophile*,
pedophilia, paedophile*, paedophilia, csam, pthc,

niny, ninya*, ninyo*, ninyita*, ninyito*, pequena nina*, pequeno nino*, menor de edad,
menores de edad, colegiala*, adolescente*, quinceañera*, chiquilla*, pornografía infantil,
enfant*, mineure*, fillette*, gamine*, petite fille, petites filles, petit garçon, petits garçons,
écolière*, écolier*, collégienne*, collégien*, lycéenne*, lycéen*, nourrisson*, bambin*,
ein kind, das kind, kleines kind, kleine kinder, kindern, kindes, kleinkind, kleinkinder,
schulkind, schulkinder, kindlich, minderjährig, minderjährige*, minderjähriger, minderjährigen,
minderjähriges, schülerin, schülerinnen, schulmädchen, kleines mädchen, kleine mädchen,
junges mädchen, jugendliche, jugendlicher, jugendlichen, säugling*, kinderen, minderjarig,
minderjarige*, criança*, menor de idade, menores de idade, menininha*, garotinha*, garotinho*,
bambina, bambine, bambino, bambini, minorenne, minorenni, ragazzina, ragazzine, ragazzino,
ragazzini, neonato, neonata, undicenne, dodicenne, tredicenne, quattordicenne, quindicenne,
sedicenne, diciassettenne, dziecko, dzieci, nieletni, nieletnia,
ребенок, ребенка, дети, детей, детская порнография, подросток, подростка, подростки,
школьница, школьницы, школьник, школьницу, малолетка, малолетки, малолетняя, малолетний,
несовершеннолетняя, несовершеннолетний, несовершеннолетние, маленькая девочка,
маленький мальчик,

未成年, 幼女, 女児, 男児, 児童, 小学生, 中学生, 高校生, 女子高生, 子供, 子ども, ロリ, ロリコン,
ロリータ, ショタ, ショタコン, 萝莉, 蘿莉, 正太, 儿童, 兒童, 初中生, 高中生, 小女孩, 小男孩, 小孩,
幼童, 미성년자, 초등학생, 중학생, 고등학생, 여고생, 여중생, 어린이
"""

# What makes a text sexual, in clinical and in common words.
# Not to be generalised to what children do and wear (bath, swimsuit, bare feet, kiss, diaper), to
# virgin and madonna, or to breast and nursing: with them a nativity would be refused. Adult mode
# needs none of these words, so the table can stay short of the ambiguous ones.
SEXUAL = """
sex, sexy, sexier, sexual, sexually, sexuality, sexualize, sexualized, sexualised, sext, sexting,
nude*, nudity, naked, nakedness, unclothed, undressed, undressing, undress, topless, bottomless,
without clothes, no clothes, wearing nothing, nsfw, porn, porno, porns, pornographic, pornography,
xxx, hentai, ecchi, rating explicit, explicit content, erotic, erotica, eroticism, erotically, lewd,
lewds, lust, lustful, lustfully, horny, aroused, arousing, arousal, seductive, seductively, seduce,
seducing, sensual, sensually, kinky, fetish, fetishes, bdsm, bondage, intercourse, masturbate*,
masturbating, masturbation, orgasm*, orgasmic, fellatio, cunnilingus, blowjob*, blow job*,
handjob*, cum, cumshot*, creampie*, ejaculate*, ejaculation, anal, foreplay, orgy, orgies,
threesome*, gangbang*, making love, make love, rape*, raped, raping, molest*, molested, grope*,
groped, groping, fondle*, fondling, incest, prostitute*, prostitution, striptease, strip tease,
stripper*, upskirt, cameltoe, camel toe, ahegao, futanari, genital*, genitalia, penis, penises,
vagina*, vaginal, vulva*, clitoris, anus, scrotum, testicle*, pubic, breasts, bare breast,
nipple*, areola*, buttock*, bare bottom, bare butt, bare ass, boob*, tit, tits, titties, ass, dick*,
cock*, pussy, cunt*, cunny, fuck*, fucked, fucking, slut*, slutty, cleavage, lingerie, underwear,
panties, panty, thong, bra, dildo*, vibrator*, spread legs, legs spread, onlyfans, csam, pthc,

desnuda*, desnudo*, desnudez, sexo, erótica*, erótico*, pornografía, tetas, nue*, dénudée*,
déshabillée*, sexe, sexuelle*, sexuel*, érotique*, seins, nackt, nackte*, nackter, nackten, nacktes,
sexuell, sexuelle, erotisch, erotische, brüste, naakt, nua*, despida*, pelada, pornográfico*, nuda,
nudo, nudi, sesso, sessuale, erotico, erotiche, naga, nagie,
голая, голый, голые, голую, голой, обнаженная, обнаженный, обнаженные, нагая, секс, порно,
эротика, эротическая, эротический, сексуальная, сексуальный, детская порнография,
裸, ヌード, セックス, エロ, エッチ, 性的, 性行為, 性爱, 性愛, 做爱, 做愛, 性交, 色情, 性感, 나체, 누드,
알몸, 섹스, 야한
"""

# Set phrases that hold a sign and mean something else. Nothing between their words but blanks,
# hyphens and apostrophes: "a minor, key light" is no "minor key". Never add one that could as well
# describe a minor ("love child", "a minor role model", "in a minor"), or an animal ("a 12 year old
# cat girl").
BENIGN = """
minor key*, minor chord*, minor scale*, minor third*, minor sixth*, minor seventh*, minor detail*,
minor change*, minor adjustment*, minor edit*, minor tweak*, minor fix, minor fixes, minor flaw*,
minor imperfection*, minor skin imperfection*, minor blemish, minor blemishes, minor scratch,
minor scratches, minor scar*, minor wrinkle*, minor injury, minor injuries, minor issue*,
minor problem*, minor role*, minor variation*, minor difference*, minor version*, minor release*,
minor league*, minor arcana, minor surgery, minor planet*, minor deity, minor deities, minor noble*,
minor film grain, minor damage, b minor, c minor, d minor, e minor, f minor, g minor, sharp minor,
flat minor, ursa minor, canis minor, leo minor, asia minor, asie mineure, vinca minor,
kid glove*, kid leather, kid skin, kid goat*, billy the kid, karate kid, sundance kid, cisco kid,
i kid you not, kid cudi, kid rock, kid icarus, new kids on the block,
child s pose, childs pose, child bearing, childbearing, inner child, wild child, flower child,
destiny s child, destinys child, man child, woman child, childlike wonder, child free,
child process, child processes, child class, child node*, child element*, child support,
teen titans, teen wolf, teen vogue, teenage mutant ninja turtle*, mutant ninja turtle*,
gothic lolita, lolita fashion, girl scout cookie*, little girls room, little girl s room,
little boys room, high school teacher*, high school principal, high school reunion*,
high school sweetheart*, high school musical, middle school teacher*, elementary school teacher*,
primary school teacher*, secondary school teacher*, kindergarten teacher*, preschool teacher*,
school uniform store, infant formula, infant jesus, bambino chair,
18 minute*, 18 second*, 18 hour*, 18 day*, 18 month*, 18 degree*, 18 percent, 18 dollar*, 18 euro*,
18 inch, 18 inches, 18 pound*, 18 kg, 18 cm, 18 mm, 18 miles, 18 km,
sex ed, sex education, same sex, opposite sex, fair sex, biological sex, sex of the baby,
nude color*, nude colour*, nude colored, nude coloured, nude tone*, nude lipstick, nude lip*,
nude heel*, nude pump*, nude makeup, nude palette, nude nail*, nude shade*, naked eye*, naked mole,
moby dick, dick tracy, dick van dyke, cum laude, kick ass, pussy willow*, pussy cat*, blue tits,
great tits, coal tits, bottle nipple*, cock a doodle, black cock, anal retentive, breaking bra,
sex pistols, sex and the city
"""

# A clause that forbids is no wish: "never depict minors", "no one under 18", "refuse sexual
# content". After a negation, and through these fillers, three legal words fall silent, and
# "sexual" before "content". Not to be extended to children, teens, ages, nude: an image model reads
# "no child" as "child".
NEGATIONS = """
no, not, never, without, refuse, refuses, decline, reject, avoid, exclude, forbid, prohibit, cannot,
dont, mustnt, nobody, t
"""
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

# What follows a number and makes it an age at once. Not to be generalised to bare years, which are
# more often a time ("15 years of experience", "hace 10 años"): those are in YEARS, and need a lead.
AGE_UNITS = """
years old, year old, year olds, yrs old, yr old, yr olds, yearold, yearolds, yearsold, yo, yos, y o,
years young, years of age, year of age, months old, month old, month olds, th birthday, st birthday,
nd birthday, rd birthday, th grade, th grader*, st grade, st grader*, nd grade, nd grader*,
rd grade, rd grader*, year girl*, year boy*, yr girl*, yr boy*,
años de edad, anos de idade, añitos, aninhos, ans d âge, ans dâge, jahre alt, jahre jung, jährig,
jährige, jähriger, jähriges, jährigen, jaehrige, jaehriger, jaehriges, jaar oud, anni di età, лет от роду,
летняя, летний, летние, летней, летнюю, летнего
"""
AGED_THINGS = """
whisky, whiskey, scotch, bourbon, rum, wine, cognac, brandy, cheese, car, truck, house, building,
tree, company, tradition, mystery, yo
"""
# What stands before a number and makes it an age, whatever follows but another measure.
AGE_LEADS = """
aged, age, ages, age of, age is, aged about, aged only, alter von, edad de, edad, idade de, idade,
età di, возраст, возрасте
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
OF_TIME = "de, di, d, of, ago, experience, later, назад, опыта, her"
PERSON = """
girl*, boy*, woman, women, man, men, female*, male*, lady, daughter*, son*, sister*, brother*,
student*, chica*, chico*, niña*, niño*, muchacha*, muchacho*, mujer, hija, hijo, fille*, garçon*,
femme, élève*, mädchen, junge, frau, tochter, sohn, meisje, jongen, menina*, menino*, garota*,
garoto*, moça, mulher, filha, filho, ragazza, ragazze, ragazzo, donna, figlia, figlio, девочка,
девочки, девушка, мальчик, дочь, сын
"""
LINKS = ", de, di, of, von, mit, con, com, with, is"
# A number alone is an age after these, where the clause ends with it: digits and English words
# only, from FIRST_BARE on. "Elf" is eleven in German, and a tag.
BARE_LEADS = """
she is, he is, she s, he s, shes, hes, i am, i m, im, who is, who s, they are, you are, you re,
youre, turned, turning, turns, looks, looks like, look, appears, is only, is just, am only, am just
"""
FIRST_BARE = 4
CLAUSE_ENDS = {",", "and", "but"}

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
SCHOOL_YEARS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
RUSSIAN_STEMS = [
    "пяти",
    "шести",
    "семи",
    "восьми",
    "девяти",
    "десяти",
    "одиннадцати",
    "двенадцати",
    "тринадцати",
    "четырнадцати",
    "пятнадцати",
    "шестнадцати",
    "семнадцати",
]
# "Twenty-five years old" does not say five.
TENS = """
twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety, hundred, thousand, million, veinte,
treinta, cuarenta, cincuenta, sesenta, setenta, ochenta, noventa, cien, ciento, mil, dix, vingt,
trente, quarante, cinquante, soixante, cent, mille, vinte, trinta, quarenta, cinquenta, sessenta,
oitenta, cento, двадцать, тридцать, сорок, пятьдесят, шестьдесят, семьдесят, восемьдесят,
девяносто, сто
"""
AND = "and, y, e, et"
RANGES = "to, or, and, a, bis, o, ou, y, e"
HAN_DIGITS = "一二三四五六七八九"
AGE_MARKS = "歳才岁歲세살"

# Letters of other scripts that are drawn like Latin ones, where compatibility forms do not already
# say so. Both cases of a Cyrillic letter fold alike, or Russian itself could not be found.
LOOK_ALIKES = str.maketrans(
    "авекмнорстухіїѕјԁһԛԝґ" + "αβεικνορτυχγηωσϲϳ" + "ΗΥΝΡΧ" + "ıłøđðħŧɡɑɩɪʟɴʀʏɢʙʜᴀᴄᴅᴇᴊᴋᴍᴏᴘᴛᴜᴠᴡᴢꜰꜱ"
    "օսոցհյզԍ",
    "abekmhopctyxiisjdhqwr"
    + "abeikvoptuxynwocj"
    + "hynpx"
    + "ilodohtgailinryggbhacdejkmoptuvwzfs"[:0]
    + "iloddhtgaiilnrygbhacdejkmoptuvwzfs"
    "ounghjqg",
)
PICTURES = {
    **dict.fromkeys("👶🧒👧👦🚸", " child "),
    "🔞": " nsfw ",
    **dict.fromkeys("'’‘ʼ`´′", "'"),
    **{chr(0x1F150 + i): chr(97 + i) for i in range(26)},  # letters in black circles
    **{chr(0x1F170 + i): chr(97 + i) for i in range(26)},  # in black squares
    **{chr(0x1F1E6 + i): chr(97 + i) for i in range(26)},  # of which flags are made
    **dict.fromkeys("\u115f\u1160\u3164\uffa0\u2800", ""),  # letters and signs without ink
    "æ": "ae",
    "œ": "oe",
}
