"""Find which landscape a picture shows, by its pixels alone.

`read` compares a picture with what `landscapes.paint` would draw: the gradient of each sky, the
disc of the sun, the outline of the ground, the outline of a tree, a house or a boat. A picture
that fits no scene is refused, and an attribute that fits no value is None. So a blob where a house
should be is no house, and a picture without a horizon is no landscape.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builder.landscapes import (
    FOOT,
    HORIZON,
    LANDS,
    NONE,
    PLACES,
    SEAS,
    SKIES,
    SUN_RADIUS,
    SUNS,
    THINGS,
    VANISHING,
    Canvas,
    Colour,
    Moment,
    Pixels,
    Plane,
    Scene,
    cloud_colours,
    lit,
    paint_thing,
    shaded,
    sky_colour,
)

#: The shorter side at which a picture is read.
SIDE = 128
#: How far colours may be from those of `landscapes`, as a distance in RGB of 0 to 255.
SKY_TOLERANCE = 30.0
GROUND_TOLERANCE = 36.0


@dataclass(frozen=True)
class Reading:
    """What a picture shows. None: not sure. `NONE`: there is surely no sun, or no thing.

    `sun_at` and `thing_at` are the middles of the sun and of the thing's foot, in shares of the
    width and of the height.
    """

    sky: str
    ground: str | None
    colour: str
    sun: str | None
    sun_place: str | None
    thing: str | None
    thing_place: str | None
    clouds: bool | None
    sun_at: tuple[float, float] | None = None
    thing_at: tuple[float, float] | None = None

    def shows(self, scene: Scene, attribute: str) -> bool:
        """Whether the picture surely shows this attribute of a scene."""
        return bool(getattr(self, attribute) == getattr(scene, attribute))


@dataclass(frozen=True)
class _Sun:
    colour: str
    x: float
    y: float


def read(picture: Image.Image | Pixels) -> Reading | None:
    """What a picture of any size shows, or None if it is no landscape of this world."""
    view = _View(picture)
    sky = view.sky()
    if sky is None:
        return None
    sun = view.find_sun(sky)
    if not view.sky_is_whole(sky, sun):
        return None
    soil = view.soil(sky)
    horizon = view.horizon(sun)
    if soil is None or horizon is None:
        return None
    sea, colour = soil
    thing, thing_at = view.find_thing(sky, "sea" if sea else "hills", sun)
    sun_name: str | None = sun.colour if sun else NONE
    if not view.sky_is_empty(sky, sun):
        sun_name = None
    return Reading(
        sky=sky,
        ground=_kind(view, horizon, sea),
        colour=colour,
        sun=sun_name,
        sun_place=_place_of(sun.x / view.width) if sun and sun_name else sun_name,
        thing=thing,
        thing_place=_place_of(thing_at[0]) if thing_at else thing,
        clouds=view.clouds(sky, sun),
        sun_at=(sun.x / view.width, sun.y / view.height) if sun else None,
        thing_at=thing_at,
    )


def cloud_mask(picture: Image.Image | Pixels, sky: str) -> Plane:
    """1 where the upper part of a picture, at the ruler's size, is as bright as a cloud, else 0."""
    view = _View(picture)
    light, _ = cloud_colours(sky)
    share, rest = view.toward(sky, light)
    mask = (share > 0.5) & (rest < 40)
    sun = view.find_sun(sky)
    if sun is not None:
        mask &= ~view.disc(sun.x, sun.y, 1.7)
    return mask[view.rows(0.02, 0.26)].astype(np.float32)


def _place_of(share: float) -> str | None:
    place = min(PLACES, key=lambda name: abs(PLACES[name] - share))
    return place if abs(PLACES[place] - share) < 0.09 else None


