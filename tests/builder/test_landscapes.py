"""Landscapes: what is painted can be read back, what is broken is refused, captions are true."""

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from builder import drawings
from builder.landscape_captions import ATTRIBUTES, caption, full_caption, vocabulary
from builder.landscape_ruler import Reading, read
from builder.landscapes import NONE, Moment, Pixels, Scene, imagine, paint

HOUSE = Scene("blue", "hills", "green", "yellow", "right", "house", "left", seed=3)
BOAT = Scene("pink", "sea", "blue", "red", "left", "boat", "right", clouds=True, seed=4)
PEAKS = Scene("orange", "mountains", "brown", NONE, NONE, "tree", "middle", seed=5)
SCENES = (HOUSE, BOAT, PEAKS)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [imagine(rng) for _ in range(count)]


def shows(reading: Reading | None, scene: Scene) -> bool:
    return reading is not None and all(reading.shows(scene, name) for name in ATTRIBUTES)


# --- painting ---


def test_a_scene_is_painted_the_same_each_time() -> None:
    assert np.array_equal(paint(HOUSE, 64, 64), paint(HOUSE, 64, 64))


def test_a_scene_has_the_same_outlines_at_every_size() -> None:
    large = Image.fromarray(paint(PEAKS, 512, 512)).resize((128, 128), Image.Resampling.BOX)

    assert np.abs(np.asarray(large, float) - paint(PEAKS, 128, 128)).mean() < 2


def test_another_seed_has_other_ridges() -> None:
    assert not np.array_equal(paint(PEAKS, 64, 64), paint(replace(PEAKS, seed=6), 64, 64))


@pytest.mark.parametrize(
    ("moment", "attribute", "across", "down"),
    [
        (Moment(sun_across=-0.1), "sun_at", -0.1, 0.0),
        (Moment(sun_down=0.1), "sun_at", 0.0, 0.1),
        (Moment(thing_across=0.06), "thing_at", 0.06, 0.0),
    ],
)
def test_a_moment_moves_what_it_names(
    moment: Moment, attribute: str, across: float, down: float
) -> None:
    before, after = (read(paint(HOUSE, 256, 256, each)) for each in (Moment(), moment))

    assert before and after
    here, there = getattr(before, attribute), getattr(after, attribute)
    assert there == pytest.approx((here[0] + across, here[1] + down), abs=0.015)


def test_clouds_and_waves_move_too() -> None:
    still = paint(BOAT, 128, 128)

    for moment in (Moment(clouds_across=0.05), Moment(waves=0.3)):
        assert not np.array_equal(paint(BOAT, 128, 128, moment), still)


# --- reading what is whole ---


@pytest.mark.parametrize(
    "size", [(256, 256), (512, 512), (128, 128), (256, 144), (144, 256), (1024, 576)]
)
def test_every_word_of_a_painted_scene_is_read_back(size: tuple[int, int]) -> None:
    asked = scenes(6)

    wrong = [scene for scene in asked if not shows(read(paint(scene, *size)), scene)]

    assert not wrong


def test_every_word_is_read_back_after_a_jpeg() -> None:
    asked = scenes(12, seed=1)

    wrong = [scene for scene in asked if not shows(read(as_jpeg(paint(scene, 256, 256))), scene)]

    assert not wrong


def as_jpeg(pixels: Pixels) -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return Image.open(file)


# --- refusing what is broken ---

Breaking = Callable[[Pixels], Pixels]


def half_flat(pixels: Pixels) -> Pixels:
    broken = pixels.copy()
    broken[:, :128] = (128, 140, 150)
    return broken


def without_ground(pixels: Pixels) -> Pixels:
    broken = pixels.copy()
    broken[150:] = (20, 20, 20)
    return broken


def without_sky(pixels: Pixels) -> Pixels:
    broken = pixels.copy()
    broken[:110] = broken[110:111]
    return broken


def blurred(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(8)))


def shuffled(pixels: Pixels) -> Pixels:
    tiles = pixels.reshape(4, 64, 4, 64, 3).swapaxes(1, 2).reshape(16, 64, 64, 3)
    order = random.Random(1).sample(range(16), 16)
    return tiles[order].reshape(4, 4, 64, 64, 3).swapaxes(1, 2).reshape(256, 256, 3)


