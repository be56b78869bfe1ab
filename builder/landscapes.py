"""Small landscapes that a pocket model learns to paint: a sky, a ground, a sun, one thing, clouds.

`imagine` chooses a random scene, `paint` draws it at any size. A `Moment` shifts what can move, so
that a video is one scene at several moments. `landscape_captions` describes scenes in words,
`landscape_ruler` finds the scene that a picture shows.
"""

import math
import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]
Colour = tuple[float, float, float]

#: The value of a scene's `sun`, `thing` and their places if there is none.
NONE = "none"

#: The colours at the top of the sky and at the horizon.
SKIES: dict[str, tuple[Colour, Colour]] = {
    "blue": ((52, 118, 210), (190, 224, 244)),
    "orange": ((222, 82, 48), (255, 208, 122)),
    "pink": ((206, 84, 148), (253, 204, 196)),
    "purple": ((74, 46, 130), (206, 150, 204)),
    "grey": ((104, 116, 130), (208, 213, 217)),
    "dark": ((8, 14, 48), (64, 84, 146)),
}
#: The colour of the light under each sky, a factor for everything that is lit.
LIGHT: dict[str, Colour] = {
    "blue": (1.0, 1.0, 1.0),
    "orange": (1.0, 0.9, 0.8),
    "pink": (1.0, 0.92, 0.95),
    "purple": (0.88, 0.84, 0.98),
    "grey": (0.9, 0.92, 0.94),
    "dark": (0.54, 0.6, 0.82),
}
LANDS: dict[str, Colour] = {
    "green": (108, 164, 66),
    "yellow": (226, 184, 76),
    "white": (226, 234, 246),
    "brown": (142, 94, 62),
    "purple": (134, 98, 172),
}
SEAS: dict[str, Colour] = {"blue": (26, 92, 176), "green": (34, 136, 122), "grey": (92, 106, 118)}
SUNS: dict[str, Colour] = {"yellow": (255, 230, 96), "red": (232, 58, 40), "white": (252, 252, 246)}
GROUNDS = ("hills", "mountains", "sea")
THINGS = {"hills": ("tree", "house"), "mountains": ("tree", "house"), "sea": ("boat",)}
#: The middle of the sun or of the thing, as a share of the width.
PLACES = {"left": 0.22, "middle": 0.5, "right": 0.78}
#: Skies and grounds whose colours would vanish in each other.
VANISHING = {("purple", "purple"), ("orange", "yellow"), ("grey", "white"), ("dark", "purple")}
#: Under a dark sky the sun is a moon, and there is no red moon.
MOONS = ("yellow", "white")

#: Heights as shares of the picture's height: the sea's horizon, the sun, the foot of the thing.
HORIZON = 0.62
SUN_HEIGHT = 0.25
FOOT = 0.87
#: Lengths in units of the picture's shorter side.
SUN_RADIUS = 0.085
#: The three layers of land, far to near: crest as a share of the height, and the crest's waves.
LAYERS = ((0.555, 0.04), (0.66, 0.034), (0.765, 0.018))
#: How much haze the foot of a far layer has.
FOOT_HAZE = 0.55

SNOW: Colour = (248, 250, 255)
DARK_GREEN: Colour = (36, 92, 54)
LEAVES: Colour = (62, 124, 66)
TRUNK: Colour = (84, 56, 38)
WALL: Colour = (250, 232, 198)
ROOF: Colour = (192, 52, 42)
DOOR: Colour = (98, 62, 44)
GLASS: Colour = (104, 136, 164)
LAMP: Colour = (255, 214, 120)
HULL: Colour = (138, 62, 40)
SAIL: Colour = (250, 248, 242)
JIB: Colour = (226, 92, 60)


#: Circles of a tree: across and down from its foot, and radius, in units of the shorter side.
TREE_CROWN = (
    (0, -0.196, 0.068),
    (-0.054, -0.150, 0.054),
    (0.054, -0.150, 0.054),
    (0, -0.138, 0.056),
)
TREE_LIGHTS = ((-0.014, -0.212, 0.038), (-0.058, -0.164, 0.025), (0.046, -0.166, 0.025))


