"""SDXL on the pocket weights: our loop against diffusers' pipelines, and what it promises."""

import inspect
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

from ourvidz_serverless.errors import Cancelled, ModelLoadError, OutOfMemory
from ourvidz_serverless.jobs.sdxl import SdxlConfig
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.schedulers import SCHEDULERS, make_scheduler
from ourvidz_serverless.models.sdxl import pipeline as models
from ourvidz_serverless.models.sdxl.prompt_encoder import PromptEncoder, chunks
from ourvidz_serverless.models.sdxl.prompt_weighting import parse, plain
from ourvidz_serverless.settings import Settings

SMALL: dict[str, Any] = {
    "width": 128,
    "height": 64,
    "num_inference_steps": 10,
    "guidance_scale": 6.0,
}
#: One grey level: what a batched forward may differ by in its last bits.
ROUNDING = 1


def render(model: Any, prompt: str = "a red circle", **options: Any) -> list[np.ndarray]:
    options = {"negative_prompt": None, "seeds": [3], **SMALL, **options}
    return list(model.generate(prompt=plain(prompt), **options))


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def through_diffusers(pipe: Any, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(3), output_type="np", **options).images
    return (images[0] * 255).round().astype(np.uint8)


# --- the same pixels as diffusers ---


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("negative", [None, "", "blue"])
def test_text_to_image_equals_diffusers_pipeline(
    sdxl: Any, negative: str | None, guidance_scale: float
) -> None:
    options = {**SMALL, "guidance_scale": guidance_scale}

    ours = render(sdxl, negative_prompt=None if negative is None else plain(negative), **options)
    theirs = through_diffusers(
        sdxl._pipe, prompt="a red circle", negative_prompt=negative, **options
    )

    assert distance(ours[0], theirs) == 0


def test_image_to_image_equals_diffusers_pipeline(sdxl: Any) -> None:
    reference = Image.new("RGB", (128, 64), "green")
    options = {"num_inference_steps": 20, "guidance_scale": 6.0, "strength": 0.5}

    (ours,) = render(sdxl, image=reference, **options)
    theirs = through_diffusers(
        StableDiffusionXLImg2ImgPipeline(**sdxl._pipe.components),
        prompt="a red circle",
        image=sdxl._encode(reference),
        **options,
    )

    assert distance(ours, theirs) == 0


