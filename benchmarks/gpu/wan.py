"""WAN T2V 1.3B at full size: a short and a long video, by the worker and by diffusers' pipeline."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.dry_run import wan
from benchmarks.dry_run.stages import DECODING, Marks
from benchmarks.gpu.findings import Fact, Findings
from benchmarks.gpu.models import choose_device, wan_pair
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.stopwatch import Comparison
from ourvidz_serverless.models.wan.pipeline import WanModel


def run(device_name: str, size: Size, findings: Findings) -> None:
    device, ledger = choose_device(device_name, torch.bfloat16)
    model, modules, peer = wan_pair(size.wan[0], device, ledger)
    for job in size.wan:
        runs = {
            "worker": partial(_ours, model, modules, job),
            "diffusers": partial(_theirs, peer, job),
        }
        made = Comparison(str(job), device.name, findings).of(runs, rounds=1)
        if set(made) == set(runs):
            differs = np.abs(made["worker"].astype(int) - made["diffusers"])
            findings.add(Fact(f"{job}: mean difference", float(differs.mean()), "grey levels"))


def _ours(
    model: WanModel, modules: wan.Modules, job: wan.Job, stages: Marks, prompt: str
) -> np.ndarray:
    wan.mark_networks(stages, modules)
    frames = np.concatenate(list(model.generate(wan.request(job, prompt), stages)))
    stages.mark(DECODING)
    return frames


def _theirs(peer: tuple[Any, wan.Modules], job: wan.Job, stages: Marks, prompt: str) -> np.ndarray:
    pipe, modules = peer
    wan.mark_networks(stages, modules)
    frames = wan.call(pipe, job, stages, prompt)
    stages.mark(DECODING)
    return (frames * 255).round().astype(np.uint8)
