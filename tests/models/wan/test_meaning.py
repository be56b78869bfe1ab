"""What WAN's prompts and reference modes do, measured in the frames of the pocket model.

References are frames of moving drawings (`builder.moving_drawings`), so the expected frames are
known, and so is what the prompt describes. The model follows a prompt often, not always (its card
says how often). So a test counts, or takes the mean, over a few seeds.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builder import moving_drawings
from builder.moving_drawings import MovingDrawing
from ourvidz_serverless.models.wan import loader as models
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, wan_payload
from tests.fakes.tiny_wan import data_uri, frames_of

pytestmark = pytest.mark.slow

SIDE, FRAMES = 96, 9
SEEDS = range(3)

#: The drawing of each seed. References are frames of it, and the caption describes it.
DRAWINGS = [
    MovingDrawing("circle", "red", "blue", "right"),
    MovingDrawing("square", "green", "white", "down"),
    MovingDrawing("circle", "yellow", "black", "left"),
]

Render = Callable[..., np.ndarray]


def caption(drawing: MovingDrawing) -> str:
    ground = f"a {drawing.background} background"
    return f"a {drawing.colour} {drawing.shape} moving {drawing.direction} on {ground}"


def drawn(seed: int) -> np.ndarray:
    """The frames of a seed's drawing."""
    return moving_drawings.draw_video(DRAWINGS[seed], FRAMES, SIDE, SIDE, random.Random(seed))


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Renders the caption of a seed with the pocket model and a payload's `config`."""
    model = models.load(Settings(families=("wan",)))
    root: Path = tmp_path_factory.mktemp("videos")
    at = LocalWorker(root, models={"wan": model})

    def render(seed: int, prompt: str | None = None, **payload: Any) -> np.ndarray:
        config = {
            "width": SIDE,
            "height": SIDE,
            "frames": FRAMES,
            "num_inference_steps": 6,
            "guidance_scale": 2.0,
        }
        config |= {"seed": seed, **payload.pop("config", {})}
        prompt = caption(DRAWINGS[seed]) if prompt is None else prompt
        document = at.run(wan_payload(prompt=prompt, config=config, **payload))
        warnings = document.metadata.get("warnings", [])
        # One test weakens a reference, which causes a warning.
        assert [each for each in warnings if "metadata.reference_strength" not in each] == []
        return frames_of(root / document.assets[0].url)

    return render


@pytest.fixture(scope="module")
def plain(render: Render) -> list[np.ndarray]:
    """The videos of the captions, without references."""
    return [render(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def guided(render: Render) -> Callable[[str], list[np.ndarray]]:
    """The videos of the captions with the references of a mode. Each mode is rendered once."""
    made: dict[str, list[np.ndarray]] = {}

    def guided(mode: str) -> list[np.ndarray]:
        if mode not in made:
            made[mode] = [render(seed, config=given(mode, seed)) for seed in SEEDS]
        return made[mode]

    return guided


def given(mode: str, seed: int) -> dict[str, str]:
    first, last = (data_uri(Image.fromarray(drawn(seed)[place])) for place in (0, -1))
    return {
        "start": {"first_frame": first},
        "end": {"last_frame": last},
        "both": {"first_frame": first, "last_frame": last},
    }[mode]


def error(video: np.ndarray, seed: int, place: int, of: int | None = None) -> float:
    """The mean distance of a frame from the drawing's, in grey levels; `of` is another index."""
    wanted = drawn(seed)[place if of is None else of]
    return float(np.abs(video[place].astype(float) - wanted).mean())


def mean_error(videos: list[np.ndarray], place: int, of: int | None = None) -> float:
    return float(np.mean([error(video, seed, place, of) for seed, video in enumerate(videos)]))


# --- references ---


@pytest.mark.parametrize(("mode", "place"), [("start", 0), ("end", -1), ("both", 0), ("both", -1)])
def test_a_frame_is_nearer_to_its_reference_than_without_a_reference(
    plain: list[np.ndarray], guided: Callable[[str], list[np.ndarray]], mode: str, place: int
) -> None:
    known, unguided = mean_error(guided(mode), place), mean_error(plain, place)

    assert known < 0.7 * unguided


@pytest.mark.parametrize(("mode", "place"), [("start", 0), ("end", -1)])
def test_the_frame_at_the_other_end_is_farther_from_the_reference(
    guided: Callable[[str], list[np.ndarray]], mode: str, place: int
) -> None:
    far = -1 if place == 0 else 0

    assert mean_error(guided(mode), place) < mean_error(guided(mode), far, of=place)


def test_a_weaker_reference_leaves_its_frame_farther_from_it(
    render: Render, guided: Callable[[str], list[np.ndarray]]
) -> None:
    weak = [
        render(seed, config=given("start", seed), metadata={"reference_strength": 0.1})
        for seed in SEEDS
    ]

    assert mean_error(guided("start"), 0) < mean_error(weak, 0)


# --- prompts ---


@pytest.mark.parametrize("attribute", ["background", "colour", "direction"])
def test_a_video_shows_what_its_prompt_says(plain: list[np.ndarray], attribute: str) -> None:
    seen = [moving_drawings.read(list(video)) for video in plain]

    right = [
        getattr(each, attribute) == getattr(asked, attribute)
        for each, asked in zip(seen, DRAWINGS, strict=True)
    ]
    assert sum(right) >= 2
