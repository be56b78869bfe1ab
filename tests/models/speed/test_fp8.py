"""Layers that multiply in fp8 for a `fast` job, as far as its numbers go the real ones on a CPU."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ourvidz_serverless.errors import Cancelled, ModelLoadError
from ourvidz_serverless.models.sdxl import pipeline as sdxl_models
from ourvidz_serverless.models.speed import fp8
from ourvidz_serverless.models.wan import pipeline as wan_models
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_wan
from tests.fakes.small_jobs import PICTURE, write_lora


@pytest.fixture(scope="module")
def quick() -> Any:
    return sdxl_models.load(Settings(fp8=True))


@pytest.fixture(scope="module")
def quick_wan(wan_settings: Settings) -> wan_models.Wan:
    return wan_models.load(wan_settings.model_copy(update={"fp8": True}))


def paint(model: Any, **options: Any) -> np.ndarray:
    (picture,) = model.generate(**{**PICTURE, **options})
    return np.asarray(picture)


def film(model: Any, **options: Any) -> np.ndarray:
    return tiny_wan.render(model, num_inference_steps=6, negative_prompt="blurry", **options)


def levers(make: Any, model: Any, **options: Any) -> list[str]:
    """Which levers acted in a job, as its document tells."""
    told: list[Any] = []
    make(model, sped=told.append, **options)
    return list(told[-1]["levers"])


class Products(TorchDispatchMode):
    """Counts products in fp8."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._scaled_mm.default
        return func(*args, **(kwargs or {}))


@contextmanager
def no_room_for_copies(network: Any, early: Any) -> Iterator[None]:
    """A device that a network does not fit while it multiplies in fp8; `early` is called first."""
    layer = fp8.layers(network)[0]

    def fail(*call: Any) -> None:
        if "forward" in vars(layer):
            raise torch.OutOfMemoryError("full")

    hook = early.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


# --- the numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, dtype=dtype)
    hidden = torch.randn(2, 5, 64, dtype=dtype)

    with torch.inference_mode():
        made = fp8.Rounded.of(layer).multiply(layer.forward, hidden)
        (rows, row_scales), (weight, scales) = map(
            fp8.rounded, (hidden.reshape(-1, 64), layer.weight)
        )
        expected = (rows.float() * row_scales) @ (weight.float() * scales).t() + layer.bias.float()

    assert (made.shape, made.dtype) == ((2, 5, 32), dtype)
    # The sum is rounded to bf16, and the bias has been.
    torch.testing.assert_close(made.float(), expected.view(2, 5, 32), atol=0.02, rtol=0.01)
    torch.testing.assert_close(made, layer(hidden), atol=0.2, rtol=0.1)


def test_a_scale_for_each_row_keeps_small_rows_beside_large_ones() -> None:
    rows = torch.tensor([[1.0, -2.0], [6e4, 3e4], [1e-6, 0.0], [0.0, 0.0]], dtype=torch.float16)

    numbers, scales = fp8.rounded(rows)

    again = numbers.float() * scales
    torch.testing.assert_close(again, rows.float(), atol=0, rtol=2**-4)
    assert float(numbers.float().abs().max()) == fp8.LARGEST


def test_layers_of_blocks_whose_sides_are_multiples_of_16_take_it_and_no_others() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fits, self.wide = torch.nn.Linear(32, 16), torch.nn.Linear(32, 24)
            self.tall, self.norm = torch.nn.Linear(20, 16), torch.nn.LayerNorm(16)

    class Network(torch.nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self) -> None:
            super().__init__()
            self.block, self.outside = Block(), torch.nn.Linear(32, 32)

    network = Network()

    assert fp8.layers(network) == [network.block.fits]


# --- a job ---


def test_a_fast_job_multiplies_in_fp8_and_says_so(quick: Any, sdxl: Any) -> None:
    with Products() as products:
        told = levers(paint, quick, speed="fast")

    assert "fp8" in told
    assert products.count > len(fp8.layers(quick._unet))
    assert (paint(quick, speed="fast") != paint(sdxl, speed="fast")).any()


