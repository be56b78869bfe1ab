"""Drawings of one coloured shape on a coloured ground, for training and for tests.

`imagine` chooses a random drawing, `paint` draws its pixels at any size, and `read` finds which
drawing a picture shows. `vocabulary` has the words of their captions.
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 165, 65),
    "blue": (40, 70, 225),
    "yellow": (250, 220, 45),
    "purple": (150, 45, 185),
    "orange": (250, 140, 25),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
RGB = {name: np.asarray(rgb, np.float32) for name, rgb in COLOURS.items()}
SHAPES = ("circle", "square", "triangle")
# Radius of the circle as a share of the picture's shorter side; the gaps keep sizes readable.
SIZES = {"small": (0.11, 0.15), "medium": (0.19, 0.24), "large": (0.29, 0.33)}
# The bounding box across and down: -1 at the left or top edge, 0 centred, None anywhere.
POSITIONS: dict[str, tuple[int | None, int | None]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "centre": (0, 0),
}
# Half the width and half the height of each shape's bounding box, in circle radii.
EXTENTS = {"circle": (1.0, 1.0), "square": (0.9, 0.9), "triangle": (1.15, 1.0)}

SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    None: ("shape", "shape", "object", "figure"),
}
SIZE_WORDS = {"small": ("small", "small", "tiny", "little"), "large": ("large", "large", "big")}
POSITION_WORDS = {
    "left": ("on the left", "on the left", "on the left side", "at the left", "left"),
    "right": ("on the right", "on the right", "on the right side", "at the right", "right"),
    "top": ("at the top", "at the top", "on top", "top"),
    "bottom": ("at the bottom", "at the bottom", "on the bottom", "bottom"),
    "centre": ("in the centre", "in the center", "in the middle", "centred", "centered"),
}
GROUND_WORDS = (
    "on a {} background",
    "on a {} background",
    "on a {} background",
    "against a {} background",
    "with a {} background",
    "over a {} background",
    "on a {} ground",
    "on {}",
)
OPENINGS = (
    "a photo of", "a photograph of", "photo of", "a picture of", "an image of", "a drawing of",
    "a painting of", "an illustration of", "a simple drawing of", "a close-up of", "draw",
    "show me",
)  # fmt: skip
DECORATIONS = (
    "masterpiece", "best quality", "high quality", "sharp", "sharp focus", "detailed",
    "highly detailed", "intricate details", "professional", "cinematic", "cinematic lighting",
    "soft light", "studio lighting", "natural light", "photo", "photorealistic", "realistic",
    "hyperrealistic", "raw photo", "high resolution", "ultra", "hd", "uhd", "4k", "8k", "hdr",
    "vivid", "beautiful", "stunning", "elegant", "simple", "minimalist", "minimal", "flat",
    "vector", "clean", "clean lines", "crisp edges", "digital art", "illustration", "painting",
    "drawing", "art", "design", "geometric", "trending", "award winning",
    "perfect composition", "style",
)  # fmt: skip
BLEMISHES = (
    "blurry", "blur", "low quality", "worst quality", "bad quality", "lowres", "jpeg artifacts",
    "noise", "grainy", "deformed", "distorted", "disfigured", "mutated", "bad anatomy", "bad hands",
    "extra fingers", "ugly", "watermark", "text", "signature", "logo", "cropped", "out of frame",
    "duplicate", "error", "poorly drawn", "oversaturated", "cartoon",
)  # fmt: skip
GLUE = ("a", "an", "and", "in", "of", "with", "background")


@dataclass(frozen=True)
class Drawing:
    """One shape on a ground. If `read` finds no shape, everything but `background` is None."""

    shape: str | None
    colour: str | None
    background: str
    size: str | None = None
    position: str | None = None


def imagine(rng: random.Random) -> Drawing:
    """A drawing with every attribute drawn evenly, its two colours different."""
    colour, background = rng.sample(tuple(COLOURS), 2)
    return Drawing(
        rng.choice(SHAPES), colour, background, rng.choice(tuple(SIZES)), rng.choice([*POSITIONS])
    )


def paint(drawing: Drawing, width: int, height: int, rng: random.Random) -> Pixels:
    """The drawing as (height, width, 3) RGB; size and place vary a little within their names."""
    assert drawing.shape and drawing.colour and drawing.size and drawing.position
    radius = min(width, height) * rng.uniform(*SIZES[drawing.size])
    half = [radius * extent for extent in EXTENTS[drawing.shape]]
    across, down = POSITIONS[drawing.position]
    centre_x = _place(across, half[0], width, rng)
    centre_y = _place(down, half[1], height, rng)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    inside = coverage(drawing.shape, x - centre_x, y - centre_y, half[0], half[1])[..., None]
    ground, colour = RGB[drawing.background], RGB[drawing.colour]
    return (ground + inside * (colour - ground) + 0.5).astype(np.uint8)


def _place(side: int | None, half: float, length: int, rng: random.Random) -> float:
    """The centre along one axis in pixels: near the edge named, or near the middle."""
    if not side:
        return length * rng.uniform(0.475, 0.525)
    distance = half + length * rng.uniform(0.02, 0.06)
    return distance if side < 0 else length - distance


def coverage(shape: str, x: Plane, y: Plane, half_x: float, half_y: float) -> Plane:
    """How much of each pixel the shape covers, 0 to 1, from signed distances in pixels."""
    if shape == "circle":
        distance = np.hypot(x, y) - half_x
    elif shape == "square":
        distance = np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)
    else:
        slope = np.hypot(2 * half_y, half_x)
        flanks = (2 * half_y * np.abs(x) - half_x * (y + half_y)) / slope
        distance = np.maximum(flanks, y - half_y)
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def vocabulary() -> list[str]:
    """Every word that a caption can have, except invented ones, sorted."""
    phrases = [*COLOURS, *OPENINGS, *DECORATIONS, *BLEMISHES, *GROUND_WORDS, *GLUE]
    for table in (SHAPE_WORDS, SIZE_WORDS, POSITION_WORDS):
        phrases += [phrase for options in table.values() for phrase in options]
    words = " ".join(phrases).replace("{}", " ").replace("-", " ").split()
    return sorted({word for word in words if word.isalpha()})


def read(image: Image.Image | Pixels) -> Drawing:
    """The drawing that a picture shows, by its pixels alone: RGB of any size."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    step = max(1, min(pixels.shape[:2]) // 128)
    pixels = pixels[::step, ::step].astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    foreign = distance > 60
    if foreign.mean() < 0.008:
        return Drawing(None, None, nearest_colour(ground))
    # The half of the pixels that differ most: the shape's inside, without its blended edge.
    core = pixels[foreign & (distance >= np.median(distance[foreign]))]
    colour = np.median(core, axis=0)
    mask = (pixels - ground) @ (colour - ground) > 0.5 * np.sum((colour - ground) ** 2)
    top, bottom, left, right = _box(mask)
    fill = float(mask[top:bottom, left:right].mean())
    return Drawing(
        _shape(fill),
        nearest_colour(colour),
        nearest_colour(ground),
        _size(mask, _shape(fill)),
        _position(top, bottom, left, right, mask.shape),
    )


