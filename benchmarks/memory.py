"""Peak memory by family and shape, beside the size of the weights.

    python -m benchmarks.memory

Each row is measured in its own process. It loads the pocket model, or with `--size full` on a GPU
the full-size one with random weights, and runs one job of one step, or some conversations at once.
`tensors` is counted: on a GPU by torch's allocator, on a CPU by the worker itself, as if the device
had a memory of `VRAM_BUDGET_GB`. That count has no noise. The peak up to the last step is in
`computing`, the peak after it in `decoding`. `process` is how much the process's peak (VmHWM) grew
while the job ran.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import architectures, report
from ourvidz_serverless.models import open_ledger
from ourvidz_serverless.models.chat.engine import Engine
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.loader import POCKET as POCKET_FOLDER
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.progress import NoProgress, Progress
from ourvidz_serverless.models.sdxl import loader as sdxl
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.models.wan import loader as wan
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import tiny_folder

POCKET, FULL = TITLES = (
    "Memory beside the weights, pocket size",
    "Memory beside the weights, full size",
)
HEADERS = (
    "family",
    "job",
    "weights, MiB",
    "computing: tensors, MiB",
    "decoding: tensors, MiB",
    "process, MiB",
)

#: GiB. Enough for all weights, so that none are evicted.
AMPLE = 64.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A job: `count` pictures, frames or conversations of a size.

    A conversation's size is the tokens of its prompt and of its reply.
    """

    family: str
    size: tuple[int, int]
    count: int

    def __str__(self) -> str:
        noun = {"sdxl": "picture", "wan": "frame", "chat": "conversation"}[self.family]
        first, second = self.size
        size = f"{first} and {second} tokens" if self.family == "chat" else f"{first}x{second}"
        return f"{self.count} {noun}{'s' * (self.count > 1)} of {size}"


TINY = (Shape("sdxl", (64, 64), 1), Shape("wan", (64, 48), 5), Shape("chat", (8, 2), 2))
QUICK = (
    Shape("sdxl", (512, 512), 1),
    Shape("sdxl", (512, 512), 4),
    Shape("sdxl", (1024, 1024), 1),
    Shape("wan", (208, 112), 17),
    Shape("wan", (208, 112), 49),
    Shape("wan", (208, 112), 81),
    Shape("chat", (100, 4), 1),
    Shape("chat", (100, 4), 16),
)
POCKET_SIZE = (*QUICK, Shape("sdxl", (1024, 1024), 4), Shape("wan", (416, 240), 81))
FULL_SIZE = (
    Shape("sdxl", (1024, 1024), 1),
    Shape("sdxl", (1024, 1024), 4),
    Shape("wan", (832, 480), 33),
    Shape("wan", (832, 480), 81),
    Shape("chat", (1000, 16), 1),
    Shape("chat", (1000, 16), 64),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=("pocket", "full", "both"), default="both")
    parser.add_argument("--one", help="measure only this shape (JSON), in this process")
    options = parser.parse_args(argv)
    if options.one:
        family, size, count = json.loads(options.one)
        print(json.dumps(row(Shape(family, tuple(size), count), options.size == "full")))
        return
    tables = []
    if options.size != "full":
        shapes = TINY if options.tiny else QUICK if options.quick else POCKET_SIZE
        tables.append(report.table(POCKET, HEADERS, [row_of_process(each) for each in shapes]))
    if options.size != "pocket":
        tables.append(full())
    report.finish("memory", tables, options.json)


def full() -> report.Table:
    if not torch.cuda.is_available():
        print("memory at full size needs a GPU")
        rows = [[each.family, *report.unmeasured(each, HEADERS[1:])] for each in FULL_SIZE]
        return report.table(FULL, HEADERS, rows)
    return report.table(FULL, HEADERS, [row_of_process(each, "full") for each in FULL_SIZE])


def row_of_process(shape: Shape, size: str = "pocket") -> list[object]:
    """A shape's row, measured in another process. Raises RuntimeError if that fails."""
    fields = json.dumps(astuple(shape))
    command = [sys.executable, "-m", "benchmarks.memory", "--size", size, "--one", fields]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{shape}: {ended.stderr[-2000:]}")
    found: list[object] = json.loads(ended.stdout.splitlines()[-1])
    print(" | ".join(map(report.cell, found)), flush=True)
    return found


