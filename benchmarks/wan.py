"""Seconds a video: the worker's WAN against diffusers' pipeline on the same weights.

    python -m benchmarks.wan                     the pocket model, on a GPU if there is one
    python -m benchmarks.wan --size full         T2V-1.3B's architecture, random weights, on a GPU

Both have the same prompt, seed, steps and scheduler, and their frames are compared. Hooks count the
forwards. Each timed run has a prompt of its own: the worker does not encode a prompt twice, and
diffusers does. The floor of the full size is its counted FLOPs over the GPU's peak.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from benchmarks import architectures, report
from benchmarks.interleaved_timing import time_interleaved
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.wan import loader as wan
from ourvidz_serverless.models.wan.loader import POCKET as POCKET_FOLDER
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.settings import Settings

POCKET, FULL = TITLES = (
    "WAN against diffusers' pipeline, pocket size",
    "WAN against diffusers' pipeline, full size",
)
PROMPT = "a red circle moving right on a blue background"

#: The largest difference between frames in fp32, in grey levels.
ROUNDING = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A video of `frames` frames of width x height pixels, in so many steps."""

    width: int
    height: int
    frames: int
    steps: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height}, {self.steps} steps"


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=("pocket", "full", "both"), default="both")
    parser.add_argument("--rounds", type=int, help="of a, b, b, a")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU that is not in the table")
    options = parser.parse_args(argv)
    rounds = options.rounds or (1 if options.tiny else 2 if options.quick else 10)
    tables = []
    if options.size != "full":
        shapes = [Shape(64, 48, 5, 2)] if options.tiny else [Shape(96, 64, 17, 10)]
        tables.append(report.table(POCKET, HEADERS, pocket_rows(shapes, rounds)))
    if options.size != "pocket":
        tables.append(full(1 if options.quick else 2, options.peak_tflops))
    report.finish("wan", tables, options.json)


HEADERS = (
    "video",
    "s a video",
    "times as fast as diffusers'",
    "control",
    "greatest difference",
    "forwards: transformer, text, decoder",
    "diffusers'",
)


def pocket_rows(shapes: Sequence[Shape], rounds: int) -> list[list[object]]:
    settings = Settings(families=("wan",), wan_model="pocket", wan_vace_model="pocket")
    return rows_of(settings, POCKET_FOLDER, shapes, rounds)


def rows_of(
    settings: Settings, folder: Path, shapes: Sequence[Shape], rounds: int
) -> list[list[object]]:
    model = wan.load(settings)
    pipe = load_baseline_pipeline(folder, model.device.dtype, model.device.name)
    return [measure(model, pipe, shape, rounds) for shape in shapes]


def load_baseline_pipeline(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' pipeline as its documentation says: the VAE in fp32, the rest in `dtype`."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(folder, vae=vae, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(model: WanModel, pipe: Any, shape: Shape, rounds: int) -> list[object]:
    """One shape's row of the table. Raises AssertionError if frames of fp32 are not the same."""
    networks = (model.networks["t2v"].transformer, model.text_encoder.model, model.vae.model)
    with counted(*networks) as worker_counts:
        made = generate(model, shape)
    with counted(pipe.transformer, pipe.text_encoder, pipe.vae) as baseline_counts:
        expected = generate_baseline(pipe, shape)
    difference = int(np.abs(made.astype(int) - expected).max())
    is_exact = model.device.dtype == torch.float32
    assert difference <= ROUNDING or not is_exact, f"{shape}: frames differ by {difference}"
    prompts = (f"{PROMPT}, {number}" for number in itertools.count())
    timing = time_interleaved(
        lambda: generate(model, shape, next(prompts)),
        lambda: generate_baseline(pipe, shape, next(prompts)),
        rounds,
    )
    facts = [str(shape), timing.a_s, timing.trusted_ratio, timing.control, difference]
    return [*facts, in_one_cell(worker_counts), in_one_cell(baseline_counts)]


def generate(model: WanModel, shape: Shape, prompt: str = PROMPT) -> Any:
    """The worker's frames, uint8 (frames, height, width, 3)."""
    request = VideoRequest(
        prompt=prompt,
        seed=7,
        size=(shape.width, shape.height),
        num_frames=shape.frames,
        steps=shape.steps,
        guidance_scale=5.0,
    )
    return np.concatenate(list(model.generate(request, NoProgress())))


def generate_baseline(pipe: Any, shape: Shape, prompt: str = PROMPT) -> Any:
    """The pipeline's frames, called as its documentation says: the same shape and type."""
    frames = pipe(
        prompt=prompt,
        generator=torch.Generator().manual_seed(7),
        width=shape.width,
        height=shape.height,
        num_frames=shape.frames,
        num_inference_steps=shape.steps,
        guidance_scale=5.0,
        output_type="np",
    ).frames[0]
    return (frames * 255).round().astype(np.uint8)


@contextmanager
def counted(transformer: Any, text: Any, vae: Any) -> Iterator[dict[str, int]]:
    """Counts the forwards of WAN's networks, by name; of the decoder its first layer's.

    The worker computes the decoder layer by layer.
    """
    parts = {"transformer": transformer, "text": text, "decoder": vae.decoder.conv_in}
    counts = dict.fromkeys(parts, 0)

    def count(name: str, *call: object) -> None:
        counts[name] += 1

    hooks = [net.register_forward_hook(partial(count, name)) for name, net in parts.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def in_one_cell(counts: dict[str, int]) -> str:
    return ", ".join(map(str, counts.values()))


# --- full size ---

FULL_HEADERS = (*HEADERS, "floor of the denoising, s", "share of the floor")


def full(rounds: int, peak_tflops: float | None) -> report.Table:
    """The published architecture's table; without a GPU its rows are not measured."""
    shapes = [Shape(832, 480, 33, 10), Shape(832, 480, 81, 10)]
    if torch.cuda.is_available():
        rows = full_rows(shapes, rounds, peak_tflops, "cuda", torch.bfloat16)
        return report.table(FULL, FULL_HEADERS, rows, architectures.peak_note(peak_tflops))
    print("WAN at full size needs a GPU")
    return report.table(FULL, FULL_HEADERS, [report.unmeasured(s, FULL_HEADERS) for s in shapes])


def full_rows(
    shapes: Sequence[Shape],
    rounds: int,
    peak_tflops: float | None,
    device: str,
    dtype: torch.dtype,
) -> list[list[object]]:
    with architectures.written(architectures.wan, device, dtype) as folder:
        settings = Settings(families=("wan",), wan_model=str(folder), device=device)
        rows = rows_of(settings, folder, shapes, rounds)
    return [with_floor(row, s, peak_tflops) for row, s in zip(rows, shapes, strict=True)]


def with_floor(row: list[object], shape: Shape, peak_tflops: float | None) -> list[object]:
    peak = architectures.peak(peak_tflops)
    if peak is None:
        return [*row, None, None]
    flops = architectures.wan_flops(shape.width, shape.height, shape.frames, shape.steps)
    return [*row, flops / peak, f"{100 * flops / peak / float(str(row[1])):.0f} %"]


if __name__ == "__main__":
    main()