def recoloured(pixels: Pixels) -> Pixels:
    hue, saturation, value = Image.fromarray(pixels).convert("HSV").split()
    turned = hue.point(lambda level: (level + 60) % 256)
    return np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


def grainy(pixels: Pixels) -> Pixels:
    grain = np.random.default_rng(0).normal(0, 60, pixels.shape)
    return np.clip(pixels + grain, 0, 255).astype(np.uint8)


BREAKINGS: dict[str, Breaking] = {
    "half_flat": half_flat,
    "without_ground": without_ground,
    "without_sky": without_sky,
    "blurred": blurred,
    "shuffled": shuffled,
    "recoloured": recoloured,
    "grainy": grainy,
    "negative": lambda pixels: 255 - pixels,
    "swapped_channels": lambda pixels: pixels[..., ::-1],
    "upside_down": lambda pixels: pixels[::-1],
    "on_its_side": lambda pixels: pixels.swapaxes(0, 1),
    "colourless": lambda pixels: np.repeat(pixels.mean(-1, keepdims=True), 3, -1).astype(np.uint8),
    "faded": lambda pixels: (0.45 * pixels + 70).astype(np.uint8),
    "glued": lambda pixels: np.hstack([pixels[:, :128], paint(PEAKS, 256, 256)[:, 128:]]),
}


@pytest.mark.parametrize("scene", [HOUSE, BOAT], ids=["house", "boat"])
@pytest.mark.parametrize("breaking", BREAKINGS)
def test_a_broken_picture_is_no_landscape(breaking: str, scene: Scene) -> None:
    assert read(np.ascontiguousarray(BREAKINGS[breaking](paint(scene, 256, 256)))) is None


def blobs(seed: int) -> Pixels:
    """Soft blobs of a landscape's own colours, where it has them."""
    rng = np.random.default_rng(seed)
    canvas = np.full((256, 256, 3), paint(HOUSE, 256, 256).mean((0, 1)))
    y, x = np.mgrid[:256, :256]
    for _ in range(12):
        row, column = rng.integers(256, size=2)
        colour = paint(HOUSE, 256, 256)[row, column]
        near = np.exp(-((x - column) ** 2 + (y - row) ** 2) / rng.uniform(20, 60) ** 2)
        canvas += near[..., None] * (colour - canvas)
    return canvas.astype(np.uint8)


def test_noise_blobs_and_flat_colours_are_no_landscapes() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (256, 256, 3), np.uint8)
    flat = [np.full((256, 256, 3), level, np.uint8) for level in (0, 128, 255)]
    pictures = [noise, *flat, *(blobs(seed) for seed in range(8))]

    assert [read(picture) for picture in pictures] == [None] * len(pictures)


def test_shapes_on_a_ground_are_no_landscapes() -> None:
    rng = random.Random(0)
    pictures = [drawings.paint(drawings.imagine(rng), 256, 256, rng) for _ in range(12)]

    assert [read(picture) for picture in pictures] == [None] * len(pictures)


def test_half_a_range_of_mountains_beside_half_a_hill_is_neither() -> None:
    scene = replace(PEAKS, thing=NONE, thing_place=NONE)
    one, other = (paint(replace(scene, ground=each), 256, 256) for each in ("mountains", "hills"))

    reading = read(np.hstack([one[:, :128], other[:, 128:]]))

    assert reading is not None
    assert reading.ground is None


def test_a_sun_that_is_not_there_is_read_as_none() -> None:
    reading = read(paint(replace(HOUSE, sun=NONE, sun_place=NONE), 256, 256))

    assert reading and (reading.sun, reading.sun_place) == (NONE, NONE)


@pytest.mark.parametrize(
    ("colour", "wide", "high"),
    [((255, 230, 96), 30, 8), ((255, 230, 96), 10, 10), ((60, 200, 60), 21, 21)],
    ids=["flat", "too_small", "green"],
)
def test_a_wrong_sun_is_neither_a_sun_nor_none(
    colour: tuple[int, int, int], wide: int, high: int
) -> None:
    pixels = paint(replace(HOUSE, sun=NONE, sun_place=NONE), 256, 256)
    y, x = np.mgrid[:256, :256]
    pixels[((x - 200) / wide) ** 2 + ((y - 64) / high) ** 2 < 1] = colour

    reading = read(pixels)

    assert reading is None or reading.sun is None


