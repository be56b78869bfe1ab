"""The icon of the Hub's listing: `python -m builder.icon` draws `.runpod/icon.png`.

Green hills under a blue sky, in a rounded square, with the triangle of a video that plays. It is
drawn four times as large and scaled down, so that its edges are smooth.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

ICON = Path(__file__).parents[1] / ".runpod/icon.png"

SIZE, SCALE = 128, 4
SKY, SUN, FAR_HILL, HILL = (125, 186, 251), (253, 224, 71), (74, 163, 107), (34, 121, 78)
COLOURS = 64


def draw() -> Image.Image:
    """The icon, RGBA, `SIZE` pixels square, with transparent corners."""
    side = SIZE * SCALE
    picture = Image.new("RGB", (side, side), SKY)
    pen = ImageDraw.Draw(picture)
    pen.ellipse(_box(0.66, 0.12, 0.88, 0.34), fill=SUN)
    pen.ellipse(_box(0.30, 0.52, 1.50, 1.60), fill=FAR_HILL)
    pen.ellipse(_box(-0.50, 0.60, 0.80, 1.80), fill=HILL)
    pen.polygon(_points((0.39, 0.36), (0.39, 0.72), (0.70, 0.54)), fill=(255, 255, 255))
    corners = Image.new("L", (side, side))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, side - 1, side - 1), side * 0.22, fill=255)
    picture.putalpha(corners)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _box(*shares: float) -> tuple[float, ...]:
    return tuple(share * SIZE * SCALE for share in shares)


def _points(*places: tuple[float, float]) -> list[tuple[float, float]]:
    return [(x * SIZE * SCALE, y * SIZE * SCALE) for x, y in places]


def main() -> None:
    few = draw().quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
    few.save(ICON, optimize=True)
    print(f"{ICON}: {ICON.stat().st_size} bytes")


if __name__ == "__main__":
    main()
