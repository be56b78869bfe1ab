"""What the machine has, and what its device really reaches: the ceilings of all that follows."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks import report
from benchmarks.gpu.findings import Fact, Findings
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.stopwatch import Clock

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"

#: What the parts import that a machine with torch, transformers and pytest may lack.
NEEDED = ("diffusers", "pydantic", "pydantic-settings", "llguidance", "ftfy", "av", "zlib-ng")

#: What only one part needs.
OPTIONAL = ("torchao",)

#: Bytes of a copy and the side of a matrix product: several times what a card's cache holds.
COPY_BYTES, SIDE = 4 << 30, 8192
SMALL_BYTES, SMALL_SIDE = 1 << 20, 128


def run(device_name: str, size: Size, findings: Findings) -> None:
    device = torch.device(device_name)
    findings.add(Fact("machine", report.machine_line(report.machine())))
    for line in differing_versions():
        findings.add(Fact("another version", line))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        findings.add(
            Fact("memory, free of total", f"{free / 2**30:.1f} of {total / 2**30:.1f}", "GiB")
        )
        findings.add(Fact("CUDA of torch", torch.version.cuda))
        findings.add(
            Fact("architecture", "sm{}{}".format(*torch.cuda.get_device_capability(device)))
        )
    num_bytes, side = (SMALL_BYTES, SMALL_SIDE) if size.is_small else (COPY_BYTES, SIDE)
    _measure_memory(device, num_bytes, findings)
    _measure_products(device, side, findings)


def differing_versions() -> Iterator[str]:
    """The packages whose version is not the pinned one, and those that are missing."""
    for name, pinned in pins():
        if name not in {*report.PACKAGES, *NEEDED, *OPTIONAL, "accelerate", "peft", "safetensors"}:
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} is missing"
            continue
        if found.split("+")[0] != pinned:
            yield f"{name} {found}, and {pinned} is pinned"


def pins() -> list[tuple[str, str]]:
    return re.findall(r"^([\w.-]+)==([\w.]+)", REQUIREMENTS.read_text(), re.MULTILINE)


def _measure_memory(device: torch.device, num_bytes: int, findings: Findings) -> None:
    here = torch.ones(num_bytes // 4, device=device)
    there = torch.empty_like(here)
    # Each byte is read and written.
    seconds = _median_s(device, lambda: there.copy_(here))
    findings.add(Fact("copy on the device", round(2 * num_bytes / 1e9 / seconds), "GB/s"))
    if device.type != "cuda":
        return
    part = here[: num_bytes // 16]
    for name, host in (
        ("pageable", torch.empty_like(part, device="cpu").fill_(1)),
        ("pinned", torch.empty_like(part, device="cpu", pin_memory=True)),
    ):
        up = _median_s(device, lambda: part.copy_(host, non_blocking=True))  # noqa: B023
        down = _median_s(device, lambda: host.copy_(part, non_blocking=True))  # noqa: B023
        gigabytes = part.nbytes / 1e9
        findings.add(Fact(f"{name} memory to the device", round(gigabytes / up, 1), "GB/s"))
        findings.add(Fact(f"{name} memory from the device", round(gigabytes / down, 1), "GB/s"))


def _measure_products(device: torch.device, side: int, findings: Findings) -> None:
    flops = 2 * side**3
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        # Not zeros, on which a product can be faster.
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _median_s(device, lambda: left @ right)  # noqa: B023
        findings.add(Fact(f"matrix product in {name}", round(flops / seconds / 1e12, 1), "TFLOP/s"))


def _median_s(device: torch.device, compute: Callable[[], object], times: int = 10) -> float:
    clock, found = Clock(device), []
    for _ in range(3):
        compute()
    for _ in range(times):
        begin = clock.now()
        compute()
        found.append(clock.seconds(begin, clock.now()))
    return max(median(found), 1e-9)
