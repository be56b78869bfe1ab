"""Tiled VAE decoding: the same pixels in less memory."""

import pytest
import torch

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.sdxl import tiled_vae
from tests.fakes.tiny_sdxl import narrow_vae

CPU = torch.device("cpu")


def simulated(budget: int) -> tuple[Device, CountedMemory]:
    memory = CountedMemory(budget)
    return Device(CPU, torch.float32, memory), memory


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 24), (13, 9)])
def test_tiled_decoding_gives_the_same_pixels_in_a_quarter_of_the_memory(
    height: int, width: int
) -> None:
    model, latent = narrow_vae(), 3 * torch.randn(1, 4, height, width)
    full_device, full_memory = simulated(1 << 30)
    tiled_device, tiled_memory = simulated(1 << 30)

    with full_device.computing():
        full = model.decode(latent, return_dict=False)[0]
    with tiled_device.computing():
        tiled = tiled_vae.decode(model, latent, tiled_device)

    torch.testing.assert_close(tiled, full, atol=1e-4, rtol=0)
    assert tiled_memory.peak_bytes < full_memory.peak_bytes / 4
