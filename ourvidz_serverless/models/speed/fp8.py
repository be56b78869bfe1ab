"""Linear layers that multiply in fp8 while a `fast` job computes.

Weights and activations are rounded to e4m3, each row by a scale of its own: an output channel's, a
token's. The network keeps its exact weights, and with them every later job its exact bits; the
rounded ones, half as large as fp16's, are made when a batch begins and gone when it ends.

Sums come out in bf16, the one format in which torch's row-wise kernels give them on every card that
has any (ATen's `ScaledBlas.cpp`), and go on in the network's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.speed.blocks import repeated_blocks, standing_in
from ourvidz_serverless.settings import Settings

LARGEST = torch.finfo(torch.float8_e4m3fn).max

#: Both sides of a weight must be multiples of it (`torch._scaled_mm`).
SIDE = 16

#: So that a row of zeros has a scale.
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True, slots=True)
class Rounded:
    """A layer's weight (in, out) in fp8, the scale of each output (1, out), and its bias."""

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, layer: torch.nn.Linear) -> Rounded:
        weight, scales = rounded(layer.weight)
        bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
        return cls(weight.t(), scales.t(), bias)

    def multiply(self, forward: object, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer gives for `hidden` (..., in); its own `forward` is not asked."""
        rows, scales = rounded(hidden.reshape(-1, hidden.shape[-1]))
        made = torch._scaled_mm(
            rows,
            self.weight,
            scale_a=scales,
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return made.to(hidden.dtype).unflatten(0, hidden.shape[:-1])


def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, width) in fp8, and the scales (n, 1) in fp32 that make them large again."""
    scales = (rows.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    scaled = (rows / scales).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn), scales


def layers(network: Any) -> list[torch.nn.Linear]:
    """The layers of a network's repeated blocks that can be multiplied in fp8."""
    found = (each for block in repeated_blocks(network) for each in block.modules())
    return [
        each
        for each in found
        if type(each) is torch.nn.Linear
        and each.in_features % SIDE == each.out_features % SIDE == 0
    ]


@contextmanager
def multiplying(network: Any) -> Iterator[None]:
    """A network whose blocks multiply in fp8, for as long as the context lasts."""
    stands = {
        each: functools.partial(Rounded.multiply, Rounded.of(each)) for each in layers(network)
    }
    with standing_in(stands):
        yield


def is_wanted(settings: Settings, device: Device) -> bool:
    """Whether `fast` jobs multiply in fp8: `FP8` asks for it, `LOW_VRAM` has no room for it.

    Raises ModelLoadError, in one line, where it is asked for and the device has none.
    """
    if settings.fp8:
        _try(device)
    return settings.fp8 and not settings.low_vram


def _try(device: Device) -> None:
    layer = torch.nn.Linear(SIDE, SIDE, device=device.name, dtype=device.dtype)
    try:
        with torch.inference_mode():
            Rounded.of(layer).multiply(layer.forward, layer.weight)
    except RuntimeError as exc:
        raise ModelLoadError(
            "FP8: this device does not multiply in it (CUDA does from compute capability 8.9 on)"
        ) from exc
