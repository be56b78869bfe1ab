"""The worker's PNG encoder, Pillow's, and the test pictures for both.

Three pictures are like photographs, one is a drawing. `benchmarks.delivery` compares the encoders.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ourvidz_serverless.delivery.images import encode_image
from ourvidz_serverless.delivery.png import Pixels

Plane = NDArray[np.float64]


def worker_png(pixels: Pixels) -> bytes:
    return encode_image(pixels).data


def pillow_png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def soft(side: int) -> Pixels:
    """Clouds of colour without grain."""
    return clouds(side, grain=0)


def grainy(side: int) -> Pixels:
    """Clouds of colour with the grain of a photographic film."""
    return clouds(side, grain=3)


def clouds(side: int, grain: float) -> Pixels:
    """Noise with the spectrum of photographs, on a gradient of colours."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf

    def cloud() -> Plane:
        spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency**1.6
        plane: Plane = np.fft.irfft2(spectrum, (side, side))
        plane /= plane.std()
        return plane

    light = 45 * cloud() + np.linspace(-20, 20, side)[:, None]
    tint = np.linspace(-30, 30, side)
    planes = [light + lean * tint + 10 * cloud() for lean in (-1, 0, 1)]
    pixels = 128 + np.stack(planes, axis=-1) + grain * rng.standard_normal((side, side, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def sharp(side: int) -> Pixels:
    """Clouds over thousands of overlapping discs ("dead leaves"), which have edges as photographs.

    The idea and the distribution of sizes: Lee, Mumford and Huang, "Occlusion models for natural
    images", IJCV 2001.
    """
    rng = np.random.default_rng(7)
    image = Image.new("RGB", (2 * side, 2 * side))
    draw = ImageDraw.Draw(image)
    for radius in 6 / np.sqrt(rng.uniform(0.0005, 1, 12_000)):
        x, y = rng.uniform(0, 2 * side, 2)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    discs = np.asarray(image.resize((side, side), Image.Resampling.BOX))
    return (0.7 * discs + 0.3 * clouds(side, grain=0)).astype(np.uint8)


def drawing(side: int) -> Pixels:
    """Three flat shapes and a paragraph on a flat ground."""
    image = Image.new("RGB", (side, side), (240, 240, 235))
    draw = ImageDraw.Draw(image)
    at = side / 10
    draw.ellipse((2 * at, 2 * at, 6 * at, 6 * at), fill=(200, 30, 40))
    draw.rectangle((5 * at, 5 * at, 9 * at, 8 * at), fill=(30, 60, 180))
    draw.polygon(((at, 9 * at), (3 * at, 6 * at), (5 * at, 9 * at)), fill=(20, 150, 60))
    draw.multiline_text((6 * at, at), "the quick brown fox\n" * 20, fill=(20, 20, 20))
    return np.asarray(image)
