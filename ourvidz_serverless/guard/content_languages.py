"""What the content floor knows of languages beside English: numbers, ages, limits, school, words.

`content_lexicon` folds these tables and looks them up. A comma separates the entries. Parentheses
hold several endings: "шко(ла лы)" is "школа" and "школы", and "-" no ending.

The words are those of a dictionary, with their inflection. Do not add stems: "детали", "lisans" and
"Ergenekon" are no signs. Do not add words that are everyday English (Kind, bimbo, ado) or words
for childhood, which adults speak of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

ENDINGS = re.compile(r"\(([^)]*)\)")


def entries(table: str) -> Iterator[str]:
    """The entries of a table, in each of their forms."""
    for entry in table.split(","):
        yield from _forms(entry.strip())


def _forms(entry: str) -> Iterator[str]:
    several = ENDINGS.search(entry)
    if not several:
        yield entry
        return
    for ending in several[1].split():
        yield from _forms(entry[: several.start()] + ending.strip("-") + entry[several.end() :])


#: Numbers from one to 19 by language; several rows are the cases and spellings of one language.
#: "_" joins the words of one number.
NUMBERS = {
    "fr": (
        "une deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize"
        " dix_sept dix_huit dix_neuf",
    ),
    "pt": (
        "um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezasseis"
        " dezassete dezoito dezanove",
    ),
    "nl": (
        "een twee drie vier vijf zes zeven acht negen tien elf twaalf dertien veertien vijftien"
        " zestien zeventien achttien negentien",
    ),
    "pl": (
        "jeden dwa trzy cztery pięć sześć siedem osiem dziewięć dziesięć jedenaście dwanaście"
        " trzynaście czternaście piętnaście szesnaście siedemnaście osiemnaście dziewiętnaście",
        "jednego dwóch trzech czterech pięciu sześciu siedmiu ośmiu dziewięciu dziesięciu"
        " jedenastu dwunastu trzynastu czternastu piętnastu szesnastu siedemnastu osiemnastu"
        " dziewiętnastu",
    ),
    "ru": (
        "один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать"
        " четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать",
        "одного двух трех четырех пяти шести семи восьми девяти десяти одиннадцати двенадцати"
        " тринадцати четырнадцати пятнадцати шестнадцати семнадцати восемнадцати девятнадцати",
    ),
    "uk": (
        "один два три чотири пять шість сім вісім девять десять одинадцять дванадцять тринадцять"
        " чотирнадцять пятнадцять шістнадцять сімнадцять вісімнадцять девятнадцять",
        "одного двох трьох чотирьох пяти шести семи восьми девяти десяти одинадцяти дванадцяти"
        " тринадцяти чотирнадцяти пятнадцяти шістнадцяти сімнадцяти вісімнадцяти девятнадцяти",
    ),
    "tr": (
        "bir iki üç dört beş altı yedi sekiz dokuz on on_bir on_iki on_üç on_dört on_beş on_altı"
        " on_yedi on_sekiz on_dokuz",
    ),
    "ar": (
        "واحدة اثنتان ثلاث أربع خمس ست سبع ثمان تسع عشر إحدى_عشرة اثنتا_عشرة ثلاث_عشرة أربع_عشرة"
        " خمس_عشرة ست_عشرة سبع_عشرة ثماني_عشرة تسع_عشرة",
        "واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة عشرة أحد_عشر اثنا_عشر ثلاثة_عشر أربعة_عشر"
        " خمسة_عشر ستة_عشر سبعة_عشر ثمانية_عشر تسعة_عشر",
        "واحد اثنين ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة عشرة احدى_عشر اثني_عشر ثلاثة_عشر"
        " أربعة_عشر خمسة_عشر ستة_عشر سبعة_عشر ثمان_عشرة تسعة_عشر",
        "الأولى الثانية الثالثة الرابعة الخامسة السادسة السابعة الثامنة التاسعة العاشرة"
        " الحادية_عشرة الثانية_عشرة الثالثة_عشرة الرابعة_عشرة الخامسة_عشرة السادسة_عشرة"
        " السابعة_عشرة الثامنة_عشرة التاسعة_عشرة",
    ),
    "hi": (
        "एक दो तीन चार पांच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस",
        "एक दो तीन चार पाँच छः सात आठ नौ दस ग्यारह बारह तेरह चौदह पन्द्रह सोलह सतरह अट्ठारह उन्नीस",
    ),
}
#: A number from one to nine after one of these, in the same language, is a part of a larger number.
TENS = {
    "fr": "vingt, trente, quarante, cinquante, soixante, cent, mille",
    "pt": "vinte, trinta, quarenta, cinquenta, sessenta, setenta, oitenta, noventa, cento, mil",
    "nl": "honderd, duizend",
    "pl": """
    dwadzieścia, trzydzieści, czterdzieści, pięćdziesiąt, sześćdziesiąt, siedemdziesiąt,
    osiemdziesiąt, dziewięćdziesiąt, dwudziestu, trzydziestu, czterdziestu, pięćdziesięciu,
    sześćdziesięciu, siedemdziesięciu, osiemdziesięciu, dziewięćdziesięciu, sto, stu, tysiąc
    """,
    "ru": """
    двадцать, тридцать, сорок, пятьдесят, шестьдесят, семьдесят, восемьдесят, девяносто, сто,
    двадцати, тридцати, сорока, пятидесяти, шестидесяти, семидесяти, восьмидесяти, ста, тысяча
    """,
    "uk": """
    двадцять, тридцять, сорок, пятдесят, шістдесят, сімдесят, вісімдесят, девяносто, сто, двадцяти,
    тридцяти, сорока, пятдесяти, шістдесяти, сімдесяти, вісімдесяти, ста, тисяча
    """,
    "tr": "yirmi, otuz, kırk, elli, altmış, yetmiş, seksen, doksan, yüz, bin",
    "ar": "مئة, مائة, ألف",
    "hi": "सौ, हजार",
}

#: Years that are an age where the number with them is a whole tag ("13 ans"), or has a lead.
YEARS = """
años, anos, ans, anni, jahre, jahren, jaar, jr, лет, года, годика, lat, lata, latka, років, роки,
рочки, рочків, سنة, سنوات, عام, عاما, أعوام, اعوام, ربيعا, साल, वर्ष, बरस, saal, yrs, yr
"""
#: What may stand before the number in such a tag, and before two numbers ("entre 6 y 10 años").
TAG_LEADS = """
de, con, a los, à, a, mit, im alter von, van, op, di, com, aos, a los, bientôt, fast, bijna,
prawie, почти, майже, quasi, casi, quase, в, у
"""
SPAN_LEADS = (
    "entre, tra, fra, zwischen, tussen, von, от, od, від, de, da, dai, van, من, بين, между, між"
)
#: What may stand after the number or after its years.
HALVES = """
and a half, et demi, et demie, und ein halb, y medio, e mezzo, e meio, i pół, с половиной, з
половиною, révolus, cumplidos, compiuti, completos, arası, وما فوق
"""
#: Before bare years these make them an age ("ma 12 lat").
YEAR_LEADS = """
cumplió, faz, fez, completou, compie, compiuto, compiva, a eu, wird, wordt, ma, miała, miał,
kończy, skończyła, skończył, ukończyła, исполнилось, исполнится, исполняется, їй, йому, мені,
виповнилося, виповнилось, تبلغ, يبلغ, بلغت, بلغ, أتمت, أتم, ابنة, ابن, ذات, ذو, بنت
"""
#: "há 13 anos" is a time in Portuguese, and "ha 13 anni" an age in Italian.
ITALIAN_LEADS = "ha, ho, hai, aveva"
#: A number alone after one of these is an age if its clause ends with it.
BARE_LEADS = """
sie ist, er ist, ich bin, wird, ze is, zij is, hij is, ik ben, wordt, исполнилось, виповнилося,
виповнилось, alter, compie, cumple, kończy
"""
AGE_LEADS = """
leeftijd, età, wiek, wieku, вік, віці, возраста, عمر, عمرها, عمره, بعمر, العمر, سن, في سن, उम्र,
आयु, yaş, yaşı, alter von, lebensjahr
"""
AGE_UNITS = f"""
jarig(- e en), letn(i ia ie iego iej ią ich im), lat(ka ki kę ką ek ka ków kowi kiem), річн(а ий ої
ого у ій ому ою і их е), летк(а и у ой), летн(яя ий ей юю его ему ие их), enne, enni, añer(o a os
as), वर्षीय, वर्षीया,
{", ".join(f"{y} {of}" for y in ("साल", "वर्ष", "बरस", "महीने") for of in ("का", "की", "के"))},
saal ki, saal ka, sal ki, sal ka, meses de edad, meses de idade, mois d âge, mesi di età, mesi d
età, jr oud, monate alt, monate jung, maanden oud, месяцев от роду, місяців від роду, років від
роду, miesięcy życia, aylık, yaş(- ında ındaki ındayım ındayken ındayız ındalar ımda ın ına ını
larında larındaki lık), geburtstag(- s), e verjaardag, verjaardag, o compleanno, compleanno,
cumpleaños, urodziny, день рождения, й день рождения, день народження, doğum günü, वां जन्मदिन
"""
#: What is "of 13 years" and no person.
AGED_THINGS = """
стаж(- а), опыт(- а), юбилей, выдержки, витримки, история, гарантия, стаж(у ем), досвід, ювілей,
гарантія, jubiläum, bestehen, jubileum, bestaan, huwelijk, garantie, ervaring, erfahrung, staż,
doświadczenie, gwarancja, rocznica, historia, अनुभव, गारंटी, वारंटी, योजना, anniversary, career,
warranty, guarantee, contract, aniversario, experiencia, garantía, garanzia, esperienza, deneyim,
garanti
"""
AGED_THING_ENDINGS = "jubilaum, jubileum, garantie, erfahrung, ervaring"
#: After bare years these make them a time. Not "fa" or "después": a sentence goes on with them.
OF_TIME = """
expérience, garantie, garanzia, esperienza, ervaring, erfahrung, doświadczenia, gwarancji, temu,
тому, стажа, гарантии, досвіду, гарантії, geleden, warranty, guarantee, خبرة, ضمان, अनुभव, पहले
"""
RANGES = "до, do, tot, i, и, й, та, et, und, en, und, إلى, الى, veya, или, або, lub, से, oder, à"
PERSON = """
dziewczyn(a y ę ą o), chłop(ak aka iec ca), córk(a i ę ą), kobiet(a y), dochter, zoon, vrouw,
jongens, meisjes, jongetje, meisje, дівчин(а и у ою), хлоп(ець ця), дочк(а и у), жінк(а и),
девушк(а и у ой), девочк(а и у ой), мальчик(- а у ом), парень, парня, kız, kızı, oğlan, öğrenci,
فتاة, بنت, ولد, लड़की, लड़का, लड़के, alumn(a o as os), alun(a o as os), allieva, élèv(e es), nena,
rapariga, rapaz
"""

LINKS = "van, w, в, у, im, à"

#: Set phrases that contain a sign and mean something else.
BENIGN = """
gamme(- s) mineure(- s), tonalité(- s) mineure(- s), tierce(- s) mineure(- s), modification(- s)
mineure(- s), différence(- s) mineure(- s), correction(- s) mineure(- s), erreur(- s) mineure(- s),
retouche(- s) mineure(- s), blessure(- s) mineure(- s), importance mineure, (mi fa sol la si bemol
diyez) minör, minör (akor gam ton), minor (prezzo costo tempo numero parte rischio male consumo
peso impatto), غير قاصر, pieds nus, pés nus, nackte füße, nackten füßen, blote voeten, çıplak
ayak(- la lı ları), çıplak göz(- le), नंगे पांव, नंगे पाँव, नंगे पैर, नंगे पैरों, नंगी आंखों, यौन
शिक्षा, cinsel eğitim, gołym okiem, голыми ногами, голые ноги, голыми руками, голые руки, голі ноги,
голими руками, educación sexual, educação sexual, éducation sexuelle, educazione sessuale,
edukacj(a i) seksualn(a ej), половое воспитание, сексуальное воспитание, sexuelle aufklärung,
seksuele voorlichting
"""

#: What stands before 18 and makes it a limit, if 18 ends its clause or a unit of age follows.
LIMITS = """
under, below, less than, younger than, short of, not yet, not quite, menor de, menores de, menos
de, menor que, debajo de, no cumple, no tiene, no ha cumplido, no cumplió, aún no, sin cumplir, más
joven que, abaixo de, abaixo dos, não tem, não fez, não completou, mais novo que, mais nova que,
moins de, dessous de, pas encore, a pas, ai pas, a pas encore, plus jeune que, plus jeunes que,
meno di, sotto, sotto i, minore di, minori di, minore degli, minori degli, non ha, non ha ancora,
non ancora, più giovane di, più giovani di, al di sotto dei, unter, jünger als, weniger als, noch
nicht, noch keine, unterhalb von, onder, jonger dan, minder dan, nog geen, nog niet, beneden,
poniżej, mniej niż, młods(za zy i ze) niż, młodsza od, młodszy od, nie ma, jeszcze nie, nie
skończył(a - y), nie ukończył(a - y), do lat, przed ukończeniem, младше, моложе, меньше, менее,
нет, не достиг(ла - ли ший шая шие ших), еще нет, еще не, не исполнилось, до достижения, молодше,
молодш(а ий і их), менше, менш ніж, менше ніж, молодше ніж, немає, нема, не досяг(ла - ли), ще не,
ще немає, не виповнилося, دون, دون سن, تحت, تحت سن, أقل من, اقل من سن, أصغر من, لم تبلغ, لم يبلغ,
قبل سن, ما دون, لم تتم, لم يتم, अभी
"""
#: These make a limit only of years: "до 18 лет", but not "до 18".
LIMITS_OF_YEARS = "до, do, bis, jusqu à, hasta, até, fino a, tot, حتى"
LIMIT_FILLERS = "the, age, of, les, los, die, den, des, i, gli, de, dei, von, l, âge, an, dem, der"
#: What stands after 18, or after 18 and its unit, and makes it a limit.
LIMITS_AFTER = f"""
{", ".join(f"से {less}" for less in ("कम", "छोटी", "छोटा", "छोटे", "नीचे"))}, की नहीं, का नहीं,
{", ".join(f"{of} küçük" for of in ("den", "dan", "inden", "yaşından", "yaştan", "yaşindan"))},
{", ".join(f"{of} küçükler" for of in ("den", "dan", "yaşından", "yaştan"))},
yaş altı, yaş altında, yaş altındaki, yaşın altı, yaşın altında, yaşın altındaki, in altında, altı,
altında, değil, yaşında değil, yaşını doldurmamış, yaşını doldurmadı, yaşına girmemiş, yaşını
bitirmemiş, yaşına gelmemiş, and under, or younger, or under, ans et moins, und jünger
"""
#: A negation and a word for a person of full age.
NOT_OF_AGE = """
not an adult, not of age, below the age of majority, under the age of majority, sin la mayoría de
edad, no es mayor de edad, sem maioridade, não é maior de idade, antes da maioridade, pas majeur(-
e es s), non majeur(- e es s), sous l âge légal, sous la majorité, non maggiorenn(e i), non ancora
maggiorenn(e i), non ancora diciottenn(e i), nicht volljährig(- e er en), noch nicht volljährig,
unter dem schutzalter, nog niet volwassen, niet volwassen, niet meerderjarig, onder de wettelijke
leeftijd, nie pełnoletni(- a e), niepełnoletni(- a ego ej ą ch m mi), не достиг(ла ли ший шая шие)
совершеннолетия, не достигла совершеннолетия, не достиг совершеннолетия, не достигший
совершеннолетия, не достигшая совершеннолетия, не досягла повноліття, не досяг повноліття, reşit
değil, reşit olmayan, reşit olmamış, ergin olmayan, ergin değil, yaşı küçük, yaşı tutmayan, تحت
السن القانونية, دون السن القانونية, لم يبلغ سن الرشد, لم تبلغ سن الرشد, دون سن الرشد, बालिग नहीं,
menor edad, minoría de edad, menoridade, minore età, minorité, minderjährigkeit
"""

#: Before "letni" and "latek" in Polish from four on, and before "enne" in Italian from 11 on.
POLISH_STEMS = """
cztero pięcio sześcio siedmio ośmio dziewięcio dziesięcio jedenasto dwunasto trzynasto czternasto
piętnasto szesnasto siedemnasto
"""
ITALIAN_STEMS = "undic dodic tredic quattordic quindic sedic diciassett"
#: The thirteenth birthday.
BIRTHDAYS = (
    (
        "fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth"
        " sixteenth seventeenth",
        "birthday",
    ),
    (
        "fünfter sechster siebter achter neunter zehnter elfter zwölfter dreizehnter vierzehnter"
        " fünfzehnter sechzehnter siebzehnter zwölften dreizehnten vierzehnten fünfzehnten"
        " sechzehnten siebzehnten",
        "geburtstag",
    ),
    (
        "vijfde zesde zevende achtste negende tiende elfde twaalfde dertiende veertiende vijftiende"
        " zestiende zeventiende",
        "verjaardag",
    ),
    ("dwunaste trzynaste czternaste piętnaste szesnaste siedemnaste", "urodziny"),
)

#: The stems of words for pupils of the second school year and later ("siebtklässler").
GERMAN_YEARS = "zweit dritt viert fünft sechst siebt acht neunt zehnt"
POLISH_YEARS = "drug trzeci czwart piąt szóst siódm ósm"
RUSSIAN_YEARS = "второ третье четверо пяти шести семи восьми девяти десяти"
UKRAINIAN_YEARS = "друго третьо четверто пяти шести семи восьми девяти десяти"
#: Schools, pupils and school years, where a rule below does not make them.
SCHOOL = f"""
sixth former*, form (1 2 3 4 5 6) pupil, escuela primaria, escuela secundaria, escuela infantil,
alumn(a o as os) de primaria, alumn(a o as os) de secundaria, colegial(- es), preescolar(- es),
jardín de infancia, jardín de niños, jardín infantil, guardería(- s), bachillerato, escola
primária, escola infantil, escola básica, ensino fundamental, ensino básico, ensino médio, educação
infantil, jardim de infância, creche(- s), pré escola, pré escolar(- es), colegial de, estudante do
secundário, estudante do ensino, alun(a o as os) do ensino, alun(a o as os) da escola, école
primaire, école maternelle, école élémentaire, en maternelle, à la maternelle, à la crèche, au
collège, élèves de primaire, élève de primaire, cours élémentaire, cours préparatoire, élève de cp,
élève de ce (1 2), élève de cm (1 2), élève de seconde, élève de première, élève de terminale,
classe de seconde, classe de terminale, scuola elementare, scuola primaria, scuola media, scuole
medie, scuola materna, scuola dell infanzia, scuola superiore, scuole superiori, asilo nido, asilo
infantile, all asilo, liceal(e i), scolarett(a e o i), scolar(a o e i), alunn(a o e i), alunn(a o e
i) delle medie, studentess(a e) delle superiori, student(e i) delle superiori, grundschule(- n),
grundschüler(- in innen n), grundschulkind, schuljunge(- n), schulbub, kita(- s),
kindertagesstätte, kindergartenkind(- er), vorschule, vorschulkind(- er), gymnasiast(- in innen
en), hauptschüler(- in innen n), realschüler(- in innen n), mittelschüler(- in innen), mittelstufe,
mittelschule, unterstufe, oberstufe, erstklässler(- in innen),
{", ".join(f"{n}klässler(- in innen n)" for n in GERMAN_YEARS.split())},
basisschool, lagere school, kleuterschool, middelbare school, middelbare scholier(- en), brugklas,
brugklasser(- s), kleuterklas, peuterspeelzaal, kinderopvang, kinderdagverblijf, scholier(- en e
es), schoolmeisje(- s), schooljongen(- s), schoolkind(- eren), leerling(- e en) van groep, tweede
klas havo, klas (1 2 3 4 5) havo, klas (1 2 3 4 5) vwo, klas (1 2 3 4) vmbo, klas (1 2 3 4) mavo,
(eerste tweede derde vierde vijfde) klas vwo, (eerste tweede derde vierde vijfde) klas havo,
(eerste tweede derde vierde) klas vmbo, (eerste tweede derde vierde) klas mavo, szkoł(a y ę ą)
podstawow(a),szkoły podstawowej, szkole podstawowej, szkołę podstawową, podstawów(ka ki kę ce),
uczennic(a y ę ą e), ucznió(w), uczeń podstawówki, gimnazjalist(a ka ki kę ce ek ów), licealist(a
ka ki kę ek ów), przedszkol(e a u ak aka aki aków), żłob(ek ka ku), pierwszoklasist(a ka ki kę),
{", ".join(f"{n}oklasist(a ka ki kę ek)" for n in POLISH_YEARS.split())},
начальн(ая ой ую) школа, начальн(ой) школы, начальную школу, начальной школе, детск(ий) сад,
детского сада, детском саду, детский садик, детсадов(ец ка ский), дошкольн(ик ика ики ица ицы ицу),
ясли, первоклассни(к ка ки ца цы цу), первоклашк(а и у), старшеклассни(к ка ки ца цы цу),
{", ".join(f"{n}классни(к ка ца цы цу)" for n in RUSSIAN_YEARS.split())},
учени(к ка ки ца цы цу ков) младших классов, учащи(йся еся мся) лицея, учащи(йся еся мся) школы,
гимназист(- ка ки ку ы), лицеист(- ка ки ку ы), школьн(ик ика ики иков ица ицы ицу иц), початков(а
ої) школа, початкової школи, початкову школу, дитяч(ий) садок, дитячого садка, дитсад(- ок),
дошкільн(ик ика ики иця иці ицю ят ята я), ясла, школяр(- а і ів ка ки ку), першокласни(к ка ки ця
ці цю), старшокласни(к ка ки ця ці цю), учн(і) школи, уч(ень ня) ліцею, учени(ця ці цю) ліцею,
гімназист(- ка ки),
{", ".join(f"{n}класни(к ка ця ці цю)" for n in UKRAINIAN_YEARS.split())},
учени(ця ці цю) молодших класів, учн(і) молодших класів, ліцеїст(- ка ки), ilkokul(- da lu lular
a), ilkokul öğrenci(si leri), ortaokul(- da lu lular), ortaokul öğrenci(si leri), ilköğretim(- de),
liseli(- ler), lise öğrenci(si leri), lise kız(ı ları), anaokul(u unda lu), ana sınıfı, anasınıfı,
kreş(- te), okul öncesi, okul çocuğu, kız öğrenci lise, تلميذة, تلميذ, تلميذات, تلاميذ, التلميذة,
التلميذ, التلميذات, التلاميذ, مدرسة ابتدائية, المدرسة الابتدائية, المرحلة الابتدائية, المرحلة
الإعدادية, المرحلة المتوسطة, المرحلة الثانوية, مدرسة إعدادية, مدرسة متوسطة, مدرسة ثانوية, المدرسة
الثانوية, طالب(ة ات -) ثانوية, طالب(ة ات -) ابتدائي, طالب(ة ات -) إعدادي, روضة أطفال, روضة الأطفال,
رياض الأطفال, حضانة, الحضانة, प्राथमिक विद्यालय, माध्यमिक विद्यालय, प्राथमिक स्कूल, प्राइमरी स्कूल, मिडिल
स्कूल, हाई स्कूल, हाईस्कूल, स्कूली छात्(रा र), स्कूली लड़(की का के), स्कूली बच्च(ा ी े), स्कूल की छात्रा, स्कूल
का छात्र, स्कूल की बच्ची, स्कूल की लड़की, बालवाड़ी, आंगनवाड़ी, बालवाटिका, नर्सरी स्कूल
"""
#: Ordinals from third to twelfth, with the words for a school year that follow them. Not first and
#: second: people travel first class, and second-rate things have their word too.
SCHOOL_YEARS = (
    ("dritte vierte fünfte sechste siebte achte neunte zehnte", "klasse"),
    ("dritten vierten fünften sechsten siebten achten neunten zehnten", "klasse"),
    ("cuarto quinto sexto séptimo octavo noveno décimo", "grado, de primaria, curso de primaria"),
    ("primero segundo tercero cuarto", "de primaria, de la eso, de eso, de secundaria"),
    ("terceira quarta quinta sexta sétima oitava", "série"),
    ("terceiro quarto quinto sexto sétimo oitavo nono", "ano do ensino, ano escolar, ano"),
    ("prima seconda terza quarta quinta", "elementare, media, liceo, superiore"),
    ("trzecia czwarta piąta szósta siódma ósma", "klasa"),
    ("trzeciej czwartej piątej szóstej siódmej ósmej", "klasy, klasie"),
    ("третий четвертый пятый шестой седьмой восьмой девятый десятый", "класс"),
    ("третьего четвертого пятого шестого седьмого восьмого девятого десятого", "класса"),
    ("третій четвертий пятий шостий сьомий восьмий девятий десятий", "клас"),
    ("третього четвертого пятого шостого сьомого восьмого девятого десятого", "класу"),
    ("beşinci altıncı yedinci sekizinci dokuzuncu onuncu", "sınıf, sınıfta, sınıf öğrencisi"),
    (
        "तीसरी चौथी पांचवीं छठी सातवीं आठवीं नौवीं दसवीं",
        "कक्षा, की छात्रा, का छात्र, क्लास, जमात",
    ),
    ("ثالث رابع خامس سادس سابع ثامن تاسع", "ابتدائي, إعدادي, متوسط, ثانوي"),
)
#: What follows, or comes before, the number of a school year.
YEARS_BEFORE = (
    "klasse, grado de primaria, klasa, klasy, класс, класса, классе, клас, класу, класі, sınıf"
)
YEARS_AFTER = "कक्षा, क्लास, groep, klasa"
FRENCH_YEARS = (
    "sixième, cinquième, quatrième, troisième, 6 e, 5 e, 4 e, 3 e, 6 ème, 5 ème, 4 ème, 3 ème"
)
ARABIC_YEARS = """
الرابع الخامس السادس السابع الثامن التاسع العاشر
"""

#: Words for a person under 18.
MINOR = """
chiquill(a o as os), mocos(a o as os) de, párvul(a o as os), lactante(- s), bebé recién nacid(a o),
recién nacid(a o as os), preadolescente(- s), púber(- es), impúber(- es), nena pequeña, niñit(a o
as os), chic(a o) menor, menor no emancipad(a o), muchachit(a o), jovencit(a as), quinceañer(a o as
os), criancinh(a as), menininh(a o as os), garotinh(a o as os), menin(a o) pequen(a o), menin(a o)
nov(a o), adolescentes, pré adolescente(- s), pubere(- s), impúber(- e es), recém nascid(a o as
os), molequ(e es), petiz(- es), pirralh(a o as os), miúda pequena, miúdo pequeno, rapazinho(- s),
rapariguinha(- s), guri(- s), gurizinho, infante(- s), garçonnet(- s), fillettes, mineur non
accompagné, mineurs non accompagnés, gamins, gamin, un gamin, une ado, ados, préado(- s),
préadolescent(- e s es), adolescent(e es), nouveau né(- s e es), prépubère(- s), pubère(- s),
môme(- s), gosse(- s), marmot(- s), mouflet(- te s), enfantin(e es), petit enfant, bimb(a e i),
adolescenti, adolescente, preadolescent(e i), lattant(e i), infante, infanti, fanciull(a o e i),
pubere, puberi, impuber(e i), ragazzett(a o e i), piccol(a o) bimb(a), ragazzetta, minore età,
kindchen, kindlein, kindlichen, kindliche(- r s n), teenie(- s), teenagerin, neugeborene(- s r n),
kleiner junge, kleinen jungen, kleinen mädchen, kleines kind, junger junge, heranwachsende(- r n),
halbwüchsige(- r n), halbwüchsig, vorpubertär(- e er es), pubertierend(- e er en es), unmündig(- e
er en), minderjährigen, minderjährige(- r s), teenagers, schulmädchens, drei kinder, die kinder,
der kinder, mit kindern, kinder im, grundschulkinder, kleinkindes, jugendlichem, kindje(- s),
kleuter(- s), peuter(- s), tiener(- s), tienermeisje(- s), tienerjongen(- s), puber(- s),
prepuberaal, prepuberale, zuigeling(- en), pasgeboren, pasgeborene(- n), klein meisje, kleine
meisjes, kleine jongen, kleine jongens, jong meisje, jonge meisjes, jeugdige(- n), dreumes(- en),
jochie(- s), jongetje(- s), kinderlijk(- e), minderjarig(- e en), onmondig(- e), een kind, klein
kind, van het kind, het kind, schoolgaand kind, dzieck(o a u iem), dziec(i iom iach ięcy ięca
ięce), dzieciak(- a i ów), dzieciątk(o a), dziewczyn(ka ki kę ką ce), chłopcz(yk yka yki yków),
małolet(ni nia niego niej nią nich), małolat(- a y ę ów), nielet(ni nia niego niej nią nich),
nastolat(ek ka ki kę ką ce ków kiem), nastoletni(- a ego ej ą), niemowl(ę ęcia ęta ąt aka),
noworod(ek ka ki ków), młodocian(a y ego ej ą ych), brzdąc(- a e), podlot(ek ka ki), smarkul(a i
ę), smarkacz(- a e), mał(a ą) dziewczynk(a), mały chłopiec, malu(ch szek), przedpokwitani(e a),
ребен(ок ка ку ком ке), дет(и ей ям ьми ях), детишк(и ам), детишек, детск(ий ая ое ого) возраст,
девчушк(а и у), девочк(а и), девчоночк(а и), мальчуган(- а), мальчик(- а и), девчонк(а и) лет,
подрост(ок ка ку ком ки ков кам), подростков(ый ая ые ого ой), младен(ец ца цу цы цев),
новорожденн(ый ая ые ого ой ых), грудни(чок чка чки), грудной ребенок, тинейджер(- а ша ши ы ов),
дитя, дитем, отрок(- а и), отроковиц(а ы у), карапуз(- а ы), малолет(ка ки ку ний няя ние них ней
нюю), несовершеннолетн(яя ий ие их его ей юю), маленьк(ая ую) девочк(а), маленькую девочку,
маленькие девочки, маленькие дети, юная девочка, дит(ина ини ину иною ині я яти ятко ятка инча),
діт(и ей ям ьми лахи очки лахів), дитинств(о) вік, дитяч(ий ого) вік, дівчинк(а и у ою), дівчат(ко
ка ок), хлопчик(- а и ів ом), хлоп(я яти ята ят), малий хлопець, маленьк(а ий у) дівчинк(а),
підліт(ок ка ку ки ків кам), підлітков(ий а і ого ої), малоліт(ка ки ній ня ні ніх ню), малюк(- а и
ів), малятк(о а), малят, немовл(я яти ята ят ятко), новонароджен(ий а і ого ої их), тінейджер(- а
ка ки и ів), неповнолітн(я ій і іх ього ьої ю), школярк(а и у), çocuk(- lar ların ça lara larla),
çocuğ(u un a umuz), çocukcağız, çocuksu, kız çocuk(- ları lar), kız çocuğu(- nun), erkek çocuk(-
lar ları), erkek çocuğu, küçük kız(- lar ı), küçük oğlan(- lar), küçük erkek çocuk, küçük yaşta,
küçük yaştaki, minik kız(- lar), minik oğlan, genç kız çocuğu, ergen(- ler lik lerin), ergenlik
çağında, ergenlik öncesi, yeniyetme(- ler), yenidoğan(- lar), sübyan(- lar), bebek yaşta, buluğ
çağında, buluğ öncesi, ufaklık(- lar), velet(- ler), kundakta, kundaktaki, küçük yaşlarda, reşit
olmayanlar, अवयस्क, नाबालिग(- ों), बच्च(ा ी े ों ियां ियों), किशोर(- ी ों ियों ियां), किशोरावस्था,
शिशु(- ओं), नवजात, बालक(- ों), बालिका(- ओं), बाल्यावस्था, छोटी लड़की, छोटी लड़कियां, छोटा लड़का, छोटे
लड़के, नन्ह(ी ा े) बच्च(ी), नन्ही लड़की, दुधमुंह(ा ी), टीनएजर(- ों), टीनेजर, बाल उम्र, कम उम्र की लड़की, कम
उम्र का लड़का, nabalig, naabaalig, bachchi, bachche, kishori, コドモ, ティーンエイジャー,
ティーンエージャー, ティーン, ジュニアアイドル
"""
#: Arabic writes the article, "and", "of" and "with" in one word with the noun.
ARABIC_PREFIXES = ("", "ال", "و", "لل", "ل", "ب", "وال", "بال")
ARABIC_MINOR = """
طفل طفلة أطفال طفلات طفلين طفلتين طفلان قاصر قاصرة قاصرات قاصرين قاصرون قصّر مراهق مراهقة مراهقون
مراهقين مراهقات رضيع رضيعة رضع صبي صبية صبيان غلام غلمان طفولة ناشئة ناشئين صغيرات صغار
"""
ARABIC_MINOR_PHRASES = """
فتاة صغيرة, الفتاة الصغيرة, فتيات صغيرات, بنت صغيرة, البنت الصغيرة, بنات صغيرات, ولد صغير, الولد
الصغير, أولاد صغار, حديث الولادة, حديثة الولادة, حديثي الولادة, سن المراهقة, سن الطفولة
"""

#: Sexual words, those of a dictionary.
SEXUAL = """
erection*, erect penis, coitus, coital, semen, sodomy, copulate, copulating, copulation, undressed,
relaciones sexuales, acto sexual, sexual(- es), sexualmente, coito, genital(- es), pene, penes,
pezón, pezones, masturbación, masturbarse, orgasmo(- s), erección(- es), eyaculación, felación, sin
ropa, desvestid(a o as os), desnud(a o as os), excitación sexual, excitad(a o) sexualmente,
pornográfic(a o as os), senos desnudos, pechos desnudos, lencería, cunnilingus, vulva, prostitut(a
as), relações sexuais, ato sexual, sexuais, nudez, despid(a o as os), mamilo(- s), órgãos genitais,
genitais, seios nus, peitos nus, masturbação, masturbar(- se), orgasmos, ereção, erecção,
ejaculação, felação, pénis, pênis, vagina, nus, nuas, homem nu, corpo nu, erótic(a o as os),
excitação sexual, pornografia, pornográfic(a os as), sem roupas, nudité, coït, sodomie, organes
génitaux, parties génitales, génital(e es), vagin, vulve, pénis, téton(- s), mamelons, orgasme(-
s), érection(- s), pornographie, pornographique(- s), fellation(- s), sans vêtements, rapports
sexuels, acte sexuel, masturbation, éjaculation, dénud(é és ées), déshabill(é és ées), nues, tout
nu, toute nue, corps nu, homme nu, seins nus, torse nu, érotisme, pornos, préliminaires sexuels,
nudità, svestit(a o e i), spogliat(a o e i), rapporti sessuali, atto sessuale, sessual(e i),
sessualmente, coito, genitali, pene, capezzol(o i), masturbazione, orgasmo, orgasmi, erezione,
erezioni, eiaculazione, senza vestiti, spogliarello, seno nudo, nude, erotic(a o i), pornografia,
pornografic(a o i), fellatio, vagina, vulva, eccitazione sessuale, sesso orale, nacktheit,
nacktfoto(- s), unbekleidet(- e er en es), entkleidet(- e er), geschlechtsverkehr, geschlechtsakt,
sexualakt, oralsex, analsex, oralverkehr, analverkehr, genital(- e en), genitalien, genitalbereich,
geschlechtsteil(- e en), geschlechtsorgan(- e en), brustwarze(- n), nackte brüste,
selbstbefriedigung, masturbier(en t end), masturbation, orgasm(us en), erektion(- en), ejakulation,
samenerguss, koitus, beischlaf, pornografie, pornographie, pornografisch(- e er es en),
pornographisch, oben ohne, ohne kleidung, sexspielzeug(- e), sexuell(- e er es en), erotik,
erotisch(- e er es en), schamlippen, hoden, penisse, striptease, naaktheid, naakt(- e en),
ontkleed(- e), uitgekleed(- e), geslachtsgemeenschap, geslachtsverkeer, seksueel, seksuele,
seksueel opgewonden, seks, orale seks, anale seks, geslachtsde(el len), geslachtsorga(an nen),
genitaliën, tepel(- s), blote borsten, blote billen, masturbatie, masturberen, orgasme(- s),
erectie(- s), ejaculatie, coïtus, pornografie, pornografisch(- e), zonder kleren, seksspeeltje(-
s), ontucht, zaadlozing, schaamlippen, erotiek, erotisch(- e), lingerie, nagość, nagiej, nagich,
nagiego, nagie piersi, nagie ciało, naga kobieta, naga dziewczyna, rozebran(a y e ą ej ych),
stosun(ek ki) płciow(y), stosunki płciowe, akt seksualny, seks(- u ie em), seks oralny, seks
analny, seksualn(a y e ie ego ej ą ych), narząd(- y) płciow(y e), narządy płciowe, pochw(a y ę),
srom(- u), sut(ki ek ków), masturbacj(a i ę), masturbuje, orgazm(- u y), erekcj(a i ę), wytrysk(-
u), ejakulacj(a i), spółkowani(e a), erotyczn(a y e ie ego ej ą ych), erotyk(a i ę), podniecenie
seksualne, podniecon(a y) seksualnie, bez ubrani(a), bez ubrań, zabawk(a i) erotyczn(a), zabawki
erotyczne, striptiz(- u), pornograficzn(a y e), pornografi(a i ę), członek w erekcji, lubieżn(a y
e), нагот(а ы у ой), наг(ой ого ие их ую), гол(ая ый ые ую ой ого ых ыми), обнаженн(ая ый ые ую ой
ого ых), раздет(а ая ый ые ую ой), полов(ой ого ые) акт, половой акт, полового акта, половое
сношение, половые сношения, половые органы, половых органов, половой член, половые губы, гениталии,
гениталий, пенис(- а ы), влагалищ(е а ем), вульв(а ы у), соск(и ов а ами), сосок, мастурбаци(я и ю
ей), мастурбирует, оргазм(- а ы ом), эрекци(я и ю ей), эякуляци(я и ю), коитус(- а), порнографи(я и
ю ей), порнографическ(ий ая ие ое), порно, сексуальн(ый ая ое ые ого ой ую ых), сексуальное
возбуждение, секс(- а ом у), без одежды, стриптиз(- а), фелляци(я и ю), минет(- а), эротическ(ий ая
ое ие ого ой), эротик(а и у), совокуплени(е я), похотлив(ый ая ые), голая грудь, голые груди,
голий, голої, гола жінка, гола дівчина, оголен(а ий і у ої их ого), нагот(а и у), нагий, нагої,
роздягнен(а ий і у ої), статев(ий ого) акт, статеві зносини, статеві органи, статевих органів,
статевий член, геніталії, геніталій, пеніс(- а), піхв(а и у), вульв(а и у), сосок, соск(и ів),
оголені груди, мастурбаці(я ї ю), оргазм(- у и), ерекці(я ї ю), еякуляці(я ї ю), коїтус(- у),
порнографі(я ї ю), порнографічн(ий а і), еротик(а и у), еротичн(ий а е і ого ої), сексуальн(ий а е
і ого ої у их), сексуальне збудження, без одягу, стриптиз(- у), феляці(я ї), мінет(- у), сексу,
злягання, çıplak(- lar lık lığı), çırılçıplak, soyunmuş, soyunuk, soyunan, soyunuyor, cinsel
ilişki(- ye si), cinsel eylem(- ler), cinsel organ(- lar ı ları), cinsel uyarılma, cinsel içerik(-
li), cinsel, cinsellik, seks(- i), seksi, oral seks, anal seks, vajina(- sı), vulva, meme uç(ları
lar), meme ucu, çıplak göğüs(- ler), mastürbasyon(- u), orgazm(- ı), ereksiyon(- u), boşalma,
ejakülasyon, koitus, pornografi(- k), erotik, erotizm, giysisiz, kıyafetsiz, üstsüz, striptiz,
müstehcen(- lik), şehvet(- li), sevişme(- k), sevişen, penisi, नग्न(- ता), नंग(ी ा े), निर्वस्त्र,
विवस्त्र, यौन संबंध, यौन क्रिया, संभोग, सेक्स, सेक्सी, मैथुन, मुख मैथुन, गुदा मैथुन, हस्तमैथुन, जननांग(-
ों), जननेंद्रिय, शिश्न, लिंग उत्थान, योनि, स्तनाग्र, नग्न स्तन, चरमसुख, चरमोत्कर्ष, वीर्य, वीर्यपात, स्खलन,
अश्लील(- ता), पोर्न, पोर्नोग्राफी, कामुक(- ता), यौन उत्तेजना, बिना कपड़ों, बिना कपड़े, कामोत्तेजक, रति
क्रिया, ペニス, マスターベーション, オーガズム, オルガズム, ストリップ, フェラチオ, クリトリス,
オナニー
"""
ARABIC_SEXUAL = """
عاري عارية عراة عري عاريات عار جماع تعري قضيب مهبل حلمة حلمات استمناء انتصاب قذف إباحية إباحي
إباحيات جنسي جنسية جنسيا نكاح مضاجعة شهواني شهوانية إيلاج
"""
ARABIC_SEXUAL_PHRASES = """
عاري الجسد, عارية الجسد, بدون ملابس, بلا ملابس, من دون ملابس, علاقة جنسية, فعل جنسي, جنس فموي, جنس
شرجي, أعضاء تناسلية, الأعضاء التناسلية, صدر عار, صدر عاري, العادة السرية, نشوة جنسية, إثارة جنسية,
مثير جنسيا, محتوى جنسي, ممارسة الجنس, يمارس الجنس, تمارس الجنس
"""

#: Words of scripts without spaces between words: they are found inside longer texts.
UNSPACED_MINOR = """
小學生, 中學生, 國中生, 高中女生, 初中女生, 高中男生, 初中男生, 小学女生, 幼儿园, 幼兒園, 幼稚园,
幼稚園, 學前班, 学前班, 学龄前, 學齡前, 孩子, 孩童, 女童, 男童, 婴儿, 嬰兒, 婴幼儿, 嬰幼兒, 幼儿,
幼兒, 少女, 少年, 青少年, 小朋友, 未到法定年龄, 未達法定年齡, 正太, 小女生, 小男生, 小姑娘, 未成人,
尚未成年, 豆蔻年华, 豆蔻年華, 二八年华, 二八年華, 及笄之年, 初中学生, 高中学生, 小学学生, 幼稚園児,
保育園児, 園児, 小学校, 中学校, こども, 幼児, 乳児, 乳幼児, 赤ん坊, 赤ちゃん, 思春期, 小さな女の子,
小さい女の子, 小さな男の子, 小さい男の子, 幼い女の子, 幼い男の子, 幼い少女, 小児, 新生児, 学童,
小さい子, 小さな子, 成人していない, 成人に達していない, 未成人, 미성년, 초등학교, 고등학교, 남고생,
남중생, 유치원, 어린아이, 청소년, 여자아이, 남자아이, 갓난아기, 신생아
"""
UNSPACED_SEXUAL = """
性行为, 性交, 做爱, 做愛, 口交, 肛交, 生殖器, 阴茎, 陰莖, 阴道, 陰道, 外阴, 外陰, 乳头, 乳頭, 自慰,
手淫, 性高潮, 勃起, 射精, 性兴奋, 性興奮, 脱光, 脫光, 脱衣舞, 脫衣舞, 露骨的性, 性爱, 性愛, 性器,
陰茎, 膣, 乳首, 乳房の露出, 性的興奮, 服を脱い, わいせつ, 猥褻, 猥亵, 露骨な性的, 구강성교,
항문성교, 외음부, 젖꼭지, 오르가슴, 오르가즘, 스트립쇼, 벌거벗
"""
#: Longer harmless words that contain such a word, or a part of it: they are skipped first.
UNSPACED_BENIGN = """
电子, 電子, 叫做, 当做, 當做, 看做, 作做, 菓子, 分子, 原子, 粒子, 量子, 帽子, 椅子, 提高, 最高,
裸眼, 裸電球, 裸麦, 裸足, 裸子植物, 裸线, 裸机, 裸価, 裸价, 裸岩, 裸馬, 裸婚, 美少女, 美少年,
魔法少女, 文学少女, 少女漫画, 少女マンガ, 少女時代, 少女时代, 少女心, 少女趣味, 少年漫画,
少年マンガ, 少年ジャンプ, 减少, 減少, 至少, 缺少, 多少, 不少, 很少, 极少, 極少, 正太阳, 正太陽,
女孩子, 男孩子, 孩子气, 孩子氣, 校正, 修正, 改正, 真正, 中学校長, 小学校長, 中学校教師, 小学校教師,
中学校教員, 小学校教員, 小学校教諭, 中学校教諭, 小児科, 生理的, 乳頭状, 性交渉術, 可能性, 选择性,
選擇性, 미소녀, 미소년, 소녀시대, 마법소녀, 방탄소년단, 초등학교교사, 고등학교교사, 유치원교사
"""
#: Characters that form a word with 性 ("女性"), so that the next one does not ("女性行为").
BEFORE_SEX = (
    "女男理感个個人知惯慣恶惡良异異同慢急酸碱中弹彈活惰择擇次用能"
    "毒属屬特磁导導韧韌显顯隐隱油水火阳陽脆刚剛天品定变變"
)
#: Korean words: a word of a text begins with one of them, and an ending may follow.
KOREAN_MINOR = """
초등생, 초딩, 중딩, 고딩, 중학교, 아이들, 아동, 유아, 영아, 영유아, 소녀, 소년, 십대, 꼬마, 아기,
사춘기, 로리, 로리콘, 쇼타, 쇼타콘, 어린애, 여자애, 남자애, 꼬맹이, 어린 소녀, 어린 소년, 여아,
성인이 아닌, 성인이 안 된
"""
KOREAN_SEXUAL = """
성행위, 성관계, 성교, 성기, 음경, 페니스, 음부, 유두, 자위, 발기, 사정액, 음란, 에로틱, 성적 흥분,
옷을 벗, 성인 동영상, 성인물, 야동, 야한, 질내사정
"""
KOREAN_BENIGN = """
유아인, 자위대, 자위권, 발기인, 성교육, 성기사, 성기능, 성기게, 아기자기, 소년체전, 소녀시대,
쇼타임, 음부호, 꼬마전구, 중학교 교사, 중학교 교장, 아동복지사, 아동 복지사, 유아독존
"""

#: Ages and limits in texts without their spaces. 二十 and 스물 are tens.
_HAN_EIGHTEEN = "(?:(?<!\\d)18|(?<![二三四五六七八九])十八)"
_HANGUL_EIGHTEEN = "(?:(?<!\\d)18|열여덟|(?<![이삼사오육칠팔구])십팔)"
UNSPACED_AGES = (
    "(?<![一二三四五六七八九两十百千〇零])(?:[一二三四五六七八九两]|十[一二三四五六七]?|一[〇零一二三四五六七])"
    "(?=周?[歳才岁歲]|さい)",
    "(?<![にんごくなちう])じゅう(?:いち|に|さん|し|よん|ご|ろく|なな|しち)?さい",
    "(?:年[龄齢齡]|나이|연령)[는은이가が是为:： ]?(?:1[0-7]|0?[1-9])(?!\\d)",
    "(?:生後|생후)\\d|(?<!\\d)\\d{1,2}[个個]月大",
    "(?<![물른흔쉰순든열])(?:열?(?:한|두|세|네|다섯|여섯|일곱)|열|여덟|아홉)살(?!연상|연하|위|많|차이|더)",
    "(?<![이삼사오육칠팔구백])십[일이삼사오육칠]?(?:세(?!기)|살)",
    f"{_HAN_EIGHTEEN}(?:周?[歳才歲岁](?:未[満滿满]|以下|より下|より若|に満たな|では?な|前)|未[満滿满])",
    f"(?:未[满滿満]|不[满滿]|小[于於]|低[于於]|不到|不足|[还還][没沒]到?|未到){_HAN_EIGHTEEN}周?[岁歲歳才]",
    f"{_HANGUL_EIGHTEEN}(?:[세살](?:미만|이하|아래|보다어|보다적|[이가도]?(?:안[된되됐]|아[니닌]|되지않))|미만)",
    "(?<!\\d)10[代대](?=の|少|女|男|소|여|남|청)|(?<![二三四五六七八九])十代(?!目)",
    "(?<!大学)[一二三四五六七八九1-9]年[级級]|[初高][一二三](?=学生|學生|女生|男生)|[小中]学[1-6一二三四五六]年",
)
UNSPACED_SCHOOL_YEARS = r"(?<!\w)(?:[초小][1-6]|[중中고高][1-3])(?!\w)"


def ages_in_a_word() -> Iterator[str]:
    """ "zestienjarige", "trzynastolatka": an age and its unit in one word; and birthdays."""
    joined = (
        (NUMBERS["nl"][0].split()[3:17], "jarig(- e en)"),
        (POLISH_STEMS.split(), "letn(i ia ie iego iej ią ich im)"),
        (POLISH_STEMS.split(), "lat(ek ka ki kę ką ce ków kowi kiem)"),
        (NUMBERS["ru"][1].split()[3:17], "летн(яя ий ей юю его ему ие их)"),
        (NUMBERS["ru"][1].split()[3:17], "летк(а и у ой)"),
        (NUMBERS["uk"][1].split()[3:17], "річн(а ий ої ого у ій ому ою і их)"),
        (ITALIAN_STEMS.split(), "enn(e i)"),
    )
    for numbers, unit in joined:
        yield from (number + form for number in numbers for form in entries(unit))
    for ordinals, birthday in BIRTHDAYS:
        yield from (f"{ordinal} {birthday}" for ordinal in ordinals.split())


def school_years() -> Iterator[str]:
    """ "siódma klasa", "7. Klasse", "classe de cinquième", "year 9 pupil"."""
    for ordinals, nouns in SCHOOL_YEARS:
        yield from (f"{nth} {noun}" for nth in ordinals.split() for noun in nouns.split(", "))
    yield from (f"{n} {noun}" for n in range(5, 13) for noun in YEARS_BEFORE.split(", "))
    yield from (f"{noun} {n}" for n in range(3, 13) for noun in YEARS_AFTER.split(", "))
    yield from (f"الصف {nth}" for nth in ARABIC_YEARS.split())
    yield from (
        f"{who} de {nth}" for who in ("classe", "élève") for nth in FRENCH_YEARS.split(", ")
    )
    for year in range(1, 14):
        for who in ("pupil*", "student*", "schoolboy", "schoolgirl", "kid*"):
            yield from (f"year {year} {who}", f"grade {year} {who}")


def arabic_words(nouns: str) -> Iterator[str]:
    """Arabic nouns, each with the short words that are written as a part of it."""
    yield from (prefix + noun for noun in nouns.split() for prefix in ARABIC_PREFIXES)


def minor() -> str:
    """All words and phrases of a person under 18, as a table without `(...)`."""
    tables = (MINOR, SCHOOL, NOT_OF_AGE, ARABIC_MINOR_PHRASES, UNSPACED_MINOR, KOREAN_MINOR)
    parts = (*map(entries, tables), ages_in_a_word(), school_years(), arabic_words(ARABIC_MINOR))
    return ", ".join(chain.from_iterable(parts))


def sexual() -> str:
    """All sexual words and phrases, as a table without `(...)`."""
    tables = (SEXUAL, ARABIC_SEXUAL_PHRASES, UNSPACED_SEXUAL, KOREAN_SEXUAL)
    parts = (*map(entries, tables), arabic_words(ARABIC_SEXUAL))
    return ", ".join(chain.from_iterable(parts))


def expanded(table: str) -> str:
    """A table without `(...)`."""
    return ", ".join(entries(table))
