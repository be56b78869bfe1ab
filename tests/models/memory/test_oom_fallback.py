"""Out of memory, for real: a CPU that counts what tensors allocate, and a model that makes do."""

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.models.loading import weight_files
from ourvidz_serverless.models.memory.device import Device, is_out_of_memory
from ourvidz_serverless.models.memory.device_memory import CountedMemory, HostMemory
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl import loader as models
from ourvidz_serverless.models.sdxl import tiled_vae
from ourvidz_serverless.settings import Settings
from tests.fakes import small_jobs
from tests.fakes.recorded_progress import RecordedProgress
from tests.fakes.small_jobs import narrow_vae
from tests.patience import PATIENCE_S

CPU = torch.device("cpu")
KIB = 1 << 10


def counting(budget: int) -> tuple[Device, CountedMemory]:
    memory = CountedMemory(budget)
    return Device(CPU, torch.float32, memory), memory


# --- a CPU that plays a small card ---


def test_what_tensors_allocate_is_counted_until_they_are_gone() -> None:
    device, memory = counting(100 * KIB)

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


def test_more_than_the_budget_is_torchs_own_error() -> None:
    device, memory = counting(10 * KIB)

    with pytest.raises(torch.OutOfMemoryError) as refused, device.computing():
        torch.zeros(3 * KIB)

    assert is_out_of_memory(refused.value)
    assert memory.used_bytes == 0


def test_weights_count_once_however_they_are_viewed() -> None:
    device, memory = counting(100 * KIB)
    layer = torch.nn.Linear(32, 32, bias=False)
    weights = MovableTensors([layer], device)

    weights.to_device()
    with device.computing():
        result = layer(torch.zeros(1, 32))

    assert memory.used_bytes == weights.num_bytes + result.nbytes
    weights.to_host()
    assert memory.used_bytes == result.nbytes


def test_tied_weights_are_one() -> None:
    one, other = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    other.weight = one.weight

    assert MovableTensors([one, other], Device(CPU, torch.float32)).num_bytes == 8 * 8 * 4


def test_views_of_one_file_count_for_themselves_and_not_for_the_file(tmp_path: Path) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, bias=False) for _ in range(3)])
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")

    layers.load_state_dict(weight_files.read(tmp_path / "layers.safetensors", True), assign=True)

    device = Device(CPU, torch.float32)
    assert [MovableTensors([layer], device).num_bytes for layer in layers] == [8 * 8 * 4] * 3


def test_every_thread_counts_into_the_same_budget() -> None:
    device, memory = counting(10 * KIB)
    kept: list[torch.Tensor] = []

    def allocate() -> None:
        with device.computing():
            kept.append(torch.zeros(KIB))

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()

    assert memory.used_bytes == 8 * KIB


def test_a_host_has_no_more_free_than_it_has() -> None:
    memory = HostMemory()

    assert 0 < memory.free_bytes() <= memory.total_bytes
    assert memory.host_free_bytes() <= memory.free_bytes() + (1 << 28)


# --- the decoder in strips ---


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 24), (13, 9)])
def test_strips_decode_what_a_whole_decode_does_in_a_quarter_of_the_memory(
    height: int, width: int
) -> None:
    model, latent = narrow_vae(), 3 * torch.randn(1, 4, height, width)
    whole_device, whole_memory = counting(1 << 30)
    strip_device, strip_memory = counting(1 << 30)

    with whole_device.computing():
        whole = model.decode(latent, return_dict=False)[0]
    with strip_device.computing():
        in_strips = tiled_vae.decode(model, latent, strip_device)

    torch.testing.assert_close(in_strips, whole, atol=1e-4, rtol=0)
    assert strip_memory.peak_bytes < whole_memory.peak_bytes / 4


# --- plans ---


def test_a_plan_shrinks_step_by_step_until_there_is_no_smaller_one() -> None:
    plan: SdxlMemoryPlan | None = SdxlMemoryPlan(6)
    seen = []
    while plan := plan.smaller("denoise", 6):
        seen.append((plan.lean, plan.max_batch, plan.offload))

    assert seen == [(True, 6, False), (True, 3, False), (True, 1, False), (True, 1, True)]


def test_what_does_not_decode_is_decoded_in_strips_first() -> None:
    tiled = SdxlMemoryPlan(6).smaller("decode")

    assert tiled == SdxlMemoryPlan(6, tiled_decode=True)
    assert tiled.smaller("decode") == SdxlMemoryPlan(6, tiled_decode=True, offload=True, lean=True)


def test_a_plan_that_worked_is_the_next_jobs_of_that_shape() -> None:
    plans = MemoryPlans(SdxlMemoryPlan(6))
    plans.remember("large", SdxlMemoryPlan(1))

    assert (plans.get("large"), plans.get("small")) == (SdxlMemoryPlan(1), SdxlMemoryPlan(6))


