"""Measure what the stored pocket WAN has learned: `python -m builder.measure_pocket_wan`.

First captions: each seed has its own video and caption, none of them from the training. The rulers
read what the frames show and what moves; an attribute counts as right only if they are sure of it.
Then references: the distance of the given frames from the reference pictures, in grey levels of
255, and how often the action is right. `--sheet` saves the videos as filmstrips.
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

from builder import landscape_videos, pocket_wan
from builder.landscape_captions import ATTRIBUTES
from builder.landscape_ruler import read
from builder.landscape_videos import Video
from builder.landscapes import Pixels

#: Videos of the training have numbers as seeds.
HELD_OUT = "held out"
# Which frames each mode knows, as indices.
MODES = {"start": [0], "end": [-1], "both": [0, -1]}
GREY = 128
STRIP = 5  # frames of each video on a sheet


def question(seed: int) -> tuple[str, Video]:
    """A caption, and the video that it describes in full."""
    asked = landscape_videos.imagine(random.Random(f"{HELD_OUT} {seed}"))
    return landscape_videos.full_caption(asked), asked


def right_in(video: Pixels, asked: Video) -> set[str]:
    """What the frames surely show of a video: attributes of its scene, and "action"."""
    # A sun that rises is not seen at first.
    seen = read(video[-1 if asked.action == "sunrise" else 0])
    right = {"action"} if landscape_videos.motion(list(video)) == asked.action else set()
    if seen is None:
        return right
    scene = landscape_videos.at_first(asked)
    return right | {name for name in judged(asked) if seen.shows(scene, name)}


def judged(asked: Video) -> list[str]:
    """The attributes that a caption in full names. A boat that sails has no place."""
    sails = asked.action.startswith("boat")
    return [name for name in ATTRIBUTES if not (sails and name == "thing_place")]


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
    return landscape_videos.draw(asked, options.frames, options.width, options.height)


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


def measure_captions(pipe: WanPipeline, options: argparse.Namespace) -> None:
    """Print how often the videos show each attribute of their captions."""
    right: Counter[str] = Counter()
    asked_for: Counter[str] = Counter()
    strips = []
    began = time.perf_counter()
    for seed in tqdm(range(options.seeds), "captions"):
        prompt, asked = question(seed)
        video = render(pipe, seed, options)
        names = {*judged(asked), "action"}
        hits = right_in(video, asked)
        asked_for.update(names)
        asked_for.update([asked.action, "all"])
        right.update(hits)
        right.update([asked.action] * ("action" in hits) + ["all"] * (hits == names))
        strips.append(strip(video))
        if options.faults and hits != names:
            tqdm.write(f"{seed}: {', '.join(sorted(names - hits))}: {prompt}")
    seconds = (time.perf_counter() - began) / options.seeds
    print(f"captions: {_shares(right, asked_for)}; {seconds:.1f} s a video", flush=True)
    if options.sheet:
        save_sheet(strips, options.sheet / "captions.png")


def _shares(right: Counter[str], asked_for: Counter[str]) -> str:
    return ", ".join(f"{name} {right[name]}/{count}" for name, count in asked_for.items())


def measure_mode(pipe: WanVACEPipeline, mode: str, options: argparse.Namespace) -> None:
    """Print the distances of the given frames, and of the others, from the drawn video."""
    given, others, strips, right = [], [], [], 0
    for seed in tqdm(range(options.references), mode):
        video, wanted = render_with_references(pipe, seed, mode, options), reference(seed, options)
        distances = np.abs(video.astype(np.float32) - wanted).mean((1, 2, 3))
        known = [index % len(video) for index in MODES[mode]]
        given += [distances[index] for index in known]
        others += [each for place, each in enumerate(distances) if place not in known]
        right += landscape_videos.motion(list(video)) == question(seed)[1].action
        strips += [strip(wanted), strip(video)]
    print(
        f"{mode}: given frames {np.mean(given):.1f} (at most {np.max(given):.1f}), others "
        f"{np.mean(others):.1f} grey levels from the drawn ones; action {right}/{len(strips) // 2}",
        flush=True,
    )
    if options.sheet:
        save_sheet(strips, options.sheet / f"{mode}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--references", type=int, default=24, help="seeds for each mode")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--faults", action="store_true", help="list the faults of each video")
    parser.add_argument("--sheet", type=Path, help="folder for the filmstrips")
    options = parser.parse_args()
    pipe = pocket_wan.load()
    measure_captions(pipe, options)
    if options.references:
        referring = pocket_wan.load_vace(pipe)
        for mode in MODES:
            measure_mode(referring, mode, options)


if __name__ == "__main__":
    main()
