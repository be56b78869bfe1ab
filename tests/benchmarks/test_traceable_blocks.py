"""Each kind of block that `COMPILE=regional` compiles can be traced as one graph.

A part that torch cannot trace would make the worker eager for good, with one warning.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel, WanVACETransformer3DModel

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.regional_compile import repeated_blocks
from ourvidz_serverless.models.wan.blocks import move_fewer_bytes

pytestmark = pytest.mark.slow

TEXT = 32

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


def unet() -> tuple[Any, dict[str, Any]]:
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=TEXT,
    )
    return network, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": torch.randn(2, 7, TEXT),
    }


def wan(**options: Any) -> tuple[Any, dict[str, Any]]:
    return WanTransformer3DModel(**{**WAN, **options}), {
        "hidden_states": torch.randn(1, options.get("in_channels", 4), 2, 4, 4),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 7, TEXT),
    }


def image_to_video() -> tuple[Any, dict[str, Any]]:
    network, inputs = wan(in_channels=12, image_dim=16, added_kv_proj_dim=24)
    return network, {**inputs, "encoder_hidden_states_image": torch.randn(1, 5, 16)}


def vace() -> tuple[Any, dict[str, Any]]:
    network = WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=8)
    _, inputs = wan()
    return network, {**inputs, "control_hidden_states": torch.randn(1, 8, 2, 4, 4)}


@pytest.mark.parametrize("make", [unet, wan, image_to_video, vace])
@torch.inference_mode()
def test_each_repeated_block_is_one_graph(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    network, inputs = make()
    network.eval()
    move_fewer_bytes(network)
    attention.set_backend(network, "native", Device(torch.device("cpu"), torch.float32))
    expected = network(**inputs).sample
    blocks = list(repeated_blocks(network))
    traced = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal traced
        traced += 1
        return graph.forward

    for block in blocks:
        # As `CompiledBlocks` does, but without generating code.
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True, backend=count)

    assert torch.equal(network(**inputs).sample, expected)
    assert traced >= len({type(block) for block in blocks}) > 0
