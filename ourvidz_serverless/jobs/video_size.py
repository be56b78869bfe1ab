"""The size of a video, where a job gives its orientation and not its sides."""

from __future__ import annotations

import re
from fractions import Fraction

#: WAN's VAE divides a side by 8, and its patches divide it by 2 once more.
MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 1280, 16
#: 720p, the largest that WAN 2.1 was trained on.
MAX_AREA = 1280 * 720

#: 480p as WAN's authors use it, by ratio of width to height. Other ratios get the same area.
SIZES = {Fraction(9, 16): (480, 832), Fraction(16, 9): (832, 480), Fraction(1): (624, 624)}
AREA = 480 * 832


def read_ratio(value: object, separators: str, shape: str) -> Fraction:
    """The ratio of two numbers with a separator between them, from 1/4 to 4.

    Raises ValueError, with the `shape` that is expected, for anything else.
    """
    number = r"(\d{1,5}(?:\.\d{1,3})?)"
    match = re.fullmatch(rf"{number}\s*[{separators}]\s*{number}", str(value).strip())
    sides = [Fraction(side) for side in match.groups()] if match else [0, 0]
    if not all(sides) or not Fraction(1, 4) <= sides[0] / sides[1] <= 4:
        raise ValueError(f"Input should be {shape}, neither more than four times the other")
    return Fraction(sides[0]) / sides[1]


def size_at_480p(ratio: Fraction) -> tuple[int, int]:
    """Width and height of 480p for a ratio of width to height."""
    if ratio in SIZES:
        return SIZES[ratio]
    width = round((AREA * ratio) ** 0.5 / SIDE_MULTIPLE) * SIDE_MULTIPLE
    return width, round(AREA / width / SIDE_MULTIPLE) * SIDE_MULTIPLE
