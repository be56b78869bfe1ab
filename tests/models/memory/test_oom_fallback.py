"""A job that runs out of memory goes on with a smaller plan, on a device simulated by a CPU."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan, WanMemoryPlan
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl import loader as models
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.recorded_progress import RecordedProgress
from tests.patience import PATIENCE_S

MIB = 1 << 20
WEIGHTS = 16915068


# --- plans ---


def test_a_plan_shrinks_step_by_step_until_there_is_no_smaller_one() -> None:
    plan: SdxlMemoryPlan | None = SdxlMemoryPlan(6)
    seen = []
    while plan := plan.smaller("denoise", 6):
        seen.append((plan.lean, plan.max_batch, plan.offload))

    assert seen == [(True, 6, False), (True, 3, False), (True, 1, False), (True, 1, True)]


def test_the_first_smaller_plan_for_decoding_is_tiled() -> None:
    tiled = SdxlMemoryPlan(6).smaller("decode")

    assert tiled == SdxlMemoryPlan(6, tiled_decode=True)
    assert tiled.smaller("decode") == SdxlMemoryPlan(6, tiled_decode=True, offload=True, lean=True)


def test_a_video_that_does_not_fit_is_only_decoded_in_another_way() -> None:
    plan = WanMemoryPlan()

    assert plan.smaller("condition") is plan.smaller("denoise") is None
    tiled = plan.smaller("decode")
    assert tiled == WanMemoryPlan(tiled_decode=True)
    assert tiled.smaller("decode") is None


def test_a_plan_that_succeeded_is_used_for_the_next_job_of_that_shape() -> None:
    plans = MemoryPlans(SdxlMemoryPlan(6))
    plans.remember("large", SdxlMemoryPlan(1))

    assert (plans.get("large"), plans.get("small")) == (SdxlMemoryPlan(1), SdxlMemoryPlan(6))


# --- the pocket SDXL on devices that are too small for the default plan ---


def render(model: Any, progress: Progress | None = None) -> list[np.ndarray]:
    return tiny_sdxl.render(model, progress=progress, seeds=(1, 2, 3), size=(128, 128), steps=2)


@pytest.fixture(scope="module")
def pictures_that_fit(sdxl: Any) -> list[np.ndarray]:
    return render(sdxl)


def on_device_of(num_bytes: float) -> Any:
    return models.load(Settings(vram_budget_gb=num_bytes / (1 << 30)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free_mib", "plan"),
    [
        (8.0, None),
        (4.0, SdxlMemoryPlan(6, tiled_decode=True, lean=True)),
        (2.0, SdxlMemoryPlan(1, tiled_decode=True, lean=True)),
        (0.6, SdxlMemoryPlan(1, offload=True, lean=True)),
    ],
)
def test_a_job_that_does_not_fit_is_rendered_by_a_smaller_plan_with_the_same_pixels(
    pictures_that_fit: list[np.ndarray], free_mib: float, plan: SdxlMemoryPlan | None
) -> None:
    model = on_device_of(WEIGHTS + free_mib * MIB)
    first, second = RecordedProgress(), RecordedProgress()

    pictures = render(model, first)
    render(model, second)

    for one, other in zip(pictures, pictures_that_fit, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert model.device.counted.peak_bytes <= model.device.counted.total_bytes
    if plan is None:
        assert first.memory_plans == second.memory_plans == []
        return
    expected = {**asdict(plan), "alone": False}
    assert first.memory_plans[-1] == {**expected, "retries": len(first.memory_plans)}
    # The second job begins with the plan that succeeded.
    assert second.memory_plans == [{**expected, "retries": 0}]


@pytest.mark.slow
def test_a_job_that_fits_by_no_plan_fails_and_the_next_job_is_served() -> None:
    model = on_device_of(WEIGHTS + 0.6 * MIB)

    with pytest.raises(OutOfMemory):
        tiny_sdxl.render(model, size=(1024, 1024), steps=1)

    assert len(render(model)) == 3
    assert [row.num_users for row in model.handle.ledger.report()] == [0]


def test_a_model_that_was_dropped_is_read_again_and_paints_the_same() -> None:
    model = models.load(Settings())
    before = render(model)

    model.handle.ledger.request_move("sdxl", "disk").is_done.wait(PATIENCE_S)
    assert model.parts.device_bytes == 0
    assert sum(part.numel() for part in model.networks.unet.parameters()) == 0

    after = render(model)
    assert all((one == other).all() for one, other in zip(before, after, strict=True))


def test_the_memory_that_a_job_took_is_remembered_by_its_shape() -> None:
    model = on_device_of(100 * MIB)

    tiny_sdxl.render(model, size=(64, 64), steps=1)

    (row,) = model.handle.ledger.report()
    assert row.num_bytes == WEIGHTS
    assert 0 < row.working_bytes["64x64 x1"] == model.device.counted.peak_bytes - WEIGHTS
    assert model.device.counted.used_bytes == WEIGHTS


# --- LOW_VRAM ---


def test_low_vram_renders_on_a_device_smaller_than_the_weights(
    pictures_that_fit: list[np.ndarray],
) -> None:
    budget = (WEIGHTS - 0.2 * MIB) / (1 << 30)
    progress = RecordedProgress()

    with pytest.raises(OutOfMemory, match="sdxl takes"):
        render(models.load(Settings(vram_budget_gb=budget)))
    model = models.load(Settings(vram_budget_gb=budget, low_vram=True))
    pictures = render(model, progress)

    for one, other in zip(pictures, pictures_that_fit, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert model.device.counted.peak_bytes <= model.device.counted.total_bytes
    smallest = {"max_batch": 1, "tiled_decode": False, "offload": True, "lean": True}
    assert progress.memory_plans == [{**smallest, "alone": False, "retries": 0}]


@pytest.mark.parametrize(("side", "is_tiled"), [(32, False), (256, True)])
def test_low_vram_decodes_in_tiles_where_a_whole_decode_takes_more_than_the_unet(
    side: int, is_tiled: bool
) -> None:
    model, progress = models.load(Settings(low_vram=True)), RecordedProgress()

    tiny_sdxl.render(model, size=(side, side), steps=1, progress=progress)

    assert progress.memory_plans[-1]["tiled_decode"] == is_tiled


def test_under_low_vram_a_model_counts_as_its_largest_stage() -> None:
    model = models.load(Settings(low_vram=True))
    stages = [sum(model.parts.parts[name].num_bytes for name in stage) for stage in models.STAGES]

    (row,) = model.handle.ledger.report()
    assert row.num_bytes == max(stages) < sum(stages)


def test_a_cached_prompt_needs_no_text_encoder_on_the_device() -> None:
    model = models.load(Settings(vram_budget_gb=100 * MIB / (1 << 30), low_vram=True))
    render(model)
    moves: list[Any] = []
    text = model.parts.parts["text"]
    to_device = text.to_device
    text.to_device = lambda: (moves.append("text"), to_device())

    render(model)

    assert moves == []
