"""What makes jobs fast: always on without a pixel's change, and by `config.speed` with some."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch.nn.attention import _cur_sdpa_kernel_backends

from benchmarks import architectures
from ourvidz_serverless import jobs
from ourvidz_serverless.errors import Cancelled, InvalidPrompt, ModelLoadError
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.sdxl import loader as sdxl_models
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.prompt_weighting import parse, plain
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.models.speed import attention, presets
from ourvidz_serverless.models.speed.embedding_cache import EmbeddingCache
from ourvidz_serverless.models.speed.step_cache import FirstBlockCache
from ourvidz_serverless.models.wan import loader as wan_models
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import References
from ourvidz_serverless.settings import Settings
from tests.fakes import small_jobs, tiny_wan
from tests.fakes.recorded_progress import RecordedProgress, stop_at_step
from tests.files import ROOT

CPU = Device(torch.device("cpu"), torch.float32)
#: Of SDXL's jobs here.
STEPS = 10
PRESETS = ("balanced", "fast")
SPEED = ROOT / "docs/speed.md"


def paint(model: Any, prompt: str = "a red circle", **changes: Any) -> np.ndarray:
    small = {"negative": plain("blurry"), "size": (128, 64), "steps": STEPS}
    (picture,) = small_jobs.render(model, prompt, **{**small, **changes})
    return picture


def film(model: Any, **options: Any) -> np.ndarray:
    return tiny_wan.render(model, steps=10, negative="blurry", **options)


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@contextmanager
def counting(*modules: Any) -> Iterator[Counter[Any]]:
    """How often each module really computed."""
    calls: Counter[Any] = Counter()
    hooks = [
        each.register_forward_hook(lambda module, *call: calls.update([module])) for each in modules
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


# --- attention ---


def test_every_attention_of_every_network_heeds_the_choice(sdxl: Any, wan: WanModel) -> None:
    attentions = sum(isinstance(each, Attention) for each in sdxl.networks.unet.modules())

    assert chosen(sdxl.networks.unet) == attentions > 0
    for network in wan.networks.values():
        blocks = [*network.transformer.blocks, *getattr(network.transformer, "vace_blocks", ())]
        assert chosen(network.transformer) == 2 * len(blocks)


def chosen(network: Any) -> int:
    processors = [getattr(each, "processor", None) for each in network.modules()]
    return sum(hasattr(each, "_attention_backend") for each in processors)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, ...]]:
    """Between which kernels torch might choose, whenever an attention was computed."""
    seen: set[tuple[str, ...]] = set()
    compute = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        seen.add(tuple(each.name for each in _cur_sdpa_kernel_backends()))
        return compute(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize(("name", "kernel"), [("math", "MATH"), ("flash", "FLASH_ATTENTION")])
def test_the_kernel_that_is_chosen_is_the_one_that_computes(
    sdxl: Any, wan: WanModel, kernels: set[tuple[str, ...]], name: str, kernel: str
) -> None:
    unet, transformer = sdxl.networks.unet, wan.networks["t2v"].transformer
    calls: list[tuple[Any, dict[str, Any]]] = [
        (unet, unet_call(unet)),
        (transformer, transformer_call(transformer)),
    ]

    for network, call in calls:
        usual = network(**call)[0]
        kernels.clear()
        attention.set_backend(network, name, CPU)
        try:
            named, used = network(**call)[0], set(kernels)
        finally:
            attention.set_backend(network, "native", CPU)
        assert used == {(kernel,)}
        torch.testing.assert_close(named, usual, atol=1e-4, rtol=0)


def unet_call(unet: Any) -> dict[str, Any]:
    """The keyword arguments of one forward."""
    width = unet.config.projection_class_embeddings_input_dim
    width -= 6 * unet.config.addition_time_embed_dim
    torch.manual_seed(0)
    return {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, width), "time_ids": torch.ones(1, 6)},
        "return_dict": False,
    }


def transformer_call(transformer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 16, 3, 6, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, transformer.config.text_dim),
        "return_dict": False,
    }
    if hasattr(transformer, "vace_blocks"):
        channels = transformer.config.vace_in_channels
        call["control_hidden_states"] = torch.randn(1, channels, 3, 6, 8)
    return call


def test_a_kernel_that_the_device_does_not_have_ends_the_start() -> None:
    with pytest.raises(ModelLoadError, match="ATTENTION_BACKEND: this device has no cudnn"):
        sdxl_models.load(Settings(attention_backend="cudnn"))


def test_the_settings_know_every_kernel_and_no_other() -> None:
    known = Settings.model_json_schema()["properties"]["attention_backend"]["enum"]

    assert set(known) == set(attention.BACKENDS)


# --- a prompt's keys and values ---


def readers(unet: Any) -> list[Any]:
    """What makes keys of a prompt, in each of a UNet's cross-attentions."""
    return [each.to_k for name, each in unet.named_modules() if name.endswith("attn2")]


