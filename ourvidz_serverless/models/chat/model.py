"""The chat models of a worker. Each has its own tokenizer and its own engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ourvidz_serverless.errors import InvalidPrompt, WorkerUnavailable
from ourvidz_serverless.models.chat.cuda_graphs import Capture
from ourvidz_serverless.models.chat.engine import Engine, EngineLimits
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.grammar import Grammars
from ourvidz_serverless.models.chat.prompt import build_prompt
from ourvidz_serverless.models.chat.request import (
    ChatRequest,
    ModelName,
    ReplyStats,
    SamplingParams,
)
from ourvidz_serverless.models.chat.tokenizer import ChatTokenizer, Thoughts
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors, Read
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.settings import CacheSalt


class ChatModel(MovableTensors):
    """One network with its tokenizer and its engine.

    `read` reads the network again after `drop`. With `capture` the engine replays decode steps.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: ChatTokenizer,
        device: Device,
        limits: EngineLimits | None = None,
        read: Read | None = None,
        capture: Capture | None = None,
    ) -> None:
        super().__init__([network], device, read)
        self.tokenizer = tokenizer
        self.context: int = network.config.max_position_embeddings
        self.vocabulary: int = network.config.vocab_size
        configured = network.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        eos_ids = [*tokenizer.eos_ids, *(token for token in configured if token is not None)]
        self.grammars = Grammars(tokenizer.backend, network.config.vocab_size, eos_ids)
        self.engine = Engine(network, device, eos_ids, limits, capture)

    def check(self, request: ChatRequest) -> None:
        """Raise InvalidPrompt if a request asks for what this model does not have."""
        highest = max(request.sampling.logit_bias, default=0)
        if highest >= self.vocabulary:
            raise InvalidPrompt(
                f"logit_bias: {highest} is no token of this model, which has {self.vocabulary}"
            )
        thinks = "never" if request.model == "qwen_base" else self.tokenizer.thinks
        if request.thinking and thinks == "never":
            raise InvalidPrompt("thinking: Input should be false, this model does not think")
        if request.schema is not None and (request.thinking or thinks == "always"):
            raise InvalidPrompt("response_format: Input should be text for a reply with thoughts")

    def thoughts(self, request: ChatRequest) -> Thoughts | None:
        """The tokens around the thoughts of a reply; None for a reply that has none."""
        is_chat = request.model != "qwen_base"
        return self.tokenizer.thoughts(request.thinking) if is_chat else None

    def to_host(self) -> None:
        """Take the weights off the device, and free the caches."""
        self.engine.free_caches()
        super().to_host()

    def drop(self) -> None:
        """Free the weights and the caches."""
        self.engine.free_caches()
        super().drop()


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
        generation = self.generation
        return ReplyStats(
            num_prompt=generation.num_prompt,
            num_completion=generation.num_completion,
            num_reused=generation.num_reused,
            num_dropped=self._num_dropped,
            finish_reason=generation.finish_reason,
            time_to_first_token_s=generation.time_to_first_token_s,
            tokens_per_second=generation.tokens_per_second,
            swap_s=self._swap_s,
            num_thought=generation.num_thought,
        )


class Chat:
    """The chat models of a worker, by name. They answer many conversations at once.

    Safe to call from any thread.
    """

    def __init__(
        self,
        models: Mapping[ModelName, ChatModel],
        device: Device,
        context: int,
        ledger: Ledger,
        cache_salt: CacheSalt = "none",
    ) -> None:
        self.models, self.device, self.ledger = models, device, ledger
        self._context, self._cache_salt = context, cache_salt

    def warm_up(self) -> None:
        """Generate five tokens with each model. A GPU that replays graphs captures all of them."""
        for name, model in self.models.items():
            model.engine.record_graphs()
            hello = ChatRequest((("user", "Hello"),), SamplingParams(max_tokens=5), name)
            deque(self.generate(hello), maxlen=0)

    def generate(self, request: ChatRequest, check: Check = lambda: None) -> EngineReply:
        """The model's reply, which grows while it is iterated over. See `TextModel.generate`.

        `truncate` removes the oldest messages, but no system prompt and not the last message.
        """
        if request.model not in self.models:
            served = ", ".join(self.models)
            raise WorkerUnavailable(
                f"model: {request.model} is not served here; this worker has {served}"
            )
        model, schema = self.models[request.model], request.schema
        model.check(request)
        prompt = build_prompt(model.tokenizer, request, min(self._context, model.context))
        generation = Generation(
            prompt.token_ids,
            request.sampling,
            model.tokenizer.decode,
            check,
            grammar=None if schema is None else model.grammars.matcher(schema),
            thoughts=model.thoughts(request),
            cache_salt=request.user if self._cache_salt == "user" else "",
        )
        use = self.ledger.acquire(model, check)
        model.engine.submit(generation)
        return EngineReply(
            generation,
            num_dropped=prompt.num_dropped,
            swap_s=use.swap_s,
            on_end=lambda: self.ledger.release(model, use),
        )
