"""Every SDXL field has a visible effect, measured on the pocket model's pixels.

`builder.drawings.read` recovers shape, colours, size and place from a picture. The model obeys
often, not always (its card says how often), so a test counts over a handful of seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builder.drawings import COLOURS, POSITION_WORDS, POSITIONS, Drawing, read
from ourvidz_serverless import jobs
from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings

pytestmark = pytest.mark.slow


def pictures(model: Any, reference: Image.Image | None = None, **payload: Any) -> list[np.ndarray]:
    """A job's images, at 128 pixels, six seeds and ten steps unless it sets others."""
    config = {"resolution": "128x128", "num_images": 6, "seed": 100, "guidance_scale": 6.0}
    payload["config"] = {"num_inference_steps": 10, **config, **payload.pop("config", {})}
    if reference:
        given = {"reference_image_url": "https://images.example/reference.png"}
        payload["metadata"] = {**given, **payload.get("metadata", {})}
    event = {
        "input": {"id": "job-1", "user_id": "user-1", "type": "sdxl_image_fast", **payload},
    }
    context = JobContext(Stop(), lambda progress: None, Bounds(600))
    references = {"reference": reference} if reference else {}
    job = Envelope.of(event).job(Settings())
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
def blue_square() -> Image.Image:
    """A reference like the drawings: a blue square in the middle of a white background."""
    return painted(slice(40, 88), slice(40, 88))


def painted(rows: slice, columns: slice) -> Image.Image:
    picture = np.full((128, 128, 3), COLOURS["white"], np.uint8)
    picture[rows, columns] = COLOURS["blue"]
    return Image.fromarray(picture)


# --- the prompt ---


@pytest.mark.parametrize(
    ("shape", "colour", "background"),
    [
        ("circle", "red", "blue"),
        ("triangle", "yellow", "black"),
    ],
)
def test_the_prompt_is_obeyed(sdxl: Any, shape: str, colour: str, background: str) -> None:
    seen = drawings(sdxl, prompt=f"a {colour} {shape} on a {background} background")

    assert share(seen, colour=colour, background=background) == 1
    assert share(seen, shape=shape) >= 5 / 6


@pytest.mark.parametrize("colour", COLOURS)
def test_the_model_draws_every_colour_that_a_prompt_names(sdxl: Any, colour: str) -> None:
    ground = "black" if colour == "white" else "white"

    seen = drawings(sdxl, prompt=f"a large {colour} circle on a {ground} background")

    assert share(seen, colour=colour, background=ground) >= 5 / 6


@pytest.mark.parametrize("place", POSITIONS)
def test_the_subject_is_in_the_place_that_the_prompt_names(sdxl: Any, place: str) -> None:
    words = POSITION_WORDS[place][0]

    seen = drawings(sdxl, prompt=f"a red circle {words} on a white background")

    assert share(seen, position=place) >= 5 / 6


@pytest.mark.parametrize("size", ["small", "large"])
def test_the_subject_has_the_size_that_the_prompt_names(sdxl: Any, size: str) -> None:
    seen = drawings(sdxl, prompt=f"a {size} red square on a white background")

    assert share(seen, size=size) >= 5 / 6


@pytest.fixture(scope="module")
def green_shapes(sdxl: Any) -> dict[str, list[Drawing]]:
    """Twelve drawings of each shape, by the shape that the prompt names."""

    def draw(shape: str) -> list[Drawing]:
        ask = {"prompt": f"a large green {shape} on a white background"}
        return drawings(sdxl, **ask) + drawings(sdxl, **ask, config={"seed": 200})

    return {shape: draw(shape) for shape in ("circle", "square", "triangle")}


@pytest.mark.parametrize(
    ("shape", "other"), [("circle", "square"), ("square", "circle"), ("triangle", "circle")]
)
def test_a_shape_that_the_prompt_names_comes_more_often_than_without(
    green_shapes: dict[str, list[Drawing]], shape: str, other: str
) -> None:
    asked, unasked = green_shapes[shape], green_shapes[other]

    assert share(asked, shape=shape) > share(unasked, shape=shape)