def test_a_unet_with_distilled_guidance_equals_diffusers_pipeline(
    sdxl: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(sdxl._unet.config, time_cond_proj_dim=16)
    pipe = StableDiffusionXLPipeline(**{**sdxl._pipe.components, "unet": unet})
    pipe.save_pretrained(tmp_path)
    distilled = models.load(Settings(sdxl_model=str(tmp_path)))

    strong, weak = (render(distilled, guidance_scale=scale)[0] for scale in (8.0, 2.0))
    theirs = through_diffusers(
        distilled._pipe, prompt="a red circle", **{**SMALL, "guidance_scale": 8.0}
    )

    assert distance(strong, theirs) == 0
    assert distance(strong, weak) > 0


def test_every_keyword_that_the_unet_is_given_is_one_that_it_takes(sdxl: Any) -> None:
    taken = inspect.signature(sdxl._unet.forward).parameters

    assert {"encoder_hidden_states", "added_cond_kwargs", "return_dict"} <= set(taken)


# --- batches ---


def test_image_i_of_a_batch_is_the_single_image_of_its_seed(sdxl: Any) -> None:
    batch = render(sdxl, seeds=[3, 4, 5, 6, 7, 8])

    for seed, picture in zip(range(3, 9), batch, strict=True):
        assert distance(picture, render(sdxl, seeds=[seed])[0]) <= ROUNDING


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_no_pixel_depends_on_how_a_batch_is_split(sdxl: Any, max_batch: int) -> None:
    split = models.Sdxl(sdxl._pipe, sdxl.device, max_batch)

    for one, other in zip(
        render(split, seeds=[1, 2, 3, 4, 5, 6]), render(sdxl, seeds=[1, 2, 3, 4, 5, 6]), strict=True
    ):
        assert distance(one, other) <= ROUNDING


def test_a_batch_is_split_in_equal_parts(sdxl: Any) -> None:
    split = models.Sdxl(sdxl._pipe, sdxl.device, max_batch=4)
    steps: list[int] = []

    render(split, seeds=[1, 2, 3, 4, 5, 6], step=lambda done, total: steps.append(done))

    assert steps == list(range(3, 61, 3))


def test_pictures_leave_one_by_one(sdxl: Any) -> None:
    pictures = sdxl.generate(prompt=plain("a"), negative_prompt=None, seeds=[1, 2, 3], **SMALL)

    assert next(pictures).shape == (64, 128, 3)
    pictures.close()


class ShortOfMemory(models.Sdxl):
    """An SDXL whose device holds only so many pictures at once, and says so as torch does."""

    room = 6
    tried: list[int]

    def _denoise(self, seeds: Any, *rest: Any) -> torch.Tensor:
        self.tried.append(len(seeds))
        if len(seeds) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._denoise(seeds, *rest)


@pytest.mark.parametrize(
    ("room", "tried"), [(6, [6]), (3, [6, 6, 3, 3]), (1, [6, 6, 3, 1, 1, 1, 1, 1, 1])]
)
def test_a_batch_that_does_not_fit_is_rendered_in_smaller_ones(
    sdxl: Any, room: int, tried: list[int]
) -> None:
    short = ShortOfMemory(sdxl._pipe, sdxl.device)
    short.room, short.tried = room, []

    pictures = render(short, seeds=[1, 2, 3, 4, 5, 6])

    assert short.tried == tried
    assert distance(pictures[5], render(sdxl, seeds=[6])[0]) <= ROUNDING


def test_a_single_picture_that_does_not_fit_is_out_of_memory(sdxl: Any) -> None:
    short = ShortOfMemory(sdxl._pipe, sdxl.device)
    short.room, short.tried = 0, []

    with pytest.raises(OutOfMemory):
        render(short)


class CannotDecode(models.Sdxl):
    """An SDXL whose decoder does not fit, which torch tells on a CPU in words only."""

    def _decode(self, decoder: Any, latent: torch.Tensor, plan: Any) -> np.ndarray:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_running_out_of_memory_anywhere_is_our_error(sdxl: Any) -> None:
    with pytest.raises(OutOfMemory):
        render(CannotDecode(sdxl._pipe, sdxl.device))


# --- steps ---


def test_every_step_is_told(sdxl: Any) -> None:
    told: list[tuple[int, int]] = []

    render(sdxl, step=lambda done, total: told.append((done, total)))

    assert told == [(done, 10) for done in range(1, 11)]


def test_what_a_step_raises_ends_the_generation_and_leaves_the_model_as_good_as_new(
    sdxl: Any,
) -> None:
    def stop_at_three(done: int, total: int) -> None:
        if done == 3:
            raise Cancelled("stop")

    before = render(sdxl)
    with pytest.raises(Cancelled):
        render(sdxl, step=stop_at_three)

    assert distance(render(sdxl)[0], before[0]) == 0


def test_a_stop_ends_a_job_between_two_forwards_of_a_text_encoder(sdxl: Any) -> None:
    forwards: list[Any] = []

    def check() -> None:
        if len(forwards) == 3:
            raise Cancelled("stop")

    hook = sdxl._pipe.text_encoder.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(Cancelled):
        render(sdxl, negative_prompt=parse("a-- , " * 256), check=check)
    hook.remove()

    assert len(forwards) == 3


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(25, 0.05, 1), (10, 0.05, 1), (25, 0.5, 12), (20, 1.0, 20)]
)
def test_image_to_image_runs_at_least_one_step(
    sdxl: Any, steps: int, strength: float, run: int
) -> None:
    told: list[int] = []

    render(
        sdxl,
        image=Image.new("RGB", (128, 64), "red"),
        strength=strength,
        num_inference_steps=steps,
        step=lambda done, total: told.append(total),
    )

    assert told == [run] * run


# --- schedulers ---


