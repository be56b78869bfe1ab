"""Pictures of noise, and how a test reads a file."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from ourvidz_serverless.delivery.png import Pixels


def noise(height: int, width: int, colours: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, colours, (height, width, 3), dtype=np.uint8)


def opened(data: bytes) -> ImageFile:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def seen(data: bytes) -> NDArray[np.int64]:
    """The pixels as Pillow reads them, wide enough to subtract."""
    return np.array(opened(data), np.int64)
