"""A real Qwen2 of a few thousand random weights, which writes letters; and what speaks to it."""

from __future__ import annotations

import string
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.chat.cuda_graphs import Record
from ourvidz_serverless.models.chat.engine import Engine, Generation, Limits
from ourvidz_serverless.models.chat.model import Chat, EngineReply, Writer
from ourvidz_serverless.models.chat.request import ChatRequest, Message, ModelName, SamplingParams
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Ledger
from tests.fakes.devices import card
from tests.patience import PATIENCE_S

CPU = Device(torch.device("cpu"), torch.float32)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CONTROL = tuple(AddedToken(name, special=True, normalized=False) for name in SPECIAL)
LETTERS = string.ascii_lowercase + " "


def tiny_tokenizer(
    control: Sequence[AddedToken] = CONTROL, **names: str
) -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's control tokens; further `names` are of transformers' own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(control))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<|im_end|>", **names}
    )


def tiny_model(seed: int = 0, context: int = 512, layers: int = 2) -> Any:
    """Its weights are so large that its likeliest tokens stand well apart."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
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


def tiny_llama(tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """The same of the other architecture, with Llama 3's stretched positions."""
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
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    return _that_writes_letters(LlamaForCausalLM(config).eval(), tokenizer)


def _that_writes_letters(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    written = tokenizer.backend_tokenizer.encode(LETTERS, add_special_tokens=False).ids
    silent = torch.ones(len(tokenizer), dtype=torch.bool)
    silent[written] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    return model


def tiny_folder(path: Path, context: int = 4096, layers: int = 2) -> str:
    """Model and tokenizer where `CHAT_INSTRUCT_MODEL` can find them; more layers, slower."""
    tiny_model(context=context, layers=layers).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def tiny_writer(model: Any = None, record: Record | None = None, **limits: int) -> Writer:
    tokens = ChatTokenizer(tiny_tokenizer())
    return Writer(model or tiny_model(), tokens, CPU, Limits(**limits), record=record)


def tiny_chat(context: int = 512, **limits: int) -> Chat:
    writer = tiny_writer(tiny_model(context=context), **limits)
    ledger = card(writer.num_bytes)
    ledger.register(writer, "qwen_instruct", "chat")
    return Chat({"qwen_instruct": writer, "qwen_base": writer}, CPU, context, ledger)


def tiny_pair(places: int) -> Chat:
    """Two models of different weights, of which so many may be on the device."""
    writers = {"qwen_instruct": tiny_writer(), "qwen_base": tiny_writer(tiny_model(seed=1))}
    ledger: Ledger = card(places * writers["qwen_base"].num_bytes)
    for name, writer in writers.items():
        ledger.register(writer, name, "chat")
    return Chat(writers, CPU, 512, ledger)


class Leave:
    """A check that can be told to raise."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self) -> None:
        if self.is_set:
            raise Cancelled("the job was cancelled")


class Gate(Leave):
    """A check that lets the engine take so many turns, and holds it until it gets more."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.holds = False
        self._turns = threading.Semaphore(turns)

    def __call__(self) -> None:
        self.holds = not self._turns.acquire(blocking=False)
        if self.holds:
            assert self._turns.acquire(timeout=PATIENCE_S)
        super().__call__()

    def let(self, turns: int) -> None:
        self.holds = False
        self._turns.release(turns)

    def open(self) -> None:
        self.let(10_000)


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


def request(writer: Writer, prompt: str, check: Any = None, shared: str = "", **rules: Any) -> Any:
    """A request for the words after `shared + prompt`, greedy unless `rules` say otherwise."""
    sampling = SamplingParams(**{"max_tokens": 12, "temperature": 0, **rules})
    ids = writer.tokens.encode(shared + prompt)
    num_shared = len(writer.tokens.encode(shared))
    options = {"check": check} if check else {}
    return Generation(ids, sampling, writer.tokens.decode, num_shared=num_shared, **options)


def say(engine: Engine, generation: Generation) -> str:
    engine.submit(generation)
    return "".join(generation)


def say_all(engine: Engine, generations: list[Generation]) -> list[str]:
    """The replies of requests that are all there at once, each heard by its own thread."""
    for generation in generations:
        engine.submit(generation)
    with ThreadPoolExecutor(len(generations)) as threads:
        return list(threads.map("".join, generations))


def until(is_so: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)
