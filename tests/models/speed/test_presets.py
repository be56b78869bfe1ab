"""The presets of `config.speed`: what they skip and report, on both families."""

from typing import Any

import pytest
from PIL import Image

from ourvidz_serverless import jobs
from ourvidz_serverless.errors import Cancelled, InvalidPrompt
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.models.speed import presets
from ourvidz_serverless.models.wan import loader as wan_models
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import References
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl, tiny_wan
from tests.fakes.recorded_progress import RecordedProgress, stop_at_step
from tests.models.speed.rendering import STEPS, counting, distance, render_image, render_video

PRESETS = ("balanced", "fast")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_skips_deep_blocks_of_the_unet_and_reports_how_often(
    sdxl: Any, preset: str
) -> None:
    progress = RecordedProgress()
    unet, exact = sdxl.networks.unet, render_image(sdxl)

    # A layer inside a block: the block itself is called even if it answers from the cache.
    with counting(unet.conv_in, unet.mid_block.resnets[0]) as calls:
        quick = render_image(sdxl, speed=preset, progress=progress)

    (report,) = progress.speed_reports
    assert calls[unet.conv_in] == STEPS
    assert calls[unet.mid_block.resnets[0]] < STEPS
    assert report["preset"] == preset
    assert report["plain_forwards"] == 2 * STEPS
    assert report["forwards"] + report["shallow_forwards"] <= report["plain_forwards"]
    assert "step_cache" in report["levers"]
    assert distance(quick, exact) > 0


def test_the_report_counts_the_forwards_that_were_computed(sdxl: Any) -> None:
    progress = RecordedProgress()

    with counting(sdxl.networks.unet.mid_block.resnets[0]) as calls:
        render_image(sdxl, speed="balanced", progress=progress)

    # Ten guided steps of two forwards each, in one call. The first two steps are full, and every
    # second step after them.
    assert calls.total() == 6
    assert progress.speed_reports == [
        {
            "preset": "balanced",
            "levers": ["step_cache"],
            "forwards": 12,
            "shallow_forwards": 8,
            "plain_forwards": 20,
        }
    ]