class _View:
    """A picture at the ruler's size, and what can be found in it."""

    def __init__(self, picture: Image.Image | Pixels):
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        shorter = min(image.size)
        size = tuple(round(side * SIDE / shorter) for side in image.size)
        small = image.convert("RGB").resize(size, Image.Resampling.BOX)  # type: ignore[arg-type]
        self.pixels = np.asarray(small, np.float32)
        self.height, self.width = self.pixels.shape[:2]

    def rows(self, first: float, last: float) -> slice:
        return slice(round(first * self.height), round(last * self.height))

    def sky_fit(self, sky: str, sun: _Sun | None) -> Plane:
        """How far each pixel is from the sky's colours there, or from its glow's, if any."""
        away = self.pixels - _sky_rows(sky, self.height)[:, None]
        if sun is None:
            return np.linalg.norm(away, axis=-1)
        share, rest = self.toward(sky, SUNS[sun.colour])
        return np.where(share < 0.62, rest, np.linalg.norm(away, axis=-1))

    def toward(self, sky: str, colour: Colour) -> tuple[Plane, Plane]:
        """How far each pixel is on the way from the sky to a colour, 0 to 1, and how far aside."""
        ground = _sky_rows(sky, self.height)[:, None]
        way = np.asarray(colour, np.float32) - ground
        away = self.pixels - ground
        share = (away * way).sum(-1) / np.maximum((way * way).sum(-1), 1)
        rest = np.linalg.norm(away - np.clip(share, 0, 1)[..., None] * way, axis=-1)
        return share, rest

    def sky(self) -> str | None:
        """The sky whose gradient most of the upper rows have."""
        rows = self.rows(0.02, 0.40)

        def distance(sky: str) -> float:
            return float(np.quantile(self.sky_fit(sky, None)[rows], 0.3))

        first, second = sorted(SKIES, key=distance)[:2]
        is_near = distance(first) < 1.2 * SKY_TOLERANCE and distance(second) > 1.5 * distance(first)
        return first if is_near else None

    def sky_is_whole(self, sky: str, sun: _Sun | None) -> bool:
        """Whether all parts of the sky are smooth and fit, but for a sun and clouds."""
        rows = self.rows(0.01, 0.36)
        fits = (self.sky_fit(sky, sun) < SKY_TOLERANCE) | self.cloudy(sky)
        if sun is not None:
            fits |= self.disc(sun.x, sun.y, 1.2)
        thirds = np.array_split(fits[rows], 3, axis=1)
        steps = np.abs(np.diff(self.pixels[rows], axis=1)).max(-1)
        smooth = float(np.median(steps)) < 5 and float((steps > 14).mean()) < 0.14
        return smooth and min(float(third.mean()) for third in thirds) > 0.82

    def cloudy(self, sky: str) -> NDArray[np.bool_]:
        """The pixels that have the colour of a cloud under this sky."""
        light, shade = (np.asarray(colour, np.float32) for colour in cloud_colours(sky))
        way = light - shade
        away = self.pixels - shade
        share = np.clip((away * way).sum(-1) / max(float((way * way).sum()), 1), 0, 1)
        return np.linalg.norm(away - share[..., None] * way, axis=-1) < 34

    def disc(self, x: float, y: float, size: float = 1.0) -> NDArray[np.bool_]:
        """The pixels within a disc of so many sun radii."""
        rows, columns = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32) + 0.5
        return np.hypot(columns - x, rows - y) < size * SUN_RADIUS * SIDE

    def find_sun(self, sky: str) -> _Sun | None:
        """The disc that has a sun's colour, size and outline."""
        found = [(self._disc_of(sky, name), name) for name in SUNS]
        (overlap, x, y), name = max(found)
        return _Sun(name, x, y) if overlap > 0.78 else None

    def _disc_of(self, sky: str, name: str) -> tuple[float, float, float]:
        """The overlap (intersection over union) of one colour's pixels with a disc, and where."""
        share, rest = self.toward(sky, SUNS[name])
        mask = (share > 0.72) & (rest < 42)
        mask[round((HORIZON - 0.04) * self.height) :] = False
        if not mask.any():
            return 0.0, 0.0, 0.0
        x, y = _densest(mask)
        near = self.disc(x, y, 1.7)
        inside = self.disc(x, y)
        overlap = (mask & inside).sum() / ((mask | inside) & near).sum()
        return float(overlap), x, y

    def sky_is_empty(self, sky: str, sun: _Sun | None) -> bool:
        """Whether the sky has nothing that is like a sun, besides this one."""
        rows = self.rows(0.02, 0.33)
        foreign = (self.sky_fit(sky, sun) > 1.4 * SKY_TOLERANCE) & ~self.cloudy(sky)
        if sun is not None:
            foreign &= ~self.disc(sun.x, sun.y, 1.35)
        cloud_edges = 0.5 * float(self.cloudy(sky)[rows].mean())
        return float(foreign[rows].mean()) < 0.008 + cloud_edges

    def clouds(self, sky: str, sun: _Sun | None) -> bool | None:
        """Whether there are clouds, by the area of what is as bright as one."""
        light, _ = cloud_colours(sky)
        share, rest = self.toward(sky, light)
        mask = (share > 0.5) & (rest < 40)
        if sun is not None:
            mask &= ~self.disc(sun.x, sun.y, 1.7)
        area = mask[self.rows(0.02, 0.26)].sum() / SIDE**2
        return True if area > 0.006 else False if area < 0.002 else None

    def soil(self, sky: str) -> tuple[bool, str] | None:
        """Whether the front is sea, and its colour."""
        front = self.pixels[self.rows(0.93, 0.99)]
        tones = _soils(sky)
        middle = np.median(front, axis=(0, 1))
        best = min(tones, key=lambda each: float(np.linalg.norm(middle - tones[each])))
        away = np.linalg.norm(front - tones[best], axis=-1)
        thirds = np.array_split(away < 1.5 * GROUND_TOLERANCE, 3, axis=1)
        alike = min(float(third.mean()) for third in thirds) > (0.35 if best[0] else 0.85)
        fits = float(np.linalg.norm(middle - tones[best])) < GROUND_TOLERANCE
        return best if alike and fits else None

    def horizon(self, sun: _Sun | None) -> Plane | None:
        """The height of the ground's outline in each column, if it is one sharp line."""
        first, last = round(0.35 * self.height), round(0.70 * self.height)
        part = self.pixels[first:last]
        # Means of three rows, so that grain is no outline. The sky's own steps are small.
        means = (part[:-2] + part[1:-1] + part[2:]) / 3
        change = np.linalg.norm(means[3:] - means[:-3], axis=-1)
        steps = np.pad(np.linalg.norm(part[2:] - part[:-2], axis=-1), ((1, 1), (0, 0)))
        if sun is not None:
            change[self.disc(sun.x, sun.y, 1.4)[first + 2 : last - 3]] = 0
        edge = change > 13
        if edge.any(0).mean() < 0.97:
            return None
        start = edge.argmax(0) + 1
        columns = np.arange(self.width)
        near = [steps[np.minimum(start + k, len(steps) - 1), columns] for k in range(5)]
        line = start + np.stack(near).argmax(0)
        if not self._sharp(part, line):
            return None
        return (line + first + 0.5).astype(np.float32)

    def _sharp(self, part: Plane, line: NDArray[np.int_]) -> bool:
        """Whether colours change at the outline within two rows, not within many.

        Haze makes parts of a far ridge soft, so its sharpest tenth is judged.
        """
        columns = np.arange(self.width)

        def change(reach: int) -> Plane:
            above = part[np.clip(line - reach, 0, len(part) - 1), columns]
            below = part[np.clip(line + reach, 0, len(part) - 1), columns]
            return np.linalg.norm(below - above, axis=-1)

        return float(np.quantile(change(1) / np.maximum(change(4), 1), 0.9)) > 0.65

    def find_thing(
        self, sky: str, ground: str, sun: _Sun | None
    ) -> tuple[str | None, tuple[float, float] | None]:
        """The thing whose outline and colours explain the picture best, and where its foot is."""
        score, thing, place = max(self._match(thing, sky) for thing in THINGS[ground])
        if score < 0.7:
            return (NONE if self.front_is_empty(sun, None) else None), None
        return (thing, place) if self.front_is_empty(sun, place[0]) else (None, None)

    def _match(self, thing: str, sky: str) -> tuple[float, str, tuple[float, float]]:
        """How much of what differs from the background a thing explains, 0 to 1, and where."""

        def score(x: int, y: int) -> tuple[float, int, int]:
            return self._explained(thing, sky, x, y), x, y

        foot = round(FOOT * self.height)
        _, x, _ = max(score(x, foot) for x in range(0, self.width, 2))
        near = [(x + right, foot + down) for right in range(-2, 3) for down in range(-4, 5)]
        best, x, y = max(score(*place) for place in near)
        return best, thing, ((x + 0.5) / self.width, y / self.height)

    def _explained(self, thing: str, sky: str, x: int, y: int) -> float:
        stencil = _stencil(thing, sky)
        top, left = y - stencil.foot, x - stencil.middle
        high, wide = stencil.alpha.shape
        if top < 0 or left < 0 or top + high > self.height or left + wide > self.width:
            return 0.0
        part = self.pixels[top : top + high, left : left + wide]
        behind = _background(part, stencil.outside)[:, None]
        painted = behind + stencil.alpha[..., None] * (stencil.colours - behind)
        near = ~stencil.outside
        wrong = np.square(part - painted).sum(-1)[near].sum()
        all_of_it = np.square(part - behind).sum(-1)[near].sum()
        return float(1 - wrong / max(all_of_it, 1.0)) if all_of_it > near.sum() * 150 else 0.0

    def front_is_empty(self, sun: _Sun | None, thing: float | None) -> bool:
        """Whether nothing stands on the ground or on the water, besides a thing at this place.

        The light of the sun on the water is nothing.
        """
        rows = self.rows(0.81, 0.875)
        part = self.pixels[rows]
        away = np.linalg.norm(part - np.median(part, axis=1)[:, None], axis=-1)
        foreign = away > 30
        if sun is not None:
            glitter = np.abs(np.arange(self.width) + 0.5 - sun.x) < 0.16 * SIDE
            way = np.asarray(SUNS[sun.colour], np.float32) - np.median(part, axis=1)[:, None]
            share = ((part - np.median(part, axis=1)[:, None]) * way).sum(-1) / (way**2).sum(-1)
            foreign &= ~(glitter[None] & (share > 0.05))
        if thing is not None:
            foreign[:, np.abs(np.arange(self.width) + 0.5 - thing * self.width) < 0.17 * SIDE] = (
                False
            )
        return float(foreign.mean()) < 0.012


