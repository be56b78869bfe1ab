"""A real Qwen2 with a few thousand random weights that writes letters, and functions to run it."""

from __future__ import annotations

import string
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.chat.cuda_graphs import Capture
from ourvidz_serverless.models.chat.engine import Engine, EngineLimits
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.model import Chat, ChatModel, EngineReply
from ourvidz_serverless.models.chat.request import ChatRequest, Message, ModelName, SamplingParams
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import CacheSalt
from tests.fakes.devices import fake_ledger
from tests.patience import PATIENCE_S, start

CPU = Device(torch.device("cpu"), torch.float32)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CONTROL = tuple(AddedToken(name, special=True, normalized=False) for name in SPECIAL)
LETTERS = string.ascii_lowercase + " "

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_tokenizer(
    control: Sequence[AddedToken] = CONTROL, **names: str
) -> PreTrainedTokenizerFast:
    """One token for each byte, and the control tokens; `names` go to transformers' tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(control))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", **names}
    )


def tiny_network(seed: int = 0, context: int = 512, layers: int = 2, hidden: int = 32) -> Any:
    """Large weights, so that the likeliest tokens have clearly different logits."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        bos_token_id=None,
    )
    return _that_writes_letters(Qwen2ForCausalLM(config).eval(), tokenizer)


def tiny_decoder(kind: type[PreTrainedConfig], **changes: Any) -> Any:
    """A network of the architecture that a configuration class of transformers describes."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    network = AutoModelForCausalLM.from_config(kind(**{**sizes, **changes}))
    return _that_writes_letters(network.eval(), tokenizer)


def tiny_llama(tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """The same network with the Llama architecture and the position scaling of Llama 3."""
    torch.manual_seed(0)
    tokenizer = tokenizer or tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters=LLAMA_3_ROPE,
    )
    return _that_writes_letters(LlamaForCausalLM(config).eval(), tokenizer)


def _that_writes_letters(network: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    letters = tokenizer.backend_tokenizer.encode(LETTERS, add_special_tokens=False).ids
    is_silent = torch.ones(len(network.lm_head.weight), dtype=torch.bool)
    is_silent[letters] = False
    with torch.no_grad():
        network.lm_head.weight[is_silent] = 0
    return network


def tiny_folder(path: Path, context: int = 4096, layers: int = 2, hidden: int = 32) -> str:
    """A checkpoint for `CHAT_INSTRUCT_MODEL`; with more layers it is slower."""
    tiny_network(context=context, layers=layers, hidden=hidden).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def tiny_chat_model(
    network: Any = None, capture: Capture | None = None, **limits: int
) -> ChatModel:
    tokenizer = ChatTokenizer(tiny_tokenizer())
    engine_limits = EngineLimits(**limits)
    return ChatModel(network or tiny_network(), tokenizer, CPU, engine_limits, capture=capture)


def tiny_chat(context: int = 512, cache_salt: CacheSalt = "none", **limits: int) -> Chat:
    """One model that serves under both names."""
    model = tiny_chat_model(tiny_network(context=context), **limits)
    ledger = fake_ledger(model.num_bytes)
    ledger.register(model, "qwen_instruct", "chat")
    models: dict[ModelName, ChatModel] = {"qwen_instruct": model, "qwen_base": model}
    return Chat(models, CPU, context, ledger, cache_salt)


def tiny_pair(places: int) -> Chat:
    """Two models with different weights, on a device with memory for `places` of them."""
    models: dict[ModelName, ChatModel] = {
        "qwen_instruct": tiny_chat_model(),
        "qwen_base": tiny_chat_model(tiny_network(seed=1)),
    }
    ledger: Ledger = fake_ledger(places * models["qwen_base"].num_bytes)
    for name, model in models.items():
        ledger.register(model, name, "chat")
    return Chat(models, CPU, 512, ledger)


class CancelCheck:
    """A check that raises Cancelled once `is_cancelled` is set."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def __call__(self) -> None:
        if self.is_cancelled:
            raise Cancelled("the job was cancelled")


class Gate(CancelCheck):
    """A check that blocks the engine after `steps` steps, until `allow` allows more."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.is_blocking = False
        self._steps = threading.Semaphore(steps)

    def __call__(self) -> None:
        self.is_blocking = not self._steps.acquire(blocking=False)
        if self.is_blocking:
            assert self._steps.acquire(timeout=PATIENCE_S)
        super().__call__()

    def allow(self, steps: int) -> None:
        self.is_blocking = False
        self._steps.release(steps)

    def open(self) -> None:
        self.allow(10_000)


def ask(
    chat: Chat,
    *messages: Message,
    check: Callable[[], None] = lambda: None,
    model: ModelName = "qwen_instruct",
    truncate: Literal["oldest"] | None = None,
    schema: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> EngineReply:
    """A reply to a conversation; `sampling` as in `SamplingParams`."""
    params = SamplingParams(**sampling)
    return chat.generate(ChatRequest(messages, params, model, truncate, schema), check)


def prompt_ids(reply: EngineReply) -> list[int]:
    """The tokens of the prompt that a reply answers."""
    return reply.generation.ids[: reply.generation.num_prompt]


def new_generation(
    model: ChatModel,
    prompt: str,
    check: Any = None,
    shared: str = "",
    salt: str = "",
    **sampling: Any,
) -> Generation:
    """A request to continue `shared + prompt`, greedy unless `sampling` says otherwise."""
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0, **sampling})
    ids = model.tokenizer.encode(shared + prompt)
    options = {"check": check} if check else {}
    return Generation(ids, params, model.tokenizer.decode, cache_salt=salt, **options)


def text_of(engine: Engine, generation: Generation) -> str:
    """The reply to one request."""
    engine.submit(generation)
    return rest_of(generation)


def generate_text(model: ChatModel, prompt: str, **options: Any) -> str:
    """The reply to one `new_generation`."""
    return text_of(model.engine, new_generation(model, prompt, **options))


def texts_of(engine: Engine, generations: list[Generation]) -> list[str]:
    """The replies to requests that are submitted together. A thread of its own reads each."""
    for generation in generations:
        engine.submit(generation)
    readers = [start("".join, generation) for generation in generations]
    return [reader.result(PATIENCE_S) for reader in readers]


def rest_of(pieces: Iterable[str]) -> str:
    """All pieces of a reply, to its end. Fails if the reply does not end."""
    return start("".join, pieces).result(PATIENCE_S)


def until(is_so: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)
