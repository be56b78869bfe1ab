"""Replayed decode steps give the same texts, and a capture that fails loses no reply."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.chat import cuda_graphs, norms
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.kv_cache import KVCache
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler, sample
from tests.fakes.fake_cuda_graph import (
    FakeCudaGraphs,
    FixedPositions,
    OperationLog,
    capture_result,
    failing_capture,
    num_computed,
)
from tests.fakes.tiny_chat import (
    CPU,
    Gate,
    generate_text,
    new_generation,
    text_of,
    texts_of,
    tiny_chat_model,
    tiny_llama,
    tiny_network,
    until,
)

PROMPTS = [f"question {i} " + "and so on " * (i % 7) for i in range(24)]
SYSTEM = "you are a patient machine that writes letters. " * 3
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "top_p": 0.9, "seed": 5},
    {"temperature": 1.1, "top_k": 9, "seed": 6, "repetition_penalty": 1.2},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
]


@pytest.fixture(scope="module")
def plain() -> ChatModel:
    return tiny_chat_model()


def make(model: ChatModel, at: int) -> Generation:
    shared = SYSTEM if at % 2 else ""
    params = {"max_tokens": 5 + at % 17, **PARAMS[at % len(PARAMS)]}
    return new_generation(model, PROMPTS[at], shared=shared, **params)


def count_calls(network: Any) -> list[int]:
    """A counter of the forwards that run the network's Python."""
    calls = [0]

    def note(module: Any, given: Any) -> None:
        calls[0] += 1

    network.base_model.register_forward_pre_hook(note)
    return calls


# --- the same texts ---


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch": 3}, {"prefill_tokens": 8}, {"kv_tokens": 2048}]
)
def test_replies_are_the_same_when_requests_come_and_go(
    plain: ChatModel, limits: dict[str, int]
) -> None:
    fake_graphs = FakeCudaGraphs()
    model = tiny_chat_model(capture=fake_graphs, **limits)
    alone = [text_of(plain.engine, make(plain, at)) for at in range(24)]

    assert texts_of(model.engine, [make(model, at) for at in range(24)]) == alone
    assert fake_graphs.num_replayed > fake_graphs.num_captured > 0
    assert not model.engine.graphs.is_off


def test_a_replayed_step_runs_no_python_of_the_network() -> None:
    network, fake_graphs = tiny_network(), FakeCudaGraphs()
    calls = count_calls(network)
    model = tiny_chat_model(network, fake_graphs)

    generate_text(model, "hello", max_tokens=60)

    # The prompt, two steps without a graph, the capture, and the step that is compared.
    assert calls == [5]
    assert (fake_graphs.num_captured, model.engine.graphs.num_replayed) == (1, 56)


def test_replies_are_the_same_when_they_cross_buckets_and_the_cache_grows(plain: ChatModel) -> None:
    fake_graphs = FakeCudaGraphs()
    model = tiny_chat_model(capture=fake_graphs)
    texts, lengths = ["a" * 20, "b" * 200, "c" * 20], [40, 120, 40]

    def both(engine_of: ChatModel) -> list[str]:
        return [
            generate_text(engine_of, text, max_tokens=tokens)
            for text, tokens in zip(texts, lengths, strict=True)
        ]

    assert both(model) == both(plain)
    # 8 and 16 pages of 32 tokens. The cache does not move, so the third text needs no capture.
    assert model.engine.graphs.buckets == [(1, 16), (1, 8)]
    assert fake_graphs.num_captured == 2


def test_a_llama_is_replayed_too() -> None:
    fake_graphs = FakeCudaGraphs()
    plain, model = tiny_chat_model(tiny_llama()), tiny_chat_model(tiny_llama(), fake_graphs)

    expected = generate_text(plain, "hello", max_tokens=100)

    assert generate_text(model, "hello", max_tokens=100) == expected
    assert fake_graphs.num_replayed > 50


def test_replayed_json_is_the_same_as_computed_json(plain: ChatModel) -> None:
    fake_graphs = FakeCudaGraphs()
    model = tiny_chat_model(capture=fake_graphs)

    def answer(of: ChatModel, seed: int) -> str:
        sampling = SamplingParams(max_tokens=60, temperature=1.5, seed=seed)
        grammar = of.grammars.matcher(SCHEMA)
        return text_of(
            of.engine,
            Generation(of.tokenizer.encode("x"), sampling, of.tokenizer.decode, grammar=grammar),
        )

    assert [answer(model, seed) for seed in range(3)] == [answer(plain, seed) for seed in range(3)]
    assert fake_graphs.num_replayed > 0