@dataclass(frozen=True)
class Scene:
    """What a landscape shows. `seed` decides its ridges, its waves and where its clouds are."""

    sky: str
    ground: str
    colour: str
    sun: str = NONE
    sun_place: str = NONE
    thing: str = NONE
    thing_place: str = NONE
    clouds: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Moment:
    """How far things have moved, in shares of the picture: right and down are positive."""

    sun_across: float = 0.0
    sun_down: float = 0.0
    thing_across: float = 0.0
    clouds_across: float = 0.0
    waves: float = 0.0


def imagine(rng: random.Random) -> Scene:
    """A scene with each attribute drawn evenly, without colours that vanish in each other."""
    sky = rng.choice(tuple(SKIES))
    ground = rng.choice(GROUNDS)
    colours = SEAS if ground == "sea" else LANDS
    colour = rng.choice([each for each in colours if (sky, each) not in VANISHING])
    sun = rng.choice((NONE, *(MOONS if sky == "dark" else SUNS)))
    thing = rng.choice((NONE, *THINGS[ground]))
    return Scene(
        sky,
        ground,
        colour,
        sun,
        rng.choice(tuple(PLACES)) if sun != NONE else NONE,
        thing,
        rng.choice(tuple(PLACES)) if thing != NONE else NONE,
        rng.random() < 0.35,
        rng.randrange(1 << 30),
    )


def paint(scene: Scene, width: int, height: int, moment: Moment = Moment()) -> Pixels:
    """The scene as (height, width, 3) RGB. The same scene has the same outlines at every size."""
    canvas = Canvas(width, height)
    rng = np.random.default_rng(scene.seed)
    _paint_sky(canvas, scene, moment)
    if scene.clouds:
        _paint_clouds(canvas, scene, moment, rng)
    if scene.ground == "sea":
        _paint_sea(canvas, scene, moment, rng)
    else:
        _paint_land(canvas, scene, moment, rng)
    if scene.thing != NONE:
        paint_thing(canvas, scene, moment)
    return (canvas.pixels + 0.5).astype(np.uint8)


@dataclass
class Canvas:
    """Float RGB pixels of 0 to 255. Lengths are in units of the shorter side."""

    width: int
    height: int
    pixels: Plane = field(init=False)
    unit: int = field(init=False)
    x: Plane = field(init=False)
    y: Plane = field(init=False)

    def __post_init__(self) -> None:
        self.pixels = np.empty((self.height, self.width, 3), np.float32)
        self.unit = min(self.width, self.height)
        self.x = _middles(self.width, self.unit)[None]
        self.y = _middles(self.height, self.unit)[:, None]

    def across(self, share: float) -> float:
        """A share of the width as a length."""
        return share * self.width / self.unit

    def down(self, share: float) -> float:
        """A share of the height as a length."""
        return share * self.height / self.unit

    def window(self, left: float, top: float, right: float, bottom: float) -> "Window":
        """The part of the canvas within these lengths, and a pixel more."""
        rows = slice(
            _clip(top * self.unit - 2, self.height), _clip(bottom * self.unit + 3, self.height)
        )
        columns = slice(
            _clip(left * self.unit - 2, self.width), _clip(right * self.unit + 3, self.width)
        )
        return Window(self.pixels[rows, columns], self.x[:, columns], self.y[rows], self.unit)

    def below(self, top: float) -> "Window":
        """All rows from a height on."""
        return self.window(0, top, self.width, self.height)


def _middles(length: int, unit: int) -> Plane:
    """The middle of each pixel along one axis, in units."""
    return ((np.arange(length) + 0.5) / unit).astype(np.float32)


def _clip(pixel: float, length: int) -> int:
    return min(max(int(pixel), 0), length)


