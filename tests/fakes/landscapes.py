"""Models that paint drawn landscapes, and references that show them."""

import base64
import io
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from builder.landscapes import Scene, paint
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.safety import Picture
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.models.wan.request import VideoRequest
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.fake_wan import FakeWan

BOAT = Scene("blue", "sea", "blue", thing="boat", thing_place="left", seed=1)
TREE = Scene("orange", "hills", "green", thing="tree", thing_place="right", seed=2)
HOUSE = Scene("grey", "hills", "yellow", thing="house", thing_place="middle", seed=3)


def data_uri(scene: Scene) -> str:
    """A landscape as a reference."""
    file = io.BytesIO()
    Image.fromarray(paint(scene, 128, 128)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class PainterSdxl(FakeSdxl):
    """A `FakeSdxl` whose pictures show one scene after the other."""

    def __init__(self, *scenes: Scene) -> None:
        super().__init__()
        self.scenes = scenes

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        for scene, _ in zip(self.scenes, super().generate(request, progress), strict=False):
            yield paint(scene, *request.size)


class PainterWan(FakeWan):
    """A `FakeWan` whose frames show one scene after the other, each for so many frames."""

    def __init__(self, *scenes: tuple[Scene, int], enhancer: Any = None) -> None:
        super().__init__(enhancer)
        self.scenes = scenes

    def generate(self, request: VideoRequest, progress: Progress) -> Generator[np.ndarray]:
        self.calls.append(request)
        frames = [paint(scene, *request.size) for scene, count in self.scenes for _ in range(count)]
        # In pieces, as the VAE decodes them: one frame, then four at a time.
        yield np.stack(frames[:1])
        for start in range(1, request.num_frames, 4):
            yield np.stack(frames[start : min(start + 4, request.num_frames)])


class BrokenClassifier:
    """A classifier that raises an error; `seen` counts the pictures that it got."""

    name = "broken@0"

    def __init__(self, error: Exception) -> None:
        self.error, self.seen = error, 0

    def scores(self, pictures: Sequence[Picture], check: Callable[[], None]) -> list[Any]:
        self.seen += len(pictures)
        raise self.error


class HeldClassifier:
    """A classifier that waits until its job is stopped."""

    name = "held@0"

    def __init__(self) -> None:
        self.is_looking = threading.Event()

    def scores(self, pictures: Iterable[Picture], check: Callable[[], None]) -> list[Any]:
        self.is_looking.set()
        pause = threading.Event()
        while not pause.wait(0.02):
            check()
        return []
