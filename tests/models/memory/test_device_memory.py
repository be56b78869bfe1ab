"""The memory of a host, and of a CPU that simulates a device by counting allocations."""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ourvidz_serverless.models.loading import weight_files
from ourvidz_serverless.models.memory.device import Device, is_out_of_memory
from ourvidz_serverless.models.memory.device_memory import (
    CountedMemory,
    HostMemory,
    unused_in_graphs,
)
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from tests.files import ROOT
from tests.patience import PATIENCE_S

CPU = torch.device("cpu")
KIB = 1 << 10


def simulated(budget: int) -> tuple[Device, CountedMemory]:
    memory = CountedMemory(budget)
    return Device(CPU, torch.float32, memory), memory


def test_tensors_are_counted_until_they_are_freed() -> None:
    device, memory = simulated(100 * KIB)

    with device.computing():
        one = torch.zeros(KIB)
        two = one + 1
        assert memory.used_bytes == 8 * KIB
        view = two[:10]
        del two
        assert memory.used_bytes == 8 * KIB
        del view

    assert memory.used_bytes == 4 * KIB
    assert memory.peak_bytes == 8 * KIB


def test_an_allocation_beyond_the_budget_raises_torchs_error() -> None:
    device, memory = simulated(10 * KIB)

    with pytest.raises(torch.OutOfMemoryError) as refused, device.computing():
        torch.zeros(3 * KIB)

    assert is_out_of_memory(refused.value)
    assert memory.used_bytes == 0


def test_views_of_weights_are_not_counted_again() -> None:
    device, memory = simulated(100 * KIB)
    layer = torch.nn.Linear(32, 32, bias=False)
    weights = MovableTensors([layer], device)

    weights.to_device()
    with device.computing():
        result = layer(torch.zeros(1, 32))

    assert memory.used_bytes == weights.num_bytes + result.nbytes
    weights.to_host()
    assert memory.used_bytes == result.nbytes


def test_tied_weights_count_once() -> None:
    one, other = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    other.weight = one.weight

    assert MovableTensors([one, other], Device(CPU, torch.float32)).num_bytes == 8 * 8 * 4


def test_tensors_that_are_views_of_one_file_count_only_their_own_bytes(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(3)])
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")

    layers.load_state_dict(weight_files.read(tmp_path / "layers.safetensors", True), assign=True)

    device = Device(CPU, torch.float32)
    assert [MovableTensors([layer], device).num_bytes for layer in layers] == [8 * 8 * 4] * 3


def test_all_threads_share_one_budget() -> None:
    device, memory = simulated(10 * KIB)
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        with device.computing():
            kept.append(torch.zeros(KIB))

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()

    assert memory.used_bytes == 8 * KIB


def test_the_free_memory_of_the_host_is_within_its_total() -> None:
    memory = HostMemory()

    assert 0 < memory.free_bytes() <= memory.total_bytes
    assert memory.host_free_bytes() <= memory.free_bytes() + (1 << 28)


def test_memory_that_a_graph_computes_in_is_not_free() -> None:
    # As `torch.cuda.memory_snapshot` gives them: the ordinary pool, a graph's, another GPU's.
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 100, "allocated_size": 40},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 70, "allocated_size": 20},
        {"device": 1, "segment_pool_id": (0, 2), "total_size": 900, "allocated_size": 0},
    ]

    assert unused_in_graphs(segments, 0) == 50


def test_a_fence_of_the_second_gpu_stands_in_the_stream_of_that_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        def record(self, stream: str) -> None:
            recorded.append(stream)

    recorded: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")

    Device(torch.device("cuda", 1), torch.float32).fence().record()

    assert recorded == ["the stream of cuda:1"]


def test_a_thread_that_computes_on_the_second_gpu_has_it_as_its_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda name: nullcontext(current.append(name)))

    for index in (0, 1):
        with Device(torch.device("cuda", index), torch.float32).computing():
            pass

    assert current == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_torchs_allocator_has_expandable_segments_unless_the_deployer_configures_it(
    own: dict[str, str], expected: str
) -> None:
    code = """
import os, sys
import ourvidz_serverless.models
assert "torch" not in sys.modules
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""
    others = {name: each for name, each in os.environ.items() if "ALLOC_CONF" not in name}

    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**others, **own},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert run.stdout.strip() == expected, run.stderr
