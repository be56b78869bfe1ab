"""Chat: Qwen2.5's instruct and base models (or a Llama of the same chat format) on the engine."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError, WorkerUnavailable
from ourvidz_serverless.models.chat import quantization
from ourvidz_serverless.models.chat.cache_budget import Room
from ourvidz_serverless.models.chat.cuda_graphs import Record, recorder
from ourvidz_serverless.models.chat.engine import Engine, Generation, Limits
from ourvidz_serverless.models.chat.grammar import Grammars
from ourvidz_serverless.models.chat.request import (
    ChatRequest,
    Message,
    ModelName,
    ReplyStats,
    SamplingParams,
)
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer
from ourvidz_serverless.models.loading import checkpoints, weight_files
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors, Read
from ourvidz_serverless.settings import Settings

POCKET = Path(__file__).parents[3] / ".cache" / "pocket_chat"

#: Decoders whose attention sees every earlier token, which is all that the engine's cache knows.
ARCHITECTURES = ("qwen2", "llama")

#: A system prompt, a prompt and its enhancement, in tokens: the shortest context of WAN's model.
ENHANCER_CONTEXT = 1024


def load(settings: Settings, ledger: Ledger | None = None) -> Chat:
    """The models of `CHAT_INSTRUCT_MODEL` and, where it is set, `CHAT_BASE_MODEL`.

    Raises ModelLoadError with one line when weights are missing, corrupt or of another kind.
    """
    ledger = ledger or open_ledger(settings)
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    asked: dict[ModelName, tuple[str, str | None]] = {
        "qwen_instruct": ("CHAT_INSTRUCT_MODEL", settings.chat_instruct_model),
        "qwen_base": ("CHAT_BASE_MODEL", settings.chat_base_model),
    }
    # By place, so that the same weights under both names are loaded once.
    names = {place: name for name, (_, place) in reversed(asked.items()) if place}
    loaded = {
        place: _read(asked[name][0], place, settings, device) for place, name in names.items()
    }
    models = {asked[names[place]][0]: model for place, (model, _) in loaded.items()}
    limits = Room(ledger, device, settings, models).limits()
    writers = {}
    for place, each in loaded.items():
        variable, _ = asked[names[place]]
        writers[place] = _writer(variable, place, each, limits, settings, device)
        ledger.register(
            writers[place],
            names[place],
            "chat",
            source=Path(place).name,
            reserved_bytes=writers[place].engine.cache_bytes,
        )
    served = {name: writers[place] for name, (_, place) in asked.items() if place}
    ledger.preload(*served.values())
    return Chat(served, device, settings.chat_context, ledger)


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError where the device cannot do what the settings ask of chat."""
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    quantization.check(settings.chat_quantization, device)


def load_one(
    variable: str, place: str, name: str, settings: Settings, device: Device, ledger: Ledger
) -> Chat:
    """One model that answers as `qwen_instruct`, one conversation at a time, for WAN.

    It stands in the ledger under `name`. Raises ModelLoadError as `load`.
    """
    loaded = _read(variable, place, settings, device)
    room = Room(ledger, device, settings, {variable: loaded[0]}, ENHANCER_CONTEXT)
    limits = room.limits_with(room.context, max_batch=1)
    writer = _writer(variable, place, loaded, limits, settings, device)
    claimed = writer.engine.cache_bytes
    ledger.register(writer, name, "wan", source=Path(place).name, reserved_bytes=claimed)
    context = min(settings.chat_context, room.context)
    return Chat({"qwen_instruct": writer}, device, context, ledger)


def _writer(
    variable: str,
    place: str,
    loaded: tuple[Any, Any],
    limits: Limits,
    settings: Settings,
    device: Device,
) -> Writer:
    """A model and its tokenizer at work; it can be read anew from where it came."""
    model, tokens = loaded
    read = functools.partial(_reread, variable, place, settings, device)
    record = recorder(settings.chat_graphs, device, model.config)
    return Writer(model, tokens, device, limits, read, record)


def _reread(variable: str, place: str, settings: Settings, device: Device) -> list[Any]:
    return [_read(variable, place, settings, device)[0]]


def _read(variable: str, place: str, settings: Settings, device: Device) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    quantization.check(settings.chat_quantization, device)
    path = _find(variable, place, settings)
    with checkpoints.loading(variable, path, "chat"):
        is_mapped = checkpoints.is_mapped(path, settings.mmap_weights)
        return _open(path, device, is_mapped, settings.chat_quantization)


def _find(variable: str, place: str, settings: Settings) -> Path:
    if place != "pocket":
        return checkpoints.find(variable, place, settings.model_dirs)
    if not POCKET.exists():
        raise ModelLoadError(f"{variable}: there is nothing at {POCKET}; `make chat` puts it there")
    return POCKET


def _open(path: Path, device: Device, is_mapped: bool, quantized: str) -> tuple[Any, Any]:
    weight_files.check_configs(path, ["."])
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "use_sliding_window", False):
        raise ValueError("its attention has a sliding window")
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{config.model_type} is not one of {', '.join(ARCHITECTURES)}")
    checkpoints.check(path)
    model, told = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=device.dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        disable_mmap=not is_mapped,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **quantization.options(quantized, device),
    )
    weight_files.check_loading_info(told, len(model.state_dict()))
    tokens = ChatTokenizer(AutoTokenizer.from_pretrained(path, local_files_only=True))
    if quantized == "int4":
        # Packed on the device; where it lies from now on is the ledger's affair.
        model = model.to("cpu")
    return model.eval(), tokens


