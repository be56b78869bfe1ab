"""Qwen2.5-7B on a fake device: the worker's engine, and transformers' `generate`."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import architectures
from benchmarks.dry_run.fake_cuda import FakeCuda
from benchmarks.dry_run.installed import device_of, installed
from benchmarks.dry_run.stages import WEIGHTS, Run, Stages
from ourvidz_serverless.models.chat import quantization
from ourvidz_serverless.models.chat.engine import Engine, EngineLimits
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors

PREFILL, DECODE, FEWER_ROWS = "prefill", "one token of each reply", "one token of some replies"

#: The most seconds until all requests are submitted.
SUBMIT_S = 60.0

#: Tokens of each reply. The first one belongs to the prefill.
REPLY = 4


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that run at once, each with a prompt of so many tokens.

    `quantization` is as in `CHAT_QUANTIZATION`.
    """

    rows: int = 1
    tokens: int = 1000
    is_chunked: bool = False
    penalty: float = 1.0
    quantization: str = "none"

    def __str__(self) -> str:
        noun = "request" if self.rows == 1 else "requests"
        facts = [
            f"Qwen2.5-7B, {self.rows} {noun} of {self.tokens} tokens",
            self.quantization if self.quantization != "none" else "",
            "in chunks" if self.is_chunked else "",
            f"a penalty of {self.penalty}" if self.penalty != 1 else "",
        ]
        return ", ".join(filter(None, facts))

    @property
    def limits(self) -> EngineLimits:
        """The engine's own limits if the prompt is chunked; else all prompts are one chunk."""
        room = 2 * self.rows * (self.tokens + 512)
        usual = EngineLimits(max_batch=max(self.rows, 1), kv_tokens=max(room, 65536))
        if self.is_chunked:
            return usual
        return EngineLimits(usual.max_batch, usual.kv_tokens, self.rows * self.tokens)


def ours(job: Job, fake: FakeCuda | None = None) -> Run:
    """What the worker's engine does, without CUDA graphs."""
    fake = fake or FakeCuda()
    with installed(fake):
        network = _network(fake)
        device = device_of(fake, torch.bfloat16)
        with fake.on():
            stages = Forwards(fake, rows=job.rows)
            MovableTensors([network], device).to_device()
            if job.quantization != "none":
                _quantize(network, job.quantization)
            stages.mark(WEIGHTS)
            weight_bytes = fake.live_bytes
            _mark_forwards(stages, network.base_model)
            engine = Engine(network, device, [1], job.limits)
        # The engine calls `check` before each step. So all requests are there in the first one.
        are_submitted = threading.Event()
        generations = [_generation(job, index, are_submitted) for index in range(job.rows)]
        for each in generations:
            engine.submit(each)
        are_submitted.set()
        for each in generations:
            "".join(each)
        # A process that ends while the engine's thread is inside torch is aborted.
        with fake.on():
            engine.free_caches()
    return Run(str(job), "worker", weight_bytes, stages.stages)


def theirs(job: Job, fake: FakeCuda | None = None) -> Run:
    """What transformers' `generate` does with all prompts as one batch."""
    fake = fake or FakeCuda(truth=_EndsAfter(REPLY))
    with installed(fake):
        network = _network(fake)
        with fake.on(), torch.inference_mode():
            stages = Forwards(fake, rows=job.rows)
            network.to("cuda")
            stages.mark(WEIGHTS)
            weight_bytes = fake.live_bytes
            _mark_forwards(stages, network.base_model)
            ids = torch.ones((job.rows, job.tokens), dtype=torch.long, device="cuda")
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=REPLY,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                repetition_penalty=job.penalty,
                pad_token_id=0,
            )
        return Run(str(job), "transformers", weight_bytes, stages.stages)


def _network(fake: FakeCuda) -> Any:
    with fake.fake, architectures.made_on("cpu", torch.bfloat16):
        network = architectures.chat().requires_grad_(False).eval()
    network.config._attn_implementation = "sdpa"
    return network


def _quantize(network: Any, name: str) -> None:
    """Quantise the linear layers, as transformers does for the worker: all but the last one."""
    # The benchmarks keep other libraries from importing torchao.
    if sys.modules.get("torchao") is None:
        sys.modules.pop("torchao", None)
    from torchao.quantization import quantize_

    quantize_(network.base_model, quantization.config(name))


def _generation(job: Job, index: int, are_submitted: threading.Event) -> Generation:
    sampling = SamplingParams(
        max_tokens=REPLY,
        temperature=0.7,
        top_p=0.9,
        seed=index,
        repetition_penalty=job.penalty,
    )
    # No two prompts begin alike, so none has its beginning from another one's pages.
    prompt = [5 + index, *range(100, 99 + job.tokens)]

    def check() -> None:
        are_submitted.wait(SUBMIT_S)

    return Generation(prompt, sampling, lambda ids: " " * len(ids), check)


class Forwards(Stages):
    """Stages that begin with a forward and end with the tokens that are drawn from it.

    All forwards over more than one token of a row are the prefill. Of the others the last one
    stays that has all rows, and after which no reply ends.
    """

    def __init__(self, fake: FakeCuda, rows: int) -> None:
        super().__init__(fake)
        self.rows, self.name = rows, ""

    def begin(self, rows: int, tokens: int) -> None:
        """End the stage of the last forward, and begin that of so many tokens of each row."""
        if self.name != PREFILL:
            self.stages.pop(self.name, None)
        if self.name:
            self.mark(self.name)
        self.name = PREFILL if tokens > 1 else DECODE if rows == self.rows else FEWER_ROWS


class _EndsAfter:
    """What transformers reads when it asks whether all replies have ended."""

    def __init__(self, tokens: int) -> None:
        self._left = tokens

    def __call__(self, readers: set[str]) -> bool:
        if "StopCheck.__call__" not in readers:
            return True
        self._left -= 1
        return self._left == 0


def _mark_forwards(stages: Forwards, decoder: Any) -> None:
    def begin(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        if pages := kwargs.get("pages"):
            rows, tokens = len(pages.batch.spans), max(pages.batch.counts)
        stages.begin(rows, tokens)

    decoder.register_forward_pre_hook(begin, with_kwargs=True)
