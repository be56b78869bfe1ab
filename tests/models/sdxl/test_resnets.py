"""SDXL's residual blocks with fewer reads and writes give the bits of diffusers' blocks."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from benchmarks import architectures
from ourvidz_serverless.models.sdxl.resnets import LeanResnet, move_fewer_bytes

#: Blocks of a UNet, which read the time, and one of a VAE, which does not.
SHAPES: dict[str, dict[str, Any]] = {
    "same width": {"in_channels": 64, "temb_channels": 32},
    "another width": {"in_channels": 64, "out_channels": 32, "temb_channels": 32},
    "without time": {"in_channels": 64, "temb_channels": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_block_that_moves_fewer_bytes_gives_the_same_bits_and_leaves_its_inputs(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    usual = ResnetBlock2D(**SHAPES[name]).to(dtype).eval()
    picture = torch.randn(2, 64, 8, 8).to(dtype)
    time = torch.randn(2, 32).to(dtype) if SHAPES[name]["temb_channels"] else None
    lean = copy.deepcopy(usual)
    move_fewer_bytes(torch.nn.ModuleList([lean]))
    given = copy.deepcopy((picture, time))

    with torch.inference_mode():
        expected, made = usual(picture, time), lean(picture, time)

    assert type(lean) is LeanResnet
    assert torch.equal(made, expected)
    assert torch.equal(picture, given[0])
    assert time is None or torch.equal(time, given[1])


def test_all_residual_blocks_of_sdxl_are_plain() -> None:
    with torch.device("meta"):
        networks = [
            UNet2DConditionModel(**architectures.SDXL_UNET),
            AutoencoderKL(**architectures.SDXL_VAE),
        ]

    for network in networks:
        move_fewer_bytes(network)
        assert not [each for each in network.modules() if type(each) is ResnetBlock2D]


@pytest.mark.parametrize(
    "other",
    [{"output_scale_factor": 2.0}, {"up": True}, {"time_embedding_norm": "scale_shift"}],
    ids=str,
)
def test_a_block_of_another_kind_stays_as_it_is(other: dict[str, Any]) -> None:
    block = ResnetBlock2D(in_channels=64, temb_channels=32, **other)

    move_fewer_bytes(torch.nn.ModuleList([block]))

    assert type(block) is ResnetBlock2D
