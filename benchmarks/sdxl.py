"""Pictures a second: the worker's SDXL against diffusers' pipeline on the same weights.

    python -m benchmarks.sdxl                    the pocket model, on a GPU if there is one
    python -m benchmarks.sdxl --size full        SDXL's architecture, random weights, on a GPU

Both have the same prompt, seeds, steps and scheduler, and their pixels are compared. Hooks count
the forwards. Each timed run has a prompt of its own: the worker does not encode a prompt twice, and
diffusers does. The floor of the full size is its counted FLOPs over the GPU's peak.

A third table compares the worker with a lever and without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks import architectures, report
from benchmarks.baselines import PROMPT, load_baseline_pipeline
from benchmarks.interleaved_timing import time_interleaved
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.sdxl import loader as sdxl
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.settings import Settings

POCKET, FULL, LEVERS = TITLES = (
    "SDXL against diffusers' pipeline, pocket size",
    "SDXL against diffusers' pipeline, full size",
    "SDXL with a lever against SDXL without it",
)

#: The largest difference in fp32, in grey levels. A batched forward differs in its last bits.
ROUNDING = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """`count` pictures of side x side pixels at once, in so many steps."""

    count: int
    side: int
    steps: int

    def __str__(self) -> str:
        return f"{self.count} of {self.side}x{self.side}, {self.steps} steps"


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=("pocket", "full", "both"), default="both")
    parser.add_argument("--rounds", type=int, help="of a, b, b, a")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU that is not in the table")
    options = parser.parse_args(argv)
    rounds = options.rounds or (1 if options.tiny else 2 if options.quick else 10)
    tables, levers = [], []
    if options.size != "full":
        side, steps = (64, 2) if options.tiny else (256, 10)
        shapes = [Shape(1, side, steps), Shape(4, side, steps)]
        tables.append(report.table(POCKET, HEADERS, pocket_rows(shapes, rounds)))
        levers += lever_rows(Settings(), shapes[0], rounds)
    if options.size != "pocket":
        tables.append(full(rounds, options.peak_tflops))
        levers += full_lever_rows(rounds)
    tables.append(report.table(LEVERS, LEVER_HEADERS, levers))
    report.finish("sdxl", tables, options.json)


HEADERS = (
    "pictures",
    "pictures/s",
    "times diffusers'",
    "control",
    "greatest difference",
    "forwards: UNet, text, VAE",
    "diffusers'",
)


def pocket_rows(shapes: Sequence[Shape], rounds: int) -> list[list[object]]:
    model, pipe = sdxl.load(Settings(sdxl_model="pocket")), load_baseline_pipeline()
    return [measure(model, pipe, shape, rounds) for shape in shapes]


def measure(model: SdxlModel, pipe: Any, shape: Shape, rounds: int) -> list[object]:
    """One shape's row of the table. Raises AssertionError if pictures of fp32 are not the same."""
    with counted(model.networks.pipe) as worker_counts, counted(pipe) as baseline_counts:
        made, expected = generate(model, shape), generate_baseline(pipe, shape)
    difference = int(np.abs(made.astype(int) - expected).max())
    is_exact = model.device.dtype == torch.float32
    assert difference <= ROUNDING or not is_exact, f"{shape}: pixels differ by {difference}"
    prompts = (f"{PROMPT}, {number}" for number in itertools.count())
    timing = time_interleaved(
        lambda: generate(model, shape, next(prompts)),
        lambda: generate_baseline(pipe, shape, next(prompts)),
        rounds,
    )
    facts = [str(shape), shape.count / timing.a_s, timing.trusted_ratio, timing.control, difference]
    return [*facts, in_one_cell(worker_counts), in_one_cell(baseline_counts)]


def generate(model: SdxlModel, shape: Shape, prompt: str = PROMPT) -> Any:
    """The worker's pictures, uint8 (count, side, side, 3)."""
    request = ImageRequest(
        prompt=plain(prompt),
        seeds=tuple(range(shape.count)),
        size=(shape.side, shape.side),
        steps=shape.steps,
        guidance_scale=6.0,
    )
    return np.stack(list(model.generate(request, NoProgress())))


def generate_baseline(pipe: Any, shape: Shape, prompt: str = PROMPT) -> Any:
    """The pipeline's pictures, called as its documentation says: the same shape and type."""
    images = pipe(
        prompt=prompt,
        num_images_per_prompt=shape.count,
        generator=[torch.Generator().manual_seed(seed) for seed in range(shape.count)],
        width=shape.side,
        height=shape.side,
        num_inference_steps=shape.steps,
        guidance_scale=6.0,
    ).images
    return np.stack([np.asarray(image) for image in images])