def test_decorations_do_not_hide_the_subject(sdxl: Any) -> None:
    seen = drawings(
        sdxl, prompt="masterpiece, best quality, a red circle on a blue background, sharp focus"
    )

    assert share(seen, colour="red", background="blue") >= 5 / 6


def test_a_prompt_far_beyond_77_tokens_is_obeyed(sdxl: Any) -> None:
    seen = drawings(sdxl, prompt="a red circle on a blue background, " + "photo, " * 45)

    assert share(seen, colour="red", background="blue") >= 5 / 6


def test_the_negative_prompt_removes_what_it_names(sdxl: Any) -> None:
    def seen(**negative: str) -> list[Drawing]:
        ask = {"prompt": "a circle on a white background", **negative}
        return drawings(sdxl, **ask) + drawings(sdxl, **ask, config={"seed": 200})

    without = seen()
    usual = max({each.colour or "" for each in without}, key=lambda c: share(without, colour=c))
    avoided = seen(negative_prompt=usual)

    assert share(avoided, colour=usual) < share(without, colour=usual)


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


def test_a_low_denoise_strength_keeps_the_reference(sdxl: Any, blue_square: Image.Image) -> None:
    # Lower than a real checkpoint would want: the pocket's latents are quieter than SDXL's, so
    # the same noise hides more of them.
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a red circle on a black background",
        config={"denoise_strength": 0.1, "num_images": 3},
    )

    assert share(seen, shape="square", colour="blue", background="white") == 1


def test_a_high_denoise_strength_changes_the_reference(sdxl: Any, blue_square: Image.Image) -> None:
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a red circle on a black background",
        config={"denoise_strength": 1.0},
    )

    assert share(seen, colour="red", background="black") >= 5 / 6


def test_the_higher_the_denoise_strength_the_more_the_image_differs(
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


def test_a_style_reference_keeps_the_palette_more_than_no_reference_does(
    sdxl: Any, blue_square: Image.Image
) -> None:
    ask = {"prompt": "a circle", "config": {"num_images": 6}}

    styled = drawings(sdxl, blue_square, **ask, metadata={"reference_type": "style"})

    assert share(styled, background="white") > share(drawings(sdxl, **ask), background="white")


def test_a_composition_reference_keeps_the_place(sdxl: Any) -> None:
    on_the_left = painted(slice(48, 80), slice(8, 40))
    ask: dict[str, Any] = {"prompt": "a red square on a white background"}

    def on_left(reference: Image.Image | None, **metadata: str) -> float:
        seen = drawings(sdxl, reference, **ask, metadata=metadata)
        again = drawings(sdxl, reference, **ask, metadata=metadata, config={"seed": 200})
        return share(seen + again, position="left")

    assert on_left(on_the_left, reference_type="composition") >= 2 * on_left(None)


def test_a_character_reference_keeps_place_and_background(
    sdxl: Any, blue_square: Image.Image
) -> None:
    seen = drawings(
        sdxl,
        blue_square,
        prompt="a shape on a green background",
        metadata={"reference_type": "character"},
    )

    assert share(seen, background="white") == 1
    assert share(seen, position="centre") >= 4 / 6


def test_the_more_a_reference_type_keeps_the_nearer_the_image_stays(
    sdxl: Any, blue_square: Image.Image
) -> None:
    def away(reference_type: str) -> float:
        made = pictures(
            sdxl,
            blue_square,
            prompt="a blue square on a white background",
            metadata={"reference_type": reference_type},
        )
        return float(np.mean([distance(each, np.asarray(blue_square)) for each in made]))

    assert away("character") < away("composition") < away("style")


# --- Compel ---


def test_a_weight_moves_the_image_toward_its_word(sdxl: Any) -> None:
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
