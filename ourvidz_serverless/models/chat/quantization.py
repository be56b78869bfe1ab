"""Chat weights in fewer bits, by torchao: linear layers only; activations keep their dtype.

Weights are quantised while they are read, so that the original and the quantised model are never
both in memory. torchao's only int4 that computes is CUDA's packing for bfloat16. A combination that
the device cannot run is refused before anything is read.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.memory.device import Device

#: The number of int4 weights that share one scale: the smallest that the packing supports.
INT4_GROUP = 32


def check(name: str, device: Device) -> None:
    """Raise ModelLoadError, in one line, for a quantisation that does not run on the device."""
    runs = device.is_cuda and device.dtype == torch.bfloat16
    if name == "int4" and not runs:
        raise ModelLoadError("CHAT_QUANTIZATION: int4 runs on CUDA in bfloat16 only")


def options(name: str, device: Device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the linear layers."""
    if name == "none":
        return {}
    # torchao warns of kernels for other devices, with their paths.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from transformers import TorchAoConfig

    options = {"quantization_config": TorchAoConfig(config(name))}
    return {**options, "device_map": str(device.name)} if name == "int4" else options


def config(name: str) -> Any:
    """torchao's configuration of a quantisation."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    if name == "int4":
        return Int4WeightOnlyConfig(
            group_size=INT4_GROUP,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    kinds = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}
    return kinds[name](set_inductor_config=False)