class Writer:
    """One model with its tokenizer and its engine."""

    def __init__(
        self,
        model: Any,
        tokens: ChatTokenizer,
        device: Device,
        limits: Limits | None = None,
        read: Read | None = None,
        record: Record | None = None,
    ) -> None:
        self._tensors = MovableTensors([model], device, read)
        self.tokens = tokens
        self.context: int = model.config.max_position_embeddings
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        ends = [*tokens.ends, *(token for token in own if token is not None)]
        self.grammars = Grammars(tokens.own, model.config.vocab_size, ends)
        self.engine = Engine(model, device, ends, limits, record)

    @property
    def num_bytes(self) -> int:
        return self._tensors.num_bytes

    @property
    def is_on_disk(self) -> bool:
        return self._tensors.is_on_disk

    def load(self) -> None:
        self._tensors.load()

    def to_device(self) -> None:
        self._tensors.to_device()

    def to_host(self) -> None:
        """Take the weights, and what was computed with them, off the device."""
        self.engine.forget()
        self._tensors.to_host()

    def drop(self) -> None:
        self.engine.forget()
        self._tensors.drop()


class EngineReply:
    """The reply of one generation; `on_end` is called when the iteration ends, in any way."""

    def __init__(
        self, generation: Generation, num_dropped: int, swap_s: float, on_end: Callable[[], None]
    ) -> None:
        self.generation = generation
        self._num_dropped, self._swap_s, self._on_end = num_dropped, swap_s, on_end

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self.generation
        finally:
            self._on_end()

    @property
    def stats(self) -> ReplyStats:
        return ReplyStats(
            self.generation.num_prompt,
            self.generation.num_completion,
            self.generation.num_reused,
            self._num_dropped,
            self.generation.finish_reason,
            self.generation.time_to_first_token_s,
            self.generation.tokens_per_second,
            self._swap_s,
        )


class Chat:
    """Answers conversations, many at once. Safe to call from any thread."""

    def __init__(
        self, writers: Mapping[ModelName, Writer], device: Device, context: int, ledger: Ledger
    ) -> None:
        self.device = device
        self._ledger = ledger
        self._writers = writers
        self._context = context

    def warm_up(self) -> None:
        """Have each model say a few words: so many that a GPU records its first step."""
        for name in self._writers:
            hello = ChatRequest((("user", "Hello"),), SamplingParams(max_tokens=5), name)
            deque(self.generate(hello), maxlen=0)

    @property
    def writers(self) -> list[Writer]:
        """The models that can be on the device or not."""
        return list(dict.fromkeys(self._writers.values()))

    def generate(
        self, request: ChatRequest, check: Callable[[], None] = lambda: None
    ) -> EngineReply:
        """The model's reply, which grows as it is iterated over. See `ChatGenerator.generate`.

        `truncate` removes the oldest messages, and keeps system prompts and the last message.
        """
        if request.model not in self._writers:
            served = ", ".join(self._writers)
            raise WorkerUnavailable(
                f"model: {request.model} is not served here; this worker has {served}"
            )
        writer, messages, sampling = (
            self._writers[request.model],
            request.messages,
            request.sampling,
        )
        lead, turns, tail = _turns(writer.tokens, messages, plain=request.model == "qwen_base")
        room = min(self._context, writer.context) - sampling.max_tokens - len(lead) - len(tail)
        kept = _fit(messages, turns, room, request.truncate)
        shared = next((i for i, at in enumerate(kept) if messages[at][0] != "system"), len(kept))
        generation = Generation(
            lead + [token for at in kept for token in turns[at]] + tail,
            sampling,
            writer.tokens.decode,
            check,
            num_shared=len(lead) + sum(len(turns[at]) for at in kept[:shared]),
            grammar=None if request.schema is None else writer.grammars.matcher(request.schema),
        )
        use = self._ledger.acquire(writer, check)
        writer.engine.submit(generation)
        return EngineReply(
            generation,
            num_dropped=len(turns) - len(kept),
            swap_s=use.swap_s,
            on_end=lambda: self._ledger.release(writer, use),
        )


def _turns(
    tokens: ChatTokenizer, messages: Sequence[Message], plain: bool
) -> tuple[list[int], list[list[int]], list[int]]:
    """What stands before the first message, each message's tokens, what stands behind the last."""
    if not plain:
        turns = [tokens.turn(role, text) for role, text in messages]
        return tokens.chat_lead, turns, tokens.answer()
    last = len(messages) - 1
    texts = [text if at == last else f"{text}\n\n" for at, (_, text) in enumerate(messages)]
    return tokens.text_lead, [tokens.encode(text) for text in texts], []


def _fit(
    messages: Sequence[Message],
    turns: Sequence[Sequence[int]],
    room: int,
    truncate: Literal["oldest"] | None,
) -> list[int]:
    """Which messages stay, by index, so that their tokens are no more than `room`."""
    kept = list(range(len(turns)))
    spare = [at for at in kept[:-1] if messages[at][0] != "system"] if truncate else []
    total = sum(map(len, turns))
    while total > room and spare:
        oldest = spare.pop(0)
        kept.remove(oldest)
        total -= len(turns[oldest])
        # A conversation does not begin with an answer.
        while spare and messages[spare[0]][0] == "assistant":
            oldest = spare.pop(0)
            kept.remove(oldest)
            total -= len(turns[oldest])
    if total > room:
        raise InvalidPrompt(
            f"messages: {total} tokens, where the context has room for {max(room, 0)} "
            "beside max_tokens"
        )
    return kept
