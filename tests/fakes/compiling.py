"""Runs jobs on a network while its blocks are compiled, and prints a report as JSON.

It runs as `python -m tests.fakes.compiling network|shapes|wan FOLDER`, each time in a new process.
FOLDER keeps the compiled code for the next process. The code has no vector instructions: the probes
for them take longer than the compilation.
"""

import json
import logging
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.cpu_vec_isa
from torch._dynamo.utils import counters

from builder import pocket_wan
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import standalone_handle
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.speed import presets
from ourvidz_serverless.models.speed.regional_compile import CompiledBlocks, compile_blocks
from ourvidz_serverless.models.wan import loader as wan
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import References
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_wan
from tests.fakes.recorded_progress import RecordedProgress, stop_at_step

PATIENCE_S = 300


#: More than the eight shapes that torch compiles a function for by default.
MANY_SHAPES = 9


class Block(torch.nn.Module):
    """A block whose code has a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        made = torch.nn.functional.silu(self.inner(hidden))
        return hidden + made if shift is None else hidden + made + shift


class PlainBlock(torch.nn.Module):
    """A block whose code calls only what torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden)


class PlainNetwork(torch.nn.Module):
    _repeated_blocks = ("PlainBlock",)

    def __init__(self) -> None:
        super().__init__()
        self.block = PlainBlock()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.block(hidden)


class Network(torch.nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden, shift=hidden[:, :1])
        return hidden


def until_compiled(blocks: CompiledBlocks, shapes: int = 1) -> None:
    end = time.monotonic() + PATIENCE_S
    while blocks.num_ready < shapes and not blocks.is_broken and time.monotonic() < end:
        time.sleep(0.05)


def compiled_blocks(network: torch.nn.Module, folder: Path) -> CompiledBlocks:
    device = Device(torch.device("cpu"), torch.float32)
    settings = Settings(compile="regional", compile_cache_dir=folder)
    handle = standalone_handle(MovableTensors([network], device))
    blocks = compile_blocks(network, handle, device, settings)
    assert blocks is not None
    with handle.using():
        """The network is on its device, as a job's is. Otherwise nothing is compiled."""
    return blocks


def serve_shapes(folder: Path) -> dict[str, Any]:
    """Run jobs of many shapes, until each has come twice and is compiled."""
    network = PlainNetwork()
    blocks = compiled_blocks(network, folder)
    for tokens in [*range(1, MANY_SHAPES + 1)] * 2:
        with torch.inference_mode(), blocks.job():
            network(torch.zeros(1, tokens, 16))
    until_compiled(blocks, MANY_SHAPES)
    return {"num_ready": blocks.num_ready}


def serve_network(folder: Path) -> dict[str, Any]:
    """Run jobs on a network of two small blocks."""
    torch.manual_seed(0)
    network = Network()
    blocks = compiled_blocks(network, folder)

    def job(tokens: int, use_compiled: bool = True) -> tuple[torch.Tensor, int]:
        """The result of a job, and how many of its calls used compiled code."""
        before = blocks.num_calls
        with torch.inference_mode(), blocks.job(use_compiled):
            made = network(torch.linspace(-1, 1, tokens * 16).reshape(1, tokens, 16))
        return made, blocks.num_calls - before

    eager, in_first = job(4)
    once, _ = job(5)
    _, in_second = job(4)
    job(4)
    until_compiled(blocks)
    compiled, in_last = job(4)
    before = counters["stats"]["unique_graphs"]
    other, in_other = job(5)
    _, in_changed = job(4, use_compiled=False)
    return {
        "compiled_calls": {
            "first job": in_first,
            "second job": in_second,
            "once ready": in_last,
            "another shape": in_other,
            "changed by a LoRA": in_changed,
        },
        "difference": float((compiled - eager).abs().max()),
        "other_difference": float((other - once).abs().max()),
        "graphs": counters["stats"]["unique_graphs"],
        "graphs_before": before,
        "is_broken": blocks.is_broken,
    }


def serve_wan(folder: Path) -> dict[str, Any]:
    """Make videos with a first frame by a VACE network of two blocks and one block for hints."""
    pocket_wan.TRANSFORMER["num_layers"] = 2
    pocket_wan.VACE["vace_layers"] = [0]
    # At this threshold a network with random weights skips blocks.
    presets.WAN["fast"] = presets.SpeedPreset(first_block_threshold=0.6)
    with tempfile.TemporaryDirectory() as weights:
        settings = tiny_wan.write_wan(Path(weights))
        eager = render(wan.load(settings))
        quick = render(wan.load(settings), speed="fast")
        compiling = settings.model_copy(update={"compile": "regional", "compile_cache_dir": folder})
        return serve_videos(wan.load(compiling), eager, quick)


def render(model: WanModel, **options: Any) -> np.ndarray:
    """A small video. It takes eight forwards of three blocks each if no block is skipped."""
    references = References(first=tiny_wan.picture(1))
    return tiny_wan.render(model, references=references, **options)


def serve_videos(model: WanModel, eager: np.ndarray, quick: np.ndarray) -> dict[str, Any]:
    network = model.networks["vace"]
    blocks, ledger = network.compiled_blocks, network.handle.ledger
    assert blocks is not None
    calls: dict[str, int] = {}

    def job(name: str, **options: Any) -> np.ndarray:
        before = blocks.num_calls
        try:
            return render(model, **options)
        finally:
            calls[name] = blocks.num_calls - before

    def move() -> None:
        """Drop the weights. The next job reads them again."""
        (name,) = [row.name for row in ledger.report() if row.name == "wan_t2v"]
        assert ledger.request_move(name, "disk").is_done.wait(PATIENCE_S)

    first = job("first job")
    job("second job")
    render(model)
    until_compiled(blocks, shapes=2)
    compiled = job("once ready")
    progress = RecordedProgress()
    compiled_quick = job("with a preset", speed="fast", progress=progress)
    with suppress(Cancelled):
        job("stopped at the second of four steps", progress=stop_at_step(2))
    move()
    moved = job("after its weights are read again")
    return {
        "compiled_calls": calls,
        "shallow_forwards": progress.speed_reports[0]["shallow_forwards"],
        "first_difference": tiny_wan.distance(first, eager),
        "difference": tiny_wan.distance(compiled, eager),
        "preset_difference": tiny_wan.distance(compiled_quick, quick),
        "later_difference": tiny_wan.distance(moved, compiled),
        "is_broken": blocks.is_broken,
    }


def forbid_silent_fallback() -> None:
    """Make torch raise an error where it would silently fall back to eager code."""
    set_stance = torch.compiler.set_stance
    torch.compiler.set_stance = lambda name: set_stance(name.replace("eager_on", "fail_on"))


class LogLines(logging.Handler):
    """Keeps the messages of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    log_lines = LogLines()
    logging.getLogger("ourvidz").addHandler(log_lines)
    forbid_silent_fallback()
    torch._inductor.cpu_vec_isa.supported_vec_isa_list.clear()
    serve = {"network": serve_network, "shapes": serve_shapes, "wan": serve_wan}[sys.argv[1]]
    report = serve(Path(sys.argv[2]))
    inductor = counters["inductor"]
    report["hits"], report["misses"] = inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]
    print(json.dumps({**report, "log": log_lines.lines}))
