"""SDXL on the pocket weights: its images equal those of diffusers' pipelines."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from ourvidz_serverless.errors import Cancelled, InvalidPrompt, ModelLoadError, OutOfMemory
from ourvidz_serverless.jobs.sdxl import SdxlConfig
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.schedulers import SCHEDULERS, make_scheduler, set_steps
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.prompt_encoder import PromptEncoder, chunks
from ourvidz_serverless.models.sdxl.prompt_weighting import parse, plain
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.recorded_progress import RecordedProgress, stop_at_step
from tests.fakes.tiny_sdxl import distance, image_request, through_diffusers

#: One grey level: what a batched forward may differ by in its last bits.
ROUNDING = 1


def render(model: SdxlModel, prompt: str = "a red sun", **changes: Any) -> list[np.ndarray]:
    return tiny_sdxl.render(model, prompt, size=(128, 64), **changes)


def fresh(model: SdxlModel) -> SdxlModel:
    """The same weights, without the memory of what fitted the device."""
    return SdxlModel(model.networks, model.device)


# --- the same pixels as diffusers ---


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("negative", [None, "", "blue"])
def test_text_to_image_equals_diffusers_pipeline(
    sdxl: Any, negative: str | None, guidance_scale: float
) -> None:
    request = image_request(
        size=(128, 64),
        negative=None if negative is None else plain(negative),
        guidance_scale=guidance_scale,
    )

    (ours,) = sdxl.generate(request, NoProgress())
    theirs = through_diffusers(sdxl.networks.pipe, request)

    assert distance(ours, theirs) == 0


def test_image_to_image_equals_diffusers_pipeline(sdxl: Any) -> None:
    reference = Image.new("RGB", (128, 64), "green")
    request = image_request(size=(128, 64), steps=20, reference=StartImage(reference, 0.5))

    (ours,) = sdxl.generate(request, NoProgress())
    theirs = through_diffusers(
        StableDiffusionXLImg2ImgPipeline(**sdxl.networks.pipe.components),
        request,
        image=sdxl.encode(reference, SdxlMemoryPlan(1)),
        strength=0.5,
    )

    assert distance(ours, theirs) == 0


@pytest.mark.parametrize("negative", [None, "blue"])
def test_clip_skip_equals_diffusers_pipeline(sdxl: Any, negative: str | None) -> None:
    request = image_request(size=(128, 64), negative=negative and plain(negative), clip_skip=1)

    (ours,) = sdxl.generate(request, NoProgress())

    assert distance(ours, through_diffusers(sdxl.networks.pipe, request, clip_skip=1)) == 0
    assert distance(ours, render(sdxl, negative=request.negative)[0]) > 0


def test_clip_skip_acts_with_weights(sdxl: Any) -> None:
    weighted, skipped = (
        tiny_sdxl.render(sdxl, parse("a (red:1.4) (sun:0.6)"), clip_skip=skip)[0] for skip in (0, 1)
    )

    assert distance(weighted, skipped) > 0


def test_more_layers_than_a_text_encoder_has_are_refused_by_field(sdxl: Any) -> None:
    with pytest.raises(InvalidPrompt, match=r"^config\.clip_skip: Input should be at most 1, "):
        render(sdxl, clip_skip=2)


def test_a_unet_with_distilled_guidance_equals_diffusers_pipeline(
    sdxl: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(sdxl.networks.unet.config, time_cond_proj_dim=16)
    pipe = StableDiffusionXLPipeline(**{**sdxl.networks.pipe.components, "unet": unet})
    pipe.save_pretrained(tmp_path)
    distilled = loader.load(Settings(sdxl_model=str(tmp_path)))

    strong, weak = (render(distilled, guidance_scale=scale)[0] for scale in (8.0, 2.0))
    request = image_request(size=(128, 64), guidance_scale=8.0)
    theirs = through_diffusers(distilled.networks.pipe, request)

    assert distance(strong, theirs) == 0
    assert distance(strong, weak) > 0


def test_every_keyword_that_the_unet_is_given_is_one_that_it_takes(sdxl: Any) -> None:
    taken = inspect.signature(sdxl.networks.unet.forward).parameters

    assert {"encoder_hidden_states", "added_cond_kwargs", "return_dict"} <= set(taken)


# --- batches ---


SIX: dict[str, Any] = {"seeds": (3, 4, 5, 6, 7, 8), "steps": 4}


@pytest.fixture(scope="module")
def batch(sdxl: Any) -> list[np.ndarray]:
    """Six pictures that were made at once."""
    return render(sdxl, **SIX)


def test_image_i_of_a_batch_is_the_single_image_of_its_seed(
    sdxl: Any, batch: list[np.ndarray]
) -> None:
    for seed, picture in zip(SIX["seeds"], batch, strict=True):
        assert distance(picture, render(sdxl, seeds=(seed,), steps=4)[0]) <= ROUNDING


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_no_pixel_depends_on_how_a_batch_is_split(
    sdxl: Any, batch: list[np.ndarray], max_batch: int
) -> None:
    split = SdxlModel(sdxl.networks, sdxl.device, plans=MemoryPlans(SdxlMemoryPlan(max_batch)))

    for one, other in zip(render(split, **SIX), batch, strict=True):
        assert distance(one, other) <= ROUNDING


@pytest.mark.parametrize("max_batch", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_any_number_of_pictures_is_split_in_parts_that_differ_by_one_at_most(
    count: int, max_batch: int
) -> None:
    size = SdxlMemoryPlan(max_batch).size(count)

    parts = [min(size, count - first) for first in range(0, count, size)]

    assert max(parts) <= max_batch
    assert max(parts) - min(parts) <= 1


def test_a_batch_is_split_in_equal_parts(sdxl: Any) -> None:
    split = SdxlModel(sdxl.networks, sdxl.device, plans=MemoryPlans(SdxlMemoryPlan(4)))
    progress = RecordedProgress()

    render(split, seeds=(1, 2, 3, 4, 5, 6), progress=progress)

    assert progress.steps == [(done, 60) for done in range(3, 61, 3)]


def test_images_are_returned_one_by_one(sdxl: Any) -> None:
    pictures = sdxl.generate(image_request(seeds=(1, 2, 3), size=(128, 64)), NoProgress())

    assert next(pictures).shape == (64, 128, 3)
    pictures.close()


@contextmanager
def room_for(sdxl: SdxlModel, images: int) -> Iterator[list[int]]:
    """A device that holds so many images in one forward; gives the sizes of the batches tried."""
    tried: list[int] = []
    timesteps: list[float] = []

    def look(unet: Any, given: tuple[torch.Tensor, torch.Tensor]) -> None:
        batch, timestep = len(given[0]) // 2, float(given[1])  # with guidance, two rows an image
        # Timesteps fall within a batch.
        if not timesteps or timestep >= timesteps[-1]:
            tried.append(batch)
        timesteps.append(timestep)
        if batch > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with sdxl.networks.unet.register_forward_pre_hook(look):
        yield tried


@pytest.mark.parametrize(
    ("room", "tried"), [(6, [6]), (3, [6, 6, 3, 3]), (1, [6, 6, 3, 1, 1, 1, 1, 1, 1])]
)
def test_a_batch_that_does_not_fit_is_rendered_in_smaller_ones(
    sdxl: Any, batch: list[np.ndarray], room: int, tried: list[int]
) -> None:
    with room_for(sdxl, room) as batches:
        pictures = render(fresh(sdxl), **SIX)

    assert batches == tried
    for one, other in zip(pictures, batch, strict=True):
        assert distance(one, other) <= ROUNDING


def test_a_single_picture_that_does_not_fit_is_out_of_memory(sdxl: Any) -> None:
    with room_for(sdxl, 0), pytest.raises(OutOfMemory):
        render(fresh(sdxl))


def test_running_out_of_memory_anywhere_is_our_error(sdxl: Any) -> None:
    def fail(*given: Any) -> None:
        # What torch raises on a CPU, where it has no class for it.
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with (
        sdxl.networks.vae.post_quant_conv.register_forward_pre_hook(fail),
        pytest.raises(OutOfMemory),
    ):
        render(fresh(sdxl))


# --- steps ---


def test_every_step_is_reported(sdxl: Any) -> None:
    progress = RecordedProgress()

    render(sdxl, progress=progress)

    assert progress.steps == [(done, 10) for done in range(1, 11)]


def test_an_error_in_a_step_ends_the_generation_and_leaves_the_model_unchanged(
    sdxl: Any,
) -> None:
    before = render(sdxl)
    with pytest.raises(Cancelled):
        render(sdxl, progress=stop_at_step(3))

    assert distance(render(sdxl)[0], before[0]) == 0


def test_a_stop_ends_a_job_between_two_forwards_of_a_text_encoder(sdxl: Any) -> None:
    forwards: list[Any] = []

    def check() -> None:
        if len(forwards) == 3:
            raise Cancelled("stop")

    hook = sdxl.networks.pipe.text_encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(Cancelled):
        render(sdxl, negative=parse("a-- , " * 256), progress=RecordedProgress(check))
    hook.remove()

    assert len(forwards) == 3


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(25, 0.05, 1), (10, 0.05, 1), (25, 0.5, 12), (20, 1.0, 20)]
)
def test_image_to_image_runs_at_least_one_step(
    sdxl: Any, steps: int, strength: float, run: int
) -> None:
    progress = RecordedProgress()
    reference = StartImage(Image.new("RGB", (128, 64), "red"), strength)

    render(sdxl, reference=reference, steps=steps, progress=progress)

    assert progress.steps == [(done, run) for done in range(1, run + 1)]


# --- schedulers ---


def test_a_payload_may_name_every_scheduler_and_no_other() -> None:
    wire = SdxlConfig.model_json_schema()["properties"]["scheduler"]["anyOf"][0]["enum"]

    assert sorted(wire) == sorted(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_renders_and_repeats_by_seed(sdxl: Any, name: str) -> None:
    one, two = (render(sdxl, scheduler=name, seeds=(3, 4), steps=5) for _ in range(2))

    assert distance(one[1], two[1]) == 0
    alone = render(sdxl, scheduler=name, seeds=(4,), steps=5)
    assert distance(one[1], alone[0]) <= 2 * ROUNDING


def test_one_jobs_scheduler_does_not_change_the_next_job(sdxl: Any) -> None:
    before = render(sdxl)
    render(sdxl, scheduler="ddim")

    assert distance(render(sdxl)[0], before[0]) == 0


@pytest.mark.parametrize(
    "chosen", [{"sdxl_timestep_spacing": "trailing"}, {"sdxl_distilled_steps": 4}]
)
def test_the_timestep_spacing_of_the_settings_reaches_every_scheduler(chosen: Any) -> None:
    model = loader.load(Settings(**chosen))
    scheduler = make_scheduler(model.networks.pipe.scheduler.config, "dpmpp_2m")

    scheduler.set_timesteps(4)

    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_the_first_step_of_a_distilled_lora_begins_at_pure_noise(sdxl: Any, name: str) -> None:
    scheduler = make_scheduler(sdxl.networks.pipe.scheduler.config, name, is_distilled=True)

    set_steps(scheduler, 1)

    assert scheduler.timesteps[0] == 999


# --- prompts ---


def test_a_short_prompt_is_read_as_diffusers_reads_it(sdxl: Any) -> None:
    ours = PromptEncoder(sdxl.networks.pipe).encode(plain("a red sun"))
    hidden, _, pooled, _ = sdxl.networks.pipe.encode_prompt(
        "a red sun", do_classifier_free_guidance=False
    )

    assert torch.equal(ours.hidden, hidden)
    assert torch.equal(ours.pooled, pooled)


@pytest.mark.parametrize("words", [75, 76, 159, 400])
def test_a_long_prompt_is_read_in_chunks_and_never_cut(sdxl: Any, words: int) -> None:
    tokenizer = sdxl.networks.pipe.tokenizer
    ids = tokenizer("red " * words, add_special_tokens=False).input_ids

    parts = chunks(tokenizer, ids)

    assert [each for part in parts for each in part] == ids == ids[:1] * words
    assert max(map(len, parts)) == 75


def test_a_word_far_beyond_77_tokens_changes_the_image(sdxl: Any) -> None:
    filler = "photo " * 100

    assert distance(render(sdxl, filler + "red")[0], render(sdxl, filler + "blue")[0]) > 0


def test_a_long_negative_prompt_works_with_a_short_prompt(sdxl: Any) -> None:
    (picture,) = render(sdxl, negative=plain("blurry, " * 60))

    assert picture.shape == (64, 128, 3)


def test_weights_change_the_hidden_states_and_not_the_pooled_ones(sdxl: Any) -> None:
    encoder = PromptEncoder(sdxl.networks.pipe)

    weighted = encoder.encode(parse("a (red:1.5) sun"))
    unweighted = encoder.encode(plain("a red sun"))

    assert not torch.equal(weighted.hidden, unweighted.hidden)
    assert torch.equal(weighted.pooled, unweighted.pooled)


def test_a_weight_of_one_changes_nothing(sdxl: Any) -> None:
    encoder = PromptEncoder(sdxl.networks.pipe)

    assert torch.equal(
        encoder.encode(parse("a (red:1.0) sun")).hidden,
        encoder.encode(plain("a red sun")).hidden,
    )


# --- loading ---


def test_a_folder_and_a_single_file_are_the_same_model(sdxl: Any, tmp_path: Path) -> None:
    sdxl.networks.pipe.save_pretrained(tmp_path / "folder")

    folder = loader.load(Settings(sdxl_model=str(tmp_path / "folder")))

    assert distance(render(folder)[0], render(sdxl)[0]) == 0


def test_a_checkpoint_without_its_configuration_says_what_is_missing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "alone.safetensors"
    checkpoint.write_bytes(loader.POCKET.read_bytes())

    with pytest.raises(ModelLoadError, match="no configuration in alone, see SDXL_CONFIG"):
        loader.load(Settings(sdxl_model=str(checkpoint)))


def test_a_configuration_may_be_in_another_folder(tmp_path: Path) -> None:
    checkpoint = tmp_path / "alone.safetensors"
    checkpoint.write_bytes(loader.POCKET.read_bytes())
    settings = Settings(sdxl_model=str(checkpoint), sdxl_config=loader.POCKET.with_suffix(""))

    assert loader.load(settings).device.name.type == "cpu"


def test_a_truncated_checkpoint_is_a_load_error(tmp_path: Path) -> None:
    checkpoint = tmp_path / "half.safetensors"
    checkpoint.write_bytes(loader.POCKET.read_bytes()[:100_000])
    settings = Settings(sdxl_model=str(checkpoint), sdxl_config=loader.POCKET.with_suffix(""))

    with pytest.raises(ModelLoadError, match=r"half\.safetensors does not load as SDXL"):
        loader.load(settings)


def test_cuda_where_there_is_none_is_a_load_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    with pytest.raises(ModelLoadError, match="DEVICE"):
        Device.choose(Settings(device="cuda"), torch.float16)
