"""Chat: Qwen2.5's instruct and base models (or a Llama of the same chat format) on the engine.

The conversation is written here, not by a tokenizer's template: templates put words of their own
before a conversation without a system prompt. Each message is encoded by itself and as plain
text, so that no message can end its turn and speak as somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ourvidz_serverless.errors import InvalidPrompt, ModelLoadError, WorkerUnavailable
from ourvidz_serverless.models.device import Device
from ourvidz_serverless.models.engine import Engine, Generation, Limits
from ourvidz_serverless.models.grammar import Grammars
from ourvidz_serverless.models.kv_cache import BLOCK, bytes_per_token
from ourvidz_serverless.models.residency import Residency
from ourvidz_serverless.models.sampling import Sampling
from ourvidz_serverless.settings import Settings

POCKET = Path(__file__).parents[2] / ".cache" / "pocket_chat"

#: Decoders whose attention sees every earlier token, which is all that the engine's cache knows.
ARCHITECTURES = ("qwen2", "llama")

START, END = "<|im_start|>", "<|im_end|>"
OTHER_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")

#: How much of a GPU's free memory the cache may take; the rest is what a forward needs.
CACHE_SHARE = 0.8

#: A message: who speaks, and what they say.
Message = tuple[str, str]


def load(settings: Settings) -> Chat:
    """The models of `CHAT_INSTRUCT_MODEL` and, where it is set, `CHAT_BASE_MODEL`.

    Raises ModelLoadError with one line when weights are missing, corrupt or of another kind.
    """
    device = Device.choose(settings, on_gpu=torch.bfloat16)
    asked = {
        "qwen_instruct": ("CHAT_INSTRUCT_MODEL", settings.chat_instruct_model),
        "qwen_base": ("CHAT_BASE_MODEL", settings.chat_base_model),
    }
    # By place, so that the same weights under both names are loaded once.
    variables = {place: variable for variable, place in asked.values() if place}
    loaded = {place: _read(variable, place, device) for place, variable in variables.items()}
    places = min(settings.chat_resident_models, len(loaded))
    models = [model for model, _ in loaded.values()]
    # Here already, since the cache has room in what they leave free.
    for model in models[:places]:
        model.to(device.name)
    limits = Limits(
        max_batch=settings.chat_max_batch,
        kv_tokens=settings.chat_kv_tokens or _room(device, models, places),
        prefix_tokens=settings.chat_prefix_tokens,
    )
    writers = {place: Writer(*parts, device, limits) for place, parts in loaded.items()}
    served = {name: writers[place] for name, (_, place) in asked.items() if place}
    residency = Residency(places)
    for writer in list(writers.values())[:places]:
        residency.take(writer)
        residency.give_back(writer)
    return Chat(served, device, settings.chat_context, residency)


def _room(device: Device, models: Sequence[Any], places: int) -> int:
    """How many tokens the cache of each model that is there may hold."""
    free = device.free_bytes()
    if free is None:
        return Limits().kv_tokens
    each = max(bytes_per_token(model.config, device.dtype) for model in models)
    return max(int(free * CACHE_SHARE) // (each * places), BLOCK)


def _read(variable: str, place: str, device: Device) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    path = POCKET if place == "pocket" else Path(place)
    if not path.exists():
        hint = "; `make chat` puts it there" if place == "pocket" else ""
        raise ModelLoadError(f"{variable}: there is nothing at {path}{hint}")
    try:
        return _open(path, device)
    except Exception as exc:
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
        raise ModelLoadError(f"{variable}: {path.name} does not load as chat ({why})") from exc


def _open(path: Path, device: Device) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "use_sliding_window", False):
        raise ValueError("its attention has a sliding window")
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{config.model_type} is not one of {', '.join(ARCHITECTURES)}")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=device.dtype, attn_implementation="sdpa", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    if None in map(tokenizer.token_to_id, (START, END)):
        raise ValueError(f"its tokenizer has no {START} and {END}")
    return model.eval(), tokenizer


class Writer:
    """One model with its tokenizer and its engine.

    The tokenizer is the library's under transformers' own: to encode through that one changes
    its state, and many jobs encode at once.
    """

    def __init__(
        self, model: Any, tokenizer: Any, device: Device, limits: Limits | None = None
    ) -> None:
        self._model, self._device = model, device
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._start, self._end = map(self._tokenizer.token_to_id, (START, END))
        self.context: int = model.config.max_position_embeddings
        ends = self._ends(model)
        self.grammars = Grammars(self._tokenizer, model.config.vocab_size, ends)
        self.engine = Engine(model, device, ends, limits)

    def arrive(self) -> None:
        """Bring the weights to the device."""
        self._model.to(self._device.name)

    def leave(self) -> None:
        """Take the weights, and what was computed with them, off the device."""
        self.engine.forget()
        self._model.to("cpu")
        self._device.free_memory()

    def turn(self, role: str, text: str) -> list[int]:
        """The tokens of one message of a conversation."""
        return [self._start, *self.encode(f"{role}\n{text}"), self._end, *self.encode("\n")]

    def answer(self) -> list[int]:
        """The tokens after which an instruct model answers."""
        return [self._start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, in which control tokens are mere letters."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _ends(self, model: Any) -> list[int]:
        own = model.generation_config.eos_token_id
        known = [self._tokenizer.token_to_id(name) for name in (END, *OTHER_ENDS)]
        ids = [*known, *(own if isinstance(own, list) else [own])]
        return [token for token in ids if token is not None]


class Chat:
    """Answers conversations, many at once. Safe to call from any thread."""

    def __init__(
        self, writers: Mapping[str, Writer], device: Device, context: int, residency: Residency
    ) -> None:
        self.device = device
        self._residency = residency
        self._writers = writers
        self._context = context

    def generate(
        self,
        *,
        messages: Sequence[Message],
        model: str = "qwen_instruct",
        truncate: Literal["oldest"] | None = None,
        schema: Mapping[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
        **sampling: Any,
    ) -> Generation:
        """The model's reply, which grows as it is iterated over; `sampling` as in `Sampling`.

        The instruct model sees turns, the base model the texts alone. Raises InvalidPrompt with
        the counts when the conversation and `max_tokens` are more than the context, unless
        `truncate` lets the oldest turns go; system prompts and the last message stay. With a
        JSON `schema` the reply is JSON that fits it.
        """
        if model not in self._writers:
            served = ", ".join(self._writers)
            raise WorkerUnavailable(f"model: {model} is not served here; this worker has {served}")
        writer, rules = self._writers[model], Sampling(**sampling)
        turns, tail = _turns(writer, messages, plain=model == "qwen_base")
        room = min(self._context, writer.context) - rules.max_tokens - len(tail)
        kept = _fit(messages, turns, room, truncate)
        shared = next((i for i, at in enumerate(kept) if messages[at][0] != "system"), len(kept))
        generation = Generation(
            [token for at in kept for token in turns[at]] + tail,
            rules,
            writer.decode,
            check,
            num_shared=sum(len(turns[at]) for at in kept[:shared]),
            grammar=None if schema is None else writer.grammars.matcher(schema),
        )
        generation.num_dropped = len(turns) - len(kept)
        generation.swap_s = self._residency.take(writer, check)
        generation.on_end = lambda: self._residency.give_back(writer)
        writer.engine.submit(generation)
        return generation


def _turns(
    writer: Writer, messages: Sequence[Message], plain: bool
) -> tuple[list[list[int]], list[int]]:
    """Each message's tokens, and those that stand behind the last one."""
    if not plain:
        return [writer.turn(role, text) for role, text in messages], writer.answer()
    last = len(messages) - 1
    return [
        writer.encode(text if at == last else f"{text}\n\n")
        for at, (_, text) in enumerate(messages)
    ], []


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
