"""A job whose latents or pixels are not finite fails with an error that says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ourvidz_serverless.errors import InternalError
from ourvidz_serverless.models.finite import check_finite
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.wan import loader as wan_models
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_sdxl import render, write_lora

VIDEO = VideoRequest(
    prompt="a red sun", seed=1, size=(32, 32), num_frames=5, steps=2, guidance_scale=1.0
)


def fill(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.fill_(torch.inf)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_single_value_that_is_not_finite_is_an_error(value: float) -> None:
    values = torch.zeros(3, 4, 4)
    assert check_finite(values, "the latent") is values
    values[1, 2, 3] = value

    with pytest.raises(InternalError) as failed:
        check_finite(values, "the latent")

    assert "the latent is not finite" in failed.value.message
    # The application searches error texts for these letters.
    assert not any(letters in failed.value.message for letters in ("inf", "nan"))


def test_a_lora_that_causes_overflow_fails_only_its_own_job(sdxl: Any, tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    write_lora(path, "to_q", "to_v")
    save_file({name: each * 1e30 for name, each in load_file(path).items()}, path)

    with pytest.raises(InternalError, match="the latent is not finite"):
        render(sdxl, loras=((path, 1.0),))

    assert len(render(sdxl)) == 1


@pytest.mark.parametrize("is_tiled", [False, True])
def test_a_picture_that_its_vae_cannot_decode_fails_its_job(is_tiled: bool) -> None:
    networks, device = loader.load(Settings()).networks, Device(torch.device("cpu"), torch.float32)
    model = SdxlModel(networks, device, plans=MemoryPlans(SdxlMemoryPlan(1, tiled_decode=is_tiled)))
    # The picture then overflows, as with SDXL's own VAE in fp16.
    fill(networks.vae.decoder.conv_out.weight)

    with pytest.raises(InternalError, match="the decoded picture is not finite"):
        render(model)


def test_a_video_whose_latent_is_not_finite_fails_its_job(wan_settings: Settings) -> None:
    model = wan_models.load(wan_settings)
    fill(model.networks["t2v"].transformer.proj_out.bias)

    with pytest.raises(InternalError, match="the latent is not finite"):
        list(model.generate(VIDEO, NoProgress()))


def test_a_video_that_its_vae_cannot_decode_fails_its_job(wan_settings: Settings) -> None:
    model = wan_models.load(wan_settings)
    fill(model.vae.model.decoder.conv_out.weight)

    with pytest.raises(InternalError, match="the decoded video is not finite"):
        list(model.generate(VIDEO, NoProgress()))
