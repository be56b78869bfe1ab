"""Every SDXL field does visibly what it says: measured on the pocket model's pixels.

`builder.drawings.read` recovers shape, colours, size and place from a picture. The model obeys
often, not always (its card says how often), so a test counts over a handful of seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builder.drawings import Drawing, read
from ourvidz_serverless import jobs
from ourvidz_serverless.context import JobContext, Stop
from ourvidz_serverless.settings import Settings

pytestmark = pytest.mark.slow


def pictures(model: Any, reference: Image.Image | None = None, **payload: Any) -> list[np.ndarray]:
    """What a job's payload is rendered as, at 128 pixels and six seeds unless it says otherwise."""
    config = {"resolution": "128x128", "num_images": 6, "seed": 100, "guidance_scale": 6.0}
    payload["config"] = {**config, **payload.pop("config", {})}
    if reference:
        given = {"reference_image_url": "https://images.example/reference.png"}
        payload["metadata"] = {**given, **payload.get("metadata", {})}
    event = {
        "input": {"id": "job-1", "user_id": "user-1", "type": "sdxl_image_fast", **payload},
    }
    context = JobContext(Stop(), lambda progress: None, 600)
    references = {"reference": reference} if reference else {}
    job = jobs.parse(event, Settings())
    return [output.pixels for output in jobs.run(job, model, references, context)]


def drawings(model: Any, reference: Image.Image | None = None, **payload: Any) -> list[Drawing]:
    return [read(picture) for picture in pictures(model, reference, **payload)]


def share(seen: Sequence[Drawing], **attributes: str) -> float:
    """The share of drawings that have all of these attributes."""
    matching = [
        all(getattr(drawing, name) == value for name, value in attributes.items())
        for drawing in seen
    ]
    return sum(matching) / len(matching)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.fixture(scope="module")
def blue_square(sdxl: Any) -> Image.Image:
    """A reference that the model itself drew."""
    for seed in range(20):
        (pixels,) = pictures(
            sdxl,
            prompt="a blue square on a white background",
            config={"num_images": 1, "seed": seed, "num_inference_steps": 25},
        )
        seen = read(pixels)
        if (seen.shape, seen.colour, seen.background) == ("square", "blue", "white"):
            return Image.fromarray(pixels)
    raise AssertionError("the model does not draw a blue square on white")


# --- the prompt ---


@pytest.mark.parametrize(
    ("shape", "colour", "background"),
    [
        ("circle", "red", "blue"),
        ("square", "green", "white"),
        ("triangle", "yellow", "black"),
    ],
)
def test_the_prompt_is_obeyed(sdxl: Any, shape: str, colour: str, background: str) -> None:
    seen = drawings(sdxl, prompt=f"a {colour} {shape} on a {background} background")

    assert share(seen, colour=colour, background=background) >= 5 / 6
    assert share(seen, shape=shape) >= 4 / 6


def test_decorations_do_not_hide_the_subject(sdxl: Any) -> None:
    seen = drawings(
        sdxl, prompt="masterpiece, best quality, a red circle on a blue background, sharp focus"
    )

    assert share(seen, colour="red", background="blue") >= 5 / 6


def test_a_prompt_beyond_77_tokens_is_obeyed_to_its_end(sdxl: Any) -> None:
    seen = drawings(sdxl, prompt="photo, " * 45 + "a red circle on a blue background")

    assert share(seen, colour="red") + share(seen, background="blue") >= 1


def test_the_negative_prompt_removes_what_it_names(sdxl: Any) -> None:
    payload = {"prompt": "a red shape on a white background"}

    without = drawings(sdxl, **payload) + drawings(sdxl, **payload, config={"seed": 200})
    avoided = drawings(sdxl, **payload, negative_prompt="circle") + drawings(
        sdxl, **payload, negative_prompt="circle", config={"seed": 200}
    )

    assert share(without, shape="circle") > 0
    assert share(avoided, shape="circle") < share(without, shape="circle")


def test_higher_guidance_obeys_more(sdxl: Any) -> None:
    def obeyed(scale: float) -> float:
        prompts = ("a red circle on a blue background", "a small green triangle on the left")
        low = [drawings(sdxl, prompt=each, config={"guidance_scale": scale}) for each in prompts]
        return share(low[0], shape="circle", colour="red", background="blue") + share(
            low[1], shape="triangle", colour="green", size="small"
        )

    assert obeyed(7.0) > obeyed(1.0)


def test_a_seed_repeats_its_picture(sdxl: Any) -> None:
    one, two = (pictures(sdxl, prompt="a red circle", config={"num_images": 1}) for _ in range(2))

    assert np.array_equal(one[0], two[0])


