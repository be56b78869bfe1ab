"""Measure what the stored pocket WAN has learned: `python -m builder.measure_pocket_wan`.

First captions: each seed has its own caption. It counts the videos that show the colour, ground,
shape and direction of the caption. Then references: it prints the distance of the known frames from
the reference pictures, in grey levels of 255, and for comparison that of the other frames, and that
of the same seeds without references. `--sheet` saves the videos as filmstrips.
"""

import argparse
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline, WanVACEPipeline
from PIL import Image
from tqdm import tqdm

from builder import moving_drawings, pocket_wan
from builder.drawings import Pixels
from builder.moving_drawings import MovingDrawing

ATTRIBUTES = ("colour", "background", "shape", "direction")
# Which frames each mode knows, as indices.
MODES = {"start": [0], "end": [-1], "both": [0, -1]}
GREY = 128
STRIP = 5  # frames of each video on a sheet


def question(seed: int) -> tuple[str, MovingDrawing]:
    """A caption, and the drawing that it describes in full."""
    asked = moving_drawings.imagine(random.Random(seed))
    motion = moving_drawings.MOVING_WORDS[str(asked.direction)][0]
    article = "an" if str(asked.colour)[0] in "aeio" else "a"
    ground = "an orange" if asked.background == "orange" else f"a {asked.background}"
    words = f"{article} {asked.colour} {asked.shape} {motion} on {ground} background"
    return words, asked


def render(pipe: WanPipeline, seed: int, options: argparse.Namespace) -> Pixels:
    """The video (frames, height, width, 3) of the seed's caption."""
    return _run(pipe, seed, options)


def render_with_references(
    pipe: WanVACEPipeline, seed: int, mode: str, options: argparse.Namespace
) -> Pixels:
    """The same with references: the mode's frames of the seed's drawing."""
    frames, size = options.frames, (options.height, options.width)
    known = [index % frames for index in MODES[mode]]
    wanted = reference(seed, options)
    white, black = (Image.new("L", size[::-1], level) for level in (255, 0))
    grey = Image.new("RGB", size[::-1], (GREY, GREY, GREY))
    return _run(
        pipe,
        seed,
        options,
        video=[Image.fromarray(wanted[i]) if i in known else grey for i in range(frames)],
        mask=[black if i in known else white for i in range(frames)],
    )


def reference(seed: int, options: argparse.Namespace) -> Pixels:
    """The drawn video of the seed, whose frames are the reference pictures."""
    _, asked = question(seed)
    size = options.frames, options.width, options.height
    return moving_drawings.draw_video(asked, *size, random.Random(seed))


def _run(
    pipe: WanPipeline | WanVACEPipeline, seed: int, options: argparse.Namespace, **known: object
) -> Pixels:
    prompt, _ = question(seed)
    video = pipe(
        prompt,
        height=options.height,
        width=options.width,
        num_frames=options.frames,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **known,
    ).frames[0]
    return (video * 255 + 0.5).astype(np.uint8)


def strip(video: Pixels) -> Pixels:
    """A few frames of the video side by side, with the first and the last."""
    chosen = np.linspace(0, len(video) - 1, min(STRIP, len(video))).round().astype(int)
    return np.concatenate([video[index] for index in chosen], 1)


def save_sheet(strips: list[Pixels], path: Path) -> None:
    """Two columns of filmstrips."""
    if len(strips) % 2:
        strips.append(np.zeros_like(strips[0]))
    columns = [np.concatenate(strips[side::2]) for side in (0, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(columns, 1)).save(path)


def measure_captions(pipe: WanPipeline, options: argparse.Namespace) -> list[Pixels]:
    """Print how often the videos show each attribute of their captions. The value is the videos."""
    right: Counter[str] = Counter()
    began = time.perf_counter()
    videos = [render(pipe, seed, options) for seed in tqdm(range(options.seeds), "captions")]
    seconds = (time.perf_counter() - began) / len(videos)
    for seed, video in enumerate(videos):
        _, asked = question(seed)
        seen = moving_drawings.read(list(video))
        hits = [name for name in ATTRIBUTES if getattr(seen, name) == getattr(asked, name)]
        right.update(hits + ["all four"] * (len(hits) == len(ATTRIBUTES)))
    marks = ", ".join(f"{name} {right[name]}/{options.seeds}" for name in (*ATTRIBUTES, "all four"))
    print(f"captions: {marks}; {seconds:.1f} s a video", flush=True)
    if options.sheet:
        save_sheet([strip(video) for video in videos], options.sheet / "captions.png")
    return videos


def measure_mode(
    pipe: WanVACEPipeline, mode: str, plain: list[Pixels], options: argparse.Namespace
) -> None:
    """Print the distances of known and other frames from the reference pictures."""
    seeds = range(min(options.references, len(plain)))
    errors: dict[str, list[float]] = {"known": [], "unknown": [], "without": []}
    strips = []
    for seed in tqdm(seeds, mode):
        video, wanted = render_with_references(pipe, seed, mode, options), reference(seed, options)
        known = [index % len(video) for index in MODES[mode]]
        for index in known:
            errors["known"].append(_error(video[index], wanted[index]))
            errors["without"].append(_error(plain[seed][index], wanted[index]))
        errors["unknown"] += [
            float(np.mean([_error(frame, wanted[index]) for index in known]))
            for place, frame in enumerate(video)
            if place not in known
        ]
        strips += [strip(wanted), strip(video)]
    means = {name: float(np.mean(each)) for name, each in errors.items()}
    print(
        f"{mode}: known frames {means['known']:.1f}, unknown frames {means['unknown']:.1f}, "
        f"without references {means['without']:.1f} grey levels from the pictures given",
        flush=True,
    )
    if options.sheet:
        save_sheet(strips, options.sheet / f"{mode}.png")


def _error(frame: Pixels, wanted: Pixels) -> float:
    return float(np.abs(frame.astype(np.float32) - wanted).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--references", type=int, default=12, help="seeds for each mode")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--sheet", type=Path, help="folder for the filmstrips")
    options = parser.parse_args()
    pipe = pocket_wan.load()
    plain = measure_captions(pipe, options)
    if options.references:
        referring = pocket_wan.load_vace(pipe)
        for mode in MODES:
            measure_mode(referring, mode, plain, options)


if __name__ == "__main__":
    main()
