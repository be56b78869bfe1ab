"""Networks whose blocks are compiled as they serve; tells what happened, as JSON.

It runs as `python -m tests.fakes.compiling network|wan FOLDER`, a process of its own each time:
what one finds in the folder another one left there.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

from builder import pocket_wan
from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import standalone_handle
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.speed import presets
from ourvidz_serverless.models.speed.regional_compile import CompiledBlocks, compile_blocks
from ourvidz_serverless.models.wan import pipeline as wan
from ourvidz_serverless.models.wan.request import References
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_wan
from tests.fakes.recorded_progress import RecordedProgress, stop_at_step

PATIENCE_S = 300


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        made = torch.nn.functional.silu(self.inner(hidden))
        return hidden + made if shift is None else hidden + made + shift


class Network(torch.nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden, shift=hidden[:, :1])
        return hidden


def until_compiled(found: CompiledBlocks, job: Callable[[], Any], shapes: int = 1) -> None:
    end = time.monotonic() + PATIENCE_S
    while found.num_ready < shapes and not found.is_broken and time.monotonic() < end:
        job()
        time.sleep(0.2)


def serve_network(folder: Path) -> dict[str, Any]:
    """Jobs of a network of two small blocks."""
    torch.manual_seed(0)
    network, device = Network(), Device(torch.device("cpu"), torch.float32)
    settings = Settings(compile="regional", compile_cache_dir=folder)
    found = compile_blocks(
        network, standalone_handle(MovableTensors([network], device)), device, settings
    )
    assert found is not None

    def job(tokens: int, use_compiled: bool = True) -> tuple[torch.Tensor, int]:
        """What a job gives, and how many of its calls compiled code answered."""
        before = found.num_calls
        with torch.inference_mode(), found.job(use_compiled):
            made = network(torch.linspace(-1, 1, tokens * 16).reshape(1, tokens, 16))
        return made, found.num_calls - before

    eager, in_first = job(4)
    once, _ = job(5)
    _, in_second = job(4)
    until_compiled(found, lambda: job(4))
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
        "is_broken": found.is_broken,
    }


def serve_wan(folder: Path) -> dict[str, Any]:
    """Videos with a first frame, of a VACE of two blocks and one that makes hints."""
    pocket_wan.TRANSFORMER["num_layers"] = 2
    pocket_wan.VACE["vace_layers"] = [0]
    # At this threshold a network of random weights leaves blocks out.
    presets.WAN["fast"] = presets.SpeedPreset(first_block_threshold=0.6)
    with tempfile.TemporaryDirectory() as weights:
        settings = tiny_wan.write_wan(Path(weights))
        eager = film(wan.load(settings))
        quick = film(wan.load(settings), speed="fast")
        compiling = settings.model_copy(update={"compile": "regional", "compile_cache_dir": folder})
        return serve_films(wan.load(compiling), eager, quick)


def film(model: wan.Wan, **options: Any) -> np.ndarray:
    """A small video: eight forwards of three blocks each, where none is left out."""
    references = References(first=tiny_wan.picture(1))
    return tiny_wan.render(model, references=references, **options)


def serve_films(model: wan.Wan, eager: np.ndarray, quick: np.ndarray) -> dict[str, Any]:
    network = model.networks["vace"]
    found, ledger = network.compiled_blocks, network.handle.ledger
    assert found is not None
    calls: dict[str, int] = {}

    def job(name: str, **options: Any) -> np.ndarray:
        before = found.num_calls
        try:
            return film(model, **options)
        finally:
            calls[name] = found.num_calls - before

    def move() -> None:
        """Have the weights dropped; the next job reads them anew."""
        (name,) = [row.name for row in ledger.report() if row.name == "wan_t2v"]
        assert ledger.request_move(name, "disk").is_done.wait(PATIENCE_S)

    first = job("first job")
    job("second job")
    until_compiled(found, lambda: film(model), shapes=2)
    compiled = job("once ready")
    progress = RecordedProgress()
    compiled_quick = job("with a preset", speed="fast", progress=progress)
    with suppress(Cancelled):
        job("stopped at the second of four steps", progress=stop_at_step(2))
    move()
    moved = job("after all that, its weights read anew")
    return {
        "compiled_calls": calls,
        "shallow_forwards": progress.speed_reports[0]["shallow_forwards"],
        "first_difference": tiny_wan.distance(first, eager),
        "difference": tiny_wan.distance(compiled, eager),
        "preset_difference": tiny_wan.distance(compiled_quick, quick),
        "later_difference": tiny_wan.distance(moved, compiled),
        "is_broken": found.is_broken,
    }


def strict() -> None:
    """Have torch raise where a compiled block does not serve, and it would go on in silence."""
    set_stance = torch.compiler.set_stance
    torch.compiler.set_stance = lambda name: set_stance(name.replace("eager_on", "fail_on"))


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    kept = Kept()
    logging.getLogger("ourvidz").addHandler(kept)
    strict()
    serve = {"network": serve_network, "wan": serve_wan}[sys.argv[1]]
    told = serve(Path(sys.argv[2]))
    inductor = counters["inductor"]
    told["hits"], told["misses"] = inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]
    print(json.dumps({**told, "log": kept.lines}))