@dataclass
class Window:
    """A view of some of a canvas's pixels, with their coordinates."""

    pixels: Plane
    x: Plane
    y: Plane
    unit: int

    def blend(self, mask: Plane, colour: Colour | Plane) -> None:
        """Paint a colour where the mask is 1, and partly where it is less."""
        self.pixels += mask[..., None] * (np.asarray(colour, np.float32) - self.pixels)

    def fill(self, distance: Plane, colour: Colour | Plane) -> None:
        """Paint where a signed distance is negative, with a smooth edge of one pixel."""
        self.blend(np.clip(0.5 - distance * self.unit, 0, 1), colour)

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """Paint a convex polygon, whose points go round clockwise on the screen."""
        self.fill(_polygon(self.x, self.y, points), colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.fill(np.hypot(self.x - x, self.y - y) - radius, colour)

    def shadow(self, x: float, y: float, wide: float, high: float, strength: float) -> None:
        """Darken a soft ellipse."""
        away = ((self.x - x) / wide) ** 2 + ((self.y - y) / high) ** 2
        self.pixels *= 1 - strength * np.exp(-away)[..., None]


def _polygon(x: Plane, y: Plane, points: list[tuple[float, float]]) -> Plane:
    """The signed distance to a convex polygon, negative inside."""
    sides = [
        ((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) / math.hypot(x1 - x0, y1 - y0)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True)
    ]
    return np.maximum.reduce(sides)


def lit(colour: Colour, sky: str) -> Colour:
    """A colour under the light of a sky."""
    red, green, blue = (value * light for value, light in zip(colour, LIGHT[sky], strict=True))
    return red, green, blue


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """The first colour with a share of the second."""
    red, green, blue = (a + share * (b - a) for a, b in zip(one, other, strict=True))
    return red, green, blue


def shaded(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255.0, value * factor) for value in colour)
    return red, green, blue


def sky_colour(sky: str, height: float) -> Colour:
    """The sky's colour without a glow, at a share of the picture's height."""
    top, low = SKIES[sky]
    return mixed(top, low, min(1.0, max(0.0, height / HORIZON)) ** 1.15)


def sun_at(scene: Scene, moment: Moment) -> tuple[float, float]:
    """The middle of the sun in shares of the width and of the height."""
    return PLACES[scene.sun_place] + moment.sun_across, SUN_HEIGHT + moment.sun_down


def _paint_sky(canvas: Canvas, scene: Scene, moment: Moment) -> None:
    top, low = (np.asarray(colour, np.float32) for colour in SKIES[scene.sky])
    depth = np.clip(canvas.y / canvas.down(HORIZON), 0, 1)[..., None] ** 1.15
    canvas.pixels[:] = top + depth * (low - top)
    if scene.sun == NONE:
        return
    across, down = sun_at(scene, moment)
    x, y = canvas.across(across), canvas.down(down)
    colour = SUNS[scene.sun]
    window = canvas.window(0, 0, canvas.width, canvas.down(HORIZON + 0.1))
    away = np.hypot(window.x - x, window.y - y)
    strength = 0.22 if scene.sky == "dark" else 0.34
    window.blend(strength * np.exp(-((away / (2.3 * SUN_RADIUS)) ** 2)), colour)
    window.blend(
        0.5 * strength * np.exp(-((away / (5.5 * SUN_RADIUS)) ** 2)),
        mixed(colour, low_of(scene), 0.5),
    )
    window.disc(x, y, SUN_RADIUS, colour)


def low_of(scene: Scene) -> Colour:
    return SKIES[scene.sky][1]


#: Puffs of a cloud: across and up from its foot, and radius, in units of the shorter side.
PUFFS = (
    (-0.085, 0.012, 0.030),
    (-0.035, 0.030, 0.042),
    (0.030, 0.022, 0.036),
    (0.085, 0.010, 0.026),
)
#: Where clouds may be, in shares of the width and of the height.
CLOUD_PLACES = ((0.10, 0.16), (0.36, 0.11), (0.64, 0.17), (0.90, 0.12))


def cloud_colours(sky: str) -> tuple[Colour, Colour]:
    """The bright top and the shaded foot of clouds under a sky."""
    low = SKIES[sky][1]
    light = mixed(lit((250, 250, 252), sky), low, 0.45 if sky == "dark" else 0.12)
    return light, mixed(light, low, 0.45)