def nearest_colour(rgb: NDArray[np.float32]) -> str:
    """The name in `COLOURS` nearest to an RGB triple of 0 to 255."""
    return min(COLOURS, key=lambda name: float(np.sum((RGB[name] - rgb) ** 2)))


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the mask, without rows and columns of a few pixels."""
    ends: list[int] = []
    for axis in (1, 0):
        counts = mask.sum(axis=axis)
        filled = np.flatnonzero(counts > 0.06 * counts.max())
        ends += [int(filled[0]), int(filled[-1]) + 1]
    return ends[0], ends[1], ends[2], ends[3]


def _shape(fill: float) -> str | None:
    """The shape, by the share of its bounding box: a triangle 1/2, a circle pi/4, a square 1."""
    if fill < 0.40:
        return None
    return "triangle" if fill < 0.66 else "circle" if fill < 0.89 else "square"


def _size(mask: NDArray[np.bool_], shape: str | None) -> str | None:
    """The size, by the circle radius in `SIZES` at which the shape would have the mask's area."""
    if shape is None:
        return None
    areas = {"circle": np.pi, "square": 4 * 0.9 * 0.9, "triangle": 2 * 1.15}
    radius = float(np.sqrt(mask.sum() / areas[shape])) / min(mask.shape)
    return "small" if radius < 0.17 else "medium" if radius < 0.27 else "large"


def _position(top: int, bottom: int, left: int, right: int, shape: tuple[int, ...]) -> str:
    """The position, by the middle of the bounding box. "centre" is within 6 % of the picture's."""
    across = (left + right) / 2 / shape[1] - 0.5
    down = (top + bottom) / 2 / shape[0] - 0.5
    if max(abs(across), abs(down)) < 0.06:
        return "centre"
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"