def _kind(view: _View, horizon: Plane, sea: bool) -> str | None:
    """The kind of ground, by its outline: a sea's is flat, hills' is gentle, mountains' is steep.

    Each third of a mountain range has steep parts. A roof may stand before the outline of hills.
    """
    line, reach = _smooth(horizon), 4
    slopes = np.abs(line[reach:] - line[:-reach]) / reach
    middle = float(np.median(line))
    # The glow below a sun, and its light on the water, hide the horizon of a few columns.
    level = float((np.abs(line - middle) <= 1.5).mean()) > 0.75
    flat = level and abs(middle / view.height - HORIZON) < 0.03
    if sea or flat:
        return "sea" if sea and flat else None
    if (np.abs(np.diff(line)) > 6).mean() > 0.04:
        return None
    thirds = np.array_split(slopes, 3)
    if min(float(np.quantile(third, 0.8)) for third in thirds) > 0.62:
        return "mountains"
    return "hills" if max(float(np.median(third)) for third in thirds) < 0.42 else None


def _smooth(line: Plane) -> Plane:
    """The line without spikes of one or two columns."""
    padded = np.pad(line, 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=-1)


@cache
def _sky_rows(sky: str, height: int) -> Plane:
    rows = [sky_colour(sky, (row + 0.5) / height) for row in range(height)]
    return np.asarray(rows, np.float32)


