"""Builds networks on the tensors of a file, without random initialisation, conversion or copies.

A network is built on torch's meta device, where a parameter has a shape and no memory. Then it gets
the file's tensors: views of the mapped file or, where maps are slow, of one buffer with the file's
bytes. A tensor is copied only if the file has another dtype than is wanted.

diffusers' and transformers' own loaders initialise missing tensors with random numbers and log
that. Here a tensor that is missing or has another shape is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers.initialization import no_init_weights

from ourvidz_serverless.models.loading import checkpoints

Tensors = dict[str, torch.Tensor]

#: safetensors' names of dtypes (https://github.com/huggingface/safetensors, `Dtype`).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read(path: Path, is_mapped: bool) -> Tensors:
    """The tensors of a safetensors file, as views of one buffer.

    Raises ValueError with a clear message if the file is corrupt or cut off.
    """
    table, start = checkpoints.header(path)
    size = path.stat().st_size
    content = _mapped(path, size) if is_mapped else _buffered(path, size)
    tensors = {}
    for name, entry in table.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        dtype, part = DTYPES[entry["dtype"]], content[first:end]
        # Other writers than safetensors may start a tensor at an unaligned offset.
        part = part.clone() if first % dtype.itemsize else part
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors


def _mapped(path: Path, size: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _buffered(path: Path, size: int) -> torch.Tensor:
    content = torch.empty(size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        rest = memoryview(content.numpy())
        while rest and (count := file.readinto(rest)):
            rest = rest[count:]
    return content


def file_names(weights: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of a network's weights, in the order to try: fp16 first unless fp32 is wanted."""
    found = (weights, f"{weights}.fp16")
    return found if dtype == torch.float32 else found[::-1]


def read_first(folder: Path, names: tuple[str, ...], is_mapped: bool) -> Tensors:
    """The tensors under the first name that exists, in one file or in the shards of its index.

    Names are without `.safetensors`. Raises ValueError if there is no such file.
    """
    for name in names:
        path, index = folder / f"{name}.safetensors", folder / _index(name)
        if path.exists():
            return read(path, is_mapped)
        if index.exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {
                tensor: each
                for shard in shards
                for tensor, each in read(folder / shard, is_mapped).items()
            }
    raise ValueError(f"there is no {names[0]}.safetensors in {folder.name}")


def _index(name: str) -> str:
    """The file name of the index of sharded weights.

    A variant comes before the last suffix: `model.safetensors.index.fp16.json`.
    """
    weights, dot, variant = name.partition(".")
    return f"{weights}.safetensors.index{dot}{variant}.json"


def build(make: Callable[[], Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A network with these weights, ready to compute in a dtype.

    Raises ValueError with a clear message if a tensor is missing or has another shape. Tensors that
    the network does not have are ignored.
    """
    with init_empty_weights(), no_init_weights():
        network = make()
    wanted = network.state_dict()
    # A conversion may give None for a tensor that it did not find.
    check_missing([name for name in wanted if tensors.get(name) is None], len(wanted))
    for name, like in wanted.items():
        check_shape(name, tensors[name].shape, like.shape)
    placed = {name: _as(tensors[name], like, dtype) for name, like in wanted.items()}
    network.load_state_dict(placed, assign=True)
    return network.requires_grad_(False).eval()


def _as(tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype if like.is_floating_point() else like.dtype)


def check_loading_info(info: Mapping[str, Any], wanted: int) -> None:
    """Raise ValueError for missing or mismatched tensors in a library's `output_loading_info`."""
    check_missing(sorted(info["missing_keys"]), wanted)
    for name, found, needed in info["mismatched_keys"]:
        check_shape(name, found, needed)


def check_missing(missing: list[str], wanted: int) -> None:
    """Raise ValueError with a clear message if tensors are missing; `wanted` is their number."""
    if missing:
        raise ValueError(
            f"{len(missing)} of {wanted} tensors are missing in it, such as {missing[0]}"
        )


def check_shape(name: str, found: Sequence[int], needed: Sequence[int]) -> None:
    """Raise ValueError with a clear message if a tensor has another shape than is needed."""
    if found != needed:
        raise ValueError(f"{name} is {_sides(found)}, where the configuration has {_sides(needed)}")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def check_configs(folder: Path, networks: Iterable[str]) -> None:
    """Raise ValueError with a clear message if a folder lacks the config.json of a network."""
    for name in networks:
        if not (folder / name / "config.json").exists():
            raise ValueError(f"there is no {name}/config.json in it".replace("./", ""))
