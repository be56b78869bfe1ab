"""Landscapes in which one thing moves: the sun, the boat, the clouds, or the time of day.

`imagine` chooses a random video, `draw` paints its frames, `caption` describes some of it in words,
and `motion` finds what moves in some frames, by their pixels alone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from builder import landscape_captions, landscapes
from builder.landscape_captions import Caption
from builder.landscape_ruler import Reading, cloud_mask, read
from builder.landscapes import NONE, Moment, Pixels, Plane, Scene

#: What moves, and the words for it.
ACTIONS: dict[str, tuple[str, ...]] = {
    "sunrise": ("the {} rises", "the {} rises", "the {} is rising", "the {} comes up"),
    "sunset": ("the {} sets", "the {} sets", "the {} is setting", "the {} goes down"),
    "boat left": ("the boat sails to the left", "the boat sails left", "the boat moves left"),
    "boat right": ("the boat sails to the right", "the boat sails right", "the boat moves right"),
    "clouds left": ("the clouds drift to the left", "the clouds drift left", "clouds go left"),
    "clouds right": ("the clouds drift to the right", "the clouds drift right", "clouds go right"),
    "nightfall": ("day turns to night", "day turns to night", "night falls", "it becomes night"),
    "daybreak": ("night turns to day", "night turns to day", "day breaks", "it becomes day"),
    "still": ("nothing moves", "nothing moves", "standing still", "a still video"),
}
OPENINGS = ("a video of", "a clip of", "a film of")

# Shares of the picture's height or width.
SUN_TRAVEL = (0.33, 0.40)
BOAT_TRAVEL = (0.36, 0.46)
CLOUD_TRAVEL = (0.26, 0.36)
#: How far the middle of the boat's way may be from the middle of the picture.
ASIDE = 0.06

#: The least way that `motion` calls a motion.
LEAST = 0.1


@dataclass(frozen=True)
class Video:
    """A scene, what moves in it, how far, and how far its way is from the usual one.

    The last two are shares of the picture's side. If the time of day changes, the scene is the one
    by day.
    """

    scene: Scene
    action: str
    travel: float = 0.0
    aside: float = 0.0


def imagine(rng: random.Random) -> Video:
    """A video with each action drawn evenly, and a scene in which it is possible."""
    action = rng.choice(tuple(ACTIONS))
    while not _fits(scene := landscapes.imagine(rng), action):
        pass
    if action.startswith("boat"):
        scene = replace(scene, thing_place="middle")
    travels = {"sun": SUN_TRAVEL, "boat": BOAT_TRAVEL, "clouds": CLOUD_TRAVEL}
    low, high = next((each for name, each in travels.items() if action.startswith(name)), (1, 1))
    return Video(scene, action, rng.uniform(low, high), rng.uniform(-ASIDE, ASIDE))


def _fits(scene: Scene, action: str) -> bool:
    """Whether this can happen in the scene."""
    if action.startswith("sun"):
        return scene.sun != NONE
    if action.startswith("boat"):
        return scene.thing == "boat"
    if action.startswith("clouds"):
        return scene.clouds
    if action in ("nightfall", "daybreak"):
        # A scene by day whose colours do not vanish at night. Its sun would not be there at night.
        return scene.sky != "dark" and scene.colour != "purple" and scene.sun == NONE
    return True


def draw(video: Video, frames: int, width: int, height: int) -> Pixels:
    """The video as (frames, height, width, 3) RGB. What moves has a constant speed."""
    shown = [frame(video, index / max(1, frames - 1), width, height) for index in range(frames)]
    return np.stack(shown)


def frame(video: Video, done: float, width: int, height: int) -> Pixels:
    """The picture at a time of 0 to 1."""
    scene = video.scene
    if video.action in ("nightfall", "daybreak"):
        share = done if video.action == "nightfall" else 1 - done
        return _dusk(scene, share, width, height)
    return landscapes.paint(scene, width, height, _moment(video, done))


def _moment(video: Video, done: float) -> Moment:
    way, aside = video.travel, video.aside
    match video.action:
        case "sunrise":
            return Moment(sun_down=way * (1 - done) + aside / 2)
        case "sunset":
            return Moment(sun_down=way * done + aside / 2)
        case "boat left":
            return Moment(thing_across=way * (0.5 - done) + aside)
        case "boat right":
            return Moment(thing_across=way * (done - 0.5) + aside)
        case "clouds left":
            return Moment(clouds_across=-way * done)
        case "clouds right":
            return Moment(clouds_across=way * done)
    return Moment()


def _dusk(scene: Scene, share: float, width: int, height: int) -> Pixels:
    """The scene by day with a share of the scene at night."""
    day = landscapes.paint(scene, width, height).astype(np.float32)
    night = landscapes.paint(replace(scene, sky="dark"), width, height)
    return np.asarray(day + share * (night - day) + 0.5).astype(np.uint8)


def caption(video: Video, rng: random.Random) -> Caption:
    """The video in words. It names the action in 17 of 20 captions that are not empty.

    The attributes that it names are those of `landscape_captions`, and "action".
    """
    said = landscape_captions.caption(at_first(video), rng)
    while "thing_place" in said.says and video.action.startswith("boat"):
        said = landscape_captions.caption(at_first(video), rng)
    if not said.says or rng.random() < 0.15:
        return said
    words = rng.choice(ACTIONS[video.action]).format(_sun_noun(video))
    text = f"{said.text}, {words}" if rng.random() < 0.8 else f"{words}, {said.text}"
    if rng.random() < 0.1:
        text = f"{rng.choice(OPENINGS)} {text}"
    return Caption(text, said.says | {"action"})


def full_caption(video: Video) -> str:
    """ "a blue sea under a pink sky, a boat, the boat sails to the left"."""
    scene, words = at_first(video), ACTIONS[video.action][0].format(_sun_noun(video))
    if not video.action.startswith("boat"):
        return f"{landscape_captions.full_caption(scene)}, {words}"
    bare = landscape_captions.full_caption(replace(scene, thing=NONE, thing_place=NONE))
    return f"{bare}, a boat, {words}"


def at_first(video: Video) -> Scene:
    """The scene of the first frame."""
    return replace(video.scene, sky="dark") if video.action == "daybreak" else video.scene


def _sun_noun(video: Video) -> str:
    return "moon" if video.scene.sky == "dark" else "sun"


def vocabulary() -> list[str]:
    """Every word that a caption can have, except invented ones, sorted."""
    phrases = [*OPENINGS, *(words for each in ACTIONS.values() for words in each)]
    words = {word for word in " ".join(phrases).split() if word.isalpha()}
    return sorted({*landscape_captions.vocabulary(), *words, "moves", "motion", "slowly"})


def motion(frames: Sequence[Pixels]) -> str | None:
    """The one action that the frames surely show.

    None if they show none or several, or if the first or the last frame is no landscape.
    """
    first, last = read(frames[0]), read(frames[-1])
    if first is None or last is None:
        return None
    if first.sky != last.sky:
        return {first.sky: "daybreak", last.sky: "nightfall"}.get("dark")
    seen = [
        *_sun_motion([read(each) for each in frames[:: max(1, len(frames) // 8)]]),
        *_boat_motion(first, last),
        *_cloud_motion(frames[0], frames[-1], first),
    ]
    if not seen:
        return "still" if _alike(frames[0], frames[-1]) else None
    return seen[0] if len(seen) == 1 else None


def _sun_motion(readings: Sequence[Reading | None]) -> list[str]:
    """Whether the sun goes up or down. Where it is not seen it is behind the ground."""
    heights = [each.sun_at[1] for each in readings if each and each.sun_at]
    if len(heights) < 2:
        return []
    change = heights[-1] - heights[0]
    if abs(change) < LEAST:
        return []
    return ["sunset" if change > 0 else "sunrise"]


def _boat_motion(first: Reading, last: Reading) -> list[str]:
    if first.thing_at is None or last.thing_at is None:
        return []
    change = last.thing_at[0] - first.thing_at[0]
    if abs(change) < LEAST:
        return []
    return ["boat right" if change > 0 else "boat left"]


def _cloud_motion(first: Pixels, last: Pixels, reading: Reading) -> list[str]:
    """The shift at which the clouds of the last frame best fit those of the first."""
    before, after = (cloud_mask(each, reading.sky) for each in (first, last))
    if min(before.sum(), after.sum()) < 40:
        return []
    width = before.shape[1]
    most = round(0.45 * width)
    shift = max(range(-most, most + 1), key=lambda by: _fit(before, after, by))
    if abs(shift) < LEAST * width:
        return []
    return ["clouds right" if shift > 0 else "clouds left"]


def _fit(before: Plane, after: Plane, by: int) -> float:
    """How alike two masks are if the second is moved back by so many columns."""
    width = before.shape[1]
    one = before[:, max(0, -by) : width - max(0, by)]
    other = after[:, max(0, by) : width - max(0, -by)]
    union = np.maximum(one, other).sum()
    return float(np.minimum(one, other).sum() / union) if union > 30 else 0.0


def _alike(first: Pixels, last: Pixels) -> bool:
    return float(np.abs(first.astype(np.float32) - last).mean()) < 8
