"""Measure how well the pocket SDXL paints what it is told: `python -m builder.measure_pocket_sdxl`.

Each seed has its own scene and caption, none of them from the training. `landscape_ruler` reads
each picture, and an attribute counts as right only if the ruler is sure of it. `--free` writes
captions in all their forms and judges what they name; otherwise a caption names everything.
Pictures are made by the worker's own loop, or with `--diffusers` by diffusers' pipeline. `--sheet`
saves them on a contact sheet, each with its caption.
"""

import argparse
import random
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from builder import pocket_sdxl
from builder.landscape_captions import ATTRIBUTES, caption, full_caption
from builder.landscape_ruler import read
from builder.landscapes import Scene, imagine
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.prompt_weighting import plain
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.settings import Settings

#: Scenes of the training have numbers as seeds.
HELD_OUT = "held out"
LABEL = 34

Question = tuple[str, Scene, frozenset[str]]


def question(seed: int, free: bool) -> Question:
    """A prompt, its scene, and the attributes that are judged."""
    rng = random.Random(f"{HELD_OUT} {seed}")
    scene = imagine(rng)
    if not free:
        return full_caption(scene), scene, frozenset(ATTRIBUTES)
    while len((said := caption(scene, rng)).says) < 2:
        pass
    return said.text, scene, said.says & frozenset(ATTRIBUTES)


def pictures(
    prompts: list[str], size: tuple[int, int], options: argparse.Namespace
) -> Iterator[Image.Image]:
    """One picture for each prompt; its number is its seed."""
    width, height = size
    if options.diffusers:
        pipe = pocket_sdxl.load()
        for seed, prompt in enumerate(prompts):
            yield pipe(
                prompt,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                width=width,
                height=height,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
        return
    model = loader.load(Settings())
    for seed, prompt in enumerate(prompts):
        request = ImageRequest(plain(prompt), (seed,), size, options.steps, options.guidance)
        for pixels in model.generate(request, NoProgress()):
            yield Image.fromarray(pixels)


def faults(picture: Image.Image, asked: Question) -> set[str]:
    """The attributes that the picture does not surely show."""
    _, scene, judged = asked
    reading = read(picture)
    return {name for name in judged if reading is None or not reading.shows(scene, name)}


def table(questions: list[Question], wrong: list[set[str]]) -> str:
    """ "sky 99/100 ..." for each attribute, and the pictures without any fault."""
    parts = []
    for name in ATTRIBUTES:
        judged = [bad for (_, _, names), bad in zip(questions, wrong, strict=True) if name in names]
        parts.append(f"{name} {sum(name not in bad for bad in judged)}/{len(judged)}")
    return ", ".join([*parts, f"everything {sum(not bad for bad in wrong)}/{len(wrong)}"])


def contact_sheet(shown: Iterable[tuple[Image.Image, str]], across: int) -> Image.Image:
    """The pictures with their captions below, at most 256 pixels wide each."""
    cells = []
    for picture, text in shown:
        small = picture.copy()
        small.thumbnail((256, 256))
        cells.append((small, text))
    wide, high = cells[0][0].size
    across = min(across, len(cells))
    sheet = Image.new("RGB", (wide * across, (high + LABEL) * -(-len(cells) // across)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index, (small, text) in enumerate(cells):
        left, top = index % across * wide, index // across * (high + LABEL)
        sheet.paste(small, (left, top))
        lines = "\n".join(textwrap.wrap(text, 46)[:2])
        draw.text((left + 4, top + high + 2), lines, fill="black", font=font)
    return sheet


def measure(size: tuple[int, int], options: argparse.Namespace) -> None:
    """Print the line of one size, and save its contact sheet."""
    questions = [question(seed, options.free) for seed in range(options.seeds)]
    prompts = [prompt for prompt, _, _ in questions]
    began = time.perf_counter()
    title = f"{size[0]}x{size[1]}"
    made = list(tqdm(pictures(prompts, size, options), title, len(prompts), leave=False))
    seconds = (time.perf_counter() - began) / len(prompts)
    wrong = [faults(picture, asked) for picture, asked in zip(made, questions, strict=True)]
    print(f"{title}: {table(questions, wrong)}; {seconds:.2f} s a picture", flush=True)
    for seed, bad in enumerate(wrong):
        if bad and options.faults:
            print(f"  {seed}: {prompts[seed]}: {', '.join(sorted(bad))}")
    if options.sheet:
        options.sheet.mkdir(parents=True, exist_ok=True)
        shown = zip(made[: options.on_sheet], prompts, strict=False)
        contact_sheet(shown, 6).save(options.sheet / f"{title}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x512"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--free", action="store_true", help="captions in all their forms")
    parser.add_argument("--diffusers", action="store_true", help="by diffusers' own pipeline")
    parser.add_argument("--faults", action="store_true", help="list the faults of each picture")
    parser.add_argument("--sheet", type=Path, help="the folder for contact sheets")
    parser.add_argument("--on-sheet", type=int, default=24, help="the most pictures on one")
    options = parser.parse_args()
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        measure((width, height), options)


if __name__ == "__main__":
    main()
