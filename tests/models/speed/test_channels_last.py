"""SDXL with its convolutions in the channels-last format."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.sdxl import loader as sdxl_models
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.settings import Settings
from tests.models.speed.rendering import (
    distance,
    render_image,
)


@pytest.fixture(scope="module")
def channels_last() -> Any:
    return sdxl_models.load(Settings(memory_format="channels_last"))


def convolutions(model: Any) -> list[Any]:
    """The convolutions of a model's UNet and VAE, except 1x1: there both formats are the same."""
    modules = (
        each for network in (model.networks.unet, model.networks.vae) for each in network.modules()
    )
    return [
        each for each in modules if isinstance(each, torch.nn.Conv2d) and each.kernel_size != (1, 1)
    ]


def is_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@contextmanager
def recorded_formats(model: Any) -> Iterator[set[bool]]:
    """Whether the outputs of convolutions are channels-last."""
    seen: set[bool] = set()
    hooks = [
        each.register_forward_hook(lambda _, given, made: seen.add(is_last(made)))
        for each in convolutions(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_weights_and_outputs_of_convolutions_are_channels_last(
    sdxl: Any, channels_last: Any
) -> None:
    with recorded_formats(channels_last) as in_last:
        render_image(channels_last)
    with recorded_formats(sdxl) as in_default:
        render_image(sdxl)

    assert {is_last(each.weight) for each in convolutions(channels_last)} == {True}
    assert {is_last(each.weight) for each in convolutions(sdxl)} == {False}
    assert (in_last, in_default) == ({True}, {False})


def test_channels_last_paints_the_same_image_within_rounding(sdxl: Any, channels_last: Any) -> None:
    reference = StartImage(Image.new("RGB", (128, 64), "green"), 0.5)

    for options in ({}, {"reference": reference}):
        assert distance(render_image(channels_last, **options), render_image(sdxl, **options)) <= 1


def test_weights_are_channels_last_again_after_they_were_dropped_and_read() -> None:
    model = sdxl_models.load(Settings(memory_format="channels_last"))
    parts = model.handle.model

    parts.drop()
    parts.load()

    assert all(is_last(each.weight) for each in convolutions(model))


def test_channels_last_works_with_tiled_decoding(channels_last: Any, sdxl: Any) -> None:
    plans = MemoryPlans(SdxlMemoryPlan(1, tiled_decode=True, offload=True, lean=True))
    small = SdxlModel(channels_last.networks, channels_last.device, plans=plans)

    assert distance(render_image(small), render_image(sdxl)) <= 1
