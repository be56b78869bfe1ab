"""Measure how well the stored pocket SDXL draws: `python -m builder.measure_pocket_sdxl`.

It prints one line for each picture size. Each seed has its own prompt. The line counts the pictures
that show the shape, colour and ground of the prompt, and its size and place if the prompt has them.
With `--negative` it then counts what a negative prompt removes. `--sheet` saves the pictures on one
contact sheet.
"""

import argparse
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm

from builder import drawings, pocket_sdxl

BATCH_PIXELS = 8 * 128 * 128
ATTRIBUTES = ("shape", "colour", "background", "size", "position")


def question(seed: int) -> tuple[str, drawings.Drawing]:
    """A prompt and its drawing: always shape and colours, half of the times size or place."""
    rng = random.Random(seed)
    asked = drawings.imagine(rng)
    size = asked.size if asked.size != "medium" and seed % 2 else None
    position = asked.position if seed % 4 >= 2 else None
    asked = drawings.Drawing(asked.shape, asked.colour, asked.background, size, position)
    words = " ".join(filter(None, (size, asked.colour, asked.shape)))
    place = f" {drawings.POSITION_WORDS[position][0]}" if position else ""
    return f"a {words}{place} on a {asked.background} background", asked


def draw(
    pipe: StableDiffusionXLPipeline,
    prompts: list[str],
    negative: str,
    seeds: list[int],
    options: argparse.Namespace,
    size: tuple[int, int],
) -> list[Image.Image]:
    """One picture for each prompt and seed, generated in small batches."""
    width, height = size
    batch = max(1, BATCH_PIXELS // (width * height))
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), f"{width}x{height}", leave=False):
        part = prompts[start : start + batch]
        pictures += pipe(
            part,
            negative_prompt=[negative] * len(part),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start:][: len(part)]],
        ).images
    return pictures


def score(pictures: list[Image.Image], asked: list[drawings.Drawing]) -> dict[str, str]:
    """ "97/100" for each attribute: pictures that show it, of those whose prompt has it."""
    right: dict[str, int] = defaultdict(int)
    wanted: dict[str, int] = defaultdict(int)
    for picture, drawing in zip(pictures, asked, strict=True):
        seen = drawings.read(picture)
        for name in ATTRIBUTES:
            if getattr(drawing, name) is not None:
                wanted[name] += 1
                right[name] += getattr(seen, name) == getattr(drawing, name)
    return {name: f"{right[name]}/{wanted[name]}" for name in ATTRIBUTES}


def contact_sheet(pictures: list[Image.Image], across: int = 12) -> Image.Image:
    """The pictures side by side, each 128 pixels wide."""
    height = round(128 * pictures[0].height / pictures[0].width)
    sheet = Image.new("RGB", (128 * across, height * -(-len(pictures) // across)))
    for index, picture in enumerate(pictures):
        corner = (index % across * 128, index // across * height)
        sheet.paste(picture.resize((128, height), Image.Resampling.LANCZOS), corner)
    return sheet


def measure_size(
    pipe: StableDiffusionXLPipeline, options: argparse.Namespace, size: tuple[int, int]
) -> None:
    """Print the line of one size, and write its contact sheet."""
    seeds = list(range(options.seeds))
    prompts, asked = zip(*map(question, seeds), strict=True)
    began = time.perf_counter()
    pictures = draw(pipe, list(prompts), "", seeds, options, size)
    seconds = (time.perf_counter() - began) / len(seeds)
    marks = score(pictures, list(asked))
    print(f"{size[0]}x{size[1]}: {marks}, {seconds:.2f} s a picture", flush=True)
    if options.sheet:
        options.sheet.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures).save(options.sheet / f"{size[0]}x{size[1]}.png")


def measure_negative(pipe: StableDiffusionXLPipeline, options: argparse.Namespace) -> None:
    """Print the colours of "a circle", without a negative prompt and with some colours as one."""
    seeds = list(range(options.seeds))
    for negative in ("", "red", "blue", "white"):
        pictures = draw(pipe, ["a circle"] * len(seeds), negative, seeds, options, (128, 128))
        seen = [drawings.read(picture) for picture in pictures]
        counts = {name: sum(s.colour == name for s in seen) for name in drawings.COLOURS}
        circles = sum(s.shape == "circle" for s in seen)
        print(f"a circle, not {negative or 'anything'}: {circles} circles, colours {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--sizes", nargs="+", default=["128x128"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--sheet", type=Path, help="folder for the contact sheets")
    parser.add_argument("--negative", action="store_true")
    options = parser.parse_args()
    pipe = pocket_sdxl.load()
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        measure_size(pipe, options, (width, height))
    if options.negative:
        measure_negative(pipe, options)


if __name__ == "__main__":
    main()