@pytest.mark.parametrize("scene", SCENES, ids=["house", "boat", "tree"])
def test_a_smeared_thing_is_neither_a_thing_nor_none(scene: Scene) -> None:
    pixels = paint(scene, 256, 256)
    smeared = pixels.astype(float)
    for shift in range(-24, 25, 4):
        smeared += np.roll(pixels, shift, axis=1)
    pixels[150:232] = (smeared / 14)[150:232]

    reading = read(pixels)

    assert reading is None or reading.thing is None


@pytest.mark.parametrize("scene", SCENES, ids=["house", "boat", "tree"])
def test_a_blob_in_a_things_colours_is_neither_a_thing_nor_none(scene: Scene) -> None:
    pixels = paint(replace(scene, thing=NONE, thing_place=NONE), 256, 256)
    colours = paint(scene, 256, 256)
    place = {"left": 56, "middle": 128, "right": 200}[scene.thing_place]
    y, x = np.mgrid[:256, :256]
    blob = ((x - place) / 24) ** 2 + ((y - 200) / 24) ** 2 < 1
    pixels[blob] = np.median(colours[165:220, place - 16 : place + 16], axis=(0, 1))

    reading = read(pixels)

    assert reading is None or reading.thing is None


def test_a_second_sun_makes_the_sun_unsure() -> None:
    pixels = paint(HOUSE, 256, 256)
    pixels[40:90, 30:80] = pixels[40:90, 175:225]

    reading = read(pixels)

    assert reading is None or reading.sun is None


def test_a_second_thing_makes_the_thing_unsure() -> None:
    pixels = paint(HOUSE, 256, 256)
    pixels[160:226, 170:230] = pixels[160:226, 26:86]

    reading = read(pixels)

    assert reading is None or reading.thing is None


# --- captions ---


def test_a_full_caption_names_everything_that_is_there() -> None:
    assert full_caption(HOUSE) == (
        "green hills under a blue sky, a yellow sun on the right, a house on the left"
    )
    assert full_caption(BOAT) == (
        "a blue sea under a pink sky, a red sun on the left, a boat on the right, clouds"
    )


def test_captions_have_many_forms() -> None:
    rng = random.Random(0)

    assert len({caption(HOUSE, rng).text for _ in range(300)}) > 150


def test_a_caption_names_nothing_that_is_absent() -> None:
    rng = random.Random(0)

    for scene in scenes(400):
        words = caption(scene, rng)
        text = f" {words.text} ".replace(",", " ")
        assert scene.thing != NONE or not any(f" {n} " in text for n in ("tree", "house", "boat"))
        assert scene.sun != NONE or not any(f" {n} " in text for n in ("sun", "moon"))
        assert scene.clouds or " clouds " not in text
        assert ("thing_place" in words.says) <= ("thing" in words.says)


def test_a_night_has_a_moon_and_a_day_a_sun() -> None:
    night = Scene("dark", "sea", "blue", "white", "left", seed=1)

    assert "a white moon on the left" in full_caption(night)
    assert "a yellow sun" in full_caption(HOUSE)


def test_each_word_of_a_full_caption_is_in_the_vocabulary() -> None:
    known = set(vocabulary())

    for scene in scenes(300):
        assert set(full_caption(scene).replace(",", " ").split()) <= known


def test_some_captions_are_empty_and_some_omit_places() -> None:
    rng = random.Random(0)
    said = [caption(HOUSE, rng) for _ in range(300)]

    assert any(not each.text for each in said)
    assert any("sun" in each.says and "sun_place" not in each.says for each in said)
    assert any("thing" in each.says and "thing_place" not in each.says for each in said)


def test_no_scene_has_colours_that_vanish_in_each_other() -> None:
    seen = {(scene.sky, scene.colour) for scene in scenes(500) if scene.ground != "sea"}

    assert ("purple", "purple") not in seen
    assert all(scene.sun != "red" for scene in scenes(500) if scene.sky == "dark")
