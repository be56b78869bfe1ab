"""Chat on a real device: graphs against eager steps, long contexts, and sampling."""

from typing import Any

import pytest
import torch

from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.cuda_graphs import CudaGraphs
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler, sample
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import generate_text, new_generation, texts_of, tiny_folder
from tests.gpu.devices import DEVICE, ON_A_DEVICE, needs_cuda, noted_waits

pytestmark = ON_A_DEVICE


def load_tiny_chat(
    folder: str, graphs: str = "auto", dtype: str = "float32", device: str = DEVICE
) -> ChatModel:
    """A small chat model. In float32 kernels that round differently choose the same tokens."""
    settings = Settings(
        families=("chat",),
        device=device,
        dtype=dtype,
        chat_instruct_model=folder,
        chat_graphs=graphs,
    )
    return chat_loader.load(settings).models["qwen_instruct"]


def replies(model: ChatModel) -> list[str]:
    """Greedy and seeded replies that are generated together and end one after another."""
    sampling = [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.1}]
    generations = [
        new_generation(model, f"question {at} ", max_tokens=20 + 9 * at, **sampling[at % 3])
        for at in range(7)
    ]
    return texts_of(model.engine, generations)


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@needs_cuda
def test_a_gpu_gives_the_replies_that_a_cpu_gives(tiny_weights: str) -> None:
    on_cpu, on_gpu = load_tiny_chat(tiny_weights, device="cpu"), load_tiny_chat(tiny_weights)

    assert replies(on_gpu) == replies(on_cpu)


def test_a_long_conversation_beside_short_ones_gets_the_reply_that_it_gets_alone(
    tiny_weights: str,
) -> None:
    model = load_tiny_chat(tiny_weights)
    prompts = ["a long story " * 250, "short", "of some length " * 20]

    together = texts_of(model.engine, [new_generation(model, each) for each in prompts])

    assert together == [generate_text(model, each) for each in prompts]


@needs_cuda
def test_a_long_conversation_has_the_same_reply_from_graphs(tiny_weights: str) -> None:
    eager, replayed = load_tiny_chat(tiny_weights, "off"), load_tiny_chat(tiny_weights)
    prompt = "a long story " * 250

    made = [generate_text(model, prompt, max_tokens=60) for model in (eager, replayed)]

    assert made[0] == made[1]


@needs_cuda
def test_a_chat_model_that_left_the_device_answers_as_before(tiny_weights: str) -> None:
    model = load_tiny_chat(tiny_weights)
    expected = generate_text(model, "hello", max_tokens=40)

    model.to_host()
    model.to_device()

    assert generate_text(model, "hello", max_tokens=40) == expected


@needs_cuda
def test_replies_from_cuda_graphs_are_the_same_as_without_them(tiny_weights: str) -> None:
    eager, replayed = load_tiny_chat(tiny_weights, "off"), load_tiny_chat(tiny_weights)

    assert replies(replayed) == replies(eager)
    replay = replayed.engine.graphs
    assert replay is not None and not replay.is_off
    assert replay.num_replayed > replay.num_captured > 1
    assert eager.engine.graphs is None


@needs_cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_graphs_are_used_in_half_precision(tiny_weights: str, dtype: str) -> None:
    model = load_tiny_chat(tiny_weights, dtype=dtype)

    replies(model)

    replay = model.engine.graphs
    assert replay is not None and not replay.is_off
    assert replay.num_replayed > 0


@needs_cuda
def test_cuda_graphs_are_dropped_with_the_weights_and_free_their_memory(tiny_weights: str) -> None:
    model = load_tiny_chat(tiny_weights)
    replay = model.engine.graphs
    assert replay is not None
    first = generate_text(model, "hello", max_tokens=40)
    made = replay.num_captured

    with_graphs = torch.cuda.memory_reserved()
    model.to_host()
    assert replay.buckets == []
    assert torch.cuda.memory_reserved() < with_graphs
    model.to_device()

    assert generate_text(model, "hello", max_tokens=40) == first
    assert replay.num_captured == 2 * made
    assert not replay.is_off


@needs_cuda
def test_a_failed_capture_leaves_the_stream_usable() -> None:
    numbers = torch.ones(4, device="cuda")
    capture, stream = CudaGraphs(numbers.device), torch.cuda.current_stream()

    with pytest.raises(RuntimeError):
        capture(lambda: numbers * numbers.sum().item())

    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    double = capture(lambda: numbers * 2)
    numbers.fill_(21)
    assert double().tolist() == [42.0] * 4


@needs_cuda
def test_sampling_a_token_waits_for_the_gpu_once() -> None:
    logits = torch.randn(3, 5000, device="cuda")
    params: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.1}, {"temperature": 0}]
    samplers = [
        Sampler(SamplingParams(max_tokens=9, **{"top_k": 40, "seed": 1, **each}), [1])
        for each in params
    ]
    with noted_waits() as waits:
        sample(logits, samplers)

    assert len(waits) == 1
