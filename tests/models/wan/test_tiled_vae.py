"""Tiled decoding of videos: the same frames in a bounded part of the memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks import architectures
from builder import pocket_wan
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CountedMemory, standalone_handle
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.wan import loader
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.tiled_vae import Part, SplitDecoder
from ourvidz_serverless.models.wan.vae import VideoVae
from ourvidz_serverless.settings import Settings
from tests.fakes.recorded_progress import RecordedProgress
from tests.fakes.tiny_wan import render

#: The pixels of neighbouring tiles are rounded alike, or differ by one.
ROUNDING = 1
#: Makes tiles of some dozens of pixels in the pocket VAE.
SMALL_TILES = 1 << 20


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = AutoencoderKLWan(**pocket_wan.VAE).requires_grad_(False).eval()
    for weight in model.parameters():
        # Without this an untrained decoder paints an almost even grey.
        weight.mul_(1.5)
    return model


def video_vae(model: Any, memory: CountedMemory | None = None) -> VideoVae:
    device = Device(torch.device("cpu"), torch.float32, memory)
    vae = VideoVae(model, device, standalone_handle(MovableTensors([model], device)))
    vae.decoder.tile_bytes = SMALL_TILES
    return vae


def decoded(model: Any, latents: torch.Tensor, is_tiled: bool) -> tuple[np.ndarray, int]:
    """The frames, and the peak of the device's memory in bytes."""
    memory = CountedMemory(1 << 40)
    with torch.inference_mode(), memory.counting():
        pieces = list(video_vae(model, memory).decode(latents, is_tiled))
    return np.concatenate(pieces), memory.peak_bytes


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# --- the same frames in less memory ---


@pytest.mark.parametrize(("frames", "rows", "columns"), [(2, 16, 24), (1, 24, 10), (3, 13, 17)])
def test_a_tiled_decode_gives_the_same_frames_in_a_third_of_the_memory(
    model: Any, frames: int, rows: int, columns: int
) -> None:
    latents = torch.randn(1, model.config.z_dim, frames, rows, columns)

    whole, whole_bytes = decoded(model, latents, is_tiled=False)
    tiled, tiled_bytes = decoded(model, latents, is_tiled=True)

    assert whole.std() > 30
    assert difference(whole, tiled) <= ROUNDING
    assert tiled_bytes < whole_bytes / 3


@pytest.mark.parametrize("is_tiled", [False, True])
def test_the_memory_of_a_decode_is_known_beforehand(model: Any, is_tiled: bool) -> None:
    vae = video_vae(model)

    _, peak = decoded(model, torch.randn(1, model.config.z_dim, 2, 16, 24), is_tiled)

    assert vae.decode_bytes((192, 128), is_tiled) == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("size", "whole_gib", "tiled_gib"), [((832, 480), 6.7, 1.4), ((1280, 720), 15.4, 2.5)]
)
def test_a_tiled_decode_of_full_size_takes_a_bounded_part_of_a_card(
    size: tuple[int, int], whole_gib: float, tiled_gib: float
) -> None:
    with architectures.made_on("meta", torch.float32):
        vae = AutoencoderKLWan(**architectures.WAN_VAE)
    width, height = (side // vae.config.scale_factor_spatial for side in size)
    decoder = SplitDecoder(vae.decoder, Device(torch.device("cpu"), torch.float32))

    whole, tiled = (decoder.num_bytes(height, width, is_tiled) for is_tiled in (False, True))

    assert whole < whole_gib * (1 << 30)
    assert tiled < tiled_gib * (1 << 30)


def test_a_tiled_decode_can_be_stopped_before_its_first_frame(model: Any) -> None:
    vae = video_vae(model)
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        next(vae.decode(torch.randn(1, model.config.z_dim, 1, 16, 24), True, check))


# --- when a job decodes in tiles ---

WIDE: dict[str, Any] = {"size": (192, 128), "num_frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def wide(wan: WanModel) -> np.ndarray:
    return render(wan, **WIDE)


def with_small_tiles(settings: Settings, **changes: Any) -> WanModel:
    wan = loader.load(settings.model_copy(update=changes))
    wan.vae.decoder.tile_bytes = SMALL_TILES
    return wan


def test_a_video_that_the_device_cannot_decode_whole_is_decoded_in_tiles_at_once(
    wan_settings: Settings, wide: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = with_small_tiles(wan_settings, vram_budget_gb=0.025)
    progress = RecordedProgress()
    monkeypatch.setattr(wan.vae.decoder, "whole", None)

    video = render(wan, progress=progress, **WIDE)

    assert difference(video, wide) <= ROUNDING
    assert progress.memory_plans[-1]["tiled_decode"]


def test_after_out_of_memory_a_decode_goes_on_in_tiles_behind_the_last_piece(
    wan_settings: Settings, wide: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = with_small_tiles(wan_settings)
    progress, whole = RecordedProgress(), wan.vae.decoder.whole

    def one_frame(hidden: torch.Tensor) -> Iterator[Part]:
        yield next(whole(hidden))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(wan.vae.decoder, "whole", one_frame)

    video = render(wan, progress=progress, **WIDE)

    assert difference(video, wide) <= ROUNDING
    assert progress.memory_plans[-1]["tiled_decode"]
