"""Compiled blocks on a real device: the same pixels as eager ones, while no job waits for them."""

from pathlib import Path
from typing import Any

import numpy as np

from ourvidz_serverless.models.sdxl import loader as sdxl_loader
from ourvidz_serverless.models.speed.regional_compile import CompiledBlocks
from ourvidz_serverless.models.wan import loader as wan_loader
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl, tiny_wan
from tests.gpu.devices import DEVICE, MAX_DIFFERENCE, ON_A_DEVICE, difference
from tests.patience import wait_until

pytestmark = ON_A_DEVICE


def once_compiled(render: Any, blocks: CompiledBlocks | None) -> tuple[np.ndarray, np.ndarray]:
    """What eager jobs make, and what a job makes after the blocks are compiled."""
    assert blocks is not None
    eager = render()
    render()
    wait_until(lambda: not blocks.is_compiling)
    compiled = render()
    assert not blocks.is_broken
    assert blocks.num_calls > 0
    return eager, compiled


def test_a_picture_from_compiled_blocks_is_that_of_eager_ones(tmp_path: Path) -> None:
    settings = Settings(device=DEVICE, compile="regional", compile_cache_dir=tmp_path)
    model = sdxl_loader.load(settings)

    made = once_compiled(lambda: tiny_sdxl.render(model)[0], model.compiled_blocks)

    assert difference(*made) < MAX_DIFFERENCE["float16"]


def test_a_video_from_compiled_blocks_is_that_of_eager_ones(tmp_path: Path) -> None:
    settings = tiny_wan.write_wan(tmp_path / "weights")
    changes = {"device": DEVICE, "compile": "regional", "compile_cache_dir": tmp_path / "cache"}
    model = wan_loader.load(settings.model_copy(update=changes))

    made = once_compiled(lambda: tiny_wan.render(model), model.networks["t2v"].compiled_blocks)

    assert difference(*made) < MAX_DIFFERENCE["bfloat16"]