@contextmanager
def counted(pipe: Any) -> Iterator[dict[str, int]]:
    """Counts the forwards of a pipeline's networks, by name."""
    parts = {
        "UNet": [pipe.unet],
        "text": [pipe.text_encoder, pipe.text_encoder_2],
        "VAE": [pipe.vae.decoder],
    }
    counts = dict.fromkeys(parts, 0)

    def count(name: str, *call: object) -> None:
        counts[name] += 1

    hooks = [
        network.register_forward_hook(partial(count, name))
        for name, networks in parts.items()
        for network in networks
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def in_one_cell(counts: dict[str, int]) -> str:
    return ", ".join(map(str, counts.values()))


# --- full size ---

FULL_HEADERS = (*HEADERS, "floor, ms a picture", "share of the floor")


def full(rounds: int, peak_tflops: float | None) -> report.Table:
    """The published architecture's table; without a GPU its rows are not measured."""
    shapes = [Shape(1, 1024, 30), Shape(4, 1024, 30)]
    if torch.cuda.is_available():
        rows = full_rows(shapes, rounds, peak_tflops, "cuda", torch.float16)
        return report.table(FULL, FULL_HEADERS, rows, architectures.peak_note(peak_tflops))
    print("SDXL at full size needs a GPU")
    return report.table(FULL, FULL_HEADERS, [report.unmeasured(s, FULL_HEADERS) for s in shapes])


def full_rows(
    shapes: Sequence[Shape],
    rounds: int,
    peak_tflops: float | None,
    device: str,
    dtype: torch.dtype,
) -> list[list[object]]:
    with architectures.written(architectures.sdxl, device, dtype) as folder:
        model = sdxl.load(Settings(sdxl_model=str(folder), device=device))
        pipe = StableDiffusionXLPipeline.from_pretrained(
            folder, torch_dtype=dtype, add_watermarker=False
        ).to(device)
        pipe.set_progress_bar_config(disable=True)
        return [with_floor(measure(model, pipe, s, rounds), s, peak_tflops) for s in shapes]


def with_floor(row: list[object], shape: Shape, peak_tflops: float | None) -> list[object]:
    peak = architectures.peak(peak_tflops)
    if peak is None:
        return [*row, None, None]
    floor_s = architectures.sdxl_flops(shape.side, shape.steps) / peak
    return [*row, 1000 * floor_s, f"{100 * floor_s * float(str(row[1])):.0f} %"]


# --- levers ---

LEVER_HEADERS = (
    "lever",
    "pictures",
    "pictures/s",
    "times without it",
    "control",
    "greatest difference",
)
LEVERS_MEASURED = ("a prompt's keys and values once", "channels-last")


def lever_rows(settings: Settings, shape: Shape, rounds: int) -> list[list[object]]:
    usual = sdxl.load(settings)
    # A lean plan computes a prompt's keys and values at every step.
    plans = MemoryPlans(SdxlMemoryPlan(settings.sdxl_max_batch, lean=True))
    lean = SdxlModel(usual.networks, usual.device, handle=usual.handle, plans=plans)
    last = sdxl.load(settings.model_copy(update={"memory_format": "channels_last"}))
    return [
        lever_row(LEVERS_MEASURED[0], usual, lean, shape, rounds),
        lever_row(LEVERS_MEASURED[1], last, usual, shape, rounds),
    ]


def lever_row(
    name: str,
    model: SdxlModel,
    without: SdxlModel,
    shape: Shape,
    rounds: int,
) -> list[object]:
    run, run_without = (partial(generate, each, shape) for each in (model, without))
    difference = int(np.abs(run().astype(int) - run_without()).max())
    timing = time_interleaved(run, run_without, rounds)
    pictures_s = shape.count / timing.a_s
    return [name, str(shape), pictures_s, timing.trusted_ratio, timing.control, difference]


def full_lever_rows(rounds: int) -> list[list[object]]:
    """The published architecture's rows; without a GPU they are not measured."""
    if not torch.cuda.is_available():
        names = LEVERS_MEASURED
        return [report.unmeasured(f"{name}, full size", LEVER_HEADERS) for name in names]
    with architectures.written(architectures.sdxl, "cuda", torch.float16) as folder:
        settings = Settings(sdxl_model=str(folder), device="cuda")
        return lever_rows(settings, Shape(1, 1024, 30), rounds)


if __name__ == "__main__":
    main()
