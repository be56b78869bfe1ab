"""The tensors of torch modules, which move between the device, the host's memory and the disk.

These are `Movable`s for any family. The modules stay the same objects wherever their tensors are,
so other objects can refer to them. A model that is evicted from a GPU is copied into pinned memory
(see `pinned`), from which it returns at the bus's full speed. The copy is kept until the model is
dropped: weights do not change, so the next eviction needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.memory.device import Device, translate_out_of_memory
from ourvidz_serverless.models.memory.pinned import PinnedBlock, block_bytes

#: Reads the same modules from the disk again, in the same order.
Read = Callable[[], Sequence[Any]]


class MovableTensors:
    """The parameters and buffers of some modules. At first they are in the host's memory."""

    def __init__(self, modules: Sequence[Any], device: Device, read: Read | None = None) -> None:
        self._modules, self._device, self._read = list(modules), device, read
        self._is_on_device = False
        # The pinned copy of each parameter, once there is one. A parameter stays the same object
        # wherever its tensor is. A LoRA's parameters are not among these.
        self._copies: dict[torch.Tensor, torch.Tensor | None] = {}
        self._block: PinnedBlock | None = None
        self._num_bytes = self._measure()

    @property
    def num_bytes(self) -> int:
        """The sum of the tensors' bytes. Tied tensors count once."""
        return self._num_bytes

    @property
    def device_bytes(self) -> int:
        """The bytes that are on the device now."""
        return self._num_bytes if self._is_on_device else 0

    @property
    def pinned_bytes(self) -> int:
        """The bytes of pinned host memory that it uses."""
        return self._block.num_bytes if self._block else 0

    @property
    def is_on_disk(self) -> bool:
        return self._read is not None

    def load(self) -> None:
        if self._read is None:
            raise ModelLoadError("its weights are in memory alone")
        self.assign_from(self._read())

    def assign_from(self, modules: Sequence[Any]) -> None:
        """Take the tensors of other modules with the same structure."""
        for module, fresh in zip(self._modules, modules, strict=True):
            _assign(module, fresh)
        self._num_bytes = self._measure()

    def to_device(self) -> None:
        if self._is_on_device:
            return
        with translate_out_of_memory():
            self._device.count_bytes(self._num_bytes)
            self._is_on_device = True
            try:
                self._upload()
            except BaseException:
                self.to_host()
                raise
            self._device.wait()

    def _upload(self) -> None:
        if self._device.is_cuda:
            with self._device.uploads() as uploads:
                self._apply(uploads.send)

    def to_host(self) -> None:
        if self._is_on_device:
            if self._device.is_cuda and self._copies and self._block is None:
                self._block = self._device.pin(block_bytes(self._copies))
            self._apply(self._evicted)
            self._mark_evicted()

    def drop(self) -> None:
        for module in self._modules:
            _empty(module)
        self._copies.clear()
        if self._block:
            self._device.unpin(self._block)
        self._block = None
        self._mark_evicted()

    def _mark_evicted(self) -> None:
        if self._is_on_device:
            self._device.count_bytes(-self._num_bytes)
        self._is_on_device = False
        self._device.free_memory()

    def _apply(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._device.is_cuda:
            for module in self._modules:
                module._apply(move)

    def _evicted(self, tensor: torch.Tensor) -> torch.Tensor:
        is_plain = not is_traceable_wrapper_subclass(tensor)
        if is_plain and tensor in self._copies and self._block and self._device.has(tensor):
            copy = self._copies[tensor]
            if copy is None:
                copy = self._copies[tensor] = self._block.copy(tensor)
            return copy
        return self._device.copy_to_host(tensor)

    def _measure(self) -> int:
        self._copies = {
            parameter: None
            for module in self._modules
            for parameter in module.parameters()
            if not is_traceable_wrapper_subclass(parameter)
        }
        # Not the storages' bytes: on the host many tensors may be views of one mapped file.
        parts = [part for module in self._modules for part in _parts(module)]
        return sum({part.data_ptr(): part.nbytes for part in parts}.values())


class MovableParts:
    """A model of several named parts. A job may have only some of them on the device.

    `parts` are the parts by name. With `stages`, which are groups of parts, a job has one group at
    a time. `num_bytes` is then that of the largest group, and `to_device` moves nothing: the job
    calls `to_device_only`.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[Any]],
        device: Device,
        read: Callable[[], Mapping[str, Sequence[Any]]] | None = None,
        stages: Sequence[Sequence[str]] = (),
    ) -> None:
        self.parts = {name: MovableTensors(modules, device) for name, modules in parts.items()}
        self._read, self._stages = read, stages
        #: Called before the weights leave the device: what refers to their addresses must go.
        self.on_leave: Callable[[], None] = lambda: None

    @property
    def num_bytes(self) -> int:
        groups = self._stages or [list(self.parts)]
        return max(sum(self.parts[name].num_bytes for name in group) for group in groups)

    @property
    def device_bytes(self) -> int:
        """The bytes that are on the device now."""
        return sum(part.device_bytes for part in self.parts.values())

    @property
    def is_on_disk(self) -> bool:
        return self._read is not None

    def load(self) -> None:
        if self._read is None:
            raise ModelLoadError("its weights are in memory alone")
        fresh = self._read()
        for name, part in self.parts.items():
            part.assign_from(fresh[name])

    def to_device(self) -> None:
        if self._stages:
            return
        try:
            for part in self.parts.values():
                part.to_device()
        except BaseException:
            self.to_host()
            raise

    def to_host(self) -> None:
        self.on_leave()
        for part in self.parts.values():
            part.to_host()

    def drop(self) -> None:
        self.on_leave()
        for part in self.parts.values():
            part.drop()

    def to_device_only(self, *names: str) -> None:
        """Move these parts to the device, and all others to the host."""
        for name, part in self.parts.items():
            if name not in names:
                part.to_host()
        for name in names:
            self.parts[name].to_device()


def _parts(module: Any) -> Iterator[torch.Tensor]:
    """A module's plain tensors, and those inside its quantised tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from _plain(tensor)


def _plain(tensor: Any) -> Iterator[torch.Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _assign(module: Any, fresh: Any) -> None:
    """Assign the tensors of another module with the same structure; tied ones stay tied."""
    for (_, mine), (_, other) in zip(module.named_modules(), fresh.named_modules(), strict=True):
        mine._parameters.update(other._parameters)
        mine._buffers.update(other._buffers)


def _empty(module: Any) -> None:
    """Free a module's tensors. `_assign` gives it new ones."""
    for each in module.modules():
        for name, tensor in each._parameters.items():
            if tensor is not None:
                nothing = torch.empty(0, dtype=tensor.dtype)
                each._parameters[name] = torch.nn.Parameter(nothing, requires_grad=False)
        for name, tensor in each._buffers.items():
            if tensor is not None:
                each._buffers[name] = torch.empty(0, dtype=tensor.dtype)
