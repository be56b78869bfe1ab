"""Models of many architectures answer as transformers' `generate` does, or do not start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat import architecture
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_cuda_graph import FakeCudaGraphs
from tests.fakes.tiny_chat import (
    LLAMA_3_ROPE,
    generate_text,
    new_generation,
    texts_of,
    tiny_chat_model,
    tiny_decoder,
    tiny_tokenizer,
)

WINDOWED: dict[str, Any] = {
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
SERVED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "Qwen3": (Qwen3Config, {}),
    "Llama 3": (LlamaConfig, {"rope_parameters": LLAMA_3_ROPE}),
    "Mistral": (MistralConfig, {"sliding_window": None}),
    "Gemma 3": (Gemma3TextConfig, {**WINDOWED, "query_pre_attn_scalar": 16}),
    "Qwen3's mixture of experts": (Qwen3MoeConfig, {**EXPERTS, "moe_intermediate_size": 32}),
    "Mixtral": (MixtralConfig, {**EXPERTS, "sliding_window": None}),
}
PROMPTS = ["hello", "once upon a time there was a machine", "a", "why is the sky so blue"]


@pytest.mark.parametrize("name", SERVED)
def test_a_batch_of_replies_is_what_transformers_generates(name: str) -> None:
    kind, changes = SERVED[name]
    network = tiny_decoder(kind, **changes)
    architecture.check(network.config, context=512)
    theirs = [_generate(network, prompt) for prompt in PROMPTS]
    model = tiny_chat_model(network, prefill_tokens=16)

    ours = texts_of(model.engine, [new_generation(model, each, max_tokens=20) for each in PROMPTS])

    assert ours == theirs
    assert len(set(theirs)) == len(PROMPTS)


def _generate(network: Any, prompt: str) -> str:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer.encode(prompt)])
    made = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
    )
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", SERVED)
def test_steps_of_such_a_model_are_replayed(name: str) -> None:
    kind, changes = SERVED[name]
    graphs = FakeCudaGraphs()
    models = [
        tiny_chat_model(tiny_decoder(kind, **changes), capture=capture)
        for capture in (None, graphs)
    ]

    without, having = (generate_text(model, "hello", max_tokens=30) for model in models)

    assert having == without
    assert graphs.num_replayed > 0


DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "a window in all layers": (
        MistralConfig(num_hidden_layers=2, sliding_window=4096),
        "its attention has a window of 4096 tokens; CHAT_CONTEXT=4096, or less, serves it",
    ),
    "a window in some layers": (
        Gemma3TextConfig(num_hidden_layers=2, **{**WINDOWED, "sliding_window": 1024}),
        "its attention has a window of 1024 tokens; CHAT_CONTEXT=1024, or less, serves it",
    ),
    "pictures": (Gemma3Config(), "gemma3 reads more than text"),
    "sinks": (GptOssConfig(num_hidden_layers=2, num_local_experts=4), "its attention has sinks"),
    "compressed keys and values": (
        DeepseekV3Config(**DEEPSEEK),
        "its keys and values have another shape than its configuration says",
    ),
    "capped scores": (Gemma2Config(num_hidden_layers=2), "its attention caps its scores"),
    "scaled logits": (
        CohereConfig(num_hidden_layers=2),
        r"it changes its logits after the last layer \(mul\)",
    ),
    "linear attention": (
        Qwen3NextConfig(num_hidden_layers=4),
        "not all of its layers have the usual attention|the engine cannot run qwen3_next",
    ),
    "no attention": (MambaConfig(num_hidden_layers=2), "its configuration has no "),
    "positions that depend on the batch": (
        LlamaConfig(
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
                "original_max_position_embeddings": 2048,
            },
        ),
        "its positions depend on the longest text in the batch; CHAT_CONTEXT=2048, or less",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_the_engine_does_not_compute_is_refused(name: str) -> None:
    config, reason = REFUSED[name]

    with pytest.raises(ValueError, match=f"^({reason})"):
        architecture.check(config, context=8192)


def test_a_window_that_is_as_long_as_the_context_is_no_obstacle() -> None:
    architecture.check(MistralConfig(num_hidden_layers=2, sliding_window=4096), context=4096)


def test_a_worker_does_not_start_with_such_a_model_and_says_why(tmp_path: Path) -> None:
    tiny_decoder(MistralConfig, sliding_window=256).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = Settings(families=("chat",), chat_instruct_model=str(tmp_path), device="cpu")

    with pytest.raises(ModelLoadError, match=r"CHAT_INSTRUCT_MODEL.*has a window of 256 tokens"):
        chat_loader.load(settings)
