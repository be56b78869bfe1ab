"""Qwen2.5-7B at full size: one conversation and many, by the engine and by transformers.

The engine runs without CUDA graphs, and on CUDA with them too. transformers' `generate` has all
prompts as one batch of one length, which suits it.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteriaList

from benchmarks import architectures
from benchmarks.chat import make_prompts
from benchmarks.dry_run.chat import DECODE, PREFILL, SUBMIT_S, Job
from benchmarks.dry_run.stages import Marks
from benchmarks.gpu.findings import Fact, Findings
from benchmarks.gpu.models import SEED, choose_device, shared_copy
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.stopwatch import Comparison, Run
from ourvidz_serverless.models.chat.cuda_graphs import choose_capture
from ourvidz_serverless.models.chat.engine import Engine
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import Device


def run(device_name: str, size: Size, findings: Findings) -> None:
    device, _ = choose_device(device_name, torch.bfloat16)
    torch.manual_seed(SEED)
    with architectures.made_on(str(device.name), device.dtype):
        network = architectures.chat().requires_grad_(False).eval()
    network.config._attn_implementation = "sdpa"
    peer = shared_copy(network)
    for job in size.chat:
        prompts = make_prompts(network.config.vocab_size, job.rows, job.tokens)
        engines = _engines(network, device, job)
        runs: dict[str, Run] = {
            who: partial(_ours, engine, prompts, size.reply) for who, engine in engines.items()
        }
        runs["transformers"] = partial(_theirs, peer, device, prompts, size.reply)
        Comparison(str(job), device.name, findings).of(runs, size.rounds)
        for who, engine in engines.items():
            if engine.graphs:
                facts = f"{engine.graphs.num_captured} captured, {engine.graphs.num_replayed} used"
                findings.add(Fact(f"{job}, {who}: graphs", facts))
            with device.computing():
                engine.free_caches()
        device.free_memory()


def _engines(network: Any, device: Device, job: Job) -> dict[str, Engine]:
    engines = {"worker": Engine(network, device, [], job.limits)}
    if capture := choose_capture("auto", device, network.config):
        engines["worker, graphs"] = Engine(network, device, [], job.limits, capture)
    return engines


def _ours(
    engine: Engine, prompts: list[list[int]], reply: int, stages: Marks, _: str
) -> list[list[int]]:
    are_submitted = threading.Event()
    # The engine calls `check` before each step. So all requests are there in the first one.
    generations = [
        Generation(
            prompt,
            SamplingParams(max_tokens=reply, temperature=0.7, top_p=0.9, seed=row),
            lambda ids: " " * len(ids),
            lambda: _ignore(are_submitted.wait(SUBMIT_S)),
        )
        for row, prompt in enumerate(prompts)
    ]
    for each in generations:
        engine.submit(each)
    began = time.monotonic()
    are_submitted.set()
    pieces = [iter(each) for each in generations]
    for each in pieces:
        next(each)
    stages.mark(PREFILL)
    prefilled = time.monotonic()
    for each in pieces:
        "".join(each)
    stages.mark(DECODE)
    stages.repeated(PREFILL, 1, prefilled - began)
    stages.repeated(DECODE, reply - 1, (time.monotonic() - prefilled) / (reply - 1))
    return [each.ids for each in generations]


def _ignore(_: object) -> None:
    """A check that lets the request go on."""


def _theirs(
    network: Any, device: Device, prompts: list[list[int]], reply: int, stages: Marks, _: str
) -> list[list[int]]:
    moments = [time.monotonic()]

    def note_token(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # transformers waits here in any case, for whether all replies have ended.
        device.wait()
        moments.append(time.monotonic())
        if len(moments) == 2:
            stages.mark(PREFILL)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    ids = torch.tensor(prompts, device=device.name)
    with torch.inference_mode():
        made = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=reply,
            min_new_tokens=reply,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([note_token]),
        ).tolist()
    stages.mark(DECODE)
    stages.repeated(PREFILL, 1, moments[1] - moments[0])
    stages.repeated(DECODE, reply - 1, (time.monotonic() - moments[1]) / (reply - 1))
    return list(made)
