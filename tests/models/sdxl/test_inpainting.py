"""Inpainting on the pocket weights: its images equal those of diffusers' inpainting pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from builder.landscapes import Scene, paint
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.schedulers import SCHEDULERS, make_scheduler
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.latent_mask import cells_of
from ourvidz_serverless.models.sdxl.loras import applied
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.prompt_weighting import parse
from ourvidz_serverless.models.sdxl.request import ImageRequest, StartImage
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_sdxl import distance, image_request, through_diffusers, write_lora

SIZE = (128, 64)
PICTURE = Image.fromarray(
    paint(Scene("pink", "sea", "blue", "yellow", "left", "boat", "right"), *SIZE)
)

#: Where the boat is, in whole cells of a latent: there our mask of a latent is diffusers' own.
BOX = (72, 16, 120, 56)


def mask_of(box: tuple[int, int, int, int] = BOX) -> Image.Image:
    mask = Image.new("L", SIZE)
    mask.paste(255, box)
    return mask


def inpainting(strength: float = 1.0, **changes: Any) -> ImageRequest:
    start = StartImage(PICTURE, strength, mask_of())
    return image_request(size=SIZE, reference=start, **changes)


def by_diffusers(
    model: SdxlModel, request: ImageRequest, scheduler: Any = None, **options: Any
) -> np.ndarray:
    """The first image of a request with a mask by diffusers, from our latents of the picture."""
    assert request.start is not None
    width, height = request.size
    pipe = StableDiffusionXLInpaintPipeline(**model.networks.pipe.components)
    pipe.scheduler = scheduler or pipe.scheduler
    return through_diffusers(
        pipe,
        request,
        image=model.encode(request.start.image, SdxlMemoryPlan(1)),
        mask_image=request.mask,
        strength=request.start.strength,
        width=width,
        height=height,
        **options,
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("strength", [0.5, 0.99, 1.0])
def test_inpainting_equals_diffusers_pipeline(
    sdxl: Any, strength: float, guidance_scale: float
) -> None:
    request = inpainting(strength, guidance_scale=guidance_scale)

    (ours,) = sdxl.generate(request, NoProgress())

    assert distance(ours, by_diffusers(sdxl, request)) == 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainting_with_every_scheduler_equals_diffusers_pipeline(sdxl: Any, name: str) -> None:
    request = inpainting(0.8, scheduler=name, steps=5)

    (ours,) = sdxl.generate(request, NoProgress())

    scheduler = make_scheduler(sdxl.networks.pipe.scheduler.config, name)
    assert distance(ours, by_diffusers(sdxl, request, scheduler=scheduler)) == 0


def test_inpainting_with_a_lora_equals_diffusers_pipeline(sdxl: Any, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", "to_q", "to_v")
    request = inpainting(loras=((tmp_path / "lora.safetensors", 0.7),))

    (ours,) = sdxl.generate(request, NoProgress())
    with applied(sdxl.networks.pipe, request.loras):
        theirs = by_diffusers(sdxl, request)

    assert distance(ours, theirs) == 0


def test_a_weighted_prompt_acts_where_a_picture_is_repainted(sdxl: Any) -> None:
    plain, weighted = (
        next(sdxl.generate(inpainting(prompt=prompt), NoProgress()))
        for prompt in (parse("a red sun"), parse("a (red:1.6) sun"))
    )

    assert distance(plain, weighted) > 0


@pytest.mark.parametrize("max_batch", [1, 2])
def test_image_i_of_an_inpainted_batch_is_the_single_image_of_its_seed(
    sdxl: Any, max_batch: int
) -> None:
    plans = MemoryPlans(SdxlMemoryPlan(max_batch))
    model = SdxlModel(sdxl.networks, sdxl.device, plans=plans)

    batch = model.generate(inpainting(seeds=(3, 4, 5), steps=4), NoProgress())

    for seed, picture in zip((3, 4, 5), batch, strict=True):
        (alone,) = sdxl.generate(inpainting(seeds=(seed,), steps=4), NoProgress())
        assert distance(picture, alone) <= 1


def test_a_cell_is_repainted_if_one_of_its_pixels_is() -> None:
    pixels = np.zeros((16, 24), bool)
    pixels[15, 8] = True

    assert cells_of(pixels, 8).tolist() == [[[[0, 0, 0], [0, 1, 0]]]]


# --- checkpoints for inpainting ---


@pytest.fixture(scope="module")
def nine(sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> SdxlModel:
    """A checkpoint whose UNet takes nine channels, with random weights."""
    folder = tmp_path_factory.mktemp("inpainting")
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(sdxl.networks.unet.config, in_channels=9)
    components = {**sdxl.networks.pipe.components, "unet": unet}
    StableDiffusionXLInpaintPipeline(**components).save_pretrained(folder)
    return loader.load(Settings(sdxl_model=str(folder)))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_checkpoint_for_inpainting_equals_diffusers_pipeline(
    nine: SdxlModel, strength: float
) -> None:
    request = inpainting(strength)
    hidden = np.asarray(mask_of()) > 0

    (ours,) = nine.generate(request, NoProgress())

    visible = nine.encode(PICTURE, SdxlMemoryPlan(1), hidden)
    assert distance(ours, by_diffusers(nine, request, masked_image_latents=visible)) == 0


@pytest.mark.parametrize("is_with_reference", [False, True])
def test_a_checkpoint_for_inpainting_repaints_all_of_a_picture_without_a_mask(
    nine: SdxlModel, is_with_reference: bool
) -> None:
    start = StartImage(PICTURE, 0.5) if is_with_reference else None
    request = image_request(size=SIZE, reference=start)

    (ours,) = nine.generate(request, NoProgress())

    whole = StartImage(PICTURE, 0.5 if start else 1.0, Image.new("L", SIZE, "white"))
    (theirs,) = nine.generate(image_request(size=SIZE, reference=whole), NoProgress())
    assert distance(ours, theirs) == 0


def test_a_single_file_for_inpainting_loads_beside_sdxls_own_configuration(
    sdxl: Any, tmp_path: Path
) -> None:
    tensors = load_file(loader.POCKET)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    # Without an effect of the five further channels, so that the picture is the pocket model's.
    tensors[first] = torch.nn.functional.pad(tensors[first], (0, 0, 0, 0, 0, 5))
    save_file(tensors, tmp_path / "inpainting.safetensors")
    settings = Settings(
        sdxl_model=str(tmp_path / "inpainting.safetensors"),
        sdxl_config=str(loader.POCKET.with_suffix("")),
    )

    (ours,) = loader.load(settings).generate(image_request(), NoProgress())

    (plain,) = sdxl.generate(image_request(), NoProgress())
    assert distance(ours, plain) <= 1