def test_other_seeds_are_other_pictures(sdxl: Any) -> None:
    batch = pictures(sdxl, prompt="a circle")

    assert min(distance(batch[0], other) for other in batch[1:]) > 1


# --- the size ---


@pytest.mark.parametrize("resolution", ["256x144", "144x256", "192x192"])
def test_the_resolution_is_the_pictures_size_and_the_subject_fits_it(
    sdxl: Any, resolution: str
) -> None:
    width, height = map(int, resolution.split("x"))

    batch = pictures(
        sdxl,
        prompt="a red circle on a blue background",
        config={"resolution": resolution, "num_images": 3},
    )

    assert {picture.shape for picture in batch} == {(height, width, 3)}
    assert share([read(picture) for picture in batch], colour="red", background="blue") >= 2 / 3


# --- image to image ---


def test_low_strength_keeps_the_reference(sdxl: Any, blue_square: Image.Image) -> None:
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a red circle on a black background",
        config={"denoise_strength": 0.15, "num_images": 3},
    )

    assert share(seen, shape="square", colour="blue", background="white") == 1


def test_high_strength_changes_it(sdxl: Any, blue_square: Image.Image) -> None:
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a red circle on a black background",
        config={"denoise_strength": 1.0},
    )

    assert share(seen, colour="red", background="black") >= 5 / 6


def test_the_further_the_strength_the_further_the_picture(
    sdxl: Any, blue_square: Image.Image
) -> None:
    reference = np.asarray(blue_square)

    distances = [
        distance(picture, reference)
        for strength in (0.1, 0.5, 1.0)
        for picture in pictures(
            sdxl,
            blue_square,
            prompt="a red circle on a black background",
            config={"denoise_strength": strength, "num_images": 1},
        )
    ]

    assert distances == sorted(distances)


@pytest.mark.parametrize("steps", [15, 25])
def test_an_exact_copy_is_the_reference(sdxl: Any, blue_square: Image.Image, steps: int) -> None:
    (copy,) = pictures(
        sdxl,
        blue_square,
        prompt="",
        config={"num_images": 1, "guidance_scale": 1.0, "num_inference_steps": steps},
        metadata={"exact_copy_mode": True},
    )

    assert distance(copy, np.asarray(blue_square)) < 8
    assert read(copy) == read(np.asarray(blue_square))


# --- reference types, by image to image ---


def test_style_keeps_the_palette_more_than_no_reference_does(
    sdxl: Any, blue_square: Image.Image
) -> None:
    ask = {"prompt": "a circle", "config": {"num_images": 6}}

    styled = drawings(sdxl, blue_square, **ask, metadata={"reference_type": "style"})

    assert share(styled, background="white") > share(drawings(sdxl, **ask), background="white")


def test_composition_keeps_the_place(sdxl: Any) -> None:
    on_the_left = paint_on_the_left()

    seen = drawings(
        sdxl,
        on_the_left,
        prompt="a red square on a white background",
        metadata={"reference_type": "composition"},
    )

    assert share(seen, position="left") >= 4 / 6


def test_character_keeps_shape_and_colour(sdxl: Any, blue_square: Image.Image) -> None:
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a shape on a green background",
        metadata={"reference_type": "character"},
    )

    assert share(seen, shape="square", colour="blue") >= 5 / 6


def paint_on_the_left() -> Image.Image:
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[48:80, 8:40] = (0, 0, 255)
    return Image.fromarray(picture)


# --- Compel ---


def test_a_weight_moves_the_picture_toward_its_word(sdxl: Any) -> None:
    def reds(prompt: str) -> float:
        ask = {"prompt": prompt, "compel_enabled": True}
        return share(
            drawings(sdxl, **ask) + drawings(sdxl, **ask, config={"seed": 300}), colour="red"
        )

    assert reds("a (red:1.6) (blue:0.4) circle") > reds("a (red:0.4) (blue:1.6) circle")


def test_compel_weights_are_weighted_words_too(sdxl: Any) -> None:
    ask = {"prompt": "a circle", "compel_enabled": True}

    seen = drawings(sdxl, **ask, compel_weights="(red:1.4)")

    assert share(seen, colour="red") > share(drawings(sdxl, **ask), colour="red")


def test_compel_works_with_a_reference_and_in_batches(sdxl: Any, blue_square: Image.Image) -> None:
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a (red:1.3) circle on a (black)1.2 background",
        compel_enabled=True,
        config={"denoise_strength": 1.0},
    )

    assert share(seen, colour="red", background="black") >= 4 / 6
