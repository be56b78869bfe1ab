"""WAN on real classes of random weights: our loop against diffusers', and what it promises."""

import shutil
from collections.abc import Iterator
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
from ourvidz_serverless.models.wan import pipeline as models
from ourvidz_serverless.models.wan.conditioning import Given
from ourvidz_serverless.models.wan.network import share
from ourvidz_serverless.models.wan.text_encoder import in_blocks
from ourvidz_serverless.settings import Settings
from tests.fakes.devices import FakeMemory, fake_ledger
from tests.fakes.tiny_chat import ask, tiny_folder
from tests.fakes.tiny_wan import (
    SMALL,
    distance,
    flow_match,
    picture,
    render,
    t2v_peer,
    through_diffusers,
    vace_peer,
    write_i2v,
    write_wan,
)
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def settings(wan_settings: Settings) -> Settings:
    return wan_settings


@pytest.fixture(scope="module")
def t2v(settings: Settings) -> Any:
    return t2v_peer(settings)


@pytest.fixture(scope="module")
def vace(settings: Settings) -> Any:
    return vace_peer(settings)


# --- the same pixels as diffusers ---


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("negative", [None, "blue"])
def test_text_to_video_equals_diffusers_pipeline(
    wan: models.Wan, t2v: Any, negative: str | None, guidance_scale: float
) -> None:
    options = {"negative_prompt": negative, "guidance_scale": guidance_scale}

    assert distance(render(wan, **options), through_diffusers(t2v, **options)) == 0


def test_a_single_frame_equals_diffusers_pipeline(wan: models.Wan, t2v: Any) -> None:
    ours = render(wan, num_frames=1)

    assert ours.shape == (1, 48, 64, 3)
    assert distance(ours, through_diffusers(t2v, num_frames=1)) == 0


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
    wan: models.Wan, t2v: Any, solver: str, scheduler: Any
) -> None:
    own = t2v.scheduler
    t2v.scheduler = scheduler

    theirs = through_diffusers(t2v)
    t2v.scheduler = own

    assert distance(render(wan, solver=solver, flow_shift=7.0), theirs) == 0
    assert distance(render(wan), theirs) > 0


def test_the_wire_knows_every_solver_and_no_other() -> None:
    assert sorted(WIRE_SOLVERS) == sorted(SOLVERS)


FIRST, LAST = picture(1), picture(2)
GREY = Image.new("RGB", (64, 48), (128, 128, 128))
KNOWN, UNKNOWN = Image.new("L", (64, 48), 0), Image.new("L", (64, 48), 255)
AS_VACE_HAS_IT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "start": (
        {"first": FIRST},
        {"video": [FIRST, *[GREY] * 8], "mask": [KNOWN, *[UNKNOWN] * 8]},
    ),
    "end": (
        {"last": LAST},
        {"video": [*[GREY] * 8, LAST], "mask": [*[UNKNOWN] * 8, KNOWN]},
    ),
    "both": (
        {"first": FIRST, "last": LAST},
        {"video": [FIRST, *[GREY] * 7, LAST], "mask": [KNOWN, *[UNKNOWN] * 7, KNOWN]},
    ),
    "subject": ({"subject": FIRST}, {"reference_images": [FIRST]}),
}


@pytest.mark.parametrize("mode", AS_VACE_HAS_IT)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_reference_equals_diffusers_pipeline(
    wan: models.Wan, vace: Any, mode: str, scale: float
) -> None:
    ours, theirs = AS_VACE_HAS_IT[mode]

    rendered = render(wan, conditioning_scale=scale, **ours)

    assert distance(rendered, through_diffusers(vace, conditioning_scale=scale, **theirs)) == 0
    assert distance(rendered, render(wan)) > 0


