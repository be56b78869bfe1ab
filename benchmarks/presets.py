"""What the presets of `config.speed` skip and change: `python -m benchmarks.presets`.

On the pocket models it counts the denoising network's forwards, and measures the PSNR against the
output of `exact`: the mean over some seeds and the worst. Neither has any noise, so one run is
enough. It does not measure time. `--grid` tries other values of SDXL's step cache. The presets'
values were chosen from that table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks import report
from ourvidz_serverless.models.memory.oom_fallback import SdxlMemoryPlan
from ourvidz_serverless.models.progress import NoProgress, Progress
from ourvidz_serverless.models.sdxl import loader as sdxl
from ourvidz_serverless.models.sdxl import vae as decoders
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.models.speed import presets as speed
from ourvidz_serverless.models.speed.presets import SpeedPreset
from ourvidz_serverless.models.wan import loader as wan
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.settings import Settings
from tests.fakes.recorded_progress import RecordedProgress

PROMPT = "green hills under a blue sky, a yellow sun on the right"

Render = Callable[..., np.ndarray]

TITLES = (
    "Forwards that each preset skips, and similarity to exact, pocket models",
    "The same latents from other decoders, pocket SDXL",
)
GRID_TITLE = "SDXL's step cache with other values, pocket model"
COUNTS = ("forwards", "shallow_forwards", "plain_forwards")
FIGURES = ("full forwards", "shallow", "of", "PSNR against exact, dB", "the worst seed's")
HEADERS = ("family", "preset", *FIGURES)
DECODER_HEADERS = ("decoder", "against", *FIGURES[-2:])
GRID_HEADERS = ("deep blocks every", "full first steps", *FIGURES)
STEPS = 25

GRID = (
    SpeedPreset(deep_cache_interval=2),
    SpeedPreset(deep_cache_interval=2, warmup_share=0.08),
    SpeedPreset(deep_cache_interval=2, warmup_share=0.2),
    SpeedPreset(deep_cache_interval=3),
    SpeedPreset(deep_cache_interval=3, warmup_share=0.08),
    SpeedPreset(deep_cache_interval=3, warmup_share=0.2),
    SpeedPreset(deep_cache_interval=4, warmup_share=0.2),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="how many, from 1 on")
    parser.add_argument("--grid", action="store_true", help="try values of SDXL's step cache")
    options = parser.parse_args(argv)
    seeds = range(1, 1 + (1 if options.tiny else options.seeds))
    tables = [grid(seeds)] if options.grid else [presets(seeds), decodings(seeds)]
    report.finish("presets", tables, options.json)


@contextmanager
def preset(name: str, values: SpeedPreset) -> Iterator[None]:
    """Within this context SDXL has one more preset."""
    speed.SDXL[name] = values
    try:
        yield
    finally:
        del speed.SDXL[name]


def presets(seeds: range) -> report.Table:
    """Each preset of each family."""
    rows = []
    for family, render, names in (
        ("SDXL", pictures(), ("balanced", "fast")),
        ("SDXL with a tiny VAE", pictures(sdxl_tiny_vae="pocket"), ("fast",)),
        ("WAN", videos(), ("balanced", "fast")),
    ):
        exact = [render(seed) for seed in seeds]
        rows += [[family, name, *figures(render, seeds, name, exact)] for name in names]
    note = f"SDXL 256x256, WAN 9 frames of 128x96, {STEPS} steps, the mean of {len(seeds)} seeds."
    return report.table(TITLES[0], HEADERS, rows, note)


def figures(render: Render, seeds: range, name: str, exact: Sequence[np.ndarray]) -> list[object]:
    """The cells of a preset below `FIGURES`."""
    progress = RecordedProgress()
    made = [render(seed, speed=name, progress=progress) for seed in seeds]
    counted = [round(mean(each[name] for each in progress.speed_reports), 1) for name in COUNTS]
    return [*counted, *psnrs(exact, made)]


def psnrs(exact: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> list[object]:
    """The mean PSNR and the worst one, in dB."""
    found = [psnr(one, other) for one, other in zip(exact, made, strict=True)]
    return [round(mean(found), 1), round(min(found), 1)]


def grid(seeds: range) -> report.Table:
    """SDXL with each preset of `GRID`."""
    render, rows = pictures(), []
    exact = [render(seed) for seed in seeds]
    for values in GRID:
        with preset("grid", values):
            found = figures(render, seeds, "grid", exact)
        rows.append([values.deep_cache_interval, values.warmup_steps(STEPS), *found])
    note = f"256x256, {STEPS} steps, the mean of {len(seeds)} seeds."
    return report.table(GRID_TITLE, GRID_HEADERS, rows, note)


def decodings(seeds: range) -> report.Table:
    """How similar the presets' decoders are to the VAE, on the latents of `exact` jobs."""
    model = sdxl.load(Settings(sdxl_tiny_vae="pocket"))
    others: Mapping[str, Any] = {
        "VAE in bf16": decoders.Vae(model.networks.vae, model.device, torch.bfloat16),
        "tiny VAE": model.networks.tiny_vae,
    }
    exact_vae = decoders.Vae(model.networks.vae, model.device, model.networks.vae.dtype)
    latents = [latent_of(model, seed) for seed in seeds]
    exact = [model.decode(exact_vae, each, SdxlMemoryPlan(1)) for each in latents]
    rows = []
    for name, decoder in others.items():
        made = [model.decode(decoder, each, SdxlMemoryPlan(1)) for each in latents]
        rows.append([name, "VAE in fp32", *psnrs(exact, made)])
    return report.table(TITLES[1], DECODER_HEADERS, rows)


def latent_of(model: SdxlModel, seed: int, side: int = 256, steps: int = STEPS) -> torch.Tensor:
    """The denoised latent of a picture, before decoding: (4, side / 8, side / 8)."""
    latents: list[torch.Tensor] = []

    class LatentRecorder(SdxlModel):
        def decode(self, decoder: Any, latent: torch.Tensor, plan: Any) -> np.ndarray:
            latents.append(latent)
            return np.empty(0)

    picture(LatentRecorder(model.networks, model.device), seed, side=side, steps=steps)
    return latents[0]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of bytes, in dB; infinite if they are equal."""
    error = float(((one.astype(float) - other) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def pictures(**settings: Any) -> Render:
    return functools.partial(picture, sdxl.load(Settings(**settings)))


def picture(
    model: SdxlModel,
    seed: int,
    progress: Progress | None = None,
    side: int = 256,
    steps: int = STEPS,
    speed: str = "exact",
) -> np.ndarray:
    request = ImageRequest(
        prompt=plain(PROMPT),
        seeds=(seed,),
        size=(side, side),
        steps=steps,
        guidance_scale=6.0,
        speed=speed,
    )
    (made,) = model.generate(request, progress or NoProgress())
    return made


def videos(**settings: Any) -> Render:
    model = wan.load(Settings(families=("wan",), **settings))

    def render(seed: int, speed: str = "exact", progress: Progress | None = None) -> np.ndarray:
        request = VideoRequest(
            prompt=PROMPT,
            negative="blurry",
            seed=seed,
            size=(128, 96),
            num_frames=9,
            steps=STEPS,
            guidance_scale=5.0,
            speed=speed,
        )
        return np.concatenate(list(model.generate(request, progress or NoProgress())))

    return render


if __name__ == "__main__":
    main()
