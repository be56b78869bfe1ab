"""One part in a process of its own; `runner` starts it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gpu.findings import CARD, Fact, Findings
from benchmarks.gpu.sizes import SIZES


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="of this package, such as sdxl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--findings", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.device != "cpu":
        # Where this thread's events are.
        torch.cuda.set_device(torch.device(options.device).index or 0)
    findings, size = Findings(options.findings, options.seconds), SIZES[options.size]
    module = importlib.import_module(f"benchmarks.gpu.{options.module}")
    findings.add(Fact(CARD, device_name(options.device)))
    with size.networks():
        module.run(options.device, size, findings)


def device_name(device: str) -> str:
    """The name of a CUDA device, or of this machine's processor."""
    if device == "cpu":
        return str(report.machine()["cpu"])
    return str(torch.cuda.get_device_name(device))


if __name__ == "__main__":
    main()