@pytest.mark.parametrize(("steps", "full"), [(10, 2), (15, 3), (25, 5)])
def test_no_block_is_skipped_in_the_warmup_steps(sdxl: Any, steps: int, full: int) -> None:
    deep: list[bool] = []
    count = sdxl.networks.unet.conv_in.register_forward_hook(lambda *_: deep.append(False))
    mark = sdxl.networks.unet.mid_block.resnets[0].register_forward_hook(
        lambda *_: deep.append(True)
    )

    try:
        render_image(sdxl, steps=steps, speed="fast")
    finally:
        count.remove()
        mark.remove()

    # Each step adds False, and then True if its deep blocks were computed.
    starts = [index for index, each in enumerate(deep) if not each]
    computed = [any(deep[start + 1 : start + 2]) for start in starts]
    every = presets.SDXL["fast"].deep_cache_interval
    assert computed == [step < full or (step - full) % every == 0 for step in range(steps)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_does_not_change_the_next_job(sdxl: Any, wan: WanModel, preset: str) -> None:
    picture, video = render_image(sdxl), render_video(wan)

    for _ in range(2):
        quick = render_image(sdxl, speed=preset)
        assert distance(render_image(sdxl, speed=preset), quick) == 0
    render_video(wan, speed=preset)

    assert distance(render_image(sdxl), picture) == 0
    assert distance(render_video(wan), video) == 0


def test_a_job_that_is_stopped_during_a_preset_does_not_change_the_next_job(
    sdxl: Any, wan: WanModel
) -> None:
    picture, video = render_image(sdxl), render_video(wan)

    with pytest.raises(Cancelled):
        render_image(sdxl, speed="fast", progress=stop_at_step(3))
    with pytest.raises(Cancelled):
        render_video(wan, speed="fast", progress=stop_at_step(3))

    assert distance(render_image(sdxl), picture) == 0
    assert distance(render_video(wan), video) == 0


def test_presets_work_with_batches_and_image_to_image(sdxl: Any) -> None:
    progress = RecordedProgress()
    reference = StartImage(Image.new("RGB", (128, 64), "green"), 0.5)

    pictures = tiny_sdxl.render(
        sdxl, seeds=(1, 2, 3), reference=reference, size=(128, 64), speed="fast", progress=progress
    )

    assert len(pictures) == 3
    assert progress.speed_reports[-1]["plain_forwards"] == STEPS


@pytest.fixture
def skipping_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a threshold at which a network with random weights skips blocks."""
    monkeypatch.setitem(presets.WAN, "fast", presets.SpeedPreset(first_block_threshold=0.6))


MODES = {
    "text": References(),
    "first frame": References(first=tiny_wan.picture(1)),
    "subject": References(subject=tiny_wan.picture(2)),
}


@pytest.mark.parametrize("mode", MODES)
def test_wan_skips_blocks_if_the_first_block_changed_little(
    wan: WanModel, skipping_threshold: None, mode: str
) -> None:
    progress = RecordedProgress()
    network = wan.networks["t2v" if mode == "text" else "vace"].transformer
    first, last = network.blocks[0].ffn, network.blocks[-1].ffn

    with counting(first, last) as calls:
        render_video(wan, speed="fast", progress=progress, references=MODES[mode])

    (report,) = progress.speed_reports
    assert calls[first] == report["plain_forwards"] == 20
    assert 0 < calls[last] == report["forwards"] < 20
    assert report["shallow_forwards"] == 20 - report["forwards"]
    assert report["levers"] == ["step_cache"]


@pytest.mark.parametrize("mode", MODES)
def test_wan_with_a_tiny_threshold_skips_nothing_and_changes_no_bit(
    wan: WanModel, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setitem(presets.WAN, "fast", presets.SpeedPreset(first_block_threshold=1e-9))

    fast, exact = (
        render_video(wan, speed=speed, references=MODES[mode]) for speed in ("fast", "exact")
    )

    assert distance(fast, exact) == 0


def test_a_distilled_checkpoint_ignores_the_preset(wan_settings: Settings) -> None:
    few = {"wan_distilled_steps": 4, "wan_flow_shift": 8.0}
    progress = RecordedProgress()
    wan = wan_models.load(wan_settings.model_copy(update=few))

    tiny_wan.render(wan, steps=4, speed="fast", progress=progress)

    assert progress.speed_reports == [
        {
            "preset": "fast",
            "levers": [],
            "forwards": 4,
            "shallow_forwards": 0,
            "plain_forwards": 4,
        }
    ]


# --- on the wire ---

TYPES = ("sdxl_image_fast", "video_fast")


@pytest.mark.parametrize("name", TYPES)
def test_an_unknown_preset_is_refused_by_its_field(name: str) -> None:
    payload = {"id": "1", "type": name, "prompt": "a", "user_id": "u", "config": {"speed": "warp"}}

    with pytest.raises(InvalidPrompt, match=r"config\.speed: .*exact.*balanced.*fast"):
        Envelope.of({"input": payload}).job(Settings())


@pytest.mark.parametrize("name", TYPES)
def test_a_job_without_a_preset_is_exact(name: str) -> None:
    payload = {"id": "1", "type": name, "prompt": "a", "user_id": "u"}

    job: Any = Envelope.of({"input": payload}).job(Settings())

    assert job.config.speed == "exact"


def test_the_payloads_accept_exactly_the_presets_there_are() -> None:
    for config, known in (
        (jobs.sdxl.SdxlConfig, presets.SDXL),
        (jobs.wan.WanConfig, presets.WAN),
    ):
        field: Any = config.model_fields["speed"].annotation
        assert set(field.__args__) == set(known)