def remembered(unet: Any) -> list[Any]:
    processors = [each.processor for each in unet.modules() if isinstance(each, Attention)]
    return [each for each in processors if each.cached]


def test_a_prompt_that_is_remembered_gives_the_bits_of_one_that_is_read_at_every_step(
    sdxl: Any,
) -> None:
    unet, call = sdxl.networks.unet, unet_call(sdxl.networks.unet)
    prompts = [call["encoder_hidden_states"], torch.randn(1, 77, unet.config.cross_attention_dim)]
    steps = [(900, prompts[0]), (600, prompts[0]), (300, prompts[1]), (0, prompts[1])]

    def forwards() -> list[torch.Tensor]:
        timed = [{"timestep": torch.tensor(at), "encoder_hidden_states": of} for at, of in steps]
        return [unet(**{**call, **each})[0] for each in timed]

    with torch.inference_mode(), counting(*readers(unet)) as calls:
        plain_ones, plainly = forwards(), calls.total()
        with attention.cached_prompt_keys(unet):
            made = forwards()

    assert all(torch.equal(*pair) for pair in zip(made, plain_ones, strict=True))
    assert plainly == len(steps) * len(readers(unet))
    assert calls.total() - plainly == len(prompts) * len(readers(unet))


@pytest.mark.parametrize(("seeds", "batches"), [((3,), 1), ((3, 4), 1), ((3, 4, 5), 2)])
def test_a_job_reads_its_prompt_once_for_each_batch(
    sdxl: Any, seeds: tuple[int, ...], batches: int
) -> None:
    model = SdxlModel(sdxl.networks, sdxl.device, plans=MemoryPlans(SdxlMemoryPlan(2)))

    with counting(*readers(sdxl.networks.unet)) as calls:
        small_jobs.render(model, seeds=seeds)

    assert {calls[each] for each in readers(sdxl.networks.unet)} == {batches}


def test_a_job_on_a_small_card_remembers_nothing(sdxl: Any) -> None:
    plans = sdxl_models.low_vram_plans()
    model = SdxlModel(sdxl.networks, sdxl.device, plans=plans)

    with counting(*readers(model.networks.unet)) as calls:
        paint(model)

    assert {calls[each] for each in readers(model.networks.unet)} == {STEPS}


@pytest.mark.parametrize("error", [None, Cancelled("stopped"), torch.OutOfMemoryError("full")])
def test_what_is_remembered_of_a_prompt_does_not_outlive_its_job(
    sdxl: Any, error: Exception | None
) -> None:
    model = SdxlModel(sdxl.networks, sdxl.device)
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        seen.append(len(remembered(model.networks.unet)))
        if error and len(seen) == 3:
            raise error

    with suppress(Cancelled):
        paint(model, progress=RecordedProgress(on_step=look))

    assert set(seen[:3]) == {len(readers(model.networks.unet))}
    assert remembered(model.networks.unet) == []
    # One that ran out of memory has gone on in a lean way.
    assert error is None or set(seen[3:]) <= {0}


