"""Videos of one coloured shape that crosses a coloured ground, or stands still.

These are the drawings of `drawings.py` in motion. `imagine` chooses a random video, `draw_video`
draws its frames, `caption` describes some of it in words, and `read` finds which video some frames
show.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from builder import drawings
from builder.drawings import COLOURS, RGB, SHAPES, Pixels

# Across and down, from the first frame to the last; y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
MOVING_WORDS = {
    **{
        name: (f"moving {name}", f"moving {name}", f"moving {name}", f"moves {name}")
        for name in ("left", "right", "up", "down")
    },
    "still": ("standing still", "standing still", "standing still", "not moving"),
}
GROUND_WORDS = ("on a {} background",) * 4 + ("against a {} background", "on {}")
OPENINGS = ("a video of", "a clip of", "an animation of", "show me")
GLUE = ("motion", "slides", "sliding", "slowly", "quickly", "the", "to", "frame", "camera")

# Shares of the picture's shorter side, and of the length along which it travels.
RADIUS = (0.2, 0.26)
TRAVEL = (0.36, 0.46)
# How far the middle of the path may be from the middle of the picture, usually and at most.
ASIDE = 0.07
ASTRAY = 0.3


@dataclass(frozen=True)
class MovingDrawing:
    """One shape on a ground. Attributes that `read` cannot find are None."""

    shape: str | None
    colour: str | None
    background: str
    direction: str | None


def imagine(rng: random.Random) -> MovingDrawing:
    """A video with every attribute drawn evenly, its two colours different."""
    colour, background = rng.sample(tuple(COLOURS), 2)
    return MovingDrawing(rng.choice(SHAPES), colour, background, rng.choice(tuple(DIRECTIONS)))


def draw_video(
    drawing: MovingDrawing,
    frames: int,
    width: int,
    height: int,
    rng: random.Random,
    aside: float = ASIDE,
) -> Pixels:
    """The video as (frames, height, width, 3) RGB. The shape moves at a constant speed.

    Its path crosses the middle of the picture, or is off it by at most `aside` of a side.
    """
    assert drawing.shape and drawing.colour and drawing.direction
    radius = min(width, height) * rng.uniform(*RADIUS)
    half = [radius * extent for extent in drawings.EXTENTS[drawing.shape]]
    travel = rng.uniform(*TRAVEL)
    centres = [
        _journey(step, half[axis], (width, height)[axis], travel, rng.uniform(-aside, aside))
        for axis, step in enumerate(DIRECTIONS[drawing.direction])
    ]
    ground, colour = RGB[drawing.background], RGB[drawing.colour]
    video = np.empty((frames, height, width, 3), np.uint8)
    video[:] = ground + 0.5
    for index in range(frames):
        done = index / max(1, frames - 1)
        across, down = (begin + done * (end - begin) for begin, end in centres)
        # Only the pixels of the shape: the ground is painted already.
        left, top = int(max(0, across - half[0] - 1)), int(max(0, down - half[1] - 1))
        window = video[index, top : int(down + half[1] + 2), left : int(across + half[0] + 2)]
        y, x = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32) + 0.5
        inside = drawings.coverage(
            drawing.shape, x + left - across, y + top - down, half[0], half[1]
        )
        window[:] = ground + inside[..., None] * (colour - ground) + 0.5
    return video


def _journey(
    step: int, half: float, length: int, travel: float, aside: float
) -> tuple[float, float]:
    """The first and the last centre along one axis, always inside the picture."""
    room = length - 2 * half
    distance = min(room, length * travel) * step
    least, most = half + abs(distance) / 2, length - half - abs(distance) / 2
    middle = min(max(length * (0.5 + aside), least), most)
    return middle - distance / 2, middle + distance / 2


def caption(drawing: MovingDrawing, rng: random.Random) -> str:
    """ "a red circle moving right on a blue background", in one of its forms, or less of it."""
    if rng.random() < 0.1:
        return ""
    colour = str(drawing.colour) if rng.random() < 0.92 else ""
    noun = str(drawing.shape) if rng.random() < 0.92 else "shape"
    thing = " ".join(filter(None, (colour, noun)))
    if rng.random() < 0.9:
        thing = ("an " if thing[0] in "aeio" else "a ") + thing
    motion = rng.choice(MOVING_WORDS[str(drawing.direction)]) if rng.random() < 0.85 else ""
    ground = ""
    if rng.random() < 0.9:
        ground = rng.choice(GROUND_WORDS).format(drawing.background)
        ground = ground.replace("a orange", "an orange")
    parts = (thing, motion, ground) if rng.random() < 0.75 else (thing, ground, motion)
    return _decorated(" ".join(filter(None, parts)), rng)


def _decorated(words: str, rng: random.Random) -> str:
    """The words, sometimes with others that say nothing about the drawing."""
    if rng.random() < 0.15:
        words = f"{rng.choice(OPENINGS)} {words}"
    if rng.random() < 0.2:
        words = ", ".join([words, *rng.sample(drawings.DECORATIONS, rng.randint(1, 3))])
    return words


def says(text: str, drawing: MovingDrawing, attribute: str) -> bool:
    """Whether a caption of this drawing names this attribute of it."""
    words = text.replace(",", " ").split()
    if attribute == "direction":
        telling = {"still", "not"} if drawing.direction == "still" else {drawing.direction}
        return bool(telling & set(words))
    # The two colours differ, so the name of a colour is enough to know which one is meant.
    return str(getattr(drawing, attribute)) in words


def vocabulary() -> list[str]:
    """Every word that a caption of a moving or a still drawing can have, sorted."""
    phrases = [*OPENINGS, *GLUE, *(words for each in MOVING_WORDS.values() for words in each)]
    return sorted({*drawings.vocabulary(), *" ".join(phrases).split()})


def read(frames: Sequence[Image.Image | Pixels]) -> MovingDrawing:
    """The video that frames show, by their pixels. The middle frame gives colours and shape."""
    middle = drawings.read(frames[len(frames) // 2])
    return MovingDrawing(middle.shape, middle.colour, middle.background, direction(frames))


def direction(frames: Sequence[Image.Image | Pixels]) -> str | None:
    """The shape's direction from the first frame to the last; None if one has no shape."""
    first, last = centre(frames[0]), centre(frames[-1])
    if first is None or last is None:
        return None
    across, down = last - first
    if max(abs(across), abs(down)) < 0.08:
        return "still"
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def centre(frame: Image.Image | Pixels) -> NDArray[np.float32] | None:
    """The middle (across, down) of the pixels that are not ground, as shares of the picture."""
    pixels = np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
    pixels = pixels.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    foreign = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > 60
    if foreign.mean() < 0.008:
        return None
    rows, columns = np.nonzero(foreign)
    height, width = foreign.shape
    return np.asarray([columns.mean() / width, rows.mean() / height], np.float32)