def row(shape: Shape, is_full: bool) -> list[object]:
    """A shape's row, measured in this process."""
    with checkpoint(shape.family, is_full) as place:
        model = LOAD[shape.family](place)
        weights = model.device.allocated_bytes()
        peaks = Peaks(model.device, weights)
        reset_peak()
        before = memory("VmRSS")
        JOBS[shape.family](model, shape, peaks)
        grown = memory("VmHWM") - before
    facts = [weights, *peaks.end(), grown]
    return [shape.family, str(shape), *[each and round(each / 2**20, 1) for each in facts]]


class Peaks(NoProgress):
    """Peak bytes of tensors beside the weights, up to the last step and after it."""

    def __init__(self, device: Any, weights: int) -> None:
        self._device, self._weights = device, weights
        self._computing: int | None = None
        device.reset_peak()

    def step(self, done: int, total: int) -> None:
        if done == total:
            self._computing = self._device.peak_bytes() - self._weights
            self._device.reset_peak()

    def end(self) -> tuple[int, int | None]:
        """Peak bytes of computing and of decoding. A job without steps has no second one."""
        last = self._device.peak_bytes() - self._weights
        return (last, None) if self._computing is None else (self._computing, last)


@contextmanager
def checkpoint(family: str, is_full: bool) -> Iterator[str]:
    """The name of the pocket model, or of one of full size with random weights."""
    if not is_full:
        yield "pocket"
        return
    dtype = torch.float16 if family == "sdxl" else torch.bfloat16
    with architectures.written(getattr(architectures, family), "cuda", dtype) as folder:
        yield str(folder)


def load_sdxl(place: str) -> Any:
    return sdxl.load(Settings(sdxl_model=place, vram_budget_gb=AMPLE))


def load_wan(place: str) -> Any:
    return wan.load(Settings(families=("wan",), wan_model=place, vram_budget_gb=AMPLE))


def load_chat(place: str) -> Any:
    """A chat engine, and the device that counts its tensors.

    The model is the pocket one if it was built, else the tests' tiny one.
    """
    settings = Settings(vram_budget_gb=AMPLE)
    device = Device.choose(settings, torch.bfloat16, open_ledger(settings).memory)
    with tempfile.TemporaryDirectory() as folder:
        if place == "pocket":
            place = str(POCKET_FOLDER) if POCKET_FOLDER.exists() else tiny_folder(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(place, dtype=device.dtype, disable_mmap=True)
    device.count_bytes(sum(each.numel() * each.element_size() for each in model.parameters()))
    return ChatEngine(device, Engine(model.to(device.name).eval(), device, eos_ids=[]))


@dataclass(frozen=True, slots=True)
class ChatEngine:
    device: Device
    engine: Engine


def run_sdxl(model: Any, shape: Shape, progress: Progress) -> None:
    request = ImageRequest(
        prompt=plain("a red sun"),
        seeds=tuple(range(shape.count)),
        size=shape.size,
        steps=1,
        guidance_scale=6.0,
    )
    deque(model.generate(request, progress), maxlen=0)


def run_wan(model: Any, shape: Shape, progress: Progress) -> None:
    request = VideoRequest(
        prompt="a red sun",
        seed=7,
        size=shape.size,
        num_frames=shape.count,
        steps=1,
        guidance_scale=5.0,
    )
    deque(model.generate(request, progress), maxlen=0)


def run_chat(model: ChatEngine, shape: Shape, progress: Progress) -> None:
    prompt, reply = shape.size
    asked = [
        Generation(
            list(range(100 + index, 100 + index + prompt)),
            SamplingParams(max_tokens=reply, temperature=0),
            decode=lambda ids: "x" * len(ids),
        )
        for index in range(shape.count)
    ]
    for each in asked:
        model.engine.submit(each)
    with ThreadPoolExecutor(len(asked)) as threads:
        list(threads.map("".join, asked))


LOAD = {"sdxl": load_sdxl, "wan": load_wan, "chat": load_chat}
JOBS = {"sdxl": run_sdxl, "wan": run_wan, "chat": run_chat}


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS` is its memory now, `VmHWM` its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) << 10


def reset_peak() -> None:
    """Let `VmHWM` begin at the memory of now (proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
