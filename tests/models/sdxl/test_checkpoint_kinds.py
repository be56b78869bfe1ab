"""SDXL checkpoints that differ from SDXL's own work as in diffusers, or are refused."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from benchmarks import architectures
from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.networks import check_networks
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.tiny_sdxl import distance, through_diffusers

#: Of Playground v2.5's VAE.
PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}


def change(folder: Path, part: str, **values: Any) -> None:
    """Change values in the configuration of a part of a checkpoint."""
    (path,) = (folder / part).glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def render(model: SdxlModel, **changes: Any) -> np.ndarray:
    (picture,) = tiny_sdxl.render(model, **changes)
    return picture


def load(folder: Path) -> SdxlModel:
    return loader.load(Settings(sdxl_model=str(folder)))


@pytest.fixture
def folder(sdxl: Any, tmp_path: Path) -> Path:
    """The pocket model as a folder that a test may change."""
    sdxl.networks.pipe.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# --- a VAE with a mean and a deviation of its own ---


@pytest.fixture(scope="module")
def playground(sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose VAE scales its latents as Playground v2.5's does, and encodes one most likely
    latent, so that diffusers' sample of it is ours."""
    folder = tmp_path_factory.mktemp("playground")
    sdxl.networks.pipe.save_pretrained(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -1e4
    vae.save_pretrained(folder / "vae")
    change(folder, "vae", **PLAYGROUND)
    return folder


def test_a_vae_with_latents_mean_and_std_decodes_as_in_diffusers(playground: Path) -> None:
    theirs = StableDiffusionXLPipeline.from_pretrained(playground)

    ours = render(load(playground))

    assert np.array_equal(ours, through_diffusers(theirs))


def test_a_vae_with_latents_mean_and_std_decodes_in_tiles_as_in_diffusers(
    playground: Path,
) -> None:
    model = load(playground)
    tiled = SdxlModel(
        model.networks, model.device, plans=MemoryPlans(SdxlMemoryPlan(1, tiled_decode=True))
    )
    theirs = StableDiffusionXLPipeline.from_pretrained(playground)

    ours = render(tiled)

    assert distance(ours, through_diffusers(theirs)) <= 1


def test_a_vae_with_latents_mean_and_std_encodes_a_reference_as_in_diffusers(
    playground: Path,
) -> None:
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(playground)
    reference = Image.new("RGB", (64, 64), "green")
    pixels, cpu = pipe.image_processor.preprocess(reference), torch.device("cpu")

    with torch.inference_mode():
        ours = load(playground).encode(reference, SdxlMemoryPlan(1))
        theirs = pipe.prepare_latents(pixels, None, 1, 1, torch.float32, cpu, add_noise=False)

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_tiny_vae_is_refused_beside_a_vae_with_latents_mean_and_std(playground: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^SDXL_TINY_VAE: .*latents_mean"):
        loader.load(Settings(sdxl_model=str(playground), sdxl_tiny_vae="pocket"))


# --- UNets of another kind ---

#: The differences from the pocket SDXL's UNet, and a part of the error message.
OTHER_UNETS: dict[str, tuple[dict[str, Any], str]] = {
    "editing": ({"in_channels": 8}, "takes 8 channels, as one for editing does"),
    "learned variance": ({"out_channels": 8}, "gives 8 channels"),
    # The refiner reads one text encoder of two, and five sizes and scores.
    "refiner's text": ({"cross_attention_dim": 64}, "such as a refiner"),
    "refiner's sizes": ({"projection_class_embeddings_input_dim": 224}, "such as a refiner"),
    "Stable Diffusion 2": ({"addition_embed_type": None}, "addition_embed_type None"),
    "classes": ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
}


@pytest.mark.parametrize("kind", OTHER_UNETS)
def test_a_unet_of_another_kind_ends_the_start(sdxl: Any, folder: Path, kind: str) -> None:
    changes, line = OTHER_UNETS[kind]
    other = UNet2DConditionModel.from_config(sdxl.networks.unet.config, **changes)
    other.save_pretrained(folder / "unet")

    with pytest.raises(ModelLoadError) as refused:
        load(folder)

    assert refused.value.message.startswith("SDXL_MODEL: other does not load as SDXL")
    assert line in refused.value.message


def test_networks_of_sdxls_published_sizes_are_accepted() -> None:
    with architectures.made_on("meta", torch.float16):
        pipe = architectures.sdxl()

    check_networks(
        unet=pipe.unet.config,
        vae=pipe.vae.config,
        text_encoder=pipe.text_encoder.config,
        text_encoder_2=pipe.text_encoder_2.config,
    )


# --- the checkpoint's own scheduler ---


def with_scheduler(folder: Path, name: str) -> Path:
    """The folder with another scheduler as its own, in that scheduler's default configuration."""
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("is_with_reference", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "TCDScheduler",
        "LCMScheduler",
        "DDPMScheduler",
        "HeunDiscreteScheduler",
        "EDMDPMSolverMultistepScheduler",
        "SASolverScheduler",
    ],
)
def test_a_checkpoints_own_scheduler_equals_diffusers(
    folder: Path, name: str, is_with_reference: bool
) -> None:
    model = load(with_scheduler(folder, name))
    changes: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    pipe: Any = model.networks.pipe
    if is_with_reference:
        reference = Image.new("RGB", (64, 64), "green")
        changes = {"reference": StartImage(reference, 0.5)}
        theirs = {"image": model.encode(reference, SdxlMemoryPlan(1)), "strength": 0.5}
        pipe = StableDiffusionXLImg2ImgPipeline(**pipe.components)

    ours = render(model, **changes)

    assert distance(ours, through_diffusers(pipe, **theirs)) <= 1


def test_a_scheduler_that_cannot_run_sdxl_ends_the_start(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^SDXL_MODEL: other .*FlowMatchEulerDiscrete"):
        load(with_scheduler(folder, "FlowMatchEulerDiscreteScheduler"))


def test_a_scheduler_of_one_step_is_served(folder: Path) -> None:
    with_scheduler(folder, "LCMScheduler")
    change(folder, "scheduler", original_inference_steps=1)

    assert render(load(folder), steps=1).shape == (64, 64, 3)


def test_more_steps_than_a_distilled_scheduler_takes_are_refused_by_field(folder: Path) -> None:
    with_scheduler(folder, "LCMScheduler")
    change(folder, "scheduler", original_inference_steps=8)

    with pytest.raises(InvalidPrompt, match=r"^config\.num_inference_steps: .* takes no 10 steps$"):
        render(load(folder))
