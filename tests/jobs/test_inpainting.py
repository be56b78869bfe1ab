"""Inpainting and outpainting: what the model gets, which pixels come back, and what is refused."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ourvidz_serverless.document import Document
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload

MakeLocal = Callable[..., LocalWorker]

#: The colour of what `FakeSdxl` makes: the seed of the payload.
NEW = 7


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def noise(width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(100, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(*box: int, size: tuple[int, int] = (64, 64), grey: int = 255) -> Image.Image:
    """A black mask with a box (left, top, right, bottom) of a grey; without a box all of it."""
    made = Image.new("L", size)
    made.paste(grey, box or (0, 0, *size))
    return made


def run(
    at: LocalWorker,
    picture: Image.Image | None = None,
    mask: Image.Image | str | None = None,
    **config: Any,
) -> Document:
    given = {"image": data_uri(picture or noise())}
    if mask:
        given["mask"] = mask if isinstance(mask, str) else data_uri(mask)
    return at.run(sdxl_payload(config={**given, "mask_blur": 0, **config}))


def pixels(at: LocalWorker, index: int = 0) -> np.ndarray:
    with Image.open(at.root / f"user-1/job-1/{index}.png") as picture:
        return np.array(picture)


def start(at: LocalWorker) -> StartImage:
    found = at.fake_sdxl.requests[-1].start
    assert found is not None
    return found


def refusal(document: Document) -> tuple[str, str]:
    assert document.failure is not None
    return document.failure.code, document.failure.message


# --- a mask ---


def test_white_is_repainted_and_every_black_pixel_comes_back_bit_for_bit(local: MakeLocal) -> None:
    at, picture = local(), noise()

    document = run(at, picture, mask(8, 16, 40, 48), num_images=2)

    for index in (0, 1):
        expected = np.array(picture)
        expected[16:48, 8:40] = NEW + index
        assert np.array_equal(pixels(at, index), expected)
    assert document.metadata["reference_method"] == "inpaint"


def test_grey_is_a_mixture(local: MakeLocal) -> None:
    at = local()

    run(at, Image.new("RGB", (64, 64), (107, 107, 107)), mask(grey=128))

    assert np.abs(pixels(at).astype(int) - 57).max() <= 1


def test_mask_blur_mixes_inside_the_edge_and_never_outside(local: MakeLocal) -> None:
    at, picture = local(), Image.new("RGB", (64, 64), (200, 200, 200))

    run(at, picture, mask(16, 0, 64, 64), mask_blur=8)

    row = pixels(at)[32, :, 0].astype(int)
    assert set(row[:16]) == {200} and set(row[24:]) == {NEW}
    assert list(row[16:24]) == sorted(row[16:24], reverse=True)


def test_the_noise_of_a_jpeg_is_not_a_mask(local: MakeLocal) -> None:
    at, picture = local(), noise()
    file = io.BytesIO()
    mask(16, 16, 48, 48).save(file, "JPEG", quality=60)

    run(at, picture, "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())

    assert np.array_equal(pixels(at)[:8], np.array(picture)[:8])
    assert set(pixels(at)[24:40, 24:40].flat) == {NEW}


def test_a_smaller_mask_of_the_same_shape_is_fitted_as_the_reference_is(local: MakeLocal) -> None:
    at = local()

    # Cropped to its middle half, which is twice as large as in the mask.
    run(at, noise(128, 64), mask(32, 0, 64, 32, size=(64, 32)))

    assert set(pixels(at)[:, 36:].flat) == {NEW}
    assert np.array_equal(pixels(at)[:, :28], np.array(noise(128, 64))[:, 32:60])


def test_a_job_that_inpaints_repaints_the_mask_wholly_unless_it_sets_a_strength(
    local: MakeLocal,
) -> None:
    for asked, expected in ({}, 1.0), ({"denoise_strength": 0.6}, 0.6):
        at = local()

        document = run(at, mask=mask(0, 0, 8, 8), **asked)

        assert start(at).strength == document.metadata["denoise_strength"] == expected


def test_a_checkpoint_for_inpainting_repaints_with_a_little_of_the_picture(
    local: MakeLocal,
) -> None:
    model = FakeSdxl()
    model.is_inpainting_checkpoint = True
    at = local(fake_sdxl=model)

    run(at, mask=mask(0, 0, 8, 8))

    assert start(at).strength == 0.99


def test_the_reference_beside_a_mask_is_the_picture_to_repaint_whatever_its_type(
    local: MakeLocal,
) -> None:
    model = FakeSdxl()
    model.has_ip_adapter = True
    at = local(fake_sdxl=model)
    config = {"image": data_uri(noise()), "mask": data_uri(mask(0, 0, 8, 8))}

    at.run(sdxl_payload(config=config, metadata={"reference_type": "style"}))

    assert start(at).mask is not None


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mask": data_uri(mask())},
            "metadata.reference_image_url: Field required beside config.mask",
        ),
        (
            {"resize_mode": "extend"},
            "metadata.reference_image_url: Field required beside config.resize_mode",
        ),
        (
            {"image": data_uri(noise()), "mask": data_uri(mask(size=(64, 40)))},
            "config.mask: Input should have the shape of the reference, 64x64, and has 64x40",
        ),
        (
            {"image": data_uri(noise()), "mask": data_uri(mask(grey=0))},
            "config.mask: Input should be white where the reference is repainted, "
            "and all that the job uses of it is black",
        ),
        (
            {
                "image": data_uri(noise(128, 64)),
                "mask": data_uri(mask(0, 0, 16, 64, size=(128, 64))),
            },
            "config.mask: Input should be white where the reference is repainted, "
            "and all that the job uses of it is black",
        ),
        (
            {"image": data_uri(noise(128, 128)), "resize_mode": "extend"},
            "config.resize_mode: nothing is left to extend, the reference fills 64x64",
        ),
        (
            {"image": data_uri(noise()), "mask": data_uri(mask()), "mask_blur": 65},
            "config.mask_blur: Input should be less than or equal to 64",
        ),
    ],
    ids=[
        *("mask alone", "extend alone", "other shape", "black", "black after the crop"),
        *("nothing to extend", "blur"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_by_its_field(
    local: MakeLocal, given: dict[str, Any], message: str
) -> None:
    at = local()

    assert refusal(at.run(sdxl_payload(config=given))) == ("INVALID_PROMPT", message)
    assert at.fake_sdxl.requests == []


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"mask": data_uri(mask())}, "config.mask"),
        ({"resize_mode": "extend"}, "config.resize_mode"),
    ],
)
def test_an_exact_copy_is_not_repainted(
    local: MakeLocal, given: dict[str, Any], field: str
) -> None:
    metadata = {"reference_image_url": data_uri(noise()), "exact_copy_mode": True}

    document = local().run(sdxl_payload(config=given, metadata=metadata))

    message = f"{field}: Input should not repaint a part of an exact copy"
    assert refusal(document) == ("INVALID_PROMPT", message)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://other.example/mask.png", "the host is not on the allow-list"),
        ("data:image/png;base64,AAAA", "not a PNG, JPEG or WebP image"),
        ("user-2/job-1/0.png", "the storage path is not in the user's own folder"),
    ],
)
def test_a_mask_that_cannot_be_fetched_ends_the_job_and_is_named(
    local: MakeLocal, url: str, reason: str
) -> None:
    at = local(settings=Settings(reference_hosts=("images.example",)))

    assert refusal(run(at, mask=url)) == ("REFERENCE_FRAME_ERROR", f"mask: {reason}")


def test_a_reference_that_cannot_be_fetched_ends_a_job_with_a_mask(local: MakeLocal) -> None:
    document = run(local(), mask=mask(), image="data:image/png;base64,AAAA")

    assert refusal(document) == (
        "REFERENCE_FRAME_ERROR",
        "reference: not a PNG, JPEG or WebP image",
    )


# --- extending ---


def test_a_picture_is_extended_around_its_middle_which_comes_back_bit_for_bit(
    local: MakeLocal,
) -> None:
    at, picture = local(), noise()

    document = run(at, picture, resolution="128x64", resize_mode="extend")

    made = pixels(at)
    assert set(made[:, :32].flat) == set(made[:, 96:].flat) == {NEW}
    assert np.array_equal(made[:, 48:80], np.array(picture)[:, 16:48])
    assert document.metadata["resize_mode"] == "extend"


def test_an_extended_picture_becomes_its_surroundings_over_a_seam(local: MakeLocal) -> None:
    at = local()

    run(at, Image.new("RGB", (64, 64), "white"), resolution="64x128", resize_mode="extend")

    column = pixels(at)[:, 0, 0].astype(int)
    assert list(column[31:49]) == sorted(column[31:49]) and column[48] == 255
    assert set(column[:32]) == {NEW} and len(set(column[32:48])) == 16


def test_a_picture_that_is_too_large_to_extend_is_made_smaller_first(local: MakeLocal) -> None:
    at = local()

    run(at, Image.new("RGB", (256, 128), "white"), resolution="128x128", resize_mode="extend")

    column = pixels(at)[:, 64, 0]
    assert set(column[:32]) == set(column[96:]) == {NEW} and set(column[48:80]) == {255}


def test_a_mask_repaints_a_part_of_a_picture_that_is_extended(local: MakeLocal) -> None:
    at, picture = local(), noise()

    run(at, picture, mask(24, 24, 40, 40), resolution="128x64", resize_mode="extend")

    expected = np.array(picture)[:, 16:48]
    expected[24:40, 8:24] = NEW
    assert np.array_equal(pixels(at)[:, 48:80], expected)
