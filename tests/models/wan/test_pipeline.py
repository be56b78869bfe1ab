"""WAN with real classes and random weights: our loop against diffusers' pipelines."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from PIL import Image
from transformers import UMT5Config, UMT5EncoderModel

from ourvidz_serverless.errors import Cancelled, ModelLoadError, OutOfMemory
from ourvidz_serverless.jobs.wan import SOLVERS as WIRE_SOLVERS
from ourvidz_serverless.models import load as load_families
from ourvidz_serverless.models import open_ledger
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.schedulers import SOLVERS, make_dmd_scheduler
from ourvidz_serverless.models.wan import loader as models
from ourvidz_serverless.models.wan.network import share_equal_tensors
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import References
from ourvidz_serverless.models.wan.text_encoder import block_by_block, encoder_blocks
from ourvidz_serverless.settings import Settings
from tests.fakes.devices import FakeMemory, fake_ledger
from tests.fakes.recorded_progress import RecordedProgress, stop_at_step
from tests.fakes.tiny_chat import ask, tiny_folder
from tests.fakes.tiny_wan import (
    SMALL,
    diffusers_t2v,
    diffusers_vace,
    distance,
    flow_match,
    out_of_memory,
    picture,
    render,
    through_diffusers,
    write_i2v,
    write_wan,
)
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def settings(wan_settings: Settings) -> Settings:
    return wan_settings


@pytest.fixture(scope="module")
def usual(wan: WanModel) -> np.ndarray:
    """The video of `SMALL`, rendered once."""
    video = render(wan)
    video.setflags(write=False)
    return video


@pytest.fixture(scope="module")
def t2v(settings: Settings) -> Any:
    return diffusers_t2v(settings)


@pytest.fixture(scope="module")
def vace(settings: Settings) -> Any:
    return diffusers_vace(settings)


# --- the same pixels as diffusers ---


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("negative", [None, "blue"])
def test_text_to_video_equals_diffusers_pipeline(
    wan: WanModel, t2v: Any, negative: str | None, guidance_scale: float
) -> None:
    changes: dict[str, Any] = {"negative": negative, "guidance_scale": guidance_scale}

    theirs = through_diffusers(t2v, replace(SMALL, **changes))

    assert distance(render(wan, **changes), theirs) == 0


def test_a_single_frame_equals_diffusers_pipeline(wan: WanModel, t2v: Any) -> None:
    ours = render(wan, num_frames=1)

    assert ours.shape == (1, 32, 48, 3)
    assert distance(ours, through_diffusers(t2v, replace(SMALL, num_frames=1))) == 0


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 7.0}


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [
        ("unipc", UniPCMultistepScheduler(**FLOW)),
        ("dpm++", DPMSolverMultistepScheduler(**FLOW)),
        ("euler", flow_match(7.0)),
    ],
)
def test_every_solver_and_its_shift_equal_diffusers_pipeline(
    wan: WanModel, t2v: Any, usual: np.ndarray, solver: str, scheduler: Any
) -> None:
    own = t2v.scheduler
    t2v.scheduler = scheduler

    theirs = through_diffusers(t2v)
    t2v.scheduler = own

    assert distance(render(wan, solver=solver, flow_shift=7.0), theirs) == 0
    assert distance(usual, theirs) > 0


def test_the_wire_knows_every_solver_and_no_other() -> None:
    assert sorted(WIRE_SOLVERS) == sorted(SOLVERS)


FIRST, LAST = picture(1), picture(2)
GREY = Image.new("RGB", SMALL.size, (128, 128, 128))
KNOWN, UNKNOWN = Image.new("L", SMALL.size, 0), Image.new("L", SMALL.size, 255)
#: The same references for us and for diffusers' VACE pipeline.
VACE_REFERENCES: dict[str, tuple[References, dict[str, Any]]] = {
    "start": (
        References(first=FIRST),
        {"video": [FIRST, *[GREY] * 8], "mask": [KNOWN, *[UNKNOWN] * 8]},
    ),
    "end": (
        References(last=LAST),
        {"video": [*[GREY] * 8, LAST], "mask": [*[UNKNOWN] * 8, KNOWN]},
    ),
    "both": (
        References(first=FIRST, last=LAST),
        {"video": [FIRST, *[GREY] * 7, LAST], "mask": [KNOWN, *[UNKNOWN] * 7, KNOWN]},
    ),
    "subject": (References(subject=FIRST), {"reference_images": [FIRST]}),
}


@pytest.mark.parametrize("mode", VACE_REFERENCES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_reference_equals_diffusers_pipeline(
    wan: WanModel, vace: Any, usual: np.ndarray, mode: str, scale: float
) -> None:
    ours, theirs = VACE_REFERENCES[mode]

    video = render(wan, references=replace(ours, scale=scale))

    assert distance(video, through_diffusers(vace, conditioning_scale=scale, **theirs)) == 0
    assert distance(video, usual) > 0


@pytest.fixture(scope="module")
def with_i2v(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> WanModel:
    """A WAN with all four networks."""
    folder = tmp_path_factory.mktemp("i2v")
    i2v = {
        "wan_i2v_model": write_i2v(folder / "i2v"),
        "wan_flf2v_model": write_i2v(folder / "flf2v", two_frames=True),
    }
    return models.load(settings.model_copy(update=i2v))


@pytest.mark.parametrize(
    ("route", "ours", "theirs"),
    [
        ("i2v", References(first=FIRST), {"image": FIRST}),
        ("flf2v", References(first=FIRST, last=LAST), {"image": FIRST, "last_image": LAST}),
    ],
)
def test_a_14b_network_is_used_instead_and_equals_diffusers_pipeline(
    with_i2v: WanModel, t2v: Any, route: Any, ours: References, theirs: dict[str, Any]
) -> None:
    network = with_i2v.networks[route]
    parts = {name: t2v.components[name] for name in ("tokenizer", "text_encoder", "vae")}
    pipe = WanImageToVideoPipeline(
        **parts,
        scheduler=t2v.scheduler,
        transformer=network.transformer,
        image_encoder=network.image_encoder.model,
        image_processor=network.image_encoder.processor,
    )

    video = render(with_i2v, references=ours)

    assert distance(video, through_diffusers(pipe, **theirs)) == 0


@pytest.mark.parametrize(
    ("references", "route_of_all_four", "route_of_vace"),
    [
        (References(), "t2v", "t2v"),
        (References(first=FIRST), "i2v", "vace"),
        (References(last=LAST), "vace", "vace"),
        (References(first=FIRST, last=LAST), "flf2v", "vace"),
        (References(subject=FIRST), "vace", "vace"),
    ],
)
def test_the_route_is_the_network_that_takes_the_references(
    with_i2v: WanModel,
    wan: WanModel,
    references: References,
    route_of_all_four: str,
    route_of_vace: str,
) -> None:
    assert with_i2v.route(references) == route_of_all_four
    assert wan.route(references) == route_of_vace


# --- frames are given out as they are decoded ---


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_decoding_in_pieces_equals_decoding_at_once_bit_for_bit(
    wan: WanModel, num_frames: int
) -> None:
    vae = wan.vae
    latents = torch.randn(vae.latent_shape(num_frames, 32, 48))
    mean, std = (
        torch.tensor(vae.model.config[f"latents_{name}"]).view(1, -1, 1, 1, 1)
        for name in ("mean", "std")
    )

    pieces = list(vae.decode(latents))
    with torch.inference_mode():
        at_once = vae.model.decode(latents / (1.0 / std) + mean).sample[0]

    assert [len(piece) for piece in pieces] == [1] + [4] * (num_frames // 4)
    expected = (at_once / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert np.array_equal(np.concatenate(pieces), expected.permute(1, 2, 3, 0).numpy())


def test_two_videos_may_be_decoded_at_the_same_time(wan: WanModel) -> None:
    one, two = (torch.randn(wan.vae.latent_shape(9, 32, 48)) for _ in range(2))
    alone = list(wan.vae.decode(one)), list(wan.vae.decode(two))

    together = list(zip(wan.vae.decode(one), wan.vae.decode(two), strict=True))

    assert all(np.array_equal(a, b) for a, (b, _) in zip(alone[0], together, strict=True))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(alone[1], together, strict=True))


def test_a_job_can_be_stopped_between_two_pieces(wan: WanModel) -> None:
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 2:
            raise Cancelled("stop")

    pieces = wan.generate(SMALL, RecordedProgress(on_check=check))

    assert len(next(pieces)) == 1
    with pytest.raises(Cancelled):
        next(pieces)


# --- prompts ---


def test_a_prompt_is_encoded_as_diffusers_encodes_it(wan: WanModel, t2v: Any) -> None:
    with torch.no_grad():
        theirs, _ = t2v.encode_prompt(
            "A red &amp; blue  circle", do_classifier_free_guidance=False, max_sequence_length=512
        )

    assert torch.equal(wan.text_encoder.encode(["A red &amp; blue  circle"])[0], theirs)


def test_a_word_after_the_226th_token_changes_the_video(wan: WanModel) -> None:
    filler = "circle " * 300

    assert distance(render(wan, filler + "red"), render(wan, filler + "blue")) > 0


def test_a_text_that_comes_again_is_not_encoded_again(settings: Settings) -> None:
    wan = models.load(settings)
    forwards: list[Any] = []
    wan.text_encoder.model.register_forward_hook(lambda *call: forwards.append(call))

    for prompt in ("one", "two", "three"):
        render(wan, prompt, negative="blurry")

    assert len(forwards) == 4


# --- seeds and steps ---


def test_a_seed_repeats_its_video_and_another_seed_does_not(wan: WanModel) -> None:
    assert distance(render(wan, seed=5), render(wan, seed=5)) == 0
    assert distance(render(wan, seed=5), render(wan, seed=6)) > 0


def test_every_step_is_reported(wan: WanModel) -> None:
    progress = RecordedProgress()

    render(wan, progress=progress)

    assert progress.steps == [(done, 4) for done in range(1, 5)]


def test_a_generation_that_is_stopped_at_a_step_does_not_change_the_next_one(
    wan: WanModel, usual: np.ndarray
) -> None:
    with pytest.raises(Cancelled):
        render(wan, progress=stop_at_step(2))

    assert distance(render(wan), usual) == 0


# --- memory ---


def test_after_out_of_memory_a_video_is_made_with_no_other_model_on_the_device(
    settings: Settings, usual: np.ndarray
) -> None:
    ledger = fake_ledger(1 << 30)
    wan, progress = models.load(settings, ledger), RecordedProgress()

    with out_of_memory(wan, times=1):
        video = render(wan, progress=progress)

    # The text encoder and the VAE left; the VAE came back.
    assert {row.name: row.state for row in ledger.report()} == {
        "wan_text_encoder": "host",
        "wan_t2v": "device",
        "wan_vae": "device",
    }
    assert distance(video, usual) == 0
    assert progress.memory_plans == [
        {"offload": False, "lean": True, "tiled_decode": False, "alone": True, "retries": 1},
    ]


def test_the_memory_of_each_stage_is_measured_by_its_shape(settings: Settings) -> None:
    wan = models.load(settings.model_copy(update={"vram_budget_gb": 1.0}))

    render(wan)

    rows = {row.name: row for row in wan.text_encoder.handle.ledger.report()}
    assert list(rows["wan_text_encoder"].working_bytes) == ["prompt"]
    assert list(rows["wan_t2v"].working_bytes) == ["48x32x9"]
    assert list(rows["wan_vae"].working_bytes) == ["48x32x9"]
    took = [next(iter(row.working_bytes.values())) for row in rows.values()]
    assert min(took) > 0
    # At the peak all models are on the device, and the memory of the largest stage beside them.
    weights = sum(row.num_bytes for row in rows.values())
    assert wan.device.peak_bytes() >= weights + max(took)


def test_low_vram_moves_the_text_encoder_block_by_block_with_the_same_bits() -> None:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=12, num_heads=4)
    model = UMT5EncoderModel(config).eval()
    ids = torch.tensor([[3, 5, 7, 1]])
    num_bytes = sum(each.nbytes for each in model.parameters())
    with torch.inference_mode():
        usual = model(ids).last_hidden_state

    memory = CountedMemory(num_bytes // 2)
    device = Device(torch.device("cpu"), torch.float32, memory)
    parts = block_by_block(model, device, lambda: model)
    parts.to_device()
    with device.computing():
        in_blocks = model(ids).last_hidden_state

    assert torch.equal(in_blocks, usual)
    assert memory.peak_bytes < num_bytes // 2
    assert parts.num_bytes < num_bytes // 4
    blocks = [torch.nn.ModuleList(each) for each in encoder_blocks(model).values()]
    assert sum(each.nbytes for block in blocks for each in block.parameters()) == num_bytes


def test_low_vram_makes_the_same_video_and_reports_its_plan(
    settings: Settings, usual: np.ndarray
) -> None:
    low = models.load(settings.model_copy(update={"low_vram": True, "vram_budget_gb": 1.0}))
    progress = RecordedProgress()

    video = render(low, progress=progress)

    assert distance(video, usual) == 0
    assert progress.memory_plans == [
        {"offload": True, "lean": True, "tiled_decode": True, "alone": False, "retries": 0},
    ]


def test_a_video_that_fits_in_no_way_is_out_of_memory_and_the_next_one_is_made(
    wan: WanModel, usual: np.ndarray
) -> None:
    with out_of_memory(wan, times=2), pytest.raises(OutOfMemory, match="a video of this size"):
        render(wan)

    assert distance(render(wan), usual) == 0


def test_running_out_of_memory_in_the_decoder_raises_our_error(
    wan: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*call: Any) -> Iterator[np.ndarray]:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        yield

    monkeypatch.setattr(wan.vae, "decode", decode)

    with pytest.raises(OutOfMemory):
        render(wan)


# --- weights that two networks share ---


def test_equal_tensors_of_t2v_and_vace_are_held_once(wan: WanModel) -> None:
    with wan.networks["t2v"].handle.using():
        plain = dict(wan.networks["t2v"].transformer.named_parameters())
        vace = dict(wan.networks["vace"].transformer.named_parameters())

    assert set(plain) <= set(vace)
    assert all(vace[name] is weight for name, weight in plain.items())


def test_networks_that_share_weights_are_one_model_in_the_ledger(settings: Settings) -> None:
    ledger = fake_ledger(1 << 30)
    wan = models.load(settings, ledger)

    plain, vace = (wan.networks[route].transformer for route in ("t2v", "vace"))
    together = {id(each): each for each in (*plain.parameters(), *vace.parameters())}
    rows = {row.name: row.num_bytes for row in ledger.report()}
    assert sorted(rows) == ["wan_t2v", "wan_text_encoder", "wan_vae"]
    assert rows["wan_t2v"] >= sum(each.nbytes for each in together.values())
    assert rows["wan_t2v"] < sum(each.nbytes for each in (*plain.parameters(), *vace.parameters()))


@pytest.mark.parametrize("change", [1e-6, -0.0])
def test_a_tensor_that_differs_in_a_bit_is_not_shared(wan: WanModel, change: float) -> None:
    weights = wan.networks["t2v"].transformer
    plain, other = (WanTransformer3DModel.from_config(weights.config) for _ in range(2))
    with wan.networks["t2v"].handle.using():
        for each in (plain, other):
            each.load_state_dict(weights.state_dict())
    with torch.no_grad():
        plain.proj_out.bias[0] = 0.0
        other.proj_out.bias[0] = change

    shared, common = share_equal_tensors(plain, other)

    assert (shared, common) == (common - 1, len(list(plain.parameters())))
    assert other.proj_out.bias is not plain.proj_out.bias


def test_a_vace_with_other_weights_keeps_its_own(settings: Settings, tmp_path: Path) -> None:
    other = write_wan(tmp_path, seed=2)
    mixed = settings.model_copy(update={"wan_vace_model": other.wan_vace_model})
    wan, vace = models.load(mixed), diffusers_vace(mixed)
    ours, theirs = VACE_REFERENCES["start"]
    plain = render(wan)

    assert distance(render(wan, references=ours), through_diffusers(vace, **theirs)) == 0
    assert distance(render(wan), plain) == 0


def test_models_that_do_not_fit_the_device_together_make_the_same_pixels_in_turn(
    settings: Settings, tmp_path: Path
) -> None:
    i2v = settings.model_copy(update={"wan_i2v_model": write_i2v(tmp_path)})
    sizes = fake_ledger(1 << 30)
    roomy = models.load(i2v, sizes)
    ledger = fake_ledger(max(row.num_bytes for row in sizes.report()))
    small = models.load(i2v, ledger)

    for references in (References(), References(first=FIRST), References(last=LAST), References()):
        one, other = (render(model, references=references) for model in (small, roomy))
        assert distance(one, other) == 0
    assert all(row.num_evictions > 0 for row in ledger.report())


def test_weights_that_were_dropped_are_read_again_and_shared_again(settings: Settings) -> None:
    # The host has no memory for weights that leave the device.
    ledger = Ledger(FakeMemory(1 << 30, host_bytes=0))
    wan = models.load(settings, ledger)
    before = [render(wan), render(wan, references=References(first=FIRST))]

    for name in ("wan_t2v", "wan_vae", "wan_text_encoder"):
        assert ledger.request_move(name, "disk").is_done.wait(PATIENCE_S)
    wan.text_encoder.cache.clear()

    assert {row.state for row in ledger.report()} == {"disk"}
    after = [render(wan), render(wan, references=References(first=FIRST))]
    assert all(distance(one, other) == 0 for one, other in zip(before, after, strict=True))
    plain, vace = (wan.networks[route].transformer for route in ("t2v", "vace"))
    assert vace.proj_out.weight is plain.proj_out.weight


# --- step-distilled checkpoints ---


#: The timesteps of the authors. FastWan's and CausVid's configurations name them; LightX2V's name
#: 1000, 750, 500 and 250, which a shift of 5 moves to these.
PUBLISHED = {
    "FastWan, CausVid": ({"wan_distilled_timesteps": (1000, 757, 522)}, [1000, 757, 522]),
    "LightX2V": ({"wan_distilled_timesteps": (1000, 938, 833, 625)}, [1000, 938, 833, 625]),
    "even steps": (
        {"wan_distilled_steps": 4, "wan_flow_shift": 5.0},
        [1000, 937.5, 833.333, 625],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_distilled_checkpoint_takes_its_authors_timesteps_and_one_forward_for_each(
    settings: Settings, name: str
) -> None:
    environment, timesteps = PUBLISHED[name]
    distilled = models.load(settings.model_copy(update=environment))
    seen: list[float] = []
    distilled.networks["t2v"].transformer.register_forward_pre_hook(
        lambda _, __, call: seen.append(float(call["timestep"])), with_kwargs=True
    )

    steps = distilled.sampling.distilled_steps
    render(distilled, negative="blue", steps=steps, guidance_scale=6.0)

    assert seen == pytest.approx(timesteps, abs=0.01)


def test_a_distilled_checkpoint_is_not_guided(settings: Settings) -> None:
    distilled = models.load(settings.model_copy(update={"wan_distilled_steps": 4}))

    videos = [
        render(distilled, negative=negative, guidance_scale=scale)
        for negative, scale in (("blue", 6.0), (None, 1.0))
    ]

    assert distance(*videos) == 0


def test_a_dmd_checkpoint_takes_its_own_timesteps(settings: Settings) -> None:
    progress = RecordedProgress()
    timesteps = {"wan_distilled_timesteps": (1000, 757, 522)}
    wan = models.load(settings.model_copy(update=timesteps))

    one, two = (render(wan, steps=25, progress=progress) for _ in range(2))

    assert progress.steps == [(1, 3), (2, 3), (3, 3)] * 2
    assert distance(one, two) == 0


def test_a_dmd_step_predicts_the_clean_video_and_adds_new_noise() -> None:
    scheduler = make_dmd_scheduler((1000, 757, 522))
    sample, velocity = torch.randn(2, 1, 4, 2, 4, 4).unbind()
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
    step = scheduler.step(
        velocity, scheduler.timesteps[1], sample, generator=torch.Generator().manual_seed(7)
    ).prev_sample

    clean = sample - 0.757 * velocity
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 757, 522])
    assert torch.allclose(step, (1 - 0.522) * clean + 0.522 * noise, atol=1e-5)


# --- loading ---


def test_without_vace_there_is_no_network_for_references(settings: Settings) -> None:
    wan = models.load(settings.model_copy(update={"wan_vace_model": None}))

    assert wan.route(References(first=FIRST)) is None
    assert wan.route(References()) == "t2v"


@pytest.mark.parametrize("variable", ["wan_model", "wan_vace_model", "wan_i2v_model"])
def test_a_folder_that_is_not_there_is_named_with_its_variable(
    settings: Settings, variable: str
) -> None:
    elsewhere = settings.model_copy(update={variable: Path("/no/such/model")})

    with pytest.raises(ModelLoadError, match=f"{variable.upper()}: there is nothing at"):
        models.load(elsewhere)


def test_truncated_weights_are_a_load_error(settings: Settings, tmp_path: Path) -> None:
    shutil.copytree(settings.wan_model, tmp_path / "half")
    weights = tmp_path / "half/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])

    with pytest.raises(ModelLoadError, match=r"WAN_MODEL: half does not load as WAN 2\.1"):
        models.load(settings.model_copy(update={"wan_model": str(tmp_path / "half")}))


def test_an_image_to_video_checkpoint_is_no_wan_model(settings: Settings, tmp_path: Path) -> None:
    shutil.copytree(settings.wan_model, tmp_path / "i2v")
    shutil.copytree(
        write_i2v(tmp_path / "parts") / "transformer",
        tmp_path / "i2v/transformer",
        dirs_exist_ok=True,
    )

    with pytest.raises(ModelLoadError, match="input channels: 36 wide, 16 is needed"):
        models.load(settings.model_copy(update={"wan_model": str(tmp_path / "i2v")}))


def test_a_text_to_video_folder_is_no_image_to_video_model(settings: Settings) -> None:
    with pytest.raises(ModelLoadError, match="WAN_I2V_MODEL: wan does not load"):
        models.load(settings.model_copy(update={"wan_i2v_model": Path(settings.wan_model)}))


@pytest.mark.parametrize(
    ("other", "why"),
    [({"text_dim": 32}, "its text: 32 wide"), ({"vace_in_channels": 80}, "96 is needed")],
)
def test_a_vace_of_other_widths_is_a_load_error(
    settings: Settings, tmp_path: Path, other: dict[str, int], why: str
) -> None:
    shutil.copytree(str(settings.wan_vace_model), tmp_path / "wide")
    vace = WanVACETransformer3DModel.from_pretrained(tmp_path / "wide/transformer")
    WanVACETransformer3DModel.from_config(vace.config, **other).save_pretrained(
        tmp_path / "wide/transformer"
    )

    with pytest.raises(ModelLoadError, match=why):
        models.load(settings.model_copy(update={"wan_vace_model": str(tmp_path / "wide")}))


def test_a_missing_text_for_enhancement_is_a_load_error(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"wan_enhancement_prompt": Path("/no/such/text")})

    with pytest.raises(ModelLoadError, match="WAN_ENHANCEMENT_PROMPT: there is nothing at"):
        models.load(nowhere)


# --- the enhancer ---


@pytest.mark.parametrize("named", [True, False])
def test_the_chat_familys_model_enhances_if_the_worker_serves_chat(
    settings: Settings, tmp_path: Path, named: bool
) -> None:
    chat = tiny_folder(tmp_path)
    both = settings.model_copy(
        update={
            "families": ("chat", "wan"),
            "chat_instruct_model": chat,
            "wan_enhancer_model": chat if named else None,
        }
    )

    loaded = load_families(both, open_ledger(both))

    assert loaded["wan"].enhancer is loaded["chat"]


def test_wans_own_enhancer_is_registered_in_the_ledger(settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"wan_enhancer_model": tiny_folder(tmp_path)})
    ledger = fake_ledger(1 << 30)

    wan = models.load(own, ledger)

    assert wan.enhancer
    assert "".join(ask(wan.enhancer, ("user", "a red circle"), max_tokens=5, seed=1))
    (row,) = [row for row in ledger.report() if row.name == "wan_enhancer"]
    assert (row.family, row.state) == ("wan", "device")


def test_a_pocket_wan_starts_without_an_enhancer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_loader, "POCKET", Path("/no/such/folder"))

    assert models.load(Settings(families=("wan",))).enhancer is None


def test_a_missing_enhancer_is_a_load_error(settings: Settings) -> None:
    with pytest.raises(ModelLoadError, match="WAN_ENHANCER_MODEL: there is nothing at"):
        models.load(settings.model_copy(update={"wan_enhancer_model": "/no/such/model"}))


def test_in_a_video_of_one_frame_the_first_and_the_last_frame_are_that_one() -> None:
    assert References(first=FIRST).frames(1) == {0: FIRST}
    assert References(last=LAST).frames(1) == {0: LAST}


def test_a_video_of_one_frame_follows_its_reference(wan: WanModel) -> None:
    one, other = (
        render(wan, num_frames=1, references=References(first=each)) for each in (FIRST, LAST)
    )

    assert distance(one, other) > 0
