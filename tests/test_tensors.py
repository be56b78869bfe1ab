"""Tensors between a GPU and the host, on an allocator that hands out again what came back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ourvidz_serverless.models import tensors
from ourvidz_serverless.models.tensors import Tensors


class Gpu:
    """Gives the lowest free address, as CUDA's allocator gives the block that was freed last."""

    is_cuda, name = True, "gpu"

    def __init__(self) -> None:
        self.taken: set[int] = set()

    def take(self, storage: Storage) -> int:
        address = next(each for each in range(1, 99) if each not in self.taken)
        self.taken.add(address)
        weakref.finalize(storage, self.taken.discard, address)
        return address

    def hold(self, num_bytes: int) -> None: ...

    def wait(self) -> None: ...

    def free_memory(self) -> None: ...


class Storage:
    """What an address belongs to."""


class Values:
    """A tensor that knows whose it is."""

    nbytes = 1

    def __init__(self, gpu: Gpu, whose: str, on_gpu: bool = False, pinned: bool = False) -> None:
        self.gpu, self.whose, self.is_cuda, self._is_pinned = gpu, whose, on_gpu, pinned
        self._storage = Storage()
        self._address = gpu.take(self._storage) if on_gpu else id(self)

    def is_pinned(self) -> bool:
        return self._is_pinned

    def data_ptr(self) -> int:
        return self._address

    def untyped_storage(self) -> Storage:
        return self._storage

    def to(self, *place: Any, **options: Any) -> Values:
        return Values(self.gpu, self.whose, on_gpu=True)

    def cpu(self) -> Values:
        return Values(self.gpu, self.whose)

    def pinned(self) -> Values:
        return Values(self.gpu, self.whose, pinned=True)


class Network:
    """Its own weight, and a LoRA's where one is at work."""

    def __init__(self, gpu: Gpu) -> None:
        self.weights = [Values(gpu, "its own")]

    def parameters(self) -> list[Values]:
        return self.weights

    def buffers(self) -> list[Values]:
        return []

    def _apply(self, place: Callable[[Any], Any]) -> None:
        self.weights = [place(weight) for weight in self.weights]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setattr(tensors, "_pinned_copy", Values.pinned)
    return Gpu()


def test_a_lora_that_has_gone_does_not_come_back_as_the_next_one(gpu: Gpu) -> None:
    network = Network(gpu)
    model = Tensors([network], gpu)  # type: ignore[arg-type]
    network.weights.append(Values(gpu, "LoRA A"))
    model.arrive()
    model.leave()
    model.arrive()
    del network.weights[1]  # the job was stopped while its network was there
    model.leave()

    network.weights.append(Values(gpu, "LoRA B"))
    model.arrive()
    model.leave()

    assert [weight.whose for weight in network.weights] == ["its own", "LoRA B"]


def test_what_left_once_leaves_again_without_a_copy(gpu: Gpu) -> None:
    network = Network(gpu)
    model = Tensors([network], gpu)  # type: ignore[arg-type]
    model.arrive()
    model.leave()
    kept = network.weights[0]

    model.arrive()
    model.leave()

    assert network.weights[0] is kept
