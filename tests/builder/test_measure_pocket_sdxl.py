"""The pocket SDXL's figures: what is asked, what counts as wrong, what is shown."""

import numpy as np
import pytest
from PIL import Image

from builder.landscape_captions import ATTRIBUTES
from builder.landscapes import paint
from builder.measure_pocket_sdxl import contact_sheet, faults, question, table


def test_a_painted_scene_has_no_faults() -> None:
    asked = question(3, free=False)

    assert faults(Image.fromarray(paint(asked[1], 256, 256)), asked) == set()


def test_a_picture_that_is_no_landscape_has_every_fault() -> None:
    flat = Image.fromarray(np.zeros((64, 64, 3), np.uint8))

    assert faults(flat, question(3, free=False)) == set(ATTRIBUTES)


def test_another_scene_has_the_faults_of_what_differs() -> None:
    asked = question(3, free=False)
    other = next(
        scene for seed in range(4, 99) if (scene := question(seed, False)[1]).sky != asked[1].sky
    )

    assert "sky" in faults(Image.fromarray(paint(other, 256, 256)), asked)


@pytest.mark.parametrize("seed", range(8))
def test_a_free_caption_is_judged_by_what_it_names(seed: int) -> None:
    text, scene, judged = question(seed, free=True)

    assert judged <= set(ATTRIBUTES)
    assert "thing" not in judged or scene.thing in text or "cottage" in text


def test_the_table_counts_only_what_is_judged() -> None:
    scene = question(0, free=False)[1]
    questions = [("", scene, frozenset({"sky", "sun"})), ("", scene, frozenset({"sky"}))]

    counted = table(questions, [{"sun"}, set()])

    assert "sky 2/2" in counted and "sun 0/1" in counted and "everything 1/2" in counted


def test_a_contact_sheet_of_few_pictures_has_no_empty_columns() -> None:
    picture = Image.new("RGB", (128, 64), "red")

    assert contact_sheet([(picture, "red"), (picture, "red")], across=6).width == 2 * 128
