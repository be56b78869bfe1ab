"""Networks that take their weights as they lie in the file: nothing is drawn, converted or copied.

A network is built on torch's meta device, where a parameter has a shape and no memory, and is then
given the file's tensors: views of the mapped file, or, where maps are slow, of the one buffer that
the file was read into. Only where the file holds another dtype than is wanted is there a copy.

diffusers' and transformers' own loaders start with random numbers where a tensor is missing, and
say so in the log; here whatever is missing or of another shape is an error.
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

#: safetensors' names (https://github.com/huggingface/safetensors, `Dtype`).
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
    """The tensors of a safetensors file, all of them views of one stretch of memory.

    Raises ValueError in words for a file that is none, or is cut off.
    """
    table, start = checkpoints.header(path)
    size = path.stat().st_size
    whole = _mapped(path, size) if is_mapped else _buffered(path, size)
    tensors = {}
    for name, entry in table.items():
        first, end = (start + offset for offset in entry["data_offsets"])
        dtype, part = DTYPES[entry["dtype"]], whole[first:end]
        # Files of other writers than safetensors' own may begin at an odd place.
        part = part.clone() if first % dtype.itemsize else part
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors


def _mapped(path: Path, size: int) -> torch.Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def _buffered(path: Path, size: int) -> torch.Tensor:
    whole = torch.empty(size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        room = memoryview(whole.numpy())
        while room and (count := file.readinto(room)):
            room = room[count:]
    return whole


def names(weights: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Under which names a network's weights are looked for: halves first where they are wanted."""
    found = (weights, f"{weights}.fp16")
    return found if dtype == torch.float32 else found[::-1]


def read_parts(folder: Path, names: tuple[str, ...], is_mapped: bool) -> Tensors:
    """The tensors of the first of some files, in one piece or in those that its index names.

    A file's name is without its `.safetensors`. Raises ValueError where there is none of them.
    """
    for name in names:
        path, index = folder / f"{name}.safetensors", folder / _index(name)
        if path.exists():
            return read(path, is_mapped)
        if index.exists():
            pieces = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {
                tensor: each
                for piece in pieces
                for tensor, each in read(folder / piece, is_mapped).items()
            }
    raise ValueError(f"there is no {names[0]}.safetensors in {folder.name}")


def _index(name: str) -> str:
    """The file name of the index of weights in several files.

    A variant comes before the last suffix: `model.safetensors.index.fp16.json`.
    """
    weights, dot, variant = name.partition(".")
    return f"{weights}.safetensors.index{dot}{variant}.json"


def build(make: Callable[[], Any], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A network with these weights, ready to compute in a dtype.

    Raises ValueError in words where a tensor is missing or has another shape; what the network has
    no place for is left out.
    """
    with init_empty_weights(), no_init_weights():
        network = make()
    wanted = network.state_dict()
    # A conversion may hand on what it did not find as None.
    check_names([name for name in wanted if tensors.get(name) is None], len(wanted))
    for name, like in wanted.items():
        check_shape(name, tensors[name].shape, like.shape)
    placed = {name: _as(tensors[name], like, dtype) for name, like in wanted.items()}
    network.load_state_dict(placed, assign=True)
    return network.requires_grad_(False).eval()


def _as(tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype if like.is_floating_point() else like.dtype)


def check_loading_info(told: Mapping[str, Any], wanted: int) -> None:
    """The same for what a library's own loader tells of a model that it has loaded."""
    check_names(sorted(told["missing_keys"]), wanted)
    for name, found, needed in told["mismatched_keys"]:
        check_shape(name, found, needed)


def check_names(missing: list[str], wanted: int) -> None:
    """Raise ValueError in words where tensors are missing, of so many that are wanted."""
    if missing:
        raise ValueError(
            f"{len(missing)} of {wanted} tensors are missing in it, such as {missing[0]}"
        )


def check_shape(name: str, found: Sequence[int], needed: Sequence[int]) -> None:
    """Raise ValueError in words where a tensor is not of the shape that is needed."""
    if found != needed:
        raise ValueError(f"{name} is {_sides(found)}, where the configuration has {_sides(needed)}")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def check_configs(folder: Path, networks: Iterable[str]) -> None:
    """Raise ValueError in words where a folder has no configuration of one of its networks."""
    for name in networks:
        if not (folder / name / "config.json").exists():
            raise ValueError(f"there is no {name}/config.json in it".replace("./", ""))
