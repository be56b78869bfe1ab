"""SDXL at full size: one picture and six, by the worker and by diffusers' pipeline."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.dry_run import sdxl
from benchmarks.dry_run.stages import DECODING, Marks
from benchmarks.gpu.findings import Fact, Findings
from benchmarks.gpu.models import choose_device, sdxl_pair
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.stopwatch import Comparison, Run
from ourvidz_serverless.models.chat.cuda_graphs import CudaGraphs
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel


def run(device_name: str, size: Size, findings: Findings) -> None:
    device, ledger = choose_device(device_name, torch.float16)
    model, peer = sdxl_pair(device, ledger)
    models = {"worker": model}
    if device.is_cuda:
        capture = CudaGraphs(device.name)
        models["worker, graphs"] = SdxlModel(
            model.networks, device, handle=model.handle, capture=capture
        )
    for job in size.sdxl:
        runs: dict[str, Run] = {who: partial(_ours, each, job) for who, each in models.items()}
        runs["diffusers"] = partial(_theirs, peer, job)
        made = Comparison(str(job), device.name, findings).of(runs, size.rounds)
        if {"worker", "diffusers"} <= set(made):
            differs = np.abs(made["worker"][0].astype(int) - made["diffusers"][0])
            findings.add(Fact(f"{job}: mean difference", float(differs.mean()), "grey levels"))
    if device.is_cuda:
        _move(model, findings)


def _ours(model: SdxlModel, job: sdxl.Job, stages: Marks, prompt: str) -> list[np.ndarray]:
    sdxl.mark_networks(stages, model.networks.pipe)
    made = list(model.generate(sdxl.request(job, prompt), stages))
    stages.mark(DECODING)
    return made


def _theirs(pipe: Any, job: sdxl.Job, stages: Marks, prompt: str) -> list[np.ndarray]:
    sdxl.mark_networks(stages, pipe)
    made = [np.asarray(each) for each in sdxl.call(pipe, job, stages, prompt)]
    stages.mark(DECODING)
    return made


def _move(model: SdxlModel, findings: Findings) -> None:
    """Time the weights' moves: out the first time, which pins memory, and then in and out."""
    gigabytes = model.parts.num_bytes / 1e9
    moves = (
        ("to the host, the first time", model.parts.to_host),
        ("to the device", model.parts.to_device),
        ("to the host", model.parts.to_host),
    )
    for name, move in moves:
        began = time.perf_counter()
        move()
        speed = gigabytes / (time.perf_counter() - began)
        findings.add(Fact(f"SDXL's {gigabytes:.1f} GB {name}", round(speed, 2), "GB/s"))
