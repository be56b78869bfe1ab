"""The tensors of torch modules, on the device, in the host's memory, or on the disk alone.

A `Movable` for any family: the modules stay the same objects wherever their tensors are, so
whatever refers to them need not know. When a model leaves a GPU it is copied into pinned memory
(`models.pinned`), from which it returns at the bus's full speed. The copy is kept until the model
is dropped: weights do not change, so leaving a second time needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.memory.device import Device, out_of_memory_is_ours
from ourvidz_serverless.models.memory.pinned import Block, block_bytes

#: Reads the same modules anew, in the same order.
Read = Callable[[], Sequence[Any]]


class Tensors:
    """Parameters and buffers of some modules, as one `Movable`. They begin in the host's memory."""

    def __init__(self, modules: Sequence[Any], device: Device, read: Read | None = None) -> None:
        self._modules, self._device, self._read = list(modules), device, read
        self._is_there = False
        # The copy of each parameter in the block, once there is one. A parameter stays the same
        # object wherever its tensor is; a LoRA's parameters are none of these.
        self._copies: dict[torch.Tensor, torch.Tensor | None] = {}
        self._block: Block | None = None
        self._num_bytes = self._measure()

    @property
    def num_bytes(self) -> int:
        """The sum of the tensors' own bytes; what is tied counts once."""
        return self._num_bytes

    @property
    def held_bytes(self) -> int:
        """What of that is on the device."""
        return self._num_bytes if self._is_there else 0

    @property
    def pinned_bytes(self) -> int:
        """How much of the host's pinned memory it uses."""
        return self._block.num_bytes if self._block else 0

    @property
    def is_on_disk(self) -> bool:
        return self._read is not None

    def load(self) -> None:
        if self._read is None:
            raise ModelLoadError("its weights are in memory alone")
        self.adopt(self._read())

    def adopt(self, modules: Sequence[Any]) -> None:
        """Have the tensors of other modules of the same make."""
        for module, fresh in zip(self._modules, modules, strict=True):
            _adopt(module, fresh)
        self._num_bytes = self._measure()

    def arrive(self) -> None:
        if self._is_there:
            return
        with out_of_memory_is_ours():
            self._device.hold(self._num_bytes)
            self._is_there = True
            try:
                self._apply(self._up)
            except BaseException:
                self.leave()
                raise
            self._device.wait()

    def leave(self) -> None:
        if self._is_there:
            if self._device.is_cuda and self._copies and self._block is None:
                self._block = self._device.pin(block_bytes(self._copies))
            self._apply(self._down)
            self._let_go()

    def drop(self) -> None:
        for module in self._modules:
            _empty(module)
        self._copies.clear()
        if self._block:
            self._device.unpin(self._block)
        self._block = None
        self._let_go()

    def _let_go(self) -> None:
        if self._is_there:
            self._device.hold(-self._num_bytes)
        self._is_there = False
        self._device.free_memory()

    def _apply(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._device.is_cuda:
            for module in self._modules:
                module._apply(place)

    def _up(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._device.send(tensor)

    def _down(self, tensor: torch.Tensor) -> torch.Tensor:
        is_plain = not is_traceable_wrapper_subclass(tensor)
        if is_plain and tensor in self._copies and self._block and self._device.has(tensor):
            copy = self._copies[tensor]
            if copy is None:
                copy = self._copies[tensor] = self._block.copy(tensor)
            return copy
        return self._device.parked(tensor)

    def _measure(self) -> int:
        self._copies = {
            parameter: None
            for module in self._modules
            for parameter in module.parameters()
            if not is_traceable_wrapper_subclass(parameter)
        }
        # Not the storages': in the host's memory many tensors may be views of one mapped file.
        parts = [part for module in self._modules for part in _parts(module)]
        return sum({part.data_ptr(): part.nbytes for part in parts}.values())


class Parts:
    """A model of several named parts, as one `Movable`, of which a job may have one at a time.

    With `stages`, groups of parts, a job never has more than one group: the model's bytes are then
    the largest group's, and nothing comes to the device before somebody says what it needs.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[Any]],
        device: Device,
        read: Callable[[], Mapping[str, Sequence[Any]]] | None = None,
        stages: Sequence[Sequence[str]] = (),
    ) -> None:
        self._parts = {name: Tensors(modules, device) for name, modules in parts.items()}
        self._read, self._stages = read, stages

    @property
    def num_bytes(self) -> int:
        groups = self._stages or [list(self._parts)]
        return max(sum(self._parts[name].num_bytes for name in group) for group in groups)

    @property
    def held_bytes(self) -> int:
        """What of that is on the device."""
        return sum(part.held_bytes for part in self._parts.values())

    @property
    def is_on_disk(self) -> bool:
        return self._read is not None

    def load(self) -> None:
        if self._read is None:
            raise ModelLoadError("its weights are in memory alone")
        fresh = self._read()
        for name, part in self._parts.items():
            part.adopt(fresh[name])

    def arrive(self) -> None:
        if self._stages:
            return
        try:
            for part in self._parts.values():
                part.arrive()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        for part in self._parts.values():
            part.leave()

    def drop(self) -> None:
        for part in self._parts.values():
            part.drop()

    def only(self, *names: str) -> None:
        """Have these parts on the device and no others."""
        for name, part in self._parts.items():
            if name not in names:
                part.leave()
        for name in names:
            self._parts[name].arrive()


def _parts(module: Any) -> Iterator[torch.Tensor]:
    """A module's plain tensors; those that quantised ones are made of."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from _plain(tensor)


def _plain(tensor: Any) -> Iterator[torch.Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _adopt(module: Any, fresh: Any) -> None:
    """Have the tensors of another module of the same make, tied ones tied."""
    for (_, mine), (_, other) in zip(module.named_modules(), fresh.named_modules(), strict=True):
        mine._parameters.update(other._parameters)
        mine._buffers.update(other._buffers)


def _empty(module: Any) -> None:
    """Hold no memory; `_adopt` undoes it."""
    for each in module.modules():
        for name, tensor in each._parameters.items():
            if tensor is not None:
                nothing = torch.empty(0, dtype=tensor.dtype)
                each._parameters[name] = torch.nn.Parameter(nothing, requires_grad=False)
        for name, tensor in each._buffers.items():
            if tensor is not None:
                each._buffers[name] = torch.empty(0, dtype=tensor.dtype)
