"""SDXL checkpoints that differ from SDXL's own: each is served as diffusers does, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models import sdxl as models
from ourvidz_serverless.models.plans import Plan, Plans
from ourvidz_serverless.settings import Settings
from tests.support.small import PICTURE

#: Of Playground v2.5's VAE.
PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}


def change(folder: Path, part: str, **values: Any) -> None:
    """Have other values in the configuration of a part of a checkpoint."""
    (path,) = (folder / part).glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def render(model: Any, **options: Any) -> np.ndarray:
    (picture,) = model.generate(**{**PICTURE, **options})
    return picture.astype(int)


def through_diffusers(pipe: Any, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options = {
        "prompt": "a red circle",
        "num_inference_steps": 10,
        "guidance_scale": 6.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "np",
        **options,
    }
    return (pipe(**options).images[0] * 255).round().astype(int)


def load(folder: Path) -> models.Sdxl:
    return models.load(Settings(sdxl_model=str(folder)))


@pytest.fixture
def folder(sdxl: Any, tmp_path: Path) -> Path:
    """The pocket model as a folder, of which a test may change something."""
    sdxl._pipe.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


# --- a VAE with a mean and a deviation of its own ---


@pytest.fixture(scope="module")
def playground(sdxl: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose VAE scales its latents as Playground v2.5's does, and encodes one most likely
    latent, so that diffusers' sample of it is ours."""
    folder = tmp_path_factory.mktemp("playground")
    sdxl._pipe.save_pretrained(folder)
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

    assert np.array_equal(ours, through_diffusers(theirs, width=64, height=64))


def test_a_vae_with_latents_mean_and_std_decodes_in_strips_as_in_diffusers(
    playground: Path,
) -> None:
    model = load(playground)
    model._plans = Plans(Plan(1, tiled_decode=True))
    theirs = StableDiffusionXLPipeline.from_pretrained(playground)

    ours = render(model)

    assert np.abs(ours - through_diffusers(theirs, width=64, height=64)).max() <= 1


def test_a_vae_with_latents_mean_and_std_encodes_a_reference_as_in_diffusers(
    playground: Path,
) -> None:
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(playground)
    reference = Image.new("RGB", (64, 64), "green")
    pixels, cpu = pipe.image_processor.preprocess(reference), torch.device("cpu")

    with torch.inference_mode():
        ours = load(playground)._encode(reference)
        theirs = pipe.prepare_latents(pixels, None, 1, 1, torch.float32, cpu, add_noise=False)

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_tiny_vae_is_refused_beside_a_vae_with_latents_mean_and_std(playground: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^SDXL_TINY_VAE: .*latents_mean"):
        models.load(Settings(sdxl_model=str(playground), sdxl_tiny_vae="pocket"))
