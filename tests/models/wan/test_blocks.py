"""WAN's blocks with fewer reads and writes give the bits of diffusers' blocks."""

import copy
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from benchmarks.dry_run.wan import keep_in_fp32
from ourvidz_serverless.models.speed.regional_compile import repeated_blocks
from ourvidz_serverless.models.wan.blocks import LEANER, move_fewer_bytes

WIDTHS: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
KINDS: dict[str, Any] = {
    "t2v": lambda: WanTransformer3DModel(**WIDTHS),
    "i2v": lambda: WanTransformer3DModel(**WIDTHS, image_dim=16, added_kv_proj_dim=48),
    "vace": lambda: WanVACETransformer3DModel(**WIDTHS, vace_layers=[0, 1], vace_in_channels=8),
}


def network(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    made = KINDS[kind]().eval().requires_grad_(False)
    for each in made.parameters():
        each.add_(0.1 * torch.randn(each.shape))  # some weights begin as zeros or ones
    made.to(dtype)
    keep_in_fp32(made)
    return made


def inputs(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    made: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 3, 8, 12, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, dtype=dtype),
    }
    if kind == "i2v":
        made["encoder_hidden_states_image"] = torch.randn(1, 5, 16, dtype=dtype)
    if kind == "vace":
        made["control_hidden_states"] = torch.randn(1, 8, 3, 8, 12, dtype=dtype)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_moves_fewer_bytes_gives_the_same_bits(
    kind: str, dtype: torch.dtype
) -> None:
    usual = network(kind, dtype)
    lean = copy.deepcopy(usual)
    move_fewer_bytes(lean)

    with torch.inference_mode():
        expected, made = (each(**inputs(kind, dtype)).sample for each in (usual, lean))

    assert expected.float().std() > 0
    assert torch.equal(made, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_all_blocks_are_those_that_move_fewer_bytes_and_are_compiled(kind: str) -> None:
    lean = network(kind, torch.float32)
    before = list(repeated_blocks(lean))

    move_fewer_bytes(lean)

    assert list(repeated_blocks(lean)) == before
    assert {type(each) for each in before} <= set(LEANER.values())
    assert not [each for each in lean.modules() if type(each) is WanTransformerBlock]