def _paint_clouds(canvas: Canvas, scene: Scene, moment: Moment, rng: np.random.Generator) -> None:
    """Three or four clouds, none of them near the sun."""
    light, shade = cloud_colours(scene.sky)
    for share, height in CLOUD_PLACES:
        jitter = rng.uniform(-0.04, 0.04), rng.uniform(-0.03, 0.03)
        size = rng.uniform(0.85, 1.25)
        near_sun = scene.sun != NONE and abs(share - PLACES[scene.sun_place]) < 0.2
        if not near_sun:
            across = (share + jitter[0] + moment.clouds_across + 0.2) % 1.4 - 0.2
            _paint_cloud(
                canvas, canvas.across(across), canvas.down(height + jitter[1]), size, light, shade
            )


def _paint_cloud(
    canvas: Canvas, x: float, y: float, size: float, light: Colour, shade: Colour
) -> None:
    window = canvas.window(x - 0.16 * size, y - 0.1 * size, x + 0.16 * size, y + 0.04 * size)
    if not window.pixels.size:
        return
    across, up = (window.x - x) / size, (y - window.y) / size
    distance = np.float32(1)
    for puff_x, puff_y, radius in PUFFS:
        distance = np.minimum(distance, np.hypot(across - puff_x, up - puff_y) - radius)
    distance = np.maximum(distance, -up - 0.004)
    tone = np.clip(up / 0.05, 0, 1)[..., None]
    colour = np.asarray(shade, np.float32) + tone * (np.asarray(light, np.float32) - shade)
    soft = np.clip(0.5 - distance / 0.014, 0, 1)
    window.blend(soft * soft * (3 - 2 * soft) * 0.95, colour)


def _paint_sea(canvas: Canvas, scene: Scene, moment: Moment, rng: np.random.Generator) -> None:
    colour = lit(SEAS[scene.colour], scene.sky)
    horizon = canvas.down(HORIZON)
    window = canvas.below(horizon)
    depth = np.clip((window.y - horizon) / (canvas.down(1) - horizon), 0, 1)
    far = np.asarray(mixed(colour, low_of(scene), 0.18), np.float32)
    near = np.asarray(shaded(colour, 0.86), np.float32)
    water = far + (depth**0.7)[..., None] * (near - far)
    start = rng.uniform(0, math.tau)
    phase = 9 * math.tau * depth**0.6 + math.tau * moment.waves
    bend = 1.4 * np.sin(window.x * 5 + start + 2.5 * depth) + 0.8 * np.sin(window.x * 11 - start)
    waves = np.sin(phase + bend) * (0.35 + 0.65 * depth)
    water = water + (0.09 * waves)[..., None] * water
    window.fill(np.broadcast_to(horizon - window.y, waves.shape), water)
    if scene.sun != NONE:
        x = canvas.across(sun_at(scene, moment)[0])
        _paint_glitter(window, scene, x, depth, phase + bend)


def _paint_glitter(window: Window, scene: Scene, x: float, depth: Plane, phase: Plane) -> None:
    """The sun's light on the water: bands under the sun that widen towards the front."""
    wide = 0.045 + 0.075 * depth
    bands = np.clip(0.5 + 0.9 * np.sin(phase), 0, 1)
    mask = 0.7 * bands * np.exp(-(((window.x - x) / wide) ** 2)) * (1 - 0.45 * depth) * (depth > 0)
    window.blend(mask, mixed(SUNS[scene.sun], (255, 255, 255), 0.25))


def _paint_land(canvas: Canvas, scene: Scene, moment: Moment, rng: np.random.Generator) -> None:
    colours = land_colours(scene)
    for number, (crest, waves) in enumerate(LAYERS):
        base = canvas.down(crest)
        if number == 0 and scene.ground == "mountains":
            _paint_mountains(canvas, scene, base, rng)
            continue
        crests = _hill_line(canvas.x[0], base, waves, rng)
        _paint_layer(canvas, crests, colours[number], scene, last=number == 2)