def test_a_cancelled_request_does_not_change_replayed_replies(plain: ChatModel) -> None:
    model = tiny_chat_model(capture=FakeCudaGraphs())
    gate = Gate(steps=3)
    alone = [generate_text(plain, text, max_tokens=60) for text in PROMPTS[:4]]
    leaving = new_generation(model, "short", check=gate, max_tokens=400)
    staying = [new_generation(model, text, max_tokens=60) for text in PROMPTS[:4]]
    model.engine.submit(leaving)
    for each in staying:
        model.engine.submit(each)
    gate.allow(20)
    until(lambda: gate.is_blocking)
    gate.is_cancelled = True
    gate.open()

    with pytest.raises(Cancelled):
        list(leaving)
    assert ["".join(each) for each in staying] == alone


# --- operations of a step ---


def operations(layers: int) -> int:
    """The number of operations that compute something in one captured step."""
    network, counts = tiny_network(layers=layers), []

    def count(compute: Any) -> Any:
        counts.append(num_computed(compute))
        return FakeCudaGraphs()(compute)

    model = tiny_chat_model(network, count)
    generate_text(model, "hello", max_tokens=4)
    return counts[0]


def test_one_layer_takes_28_operations_of_which_two_copy_pages() -> None:
    assert operations(layers=3) - operations(layers=2) == 28


@pytest.mark.parametrize(
    ("dtype", "apart"), [(torch.float32, 0.0), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)]
)
def test_fused_norms_differ_in_the_last_bits_at_most(dtype: torch.dtype, apart: float) -> None:
    norm = Qwen2RMSNorm(256).to(dtype)
    torch.manual_seed(0)
    hidden = torch.randn(9, 1, 256, dtype=dtype) * 3
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        expected = norm(hidden)
        norms.fuse(norm)
        fused = norm(hidden)

    assert torch.all((fused - expected).abs() <= apart * expected.abs())


# --- how long a graph is kept, and how many ---


def test_graphs_are_dropped_with_the_weights_and_captured_again(plain: ChatModel) -> None:
    fake_graphs = FakeCudaGraphs()
    model = tiny_chat_model(capture=fake_graphs)
    first = generate_text(model, "hello", max_tokens=20)

    model.to_host()
    assert model.engine.graphs.buckets == []
    model.to_device()

    assert generate_text(model, "hello", max_tokens=20) == first
    assert fake_graphs.num_captured == 2


def test_after_an_out_of_memory_graphs_are_captured_again(plain: ChatModel) -> None:
    network, fake_graphs = tiny_network(), FakeCudaGraphs()
    is_full = [True]

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["pages"].batch.counts == [1, 1] and is_full[0]:
            is_full[0] = False
            raise torch.OutOfMemoryError("full")

    network.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    model = tiny_chat_model(network, fake_graphs)
    alone = [generate_text(plain, text) for text in PROMPTS[:2]]

    assert texts_of(model.engine, [new_generation(model, text) for text in PROMPTS[:2]]) == alone
    assert not is_full[0]
    assert not model.engine.graphs.is_off


def test_a_cache_for_graphs_never_moves_where_there_is_room() -> None:
    cache = KVCache(tiny_network().config, CPU.name, CPU.dtype, page_tokens=32)
    sizes = []
    for num_pages in (1, 20, 300):
        cache.reserve(num_pages, most=300, at_once=True)
        sizes.append((cache.num_pages, cache.version))

    assert sizes == [(300, 2)] * 3


def test_a_cache_for_graphs_grows_as_it_is_needed_where_room_is_short() -> None:
    cache = KVCache(tiny_network().config, CPU.name, CPU.dtype, page_tokens=32)
    with Refusing(most_numbers=100 * 32 * 16):
        sizes = []
        for num_pages in (1, 20, 90):
            cache.reserve(num_pages, most=300, at_once=True)
            sizes.append(cache.num_pages)

    assert sizes == [1, 20, 90]
    assert {len(each) for layer in cache.layers for each in layer} == {90}


class Refusing(TorchDispatchMode):
    """Refuses to make tensors of more than so many numbers."""

    def __init__(self, most_numbers: int) -> None:
        super().__init__()
        self.most_numbers = most_numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.numel() > self.most_numbers:
            raise torch.OutOfMemoryError("full")
        return made