def test_the_wire_knows_every_scheduler_and_no_other() -> None:
    wire = SdxlConfig.model_json_schema()["properties"]["scheduler"]["anyOf"][0]["enum"]

    assert sorted(wire) == sorted(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_renders_and_repeats_by_seed(sdxl: Any, name: str) -> None:
    one, two = (render(sdxl, scheduler=name, seeds=[3, 4]) for _ in range(2))

    assert distance(one[1], two[1]) == 0
    assert distance(one[1], render(sdxl, scheduler=name, seeds=[4])[0]) <= 2 * ROUNDING


def test_one_jobs_scheduler_leaves_the_next_ones_alone(sdxl: Any) -> None:
    before = render(sdxl)
    render(sdxl, scheduler="ddim")

    assert distance(render(sdxl)[0], before[0]) == 0


def test_a_few_step_checkpoint_may_want_its_timesteps_trailing() -> None:
    model = models.load(Settings(sdxl_timestep_spacing="trailing"))
    scheduler = make_scheduler(model._pipe.scheduler.config, "dpmpp_2m")

    scheduler.set_timesteps(4)

    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


# --- prompts ---


def test_a_short_prompt_is_read_as_diffusers_reads_it(sdxl: Any) -> None:
    ours = PromptEncoder(sdxl._pipe).encode(plain("a red circle"))
    hidden, _, pooled, _ = sdxl._pipe.encode_prompt(
        "a red circle", do_classifier_free_guidance=False
    )

    assert torch.equal(ours.hidden, hidden)
    assert torch.equal(ours.pooled, pooled)


@pytest.mark.parametrize("words", [75, 76, 159, 400])
def test_a_long_prompt_is_read_in_chunks_and_never_cut(sdxl: Any, words: int) -> None:
    tokenizer = sdxl._pipe.tokenizer
    ids = tokenizer("red " * words, add_special_tokens=False).input_ids

    parts = chunks(tokenizer, ids)

    assert [each for part in parts for each in part] == ids == ids[:1] * words
    assert max(map(len, parts)) == 75


def test_a_word_far_beyond_77_tokens_still_counts(sdxl: Any) -> None:
    filler = "photo " * 100

    assert distance(render(sdxl, filler + "red")[0], render(sdxl, filler + "blue")[0]) > 0


def test_a_long_negative_prompt_meets_a_short_prompt(sdxl: Any) -> None:
    (picture,) = render(sdxl, negative_prompt=plain("blurry, " * 60))

    assert picture.shape == (64, 128, 3)


def test_weights_change_the_hidden_states_and_not_the_pooled_ones(sdxl: Any) -> None:
    encoder = PromptEncoder(sdxl._pipe)

    weighted = encoder.encode(parse("a (red:1.5) circle"))
    unweighted = encoder.encode(plain("a red circle"))

    assert not torch.equal(weighted.hidden, unweighted.hidden)
    assert torch.equal(weighted.pooled, unweighted.pooled)


def test_a_weight_of_one_changes_nothing(sdxl: Any) -> None:
    encoder = PromptEncoder(sdxl._pipe)

    assert torch.equal(
        encoder.encode(parse("a (red:1.0) circle")).hidden,
        encoder.encode(plain("a red circle")).hidden,
    )


# --- loading ---


def test_a_folder_and_a_single_file_are_the_same_model(sdxl: Any, tmp_path: Path) -> None:
    sdxl._pipe.save_pretrained(tmp_path / "folder")

    folder = models.load(Settings(sdxl_model=str(tmp_path / "folder")))

    assert distance(render(folder)[0], render(sdxl)[0]) == 0


def test_a_checkpoint_without_its_configuration_says_what_is_missing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "alone.safetensors"
    checkpoint.write_bytes(models.POCKET.read_bytes())

    with pytest.raises(ModelLoadError, match="no configuration in alone, see SDXL_CONFIG"):
        models.load(Settings(sdxl_model=str(checkpoint)))


def test_a_configuration_may_lie_elsewhere(tmp_path: Path) -> None:
    checkpoint = tmp_path / "alone.safetensors"
    checkpoint.write_bytes(models.POCKET.read_bytes())
    settings = Settings(sdxl_model=str(checkpoint), sdxl_config=models.POCKET.with_suffix(""))

    assert models.load(settings).device.name.type == "cpu"


def test_a_truncated_checkpoint_is_a_load_error(tmp_path: Path) -> None:
    checkpoint = tmp_path / "half.safetensors"
    checkpoint.write_bytes(models.POCKET.read_bytes()[:100_000])
    settings = Settings(sdxl_model=str(checkpoint), sdxl_config=models.POCKET.with_suffix(""))

    with pytest.raises(ModelLoadError, match=r"half\.safetensors does not load as SDXL"):
        models.load(settings)


def test_cuda_where_there_is_none_is_a_load_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    with pytest.raises(ModelLoadError, match="DEVICE"):
        Device.choose(Settings(device="cuda"), torch.float16)