def land_colours(scene: Scene) -> tuple[Colour, Colour, Colour]:
    """The colours of the three layers' crests, far to near.

    Far layers are hazy. They are dark in front of a bright sky and bright in front of a dark one.
    """
    colour = lit(LANDS[scene.colour], scene.sky)
    haze = low_of(scene)
    far = _apart(haze, [mixed(shaded(colour, shade), haze, 0.28) for shade in (0.45, 1.0)])
    behind = mixed(far, haze, FOOT_HAZE)
    middle = _apart(behind, [mixed(shaded(colour, shade), haze, 0.1) for shade in (0.52, 0.64)])
    return far, middle, colour


def _apart(ground: Colour, colours: list[Colour]) -> Colour:
    """The colour that differs most from the one behind it."""
    return max(colours, key=lambda each: math.dist(each, ground))


def _hill_line(x: Plane, base: float, waves: float, rng: np.random.Generator) -> Plane:
    """The height of a smooth crest for each column: two waves of random phases."""
    long, short = rng.uniform(0, math.tau, 2)
    stretch = rng.uniform(0.85, 1.15)
    line = base + waves * (np.sin(6.2 * stretch * x + long) + 0.45 * np.sin(12.5 * x + short))
    return np.asarray(line, np.float32)


def _paint_layer(canvas: Canvas, crests: Plane, colour: Colour, scene: Scene, last: bool) -> None:
    """One layer of land: clear at its crest, hazy at its foot; the last one darker at its foot."""
    window = canvas.below(float(crests.min()))
    depth = window.y - crests
    foot = shaded(colour, 0.8) if last else mixed(colour, low_of(scene), FOOT_HAZE)
    share = np.clip(depth / (0.24 if last else 0.13), 0, 1)[..., None]
    start = np.asarray(shaded(colour, 1.06), np.float32)
    window.fill(-depth, start + share * (np.asarray(foot, np.float32) - start))


def _paint_mountains(canvas: Canvas, scene: Scene, base: float, rng: np.random.Generator) -> None:
    """Pointed peaks with a bright and a dark face, and snow on top. The low ones are behind."""
    toward_left = scene.sun_place == "left" or scene.sun == NONE
    for peak in _peaks(canvas, base, rng):
        window = canvas.window(peak.x - 0.45, peak.y, peak.x + 0.45, base + canvas.down(0.15))
        if window.pixels.size:
            _paint_peak(window, peak, base, scene, toward_left)


@dataclass(frozen=True)
class _Peak:
    """The place of a tip, the steepness of the flanks, and where their teeth are."""

    x: float
    y: float
    slope: float
    teeth: float


def _peaks(canvas: Canvas, base: float, rng: np.random.Generator) -> list[_Peak]:
    """Peaks far apart from each other, the lowest first."""
    number = max(3, round(canvas.across(1) / 0.3) + 1)
    first = rng.integers(2)
    peaks = []
    for index in range(number):
        x = (index + rng.uniform(0.3, 0.7)) * canvas.across(1) / number
        high = rng.uniform(0.155, 0.18) if (index + first) % 2 else rng.uniform(0.095, 0.12)
        peaks.append(_Peak(x, base - high, rng.uniform(0.85, 1.1), rng.uniform()))
    return sorted(peaks, key=lambda peak: -peak.y)


def _paint_peak(window: Window, peak: _Peak, base: float, scene: Scene, from_left: bool) -> None:
    across, fallen = window.x - peak.x, window.y - peak.y
    teeth = 0.007 * _zigzag(across * 14 + peak.teeth) + 0.004 * _zigzag(across * 31)
    outside = np.abs(across) * peak.slope + teeth - fallen
    split = (-across if from_left else across) + 0.3 * fallen + 0.02 * _zigzag(fallen * 13)
    bright = np.clip(0.5 + split * window.unit, 0, 1)
    fog = np.clip((window.y - base) / 0.16 + 0.4, 0, 1)[..., None] * 0.55
    rock = _between(*_rocks(scene), bright)
    window.fill(outside, rock + fog * (np.asarray(low_of(scene), np.float32) - rock))
    edge = fallen - (0.068 + 0.016 * _zigzag(across * 17 + peak.teeth))
    window.fill(np.maximum(edge, outside), _between(*_snows(scene), bright))