# --- the pocket SDXL on cards that are too small for the usual way ---

MIB = 1 << 20
WEIGHTS = 11147772


def render(model: Any, progress: Progress | None = None) -> list[np.ndarray]:
    return small_jobs.render(model, progress=progress, seeds=(1, 2, 3), size=(128, 128), steps=2)


def on_card(num_bytes: float) -> Any:
    return models.load(Settings(vram_budget_gb=num_bytes / (1 << 30)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "plan"),
    [
        (8.0, None),
        (4.0, SdxlMemoryPlan(6, tiled_decode=True, lean=True)),
        (2.0, SdxlMemoryPlan(1, tiled_decode=True, lean=True)),
        (0.6, SdxlMemoryPlan(1, offload=True, lean=True)),
    ],
)
def test_a_job_that_does_not_fit_is_rendered_in_a_smaller_way_with_the_same_pixels(
    sdxl: Any, room: float, plan: SdxlMemoryPlan | None
) -> None:
    card = on_card(WEIGHTS + room * MIB)
    first, second = RecordedProgress(), RecordedProgress()

    pictures = render(card, first)
    render(card, second)

    for one, other in zip(pictures, render(sdxl), strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert card.device.counted.peak_bytes <= card.device.counted.total_bytes
    if plan is None:
        assert first.memory_plans == second.memory_plans == []
        return
    told = {**asdict(plan), "alone": False}
    assert first.memory_plans[-1] == {**told, "retries": len(first.memory_plans)}
    # What worked is remembered: the second job does not fail first.
    assert second.memory_plans == [{**told, "retries": 0}]


@pytest.mark.slow
def test_what_fits_in_no_way_is_out_of_memory_and_the_next_job_is_served() -> None:
    card = on_card(WEIGHTS + 0.6 * MIB)

    with pytest.raises(OutOfMemory):
        small_jobs.render(card, size=(1024, 1024), steps=1)

    assert len(render(card)) == 3
    assert [row.num_users for row in card.handle.ledger.report()] == [0]


def test_a_model_that_was_dropped_is_read_again_and_paints_the_same() -> None:
    model = models.load(Settings())
    before = render(model)

    model.handle.ledger.request_move("sdxl", "disk").is_done.wait(PATIENCE_S)
    assert model.parts.device_bytes == 0
    assert sum(part.numel() for part in model.networks.unet.parameters()) == 0

    after = render(model)
    assert all((one == other).all() for one, other in zip(before, after, strict=True))


def test_what_a_job_really_took_is_known_by_its_shape() -> None:
    card = on_card(100 * MIB)

    small_jobs.render(card, size=(64, 64), steps=1)

    (row,) = card.handle.ledger.report()
    assert row.num_bytes == WEIGHTS
    assert 0 < row.working_bytes["64x64 x1"] == card.device.counted.peak_bytes - WEIGHTS
    assert card.device.counted.used_bytes == WEIGHTS


# --- LOW_VRAM ---


def test_low_vram_renders_on_a_card_that_does_not_hold_the_weights(sdxl: Any) -> None:
    budget = (WEIGHTS - 0.2 * MIB) / (1 << 30)
    progress = RecordedProgress()

    with pytest.raises(OutOfMemory, match="sdxl takes"):
        render(models.load(Settings(vram_budget_gb=budget)))
    card = models.load(Settings(vram_budget_gb=budget, low_vram=True))
    pictures = render(card, progress)

    for one, other in zip(pictures, render(sdxl), strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert card.device.counted.peak_bytes <= card.device.counted.total_bytes
    smallest = {"max_batch": 1, "tiled_decode": True, "offload": True, "lean": True}
    assert progress.memory_plans == [{**smallest, "alone": False, "retries": 0}]


def test_under_low_vram_a_model_counts_as_its_largest_stage() -> None:
    card = models.load(Settings(low_vram=True))
    stages = [sum(card.parts._parts[name].num_bytes for name in stage) for stage in models.STAGES]

    (row,) = card.handle.ledger.report()
    assert row.num_bytes == max(stages) < sum(stages)


def test_a_prompt_that_is_kept_needs_no_text_encoder_on_the_device() -> None:
    card = models.load(Settings(vram_budget_gb=100 * MIB / (1 << 30), low_vram=True))
    render(card)
    brought: list[Any] = []
    text = card.parts._parts["text"]
    arrive = text.to_device
    text.to_device = lambda: (brought.append("text"), arrive())  # type: ignore[method-assign,assignment]

    render(card)

    assert brought == []
