"""Captions of landscapes, as people write prompts: ten orders, synonyms, decorations, gaps.

`caption` writes a random one and notes which attributes it names. `full_caption` names them all in
the plainest words.
"""

import random
from dataclasses import dataclass

from builder.drawings import BLEMISHES, DECORATIONS, OPENINGS
from builder.landscapes import LANDS, NONE, SEAS, SKIES, SUNS, Scene

#: The attributes of a scene that a caption can name.
ATTRIBUTES = (
    "sky", "ground", "colour", "sun", "sun_place", "thing", "thing_place", "clouds",
)  # fmt: skip

SKY_WORDS = {
    "blue": ("blue",),
    "orange": ("orange",),
    "pink": ("pink",),
    "purple": ("purple", "purple", "violet"),
    "grey": ("grey", "grey", "gray"),
    "dark": ("dark", "dark", "night", "black"),
}
NIGHTS = ("at night", "at night", "by night", "in the night")
GROUND_WORDS = {
    "hills": ("hills", "hills", "hills", "a hill"),
    "mountains": ("mountains", "mountains", "mountains", "a mountain"),
    "sea": ("a sea", "a sea", "the sea", "an ocean", "water"),
}
COLOUR_WORDS = {
    "green": ("green",),
    "yellow": ("yellow", "yellow", "golden"),
    "white": ("white", "white", "snowy"),
    "brown": ("brown",),
    "purple": ("purple", "purple", "violet"),
    "blue": ("blue",),
    "grey": ("grey", "grey", "gray"),
}
SNOW = ("in the snow", "covered with snow", "with snow")
SUN_WORDS = {"yellow": ("yellow", "yellow", "golden"), "red": ("red",), "white": ("white",)}
THING_WORDS = {
    "tree": ("tree",),
    "house": ("house", "house", "house", "cottage"),
    "boat": ("boat", "boat", "boat", "sailing boat"),
}
PLACE_WORDS = {
    "left": ("on the left", "on the left", "on the left side", "at the left", "to the left"),
    "middle": ("in the middle", "in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right", "on the right side", "at the right", "to the right"),
}
CLOUD_WORDS = ("clouds", "clouds", "some clouds", "a few clouds", "a cloud")
ORDERS = (
    "{ground} under {sky}, {sun}, {thing}, {clouds}",
    "{ground} under {sky}, {thing}, {sun}, {clouds}",
    "{ground} with {thing} and {sun} under {sky}, {clouds}",
    "{sun} over {ground} under {sky}, {thing}, {clouds}",
    "{sun} above {ground}, {thing}, {sky}, {clouds}",
    "{thing} and {sun}, {ground}, {sky}, {clouds}",
    "{thing} in front of {ground} under {sky}, {sun}, {clouds}",
    "{sky} with {clouds} over {ground}, {sun}, {thing}",
    "{sky}, {ground}, {sun}, {thing}, {clouds}",
    "{clouds} and {sun} in {sky}, {ground}, {thing}",
    "landscape with {ground}, {sky}, {sun}, {thing}, {clouds}",
    "{sky} above {ground} with {thing}, {sun}, {clouds}",
)
JOINTS = (" under ", " with ", " and ", " over ", " above ", " in front of ", " in ", ", ")
#: Words of prompts without a meaning of their own.
GLUE = ("a", "an", "the", "sun", "moon", "sky", "full", "hill", "mountain", "landscape", "it", "is",
        "there", "no", "without", "cloudy", "side", "of", "by")  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A prompt, and the attributes of the scene that it names."""

    text: str
    says: frozenset[str]


def full_caption(scene: Scene) -> str:
    """ "green hills under a blue sky, a yellow sun on the right, a tree on the left, clouds"."""
    ground = f"{scene.colour} {scene.ground}"
    parts = [f"{'a ' * (scene.ground == 'sea')}{ground} under {_article(scene.sky)} sky"]
    if scene.sun != NONE:
        parts.append(f"a {scene.sun} {_sun_noun(scene)} {PLACE_WORDS[scene.sun_place][0]}")
    if scene.thing != NONE:
        parts.append(f"a {scene.thing} {PLACE_WORDS[scene.thing_place][0]}")
    return ", ".join(parts + ["clouds"] * scene.clouds)


def caption(scene: Scene, rng: random.Random) -> Caption:
    """The scene in words. Colours and places may be omitted, and words without meaning added.

    A sentence names the ground, and the sun, thing and clouds if there are any, so that what it
    omits is absent. One caption in ten is empty, and one in ten names a single part.
    """
    kind = rng.random()
    if kind < 0.07:
        return Caption("", frozenset())
    if kind < 0.10:
        words = rng.sample(BLEMISHES + DECORATIONS, rng.randint(1, 12))
        return Caption(", ".join(words), frozenset())
    if kind < 0.25:
        return Caption(full_caption(scene), _all_of(scene))
    if kind < 0.35:
        text, says = _one_part(scene, rng)
    else:
        text, says = _sentence(scene, rng)
    return Caption(_decorated(text, rng) if rng.random() < 0.35 else text, frozenset(says))


def _all_of(scene: Scene) -> frozenset[str]:
    """The attributes that a full caption names: all that are there."""
    return frozenset(name for name in ATTRIBUTES if getattr(scene, name) not in (NONE, False))


def _sentence(scene: Scene, rng: random.Random) -> tuple[str, set[str]]:
    """All parts in one of the orders. Parts that are absent or omitted leave no gap."""
    says: set[str] = set()
    sky = _sky(scene, rng, says) if rng.random() < 0.88 else ""
    parts = {
        "sky": sky,
        "ground": _ground(scene, rng, says),
        "sun": _sun(scene, rng, says),
        "thing": _thing(scene, rng, says),
        "clouds": _clouds(scene, rng, says),
    }
    text = _filled(rng.choice(ORDERS), parts)
    if rng.random() < 0.25:  # a list of words, without articles
        text = " ".join(word for word in text.split() if word not in ("a", "an"))
    return text, says


def _one_part(scene: Scene, rng: random.Random) -> tuple[str, set[str]]:
    """One part alone, as in negative prompts."""
    parts = [_ground, _ground, _sky, _sun, _sun, _thing, _thing, _clouds]
    while True:
        says: set[str] = set()
        text = rng.choice(parts)(scene, rng, says)
        if text:
            bare = rng.random() < 0.5
            return text.removeprefix("an ").removeprefix("a ") if bare else text, says


def _filled(order: str, parts: dict[str, str]) -> str:
    """The order with its parts. The joint before a missing part goes with it."""
    text, joint = "", ""
    for piece in order.replace("{", "\0{").replace("}", "}\0").split("\0"):
        if piece in JOINTS or not piece.startswith("{"):
            joint = piece
        elif words := parts[piece[1:-1]]:
            night = words.endswith("night") and joint in (" under ", " in ", " with ")
            text += (" " if night else joint if text or joint not in JOINTS else "") + words
            joint = ""
    return text


def _sky(scene: Scene, rng: random.Random, says: set[str]) -> str:
    says.add("sky")
    if scene.sky == "dark" and rng.random() < 0.45:
        return rng.choice(NIGHTS)
    return f"{_article(rng.choice(SKY_WORDS[scene.sky]))} sky"


def _ground(scene: Scene, rng: random.Random, says: set[str]) -> str:
    says.add("ground")
    noun = rng.choice(GROUND_WORDS[scene.ground])
    if rng.random() > 0.88:
        return noun
    says.add("colour")
    if scene.colour == "white" and rng.random() < 0.25:
        return f"{noun} {rng.choice(SNOW)}"
    colour = rng.choice(COLOUR_WORDS[scene.colour])
    article, _, bare = noun.rpartition(" ")
    article = "a" if article == "an" else article
    return f"{article} {colour} {bare}".strip()


def _sun(scene: Scene, rng: random.Random, says: set[str]) -> str:
    if scene.sun == NONE:
        return ""
    says.add("sun")
    noun = _sun_noun(scene)
    if rng.random() > 0.12:
        noun = f"{rng.choice(SUN_WORDS[scene.sun])} {noun}"
    else:
        says.discard("sun")
        says.add("any_sun")
        noun = f"full {noun}" if noun == "moon" and rng.random() < 0.3 else noun
    article = "the" if rng.random() < 0.1 else "a"
    return f"{article} {noun} {_place(scene.sun_place, 'sun_place', rng, says)}".strip()


def _sun_noun(scene: Scene) -> str:
    return "moon" if scene.sky == "dark" else "sun"


def _thing(scene: Scene, rng: random.Random, says: set[str]) -> str:
    if scene.thing == NONE:
        return ""
    says.add("thing")
    noun = rng.choice(THING_WORDS[scene.thing])
    return f"a {noun} {_place(scene.thing_place, 'thing_place', rng, says)}".strip()


def _clouds(scene: Scene, rng: random.Random, says: set[str]) -> str:
    if not scene.clouds:
        return ""
    says.add("clouds")
    return rng.choice(CLOUD_WORDS)


def _place(place: str, name: str, rng: random.Random, says: set[str]) -> str:
    if rng.random() > 0.85:
        return ""
    says.add(name)
    return rng.choice(PLACE_WORDS[place])


def _article(word: str) -> str:
    return f"an {word}" if word == "orange" else f"a {word}"


def _decorated(words: str, rng: random.Random) -> str:
    """The words, with openings and decorations that say nothing about the scene."""
    if rng.random() < 0.5:
        words = f"{rng.choice(OPENINGS)} {words}"
    before = _decorations(rng, 3) if rng.random() < 0.35 else []
    after = _decorations(rng, 8) if rng.random() < 0.75 else []
    return ", ".join([*before, words, *after])


def _decorations(rng: random.Random, most: int) -> list[str]:
    """One to `most` decorations. Some are invented words that no vocabulary has."""
    chosen = rng.sample(DECORATIONS, rng.randint(1, most))
    if rng.random() < 0.25:
        invented = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))
        chosen[rng.randrange(len(chosen))] = invented
    return chosen


def filler(rng: random.Random) -> str:
    """The second part of a long prompt: only decorations, perhaps none."""
    return ", ".join(rng.sample(DECORATIONS, rng.randint(0, 20)))


def vocabulary() -> list[str]:
    """Every word that a caption can have, except invented ones, sorted."""
    phrases = [*SKIES, *LANDS, *SEAS, *SUNS, *NIGHTS, *SNOW, *CLOUD_WORDS, *ORDERS, *GLUE]
    phrases += [*OPENINGS, *DECORATIONS, *BLEMISHES]
    for table in (SKY_WORDS, GROUND_WORDS, COLOUR_WORDS, SUN_WORDS, THING_WORDS, PLACE_WORDS):
        phrases += [phrase for options in table.values() for phrase in options]
    words = " ".join(phrases).replace("{", " ").replace("}", " ").replace("-", " ")
    return sorted({word for word in words.replace(",", " ").split() if word.isalpha()})