def _between(one: Colour, other: Colour, share: Plane) -> Plane:
    """The second colour where the share is 0, the first where it is 1."""
    second = np.asarray(other, np.float32)
    return second + share[..., None] * (np.asarray(one, np.float32) - second)


def _zigzag(x: Plane) -> Plane:
    """A triangle wave of -1 to 1 with period 1."""
    return np.abs((x % 1) * 4 - 2) - 1


def _rocks(scene: Scene) -> tuple[Colour, Colour]:
    """The bright and the dark face of a mountain of the scene's colour."""
    colour = lit(LANDS[scene.colour], scene.sky)
    if scene.colour == "white":
        colour = lit((190, 200, 220), scene.sky)
    haze = low_of(scene)
    dark = 0.36 if scene.sky == "dark" else 0.5
    return mixed(shaded(colour, 0.84), haze, 0.12), mixed(shaded(colour, dark), haze, 0.14)


def _snows(scene: Scene) -> tuple[Colour, Colour]:
    snow = lit(SNOW, scene.sky)
    return snow, shaded(mixed(snow, (110, 130, 190), 0.35), 0.74)


def paint_thing(canvas: Canvas, scene: Scene, moment: Moment, shadow: bool = True) -> None:
    """Paint the scene's thing on a canvas, with or without the shadow at its foot."""
    x = canvas.across(PLACES[scene.thing_place] + moment.thing_across)
    y = canvas.down(FOOT)
    window = canvas.window(x - 0.2, y - 0.34, x + 0.2, y + 0.08)
    if not window.pixels.size:
        return
    window.x, window.y = window.x - x, window.y - y
    if shadow:
        window.shadow(0, 0.006, 0.11, 0.015, 0.36)
    paint = {"tree": _paint_tree, "house": _paint_house, "boat": _paint_boat}[scene.thing]
    paint(window, scene.sky)


def _paint_tree(window: Window, sky: str) -> None:
    trunk = [(-0.015, -0.12), (0.015, -0.12), (0.021, 0.004), (-0.021, 0.004)]
    window.polygon(trunk, lit(TRUNK, sky))
    for x, y, radius in TREE_CROWN:
        window.disc(x, y, radius, lit(DARK_GREEN, sky))
    for x, y, radius in TREE_LIGHTS:
        window.disc(x, y, radius, lit(LEAVES, sky))


def _paint_house(window: Window, sky: str) -> None:
    wall, roof = lit(WALL, sky), lit(ROOF, sky)
    window.polygon(
        [(0.045, -0.235), (0.072, -0.235), (0.072, -0.150), (0.045, -0.150)], shaded(roof, 0.7)
    )
    window.polygon([(-0.090, -0.110), (0.090, -0.110), (0.090, 0.004), (-0.090, 0.004)], wall)
    window.polygon([(-0.068, -0.215), (0.068, -0.215), (0.118, -0.100), (-0.118, -0.100)], roof)
    window.polygon(
        [(-0.020, -0.066), (0.020, -0.066), (0.020, 0.004), (-0.020, 0.004)], lit(DOOR, sky)
    )
    glass = LAMP if sky == "dark" else lit(GLASS, sky)
    for x in (-0.055, 0.055):
        window.polygon(
            [(x - 0.016, -0.074), (x + 0.016, -0.074), (x + 0.016, -0.040), (x - 0.016, -0.040)],
            glass,
        )


def _paint_boat(window: Window, sky: str) -> None:
    window.polygon(
        [(-0.006, -0.240), (0.006, -0.240), (0.006, -0.030), (-0.006, -0.030)], lit(TRUNK, sky)
    )
    window.polygon([(0.010, -0.232), (0.100, -0.052), (0.010, -0.052)], lit(SAIL, sky))
    window.polygon([(-0.010, -0.200), (-0.010, -0.052), (-0.076, -0.052)], lit(JIB, sky))
    window.polygon(
        [(-0.115, -0.042), (0.115, -0.042), (0.080, 0.012), (-0.080, 0.012)], lit(HULL, sky)
    )