@cache
def _soils(sky: str) -> dict[tuple[bool, str], Plane]:
    """The colours of the picture's lowest rows: is it sea, and the colour's name."""
    lands = {(False, name): shaded(lit(rgb, sky), 0.85) for name, rgb in LANDS.items()}
    seas = {(True, name): shaded(lit(rgb, sky), 0.88) for name, rgb in SEAS.items()}
    both = {**lands, **seas}
    return {
        key: np.asarray(rgb, np.float32)
        for key, rgb in both.items()
        if (sky, key[1]) not in VANISHING or key[0]
    }


def _densest(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Where a disc of the sun's size covers most of the mask, refined to its mean."""
    side = round(1.8 * SUN_RADIUS * SIDE)
    sums = np.pad(mask.astype(np.float32), side).cumsum(0).cumsum(1)
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    row, column = np.unravel_index(boxes.argmax(), boxes.shape)
    y, x = row + 1 - side / 2, column + 1 - side / 2
    rows, columns = np.nonzero(mask)
    near = np.hypot(rows - y, columns - x) < 1.5 * SUN_RADIUS * SIDE
    if not near.any():
        return float(x), float(y)
    return float(columns[near].mean()) + 0.5, float(rows[near].mean()) + 0.5


@dataclass(frozen=True)
class _Stencil:
    """A thing alone: its coverage, its colours, what is outside, and where its foot is."""

    alpha: Plane
    colours: Plane
    outside: NDArray[np.bool_]
    middle: int
    foot: int


@cache
def _stencil(thing: str, sky: str) -> _Stencil:
    """A thing as `landscapes` paints it, found from pictures on black and on white."""
    scale = 4
    pictures = []
    for ground in (0.0, 255.0):
        canvas = Canvas(SIDE * scale, SIDE * scale)
        canvas.pixels[:] = ground
        paint_thing(
            canvas, Scene(sky, "", "", thing=thing, thing_place="middle"), Moment(), shadow=False
        )
        blocks = canvas.pixels.reshape(SIDE, scale, SIDE, scale, 3)
        pictures.append(blocks.mean((1, 3)))
    alpha = 1 - (pictures[1] - pictures[0]).mean(-1) / 255
    rows, columns = np.nonzero(alpha > 0.02)
    foot, middle = round(FOOT * SIDE), SIDE // 2
    reach = int(max(middle - columns.min(), columns.max() - middle)) + 8
    window = (slice(rows.min() - 3, foot + 3), slice(middle - reach, middle + reach))
    colours = pictures[0] / np.maximum(alpha, 0.02)[..., None]
    cut = alpha[window]
    return _Stencil(cut, colours[window], ~_grown(cut > 0.02, 3), reach, foot - window[0].start)


def _grown(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    """The mask and its neighbours within so many steps."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1]
        mask = mask | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def _background(part: Plane, outside: NDArray[np.bool_]) -> Plane:
    """The colour of each row outside the thing."""
    weights = outside.astype(np.float32)[..., None]
    return (part * weights).sum(1) / np.maximum(weights.sum(1), 1)