@pytest.mark.parametrize("speed", ["exact", "balanced"])
def test_no_other_preset_does(quick: Any, sdxl: Any, speed: str) -> None:
    with Products() as products:
        picture = paint(quick, speed=speed)

    assert products.count == 0
    assert np.array_equal(picture, paint(sdxl, speed=speed))


def test_without_the_setting_no_job_does(sdxl: Any) -> None:
    with Products() as products:
        assert "fp8" not in levers(paint, sdxl, speed="fast")

    assert products.count == 0


@pytest.mark.parametrize("error", [None, Cancelled("stopped")])
def test_the_next_exact_job_has_the_bits_that_it_always_had_and_no_copy_is_left(
    quick: Any, sdxl: Any, error: Exception | None
) -> None:
    copies: list[int] = []

    def look(done: int, total: int) -> None:
        if done == 3:
            copies.append(len(in_fp8()))
            if error:
                raise error

    try:
        paint(quick, speed="fast", step=look)
    except Cancelled:
        assert error

    assert copies[0] >= len(fp8.layers(quick._unet))
    assert in_fp8() == []
    assert np.array_equal(paint(quick), paint(sdxl))


def in_fp8() -> list[Any]:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return [each for each in tensors if each.dtype == torch.float8_e4m3fn]


def test_a_job_with_a_lora_stays_without_it(quick: Any, tmp_path: Path) -> None:
    path = tmp_path / "bold.safetensors"
    write_lora(path, "to_q")

    with Products() as products:
        told = levers(paint, quick, speed="fast", loras=[(path, 1.0)])

    assert ("fp8" in told, products.count) == (False, 0)


def test_a_job_in_fp8_is_eager_and_teaches_the_compiler_nothing() -> None:
    model = sdxl_models.load(Settings(fp8=True, compile="regional"))
    assert model.regions is not None

    paint(model, speed="fast")
    assert not model.regions._seen

    paint(model)
    assert model.regions._seen


def test_wans_networks_multiply_in_it_and_are_exact_again(
    quick_wan: wan_models.Wan, wan: wan_models.Wan
) -> None:
    for references in ({}, {"subject": tiny_wan.picture(2)}):
        assert "fp8" in levers(film, quick_wan, speed="fast", **references)
        assert np.array_equal(film(quick_wan, **references), film(wan, **references))


# --- where it has no room ---


def test_a_job_that_ran_out_of_memory_goes_on_without_it(
    quick: Any, quick_wan: wan_models.Wan
) -> None:
    picture = sdxl_models.Sdxl(quick._pipe, quick.device)
    picture.has_fp8 = True
    transformer = quick_wan._networks["t2v"].transformer

    with no_room_for_copies(picture._unet, picture._unet.conv_in):
        assert "fp8" not in levers(paint, picture, speed="fast")
    with no_room_for_copies(transformer, transformer.patch_embedding):
        assert "fp8" not in levers(film, quick_wan, speed="fast", width=48)


def test_on_a_small_card_no_job_multiplies_in_it(quick: Any, wan_settings: Settings) -> None:
    fake_sdxl = sdxl_models.Sdxl(quick._pipe, quick.device, plans=sdxl_models.low_vram_plans())
    fake_sdxl.has_fp8 = True
    small = {"fp8": True, "low_vram": True}
    filmer = wan_models.load(wan_settings.model_copy(update=small))

    assert "fp8" not in levers(paint, fake_sdxl, speed="fast")
    assert "fp8" not in levers(film, filmer, speed="fast")


@pytest.mark.parametrize("load", [sdxl_models.load, wan_models.load])
def test_a_device_that_has_none_ends_the_start(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*call: Any, **options: Any) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with ... >= 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)

    with pytest.raises(ModelLoadError, match=r"^FP8: this device does not multiply in it \(CUDA"):
        load(Settings(fp8=True, families=("sdxl",)))
