"""The attention kernel of each network, and the cache of a prompt's keys and values."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch.nn.attention import _cur_sdpa_kernel_backends

from benchmarks import architectures
from ourvidz_serverless.errors import Cancelled, ModelLoadError
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.sdxl import loader as sdxl_models
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.recorded_progress import RecordedProgress
from tests.files import ROOT
from tests.models.speed.rendering import (
    CPU,
    STEPS,
    counting,
    render_image,
    transformer_call,
    unet_call,
)

SPEED = ROOT / "docs/speed.md"


def test_every_attention_of_every_network_can_be_set(sdxl: Any, wan: WanModel) -> None:
    attentions = sum(isinstance(each, Attention) for each in sdxl.networks.unet.modules())

    assert num_settable(sdxl.networks.unet) == attentions > 0
    for network in wan.networks.values():
        blocks = [*network.transformer.blocks, *getattr(network.transformer, "vace_blocks", ())]
        assert num_settable(network.transformer) == 2 * len(blocks)


def num_settable(network: Any) -> int:
    processors = [getattr(each, "processor", None) for each in network.modules()]
    return sum(hasattr(each, "_attention_backend") for each in processors)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, ...]]:
    """The kernels that torch could choose from, for each attention that was computed."""
    seen: set[tuple[str, ...]] = set()
    compute = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        seen.add(tuple(each.name for each in _cur_sdpa_kernel_backends()))
        return compute(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


@pytest.mark.parametrize(("name", "kernel"), [("math", "MATH"), ("flash", "FLASH_ATTENTION")])
def test_the_kernel_that_is_set_computes_the_attention(
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


def test_an_attention_kernel_that_the_device_lacks_ends_the_start() -> None:
    with pytest.raises(ModelLoadError, match="ATTENTION_BACKEND: this device has no cudnn"):
        sdxl_models.load(Settings(attention_backend="cudnn"))


def test_the_setting_accepts_exactly_the_attention_kernels_there_are() -> None:
    known = Settings.model_json_schema()["properties"]["attention_backend"]["enum"]

    assert set(known) == set(attention.BACKENDS)


# --- a prompt's keys and values ---


def key_projections(unet: Any) -> list[Any]:
    """The layers that make the keys of a prompt, in all cross-attentions of a UNet."""
    return [each.to_k for name, each in unet.named_modules() if name.endswith("attn2")]


def with_cached_keys(unet: Any) -> list[Any]:
    """The attention processors that have a prompt's keys in their cache."""
    processors = [each.processor for each in unet.modules() if isinstance(each, Attention)]
    return [each for each in processors if each.cached]


def test_cached_prompt_keys_change_no_bit_of_the_unets_output(
    sdxl: Any,
) -> None:
    unet, call = sdxl.networks.unet, unet_call(sdxl.networks.unet)
    prompts = [call["encoder_hidden_states"], torch.randn(1, 77, unet.config.cross_attention_dim)]
    steps = [(900, prompts[0]), (600, prompts[0]), (300, prompts[1]), (0, prompts[1])]

    def forwards() -> list[torch.Tensor]:
        timed = [{"timestep": torch.tensor(at), "encoder_hidden_states": of} for at, of in steps]
        return [unet(**{**call, **each})[0] for each in timed]

    with torch.inference_mode(), counting(*key_projections(unet)) as calls:
        uncached, num_uncached = forwards(), calls.total()
        with attention.cached_prompt_keys(unet):
            made = forwards()

    assert all(torch.equal(*pair) for pair in zip(made, uncached, strict=True))
    assert num_uncached == len(steps) * len(key_projections(unet))
    assert calls.total() - num_uncached == len(prompts) * len(key_projections(unet))


@pytest.mark.parametrize(("seeds", "batches"), [((3,), 1), ((3, 4), 1), ((3, 4, 5), 2)])
def test_a_job_computes_its_prompts_keys_once_for_each_batch(
    sdxl: Any, seeds: tuple[int, ...], batches: int
) -> None:
    model = SdxlModel(sdxl.networks, sdxl.device, plans=MemoryPlans(SdxlMemoryPlan(2)))

    with counting(*key_projections(sdxl.networks.unet)) as calls:
        tiny_sdxl.render(model, seeds=seeds)

    assert {calls[each] for each in key_projections(sdxl.networks.unet)} == {batches}


def test_under_low_vram_a_prompts_keys_are_not_cached(sdxl: Any) -> None:
    plans = sdxl_models.low_vram_plans()
    model = SdxlModel(sdxl.networks, sdxl.device, plans=plans)

    with counting(*key_projections(model.networks.unet)) as calls:
        render_image(model)

    assert {calls[each] for each in key_projections(model.networks.unet)} == {STEPS}


@pytest.mark.parametrize("error", [None, Cancelled("stopped"), torch.OutOfMemoryError("full")])
def test_cached_prompt_keys_do_not_outlive_their_job(sdxl: Any, error: Exception | None) -> None:
    model = SdxlModel(sdxl.networks, sdxl.device)
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        seen.append(len(with_cached_keys(model.networks.unet)))
        if error and len(seen) == 3:
            raise error

    with suppress(Cancelled):
        render_image(model, progress=RecordedProgress(on_step=look))

    assert set(seen[:3]) == {len(key_projections(model.networks.unet))}
    assert with_cached_keys(model.networks.unet) == []
    # The job that ran out of memory goes on with a lean plan.
    assert error is None or set(seen[3:]) <= {0}


def test_compiled_blocks_compute_a_prompts_keys_at_every_call(sdxl: Any) -> None:
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


def test_the_documented_memory_of_cached_prompt_keys_is_right() -> None:
    with architectures.made_on("meta", torch.float16):
        unet = UNet2DConditionModel(**architectures.SDXL_UNET)
    # Keys and values of 77 tokens, two bytes each, for the prompt and the negative one.
    num_bytes = sum(2 * 77 * 2 * 2 * each.out_features for each in key_projections(unet))

    assert num_bytes == 51_251_200
    assert f"{num_bytes / 2**20:.0f} MiB a guided picture" in SPEED.read_text(encoding="utf-8")
