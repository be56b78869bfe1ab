"""Landscapes that move, and the ruler that tells what moves in a video."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from builder import landscape_videos
from builder.landscape_videos import ACTIONS, Video
from builder.landscapes import Pixels, Scene


def drawn(action: str, frames: int = 9, **scene: object) -> Pixels:
    fields = {"sky": "blue", "ground": "sea", "colour": "blue", "seed": 3, **scene}
    return landscape_videos.draw(Video(Scene(**fields), action, travel=0.36), frames, 128, 128)  # type: ignore[arg-type]


def test_a_rising_sun_moves_up() -> None:
    video = drawn("sunrise", sun="yellow", sun_place="left")

    assert landscape_videos.motion(list(video)) == "sunrise"
    assert landscape_videos.motion(list(video[::-1])) == "sunset"


def test_a_sailing_boat_moves_to_its_side() -> None:
    video = drawn("boat right", thing="boat", thing_place="middle")

    assert landscape_videos.motion(list(video)) == "boat right"
    assert landscape_videos.motion(list(video[::-1])) == "boat left"


def test_drifting_clouds_move_to_their_side() -> None:
    video = drawn("clouds right", clouds=True)

    assert landscape_videos.motion(list(video)) == "clouds right"
    assert landscape_videos.motion(list(video[::-1])) == "clouds left"


def test_nightfall_ends_under_a_dark_sky() -> None:
    video = drawn("nightfall")

    assert landscape_videos.motion(list(video)) == "nightfall"
    assert landscape_videos.motion(list(video[::-1])) == "daybreak"


def test_a_still_video_has_equal_frames() -> None:
    video = drawn("still", thing="boat", thing_place="left")

    assert np.array_equal(video[0], video[-1])
    assert landscape_videos.motion(list(video)) == "still"


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (96, 160)])
def test_the_ruler_reads_nearly_every_drawn_video(size: tuple[int, int]) -> None:
    rng = random.Random(f"{size}")
    asked = [landscape_videos.imagine(rng) for _ in range(20)]

    seen = [landscape_videos.motion(list(landscape_videos.draw(each, 9, *size))) for each in asked]

    right = [found == video.action for found, video in zip(seen, asked, strict=True)]
    assert sum(right) >= 19


def noise(video: Pixels) -> list[Pixels]:
    return list(np.random.default_rng(0).integers(0, 256, video.shape, np.uint8))


def half_grey(video: Pixels) -> list[Pixels]:
    broken = video.copy()
    broken[-1, :, :64] = 128
    return list(broken)


def two_motions(video: Pixels) -> list[Pixels]:
    """A boat that sails while the sun sets."""
    both = video.copy()
    sun = drawn("sunset", sun="red", sun_place="left", thing="boat", thing_place="middle")
    both[:, :76] = sun[:, :76]
    return list(both)


@pytest.mark.parametrize("breaks", [noise, half_grey, two_motions])
def test_the_ruler_refuses_what_shows_no_single_motion(breaks: object) -> None:
    video = drawn("boat right", thing="boat", thing_place="middle")

    assert callable(breaks)
    frames: Sequence[Pixels] = breaks(video)
    assert landscape_videos.motion(frames) is None


@pytest.mark.parametrize("action", ACTIONS)
def test_a_full_caption_ends_with_its_action(action: str) -> None:
    rng = random.Random(0)
    while (video := landscape_videos.imagine(rng)).action != action:
        pass

    noun = "moon" if video.scene.sky == "dark" else "sun"
    assert landscape_videos.full_caption(video).endswith(f", {ACTIONS[action][0].format(noun)}")


def test_most_captions_name_the_action() -> None:
    rng = random.Random(0)
    said = [landscape_videos.caption(landscape_videos.imagine(rng), rng) for _ in range(400)]

    named = sum("action" in each.says for each in said)
    assert 0.6 < named / len(said) < 0.9


def test_every_word_of_a_caption_is_in_the_vocabulary() -> None:
    rng, words = random.Random(0), set(landscape_videos.vocabulary())
    texts = [landscape_videos.full_caption(landscape_videos.imagine(rng)) for _ in range(200)]

    assert {word for text in texts for word in text.replace(",", "").split()} <= words
