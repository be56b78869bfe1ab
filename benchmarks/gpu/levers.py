"""One forward of SDXL's UNet, guided, in several ways: which of the levers are worth their setting.

The forward as the worker runs it stands at the beginning and at the end: what lies between the two
is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.dry_run import sdxl
from benchmarks.gpu.findings import Fact, Findings, Stage
from benchmarks.gpu.models import SEED, choose_device
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.stopwatch import Clock
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat.cuda_graphs import CudaGraphs
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.speed import attention

AS_IT_IS, TIMES = "worker as it is", 10


def run(device_name: str, size: Size, findings: Findings) -> None:
    device, _ = choose_device(device_name, torch.float16)
    torch.manual_seed(SEED)
    pipe = sdxl.made(str(device.name), device.dtype)
    sdxl.prepare(pipe, device)
    for job in size.sdxl:
        forward = partial(pipe.unet, **_inputs(pipe.unet, device, job), return_dict=False)
        _try_all(pipe.unet, device, f"the UNet of {job}", lambda: forward()[0], findings)  # noqa: B023


def _try_all(
    unet: Any, device: Device, work: str, forward: Callable[[], Any], findings: Findings
) -> None:
    expected = None
    for name, prepared in _levers(unet, device, forward).items():
        if findings.seconds_left < 10:
            return
        try:
            with torch.inference_mode(), attention.cached_prompt_keys(unet), prepared() as compute:
                for _ in range(3):
                    made = compute()
                expected = made.clone() if expected is None else expected
                distance = float((made.float() - expected.float()).norm() / expected.float().norm())
                seconds = _seconds(device, compute)
        except (ModelLoadError, RuntimeError) as exc:
            findings.add(Fact(f"{work}, {name}: failed", " ".join(str(exc).split())[:200]))
            continue
        findings.add(Stage(work, name, "one forward", median(seconds), len(seconds)))
        findings.add(Fact(f"{work}, {name}: relative distance", round(distance, 6)))


Prepared = Callable[[], Any]


def _levers(unet: Any, device: Device, forward: Callable[[], Any]) -> dict[str, Prepared]:
    """Ways to compute the forward: each a context that prepares one and puts things back."""

    @contextmanager
    def as_it_is() -> Iterator[Any]:
        yield forward

    @contextmanager
    def benchmark() -> Iterator[Any]:
        torch.backends.cudnn.benchmark = True
        try:
            yield forward
        finally:
            torch.backends.cudnn.benchmark = False

    @contextmanager
    def last() -> Iterator[Any]:
        unet.to(memory_format=torch.channels_last)
        try:
            yield forward
        finally:
            unet.to(memory_format=torch.contiguous_format)

    @contextmanager
    def last_and_benchmark() -> Iterator[Any]:
        with last(), benchmark():
            yield forward

    @contextmanager
    def kernel(name: str) -> Iterator[Any]:
        attention.set_backend(unet, name, device)
        try:
            yield forward
        finally:
            attention.set_backend(unet, "native", device)

    @contextmanager
    def graph() -> Iterator[Any]:
        # The prompt's keys must be there before the capture: their memory would be the graph's.
        forward()
        yield CudaGraphs(device.name)(forward)

    levers: dict[str, Prepared] = {
        AS_IT_IS: as_it_is,
        "cudnn.benchmark": benchmark,
        "channels-last": last,
        "channels-last and cudnn.benchmark": last_and_benchmark,
        **{f"attention by {name}": partial(kernel, name) for name in ("cudnn", "flash")},
    }
    if device.is_cuda:
        levers["a CUDA graph"] = graph
    return {**levers, f"{AS_IT_IS}, again": as_it_is}


def _seconds(device: Device, compute: Callable[[], Any]) -> list[float]:
    clock, found = Clock(device.name), []
    for _ in range(TIMES):
        begin = clock.now()
        compute()
        found.append((begin, clock.now()))
    return [clock.seconds(*each) for each in found]


def _inputs(unet: Any, device: Device, job: sdxl.Job) -> dict[str, Any]:
    rows, cells = 2 * job.count, job.side // 8
    width = (
        unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    )

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device.name, dtype=device.dtype)

    return {
        "sample": noise(rows, unet.config.in_channels, cells, cells),
        "timestep": torch.tensor(500.0, device=device.name),
        "encoder_hidden_states": noise(rows, 77, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": noise(rows, width), "time_ids": noise(rows, 6)},
    }