@pytest.fixture(scope="module")
def with_i2v(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> models.Wan:
    """All four networks."""
    folder = tmp_path_factory.mktemp("i2v")
    i2v = {
        "wan_i2v_model": write_i2v(folder / "i2v"),
        "wan_flf2v_model": write_i2v(folder / "flf2v", two_frames=True),
    }
    return models.load(settings.model_copy(update=i2v))


@pytest.mark.parametrize(
    ("network", "ours", "theirs"),
    [
        ("i2v", {"first": FIRST}, {"image": FIRST}),
        ("flf2v", {"first": FIRST, "last": LAST}, {"image": FIRST, "last_image": LAST}),
    ],
)
def test_a_14b_network_is_used_instead_and_equals_diffusers_pipeline(
    with_i2v: models.Wan, t2v: Any, network: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    loaded = with_i2v._networks[network]
    parts = {name: t2v.components[name] for name in ("tokenizer", "text_encoder", "vae")}
    pipe = WanImageToVideoPipeline(
        **parts,
        scheduler=t2v.scheduler,
        transformer=loaded.transformer,
        image_encoder=loaded.eyes.model,
        image_processor=loaded.eyes.processor,
    )

    assert distance(render(with_i2v, **ours), through_diffusers(pipe, **theirs)) == 0


def test_which_network_serves_which_references(with_i2v: models.Wan, wan: models.Wan) -> None:
    def routes(first: bool, last: bool, subject: bool = False) -> tuple[Any, Any]:
        asked = {"first": first, "last": last, "subject": subject}
        return with_i2v.route(**asked), wan.route(**asked)

    assert routes(first=False, last=False) == ("t2v", "t2v")
    assert routes(first=True, last=False) == ("i2v", "vace")
    assert routes(first=False, last=True) == ("vace", "vace")
    assert routes(first=True, last=True) == ("flf2v", "vace")
    assert routes(first=False, last=False, subject=True) == ("vace", "vace")


# --- frames leave as they are decoded ---


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_the_pieces_are_bit_for_bit_what_the_vae_decodes_at_once(
    wan: models.Wan, num_frames: int
) -> None:
    vae = wan._vae
    latents = torch.randn(vae.latent_shape(num_frames, 48, 64))
    mean, std = (vae._per_channel(f"latents_{name}", vae.dtype) for name in ("mean", "std"))

    pieces = list(vae.decode(latents))
    with torch.inference_mode():
        whole = vae._vae.decode(latents / (1.0 / std) + mean).sample[0]

    assert [len(piece) for piece in pieces] == [1] + [4] * (num_frames // 4)
    expected = (whole / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert np.array_equal(np.concatenate(pieces), expected.permute(1, 2, 3, 0).numpy())


def test_two_videos_may_be_decoded_in_turns(wan: models.Wan) -> None:
    one, two = (torch.randn(wan._vae.latent_shape(9, 48, 64)) for _ in range(2))
    alone = list(wan._vae.decode(one)), list(wan._vae.decode(two))

    together = list(zip(wan._vae.decode(one), wan._vae.decode(two), strict=True))

    assert all(np.array_equal(a, b) for a, (b, _) in zip(alone[0], together, strict=True))
    assert all(np.array_equal(a, b) for a, (_, b) in zip(alone[1], together, strict=True))


def test_the_check_is_heard_between_pieces(wan: models.Wan) -> None:
    heard: list[int] = []

    def check() -> None:
        heard.append(1)
        if len(heard) == 2:
            raise Cancelled("stop")

    pieces = wan.generate(prompt="a", negative_prompt=None, seed=1, check=check, **SMALL)

    assert len(next(pieces)) == 1
    with pytest.raises(Cancelled):
        next(pieces)


# --- prompts ---


def test_a_prompt_is_read_as_diffusers_reads_it(wan: models.Wan, t2v: Any) -> None:
    with torch.no_grad():
        theirs, _ = t2v.encode_prompt(
            "A red &amp; blue  circle", do_classifier_free_guidance=False, max_sequence_length=512
        )

    assert torch.equal(wan._text.encode(["A red &amp; blue  circle"])[0], theirs)


def test_a_word_behind_the_226th_token_still_counts(wan: models.Wan) -> None:
    filler = "circle " * 300

    assert distance(render(wan, filler + "red"), render(wan, filler + "blue")) > 0


def test_a_text_that_comes_again_is_not_read_again(settings: Settings) -> None:
    wan = models.load(settings)
    reads: list[Any] = []
    wan._text._model.register_forward_hook(lambda *call: reads.append(call))

    for prompt in ("one", "two", "three"):
        render(wan, prompt, negative_prompt="blurry")

    assert len(reads) == 4


# --- seeds and steps ---


def test_a_seed_repeats_and_another_differs(wan: models.Wan) -> None:
    assert distance(render(wan, seed=5), render(wan, seed=5)) == 0
    assert distance(render(wan, seed=5), render(wan, seed=6)) > 0


def test_every_step_is_told(wan: models.Wan) -> None:
    told: list[tuple[int, int]] = []

    render(wan, step=lambda done, total: told.append((done, total)))

    assert told == [(done, 4) for done in range(1, 5)]


def test_what_a_step_raises_ends_the_generation_and_leaves_the_model_as_good_as_new(
    wan: models.Wan,
) -> None:
    def stop_at_two(done: int, total: int) -> None:
        if done == 2:
            raise Cancelled("stop")

    before = render(wan)
    with pytest.raises(Cancelled):
        render(wan, step=stop_at_two)

    assert distance(render(wan), before) == 0


# --- memory ---


class ShortOfMemory(models.Wan):
    """A WAN whose device is too small so many times, and says so as torch does."""

    too_small = 1

    def _denoise(self, *job: Any) -> torch.Tensor:
        self.too_small -= 1
        if self.too_small >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._denoise(*job)


def as_kind(kind: Any, wan: models.Wan) -> Any:
    return kind(
        text=wan._text,
        vae=wan._vae,
        networks=wan._networks,
        sampling=wan.sampling,
        device=wan.device,
    )


def test_a_video_that_does_not_fit_is_made_with_no_other_model_beside_it(
    settings: Settings,
) -> None:
    ledger = fake_ledger(1 << 30)
    wan = models.load(settings, ledger)
    told: list[Any] = []

    video = render(as_kind(ShortOfMemory, wan), planned=told.append)

    # The text encoder and the VAE left; the VAE came again.
    assert {row.name: row.state for row in ledger.report()} == {
        "wan_text_encoder": "host",
        "wan_t2v": "device",
        "wan_vae": "device",
    }
    assert distance(video, render(wan)) == 0
    assert told == [{"offload": False, "lean": True, "alone": True, "retries": 1}]


def test_what_each_stage_really_took_is_known_by_its_shape(settings: Settings) -> None:
    wan = models.load(settings.model_copy(update={"vram_budget_gb": 1.0}))

    render(wan)

    rows = {row.name: row for row in wan._text.handle.ledger.report()}
    assert list(rows["wan_text_encoder"].working_bytes) == ["prompt"]
    assert list(rows["wan_t2v"].working_bytes) == ["64x48x9"]
    assert list(rows["wan_vae"].working_bytes) == ["64x48x9"]
    took = [next(iter(row.working_bytes.values())) for row in rows.values()]
    assert min(took) > 0
    # All models are there, and the longest stage's work beside them.
    weights = sum(row.num_bytes for row in rows.values())
    assert wan.device.peak_bytes() >= weights + max(took)


def test_low_vram_brings_the_text_encoder_block_by_block_with_the_same_bits() -> None:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=12, num_heads=4)
    model = UMT5EncoderModel(config).eval()
    ids = torch.tensor([[3, 5, 7, 1]])
    whole = sum(each.nbytes for each in model.parameters())
    with torch.inference_mode():
        usual = model(ids).last_hidden_state

    memory = CountedMemory(whole // 2)
    device = Device(torch.device("cpu"), torch.float32, memory)
    parts = in_blocks(model, device, lambda: model)
    parts.to_device()
    with device.computing():
        in_turns = model(ids).last_hidden_state

    assert torch.equal(in_turns, usual)
    assert memory.peak_bytes < whole // 2
    assert parts.num_bytes < whole // 4
    assert sum(part.num_bytes for part in parts._parts.values()) == whole


def test_low_vram_makes_the_same_video_and_says_so(settings: Settings, wan: models.Wan) -> None:
    low = models.load(settings.model_copy(update={"low_vram": True, "vram_budget_gb": 1.0}))
    told: list[Any] = []

    video = render(low, planned=told.append)

    assert distance(video, render(wan)) == 0
    assert told == [{"offload": True, "lean": True, "alone": False, "retries": 0}]


def test_a_video_that_does_not_fit_then_either_is_out_of_memory(wan: models.Wan) -> None:
    short = as_kind(ShortOfMemory, wan)
    short.too_small = 2

    with pytest.raises(OutOfMemory, match="a video of this size"):
        render(short)
    assert distance(render(wan), render(short)) == 0


def test_running_out_of_memory_in_the_decoder_is_our_error(
    wan: models.Wan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(latents: torch.Tensor) -> Iterator[np.ndarray]:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        yield

    monkeypatch.setattr(wan._vae, "decode", decode)

    with pytest.raises(OutOfMemory):
        render(wan)


# --- weights that two networks share ---


def test_equal_tensors_of_t2v_and_vace_are_held_once(wan: models.Wan) -> None:
    with wan._networks["t2v"].handle.using():
        plain = dict(wan._networks["t2v"].transformer.named_parameters())
        vace = dict(wan._networks["vace"].transformer.named_parameters())

    assert set(plain) <= set(vace)
    assert all(vace[name] is weight for name, weight in plain.items())


def test_they_are_one_model_in_the_ledger(settings: Settings) -> None:
    ledger = fake_ledger(1 << 30)
    wan = models.load(settings, ledger)

    plain, vace = (wan._networks[route].transformer for route in ("t2v", "vace"))
    together = {id(each): each for each in (*plain.parameters(), *vace.parameters())}
    rows = {row.name: row.num_bytes for row in ledger.report()}
    assert sorted(rows) == ["wan_t2v", "wan_text_encoder", "wan_vae"]
    assert rows["wan_t2v"] >= sum(each.nbytes for each in together.values())
    assert rows["wan_t2v"] < sum(each.nbytes for each in (*plain.parameters(), *vace.parameters()))


@pytest.mark.parametrize("change", [1e-6, -0.0])
def test_a_tensor_that_differs_in_a_bit_is_not_shared(wan: models.Wan, change: float) -> None:
    weights = wan._networks["t2v"].transformer
    plain, other = (WanTransformer3DModel.from_config(weights.config) for _ in range(2))
    with wan._networks["t2v"].handle.using():
        for each in (plain, other):
            each.load_state_dict(weights.state_dict())
    with torch.no_grad():
        plain.proj_out.bias[0] = 0.0
        other.proj_out.bias[0] = change

    shared, common = share(plain, other)

    assert (shared, common) == (common - 1, len(list(plain.parameters())))
    assert other.proj_out.bias is not plain.proj_out.bias


def test_a_vace_of_other_weights_is_rendered_with_its_own(
    settings: Settings, tmp_path: Path
) -> None:
    other = write_wan(tmp_path, seed=2)
    mixed = settings.model_copy(update={"wan_vace_model": other.wan_vace_model})
    wan, peer = models.load(mixed), vace_peer(mixed)
    ours, theirs = AS_VACE_HAS_IT["start"]
    plain = render(wan)

    assert distance(render(wan, **ours), through_diffusers(peer, **theirs)) == 0
    assert distance(render(wan), plain) == 0


def test_models_that_have_no_room_together_come_and_go_with_the_same_pixels(
    settings: Settings, tmp_path: Path
) -> None:
    i2v = settings.model_copy(update={"wan_i2v_model": write_i2v(tmp_path)})
    sizes = fake_ledger(1 << 30)
    roomy = models.load(i2v, sizes)
    ledger = fake_ledger(max(row.num_bytes for row in sizes.report()))
    small = models.load(i2v, ledger)

    for references in ({}, {"first": FIRST}, {"last": LAST}, {}):
        assert distance(render(small, **references), render(roomy, **references)) == 0
    assert all(row.num_evictions > 0 for row in ledger.report())


def test_weights_that_were_dropped_are_read_again_and_shared_again(settings: Settings) -> None:
    # A host without memory to keep what leaves the device.
    ledger = Ledger(FakeMemory(1 << 30, host_bytes=0))
    wan = models.load(settings, ledger)
    before = [render(wan), render(wan, first=FIRST)]

    for name in ("wan_t2v", "wan_vae", "wan_text_encoder"):
        assert ledger.request_move(name, "disk").is_done.wait(PATIENCE_S)
    wan._text._kept.clear()

    assert {row.state for row in ledger.report()} == {"disk"}
    after = [render(wan), render(wan, first=FIRST)]
    assert all(distance(one, other) == 0 for one, other in zip(before, after, strict=True))
    plain, vace = (wan._networks[route].transformer for route in ("t2v", "vace"))
    assert vace.proj_out.weight is plain.proj_out.weight


# --- step-distilled checkpoints ---


#: As their authors sample them: FastWan's and CausVid's configurations name the timesteps; those of
#: LightX2V name 1000, 750, 500 and 250, which a shift of 5 moves to these.
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
    distilled._networks["t2v"].transformer.register_forward_pre_hook(
        lambda _, __, call: seen.append(float(call["timestep"])), with_kwargs=True
    )

    steps = distilled.sampling.distilled_steps
    render(distilled, negative_prompt="blue", num_inference_steps=steps, guidance_scale=6.0)

    assert seen == pytest.approx(timesteps, abs=0.01)


def test_a_distilled_checkpoint_is_not_guided(settings: Settings) -> None:
    distilled = models.load(settings.model_copy(update={"wan_distilled_steps": 4}))

    videos = [
        render(distilled, negative_prompt=negative, guidance_scale=scale)
        for negative, scale in (("blue", 6.0), (None, 1.0))
    ]

    assert distance(*videos) == 0


def test_a_dmd_checkpoint_takes_its_own_timesteps(settings: Settings) -> None:
    told: list[tuple[int, int]] = []
    timesteps = {"wan_distilled_timesteps": (1000, 757, 522)}
    wan = models.load(settings.model_copy(update=timesteps))

    one, two = (
        render(wan, num_inference_steps=25, step=lambda *done: told.append(done)) for _ in range(2)
    )

    assert told == [(1, 3), (2, 3), (3, 3)] * 2
    assert distance(one, two) == 0


def test_a_dmd_step_predicts_the_clean_video_and_noises_it_anew() -> None:
    scheduler = make_dmd_scheduler((1000, 757, 522), "cpu")
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

    assert wan.route(first=True, last=False, subject=False) is None
    assert wan.route(first=False, last=False, subject=False) == "t2v"


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
def test_where_chat_is_served_too_its_model_enhances(
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


def test_an_enhancer_of_its_own_stands_in_the_ledger(settings: Settings, tmp_path: Path) -> None:
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


def test_an_enhancer_that_is_asked_for_and_missing_is_a_load_error(settings: Settings) -> None:
    with pytest.raises(ModelLoadError, match="WAN_ENHANCER_MODEL: there is nothing at"):
        models.load(settings.model_copy(update={"wan_enhancer_model": "/no/such/model"}))


def test_of_a_single_frame_the_first_is_given() -> None:
    assert Given(first=FIRST).known(1) == {0: FIRST}
    assert Given(last=LAST).known(1) == {0: LAST}


def test_a_video_of_a_single_frame_keeps_its_reference(wan: models.Wan) -> None:
    one, other = (render(wan, num_frames=1, first=each) for each in (FIRST, LAST))

    assert distance(one, other) > 0
