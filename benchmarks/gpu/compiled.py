"""`COMPILE=regional` at full size: how long it takes, and what a step gains."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.dry_run import sdxl, wan
from benchmarks.dry_run.stages import STEP
from benchmarks.gpu.findings import Fact, Findings, Stage
from benchmarks.gpu.models import SEED, choose_device
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.stopwatch import Clock, TimedStages
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.speed.regional_compile import CompiledBlocks, compile_blocks
from ourvidz_serverless.settings import Settings

#: Seconds that must be left for the jobs with compiled blocks.
SPARE_S = 10.0


def run(device_name: str, size: Size, findings: Findings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(compile="regional", compile_cache_dir=Path(folder))
        _sdxl(device_name, size.sdxl[0], settings, findings)
        if findings.seconds_left > 2 * SPARE_S:
            _wan(device_name, size.wan[0], settings, findings)


def _sdxl(device_name: str, job: sdxl.Job, settings: Settings, findings: Findings) -> None:
    device, ledger = choose_device(device_name, torch.float16)
    torch.manual_seed(SEED)
    pipe = sdxl.made(str(device.name), device.dtype)
    sdxl.prepare(pipe, device)
    model = sdxl.model_of(pipe, device, ledger)
    model.parts.to_device()
    model.compiled_blocks = compile_blocks(pipe.unet, model.handle, device, settings)
    _compare(model, sdxl.request(job), model.compiled_blocks, str(job), findings, device)


def _wan(device_name: str, job: wan.Job, settings: Settings, findings: Findings) -> None:
    device, ledger = choose_device(device_name, torch.bfloat16)
    torch.manual_seed(SEED)
    modules = wan.made(str(device.name), device.dtype, job.route)
    wan.prepare(modules, device)
    model = wan.model_of(job, device, ledger, modules, settings)
    for each in wan.movables(model):
        each.to_device()
    blocks = model.networks[job.route].compiled_blocks
    _compare(model, wan.request(job), blocks, str(job), findings, device)


def _compare(
    model: Any,
    request: Any,
    blocks: CompiledBlocks | None,
    work: str,
    findings: Findings,
    device: Device,
) -> None:
    """Time the steps of eager jobs, have the blocks compiled, and time them again."""
    assert blocks
    eager = [_step_s(model, request, device) for _ in range(3)][-1]
    findings.add(Stage(work, "worker, eager", STEP, eager, 1))
    began = time.monotonic()
    while blocks.is_compiling and findings.seconds_left > SPARE_S:
        time.sleep(0.1)
    seconds = round(time.monotonic() - began, 1)
    findings.add(Fact(f"{work}: {blocks.num_ready} shapes compiled", seconds, "s"))
    compiled = [_step_s(model, request, device) for _ in range(2)][-1]
    findings.add(Stage(work, "worker, compiled", STEP, compiled, 1))
    findings.add(Fact(f"{work}: calls of compiled blocks", blocks.num_calls))


def _step_s(model: Any, request: Any, device: Device) -> float:
    stages = TimedStages(Clock(device.name))
    for _ in model.generate(request, stages):
        pass
    return min(stages.seconds()[STEP])