def test_compiled_blocks_read_the_prompt_by_themselves(sdxl: Any) -> None:
    block = sdxl.networks.unet.mid_block.attentions[0].transformer_blocks[0]
    graphs: list[Any] = []

    def keep_graph(graph: Any, given: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    hidden = torch.randn(1, 4, block.attn1.to_q.in_features)
    first, second = (torch.randn(1, 77, block.attn2.to_k.in_features) for _ in range(2))
    prompts = (first, first, second)

    with torch.inference_mode(), attention.cached_prompt_keys(sdxl.networks.unet):
        eager = [block(hidden, encoder_hidden_states=each) for each in prompts]
        compiled = torch.compile(type(block).forward, backend=keep_graph, fullgraph=True)
        made = [compiled(block, hidden, encoder_hidden_states=each) for each in prompts]

    assert all(torch.equal(*pair) for pair in zip(made, eager, strict=True))
    assert len(graphs) == 1


def test_what_the_documents_say_of_its_memory_is_counted() -> None:
    with architectures.made_on("meta", torch.float16):
        unet = UNet2DConditionModel(**architectures.SDXL_UNET)
    # Keys and values of 77 tokens, two bytes each, for the prompt and the negative one.
    num_bytes = sum(2 * 77 * 2 * 2 * each.out_features for each in readers(unet))

    assert num_bytes == 51_251_200
    assert f"{num_bytes / 2**20:.0f} MiB a guided picture" in SPEED.read_text(encoding="utf-8")


# --- channels-last ---


@pytest.fixture(scope="module")
def last() -> Any:
    return sdxl_models.load(Settings(memory_format="channels_last"))


def convolutions(model: Any) -> list[Any]:
    """Those of a model's UNet and VAE that see more than a pixel: of a 1x1 both formats are one."""
    modules = (
        each for network in (model.networks.unet, model.networks.vae) for each in network.modules()
    )
    return [
        each for each in modules if isinstance(each, torch.nn.Conv2d) and each.kernel_size != (1, 1)
    ]


def is_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@contextmanager
def looking_at_what_convolutions_make(model: Any) -> Iterator[set[bool]]:
    """Whether they made it channels-last."""
    seen: set[bool] = set()
    hooks = [
        each.register_forward_hook(lambda _, given, made: seen.add(is_last(made)))
        for each in convolutions(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_channels_last_is_the_format_of_weights_and_of_what_convolutions_make(
    sdxl: Any, last: Any
) -> None:
    with looking_at_what_convolutions_make(last) as in_last:
        paint(last)
    with looking_at_what_convolutions_make(sdxl) as in_usual:
        paint(sdxl)

    assert {is_last(each.weight) for each in convolutions(last)} == {True}
    assert {is_last(each.weight) for each in convolutions(sdxl)} == {False}
    assert (in_last, in_usual) == ({True}, {False})


def test_channels_last_paints_the_same_within_rounding(sdxl: Any, last: Any) -> None:
    reference = StartImage(Image.new("RGB", (128, 64), "green"), 0.5)

    for options in ({}, {"reference": reference}):
        assert distance(paint(last, **options), paint(sdxl, **options)) <= 1


def test_channels_last_is_so_again_after_the_weights_were_dropped_and_read_anew() -> None:
    model = sdxl_models.load(Settings(memory_format="channels_last"))
    parts = model.handle.model

    parts.drop()
    parts.load()

    assert all(is_last(each.weight) for each in convolutions(model))


def test_channels_last_decodes_in_strips_too(last: Any, sdxl: Any) -> None:
    plans = sdxl_models.low_vram_plans()
    small = SdxlModel(last.networks, last.device, plans=plans)

    assert distance(paint(small), paint(sdxl)) <= 1


# --- embeddings that are kept ---


def test_a_prompt_that_comes_again_is_not_read_again_and_paints_the_same() -> None:
    model = sdxl_models.load(Settings())
    encoders = (model.networks.pipe.text_encoder, model.networks.pipe.text_encoder_2)

    with counting(*encoders) as calls:
        first = paint(model)
        again = paint(model, seeds=(3,))
        paint(model, "a blue square")

    assert distance(first, again) == 0
    # The prompt, the negative one, and one that is new.
    assert [calls[each] for each in encoders] == [3, 3]


def test_a_weighted_prompt_is_another_one_than_its_words(sdxl: Any) -> None:
    words, weighted = plain("a red circle"), parse("a (red:1.5) circle")

    assert distance(small_jobs.render(sdxl, words)[0], small_jobs.render(sdxl, weighted)[0]) > 0


def test_what_is_kept_takes_no_more_than_it_may() -> None:
    row = torch.zeros(1, 256)
    kept = EmbeddingCache(CPU, max_bytes=3 * row.nbytes)

    for key in ("a", "b", "c", "a", "d"):
        kept.get(lambda key: (row,), key)

    assert [key in kept for key in "abcd"] == [True, False, True, True]
    assert kept.num_bytes == 3 * row.nbytes
    assert (kept.misses, kept.hits) == (4, 1)


def test_what_is_kept_takes_nothing_of_the_device() -> None:
    memory = CountedMemory(1 << 20)
    device = Device(torch.device("cpu"), torch.float32, memory)
    kept = EmbeddingCache(device)

    with device.computing():
        kept.get(lambda key: (torch.zeros(1, 1024),), "a")
    assert (memory.used_bytes, kept.num_bytes) == (0, 4096)

    with device.computing():
        (row,) = kept.get(lambda key: (), "a")
        assert memory.used_bytes == row.nbytes


def test_one_text_read_in_two_ways_is_kept_twice() -> None:
    kept = EmbeddingCache(CPU)

    def read(key: tuple[str, int]) -> tuple[torch.Tensor]:
        text, skipped_layers = key
        return (torch.full((1, 4), float(len(text) + skipped_layers)),)

    rows = [kept.get(read, ("a circle", skipped))[0] for skipped in (0, 1, 0)]

    assert [row[0, 0].item() for row in rows] == [8, 9, 8]
    assert (kept.misses, kept.hits) == (2, 1)


# --- presets ---


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_out_deep_blocks_of_the_unet_and_says_how_many_times(
    sdxl: Any, preset: str
) -> None:
    progress = RecordedProgress()
    unet, exact = sdxl.networks.unet, paint(sdxl)

    # Inside of a block, since a block itself is called, and may answer from the cache.
    with counting(unet.conv_in, unet.mid_block.resnets[0]) as calls:
        quick = paint(sdxl, speed=preset, progress=progress)

    (report,) = progress.speed_reports
    assert calls[unet.conv_in] == STEPS
    assert calls[unet.mid_block.resnets[0]] < STEPS
    assert report["preset"] == preset
    assert report["plain_forwards"] == 2 * STEPS
    assert report["forwards"] + report["shallow_forwards"] <= report["plain_forwards"]
    assert "step_cache" in report["levers"]
    assert distance(quick, exact) > 0


def test_what_is_reported_is_what_was_computed(sdxl: Any) -> None:
    progress = RecordedProgress()

    with counting(sdxl.networks.unet.mid_block.resnets[0]) as calls:
        paint(sdxl, speed="balanced", progress=progress)

    # Ten guided steps of two forwards each, in one call; the first two are whole, and every second
    # one after them.
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


@pytest.mark.parametrize(("steps", "whole"), [(10, 2), (15, 3), (25, 5)])
def test_no_block_is_left_out_while_the_layout_is_decided(
    sdxl: Any, steps: int, whole: int
) -> None:
    deep: list[bool] = []
    count = sdxl.networks.unet.conv_in.register_forward_hook(lambda *_: deep.append(False))
    mark = sdxl.networks.unet.mid_block.resnets[0].register_forward_hook(
        lambda *_: deep.append(True)
    )

    try:
        paint(sdxl, steps=steps, speed="fast")
    finally:
        count.remove()
        mark.remove()

    # Each step begins with False, and is followed by True where its deep blocks were computed.
    starts = [index for index, each in enumerate(deep) if not each]
    computed = [any(deep[start + 1 : start + 2]) for start in starts]
    every = presets.SDXL["fast"].deep_cache_interval
    assert computed == [step < whole or (step - whole) % every == 0 for step in range(steps)]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_of_one_job_touches_the_next(sdxl: Any, wan: WanModel, preset: str) -> None:
    picture, video = paint(sdxl), film(wan)

    for _ in range(2):
        quick = paint(sdxl, speed=preset)
        assert distance(paint(sdxl, speed=preset), quick) == 0
    film(wan, speed=preset)

    assert distance(paint(sdxl), picture) == 0
    assert distance(film(wan), video) == 0


def test_a_job_that_is_stopped_amid_a_preset_leaves_the_model_as_good_as_new(
    sdxl: Any, wan: WanModel
) -> None:
    picture, video = paint(sdxl), film(wan)

    with pytest.raises(Cancelled):
        paint(sdxl, speed="fast", progress=stop_at_step(3))
    with pytest.raises(Cancelled):
        film(wan, speed="fast", progress=stop_at_step(3))

    assert distance(paint(sdxl), picture) == 0
    assert distance(film(wan), video) == 0


def test_batches_and_image_to_image_take_presets_too(sdxl: Any) -> None:
    progress = RecordedProgress()
    reference = StartImage(Image.new("RGB", (128, 64), "green"), 0.5)

    pictures = small_jobs.render(
        sdxl, seeds=(1, 2, 3), reference=reference, size=(128, 64), speed="fast", progress=progress
    )

    assert len(pictures) == 3
    assert progress.speed_reports[-1]["plain_forwards"] == STEPS


@pytest.fixture
def eager_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold at which a network of random weights leaves blocks out."""
    monkeypatch.setitem(presets.WAN, "fast", presets.SpeedPreset(first_block_threshold=0.6))


MODES = {
    "text": References(),
    "first frame": References(first=tiny_wan.picture(1)),
    "subject": References(subject=tiny_wan.picture(2)),
}


@pytest.mark.parametrize("mode", MODES)
def test_wan_leaves_blocks_out_where_the_first_changes_little(
    wan: WanModel, eager_cache: None, mode: str
) -> None:
    progress = RecordedProgress()
    network = wan.networks["t2v" if mode == "text" else "vace"].transformer
    first, last = network.blocks[0].ffn, network.blocks[-1].ffn

    with counting(first, last) as calls:
        film(wan, speed="fast", progress=progress, references=MODES[mode])

    (report,) = progress.speed_reports
    assert calls[first] == report["plain_forwards"] == 20
    assert 0 < calls[last] == report["forwards"] < 20
    assert report["shallow_forwards"] == 20 - report["forwards"]
    assert report["levers"] == ["step_cache"]


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_that_nothing_is_below_changes_no_bit(
    wan: WanModel, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setitem(presets.WAN, "fast", presets.SpeedPreset(first_block_threshold=1e-9))

    fast, exact = (film(wan, speed=speed, references=MODES[mode]) for speed in ("fast", "exact"))

    assert distance(fast, exact) == 0


def test_hints_of_a_reference_are_not_added_twice_where_blocks_are_left_out(
    wan: WanModel,
) -> None:
    network = wan.networks["vace"].transformer
    call = transformer_call(network)
    cache = FirstBlockCache(network, threshold=0.5)

    with torch.inference_mode(), cache.enabled():
        cache.begin_forward("positive")
        whole = network(**call)[0]
        left_out = network(**call)[0]

    # The same call again: what is used again is what would be computed.
    assert not cache.is_full
    torch.testing.assert_close(left_out, whole, atol=1e-4, rtol=0)


def test_diffusers_own_cache_adds_the_hints_twice_which_is_why_ours_is_there(
    wan: WanModel,
) -> None:
    # When this fails diffusers has mended it, and its cache may take the place of ours.
    network = copy.deepcopy(wan.networks["vace"].transformer)
    call, before_end, hints = transformer_call(network), list[Any](), list[Any]()
    network.norm_out.register_forward_hook(lambda _, given, __: before_end.append(given[0]))
    for block in network.vace_blocks:
        block.register_forward_hook(lambda _, __, made: hints.append(made[0]))
    network.enable_cache(FirstBlockCacheConfig(threshold=0.5))

    with torch.inference_mode(), network.cache_context("positive"):
        network(**call)
        made = dict(zip(network.config.vace_layers, hints, strict=True))
        network(**call)

    whole, left_out = before_end
    # What is added behind the last block is in no block's output, and is added once.
    between = sum(hint for layer, hint in made.items() if layer < len(network.blocks) - 1)
    assert between.abs().max() > 1
    torch.testing.assert_close(left_out - whole, between, atol=1e-3, rtol=0)


def test_a_distilled_checkpoint_takes_no_lever(wan_settings: Settings) -> None:
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
def test_a_preset_that_nobody_knows_is_refused_by_its_field(name: str) -> None:
    payload = {"id": "1", "type": name, "prompt": "a", "user_id": "u", "config": {"speed": "warp"}}

    with pytest.raises(InvalidPrompt, match=r"config\.speed: .*exact.*balanced.*fast"):
        jobs.parse({"input": payload}, Settings())


@pytest.mark.parametrize("name", TYPES)
def test_a_job_that_names_no_preset_is_exact(name: str) -> None:
    payload = {"id": "1", "type": name, "prompt": "a", "user_id": "u"}

    job: Any = jobs.parse({"input": payload}, Settings())

    assert job.config.speed == "exact"


def test_the_wire_knows_every_preset_and_no_other() -> None:
    for config, known in (
        (jobs.sdxl.SdxlConfig, presets.SDXL),
        (jobs.wan.WanConfig, presets.WAN),
    ):
        field: Any = config.model_fields["speed"].annotation
        assert set(field.__args__) == set(known)