def test_all_steps_fall_into_42_buckets() -> None:
    shapes = cuda_graphs.Buckets(max_rows=64, least=8, most=256)
    used = {
        shapes.of([[0, 0, *[1] * pages]] * rows)
        for rows, pages in itertools.product(range(1, 65), range(1, 257, 3))
    }

    assert used == set(shapes.all())
    assert len(used) == 42


def test_steps_of_an_attention_that_reads_only_what_is_used_fall_into_seven_buckets() -> None:
    shapes = cuda_graphs.Buckets(max_rows=64, least=32, most=32)

    assert shapes.all() == [(rows, 32) for rows in (1, 2, 4, 8, 16, 32, 64)]


def test_a_text_with_more_pages_than_any_bucket_is_computed_without_a_graph() -> None:
    shapes = cuda_graphs.Buckets(max_rows=4, least=8, most=16)

    assert shapes.of([[0, 0, *[1] * 17]]) is None


def test_after_the_warm_up_no_step_is_captured_and_none_is_computed_by_python(
    plain: ChatModel,
) -> None:
    network, fake_graphs = tiny_network(), FakeCudaGraphs()
    model = tiny_chat_model(network, fake_graphs, max_batch=4, prefill_tokens=4096)
    model.engine.record_graphs()
    generate_text(model, "hello")
    recorded = fake_graphs.num_captured
    alone = [text_of(plain.engine, make(plain, at)) for at in range(6)]
    computed: list[int] = []
    network.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: computed.append(max(kwargs["pages"].batch.counts)), with_kwargs=True
    )

    assert texts_of(model.engine, [make(model, at) for at in range(6)]) == alone
    # One, two and four rows, and texts of up to 256 and 512 tokens.
    assert fake_graphs.num_captured == recorded == 6
    assert min(computed) > 1
    assert not model.engine.graphs.is_off


def test_a_capture_that_fails_in_the_warm_up_loses_no_reply(plain: ChatModel) -> None:
    model = tiny_chat_model(capture=capture_result)
    model.engine.record_graphs()

    assert generate_text(model, "hello") == generate_text(plain, "hello")
    assert model.engine.graphs.is_off


def test_the_least_recently_used_graph_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    model = tiny_chat_model(capture=FakeCudaGraphs())

    for at_once in (4, 1, 2):
        texts_of(
            model.engine, [new_generation(model, "hello", max_tokens=30) for _ in range(at_once)]
        )

    assert len(model.engine.graphs.buckets) == 2


# --- captures that fail ---


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        (capture_result, "it computed something else"),
        (FixedPositions(), "it computed something else"),
        (failing_capture(torch.OutOfMemoryError("full")), "OutOfMemoryError"),
        (failing_capture(RuntimeError("secret")), "RuntimeError"),
        (failing_capture(RuntimeError("secret"), after=9), "RuntimeError"),
    ],
    ids=["fixed result", "fixed positions", "out of memory", "refused", "later"],
)
def test_a_capture_that_fails_is_one_warning_and_loses_no_reply(
    plain: ChatModel, capture: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_chat_model(capture=capture)
    expected = [text_of(plain.engine, make(plain, at)) for at in range(8)]

    with caplog.at_level(logging.WARNING, "ourvidz"):
        replies = [text_of(model.engine, make(model, at)) for at in range(8)]

    assert replies == expected
    assert [each.getMessage() for each in caplog.records] == [
        f"CHAT_GRAPHS: no step is replayed from now on ({why})"
    ]
    assert model.engine.graphs.is_off
    until(lambda: model.engine.num_running == 0)


def test_what_a_wrong_graph_wrote_to_the_cache_is_computed_again(plain: ChatModel) -> None:
    model = tiny_chat_model(capture=FixedPositions())

    replies = [generate_text(of, "x", max_tokens=60) for of in (model, plain)]

    assert replies[0] == replies[1]
    assert model.engine.graphs.is_off


def test_nothing_is_captured_on_a_cpu_or_if_it_is_switched_off() -> None:
    config = Qwen2Config()

    assert cuda_graphs.choose_capture("auto", CPU, config) is None
    assert cuda_graphs.choose_capture("off", CPU, config) is None


# --- waits of the host ---


def test_the_host_waits_for_nothing_but_the_tokens() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(SamplingParams(max_tokens=9, **each), prompt=[1, 2]) for each in PARAMS]

    with OperationLog() as operations:
        for _ in range(3):
            for sampler, token in zip(samplers, sample(logits.clone(), samplers), strict=True):
                sampler.accept(token)

    assert [name for name in operations.waits if name != "lift_fresh"] == []
