"""Every reference mode of WAN, rendered by the worker, as filmstrips on one picture.

`python -m builder.filmstrip` renders the payload of `video_fast` once in each mode with the pocket
WAN, and writes `docs/images/wan-modes.png`. Frames with a border are references. This takes a
minute or two.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from builder import moving_drawings
from builder.contact_sheet import IMAGES, payload
from builder.drawings import Pixels
from builder.moving_drawings import MovingDrawing
from ourvidz_serverless.context import Stop
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker

SIDE, FRAMES, FPS, STEPS = 128, 17, 8, 15
SCALE = 1
SHOWN = 9
MARGIN, LABEL, BORDER = 12, 26, 4
SEED = 7

#: The references are the first and the last frame of this drawing. The prompt describes it.
DRAWING = MovingDrawing("circle", "red", "blue", "right")
PROMPT = "a red circle moving right on a blue background"

#: A label, its frames, and the indices of those that are references.
Strip = tuple[str, list[Image.Image], tuple[int, ...]]

#: Label, additional fields of `config`, and the indices of the shown frames that are references.
MODES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("none", {}, ()),
    ("single, as a subject", {"image": "first", "single_mode": "subject"}, ()),
    ("single or start: the first frame is given", {"first_frame": "first"}, (0,)),
    ("end: the last frame is given", {"last_frame": "last"}, (SHOWN - 1,)),
    ("both are given", {"first_frame": "first", "last_frame": "last"}, (0, SHOWN - 1)),
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    drawn = moving_drawings.draw_video(DRAWING, FRAMES, SIDE, SIDE, random.Random(SEED))
    given = {"first": data_uri(drawn[0]), "last": data_uri(drawn[-1])}
    strips: list[Strip] = [("the drawing that the references come from", chosen(drawn), ())]
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker.of(Settings(families=("wan",), storage_url=f"file:{folder}"))
        for label, references, borders in tqdm(MODES, unit="video"):
            config = {name: given.get(value, value) for name, value in references.items()}
            video = rendered(worker, config, Path(folder))
            strips.append((f"{label}: '{PROMPT}'", chosen(video), borders))
    IMAGES.mkdir(parents=True, exist_ok=True)
    sheet(strips).save(IMAGES / "wan-modes.png", optimize=True)


def rendered(worker: Worker, config: dict[str, Any], storage: Path) -> Pixels:
    """The video (frames, height, width, 3) of the payload with these fields of `config`."""
    size = {"width": SIDE, "height": SIDE, "frames": FRAMES, "fps": FPS, "seed": SEED}
    size["num_inference_steps"] = STEPS
    # The payload has the mode `none`. Without it the references decide.
    changes = {
        "prompt": PROMPT,
        "config": {**size, **config},
        "metadata": {"video_reference_mode": None},
    }
    envelope = Envelope.of({"input": payload("video_fast", changes)})
    document = worker.run(envelope, Stop(), lambda progress: None)
    with av.open(str(storage / document.assets[0].url)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def data_uri(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def chosen(video: Pixels) -> list[Image.Image]:
    """`SHOWN` frames at equal distances, with the first and the last."""
    places = np.linspace(0, len(video) - 1, SHOWN).round().astype(int)
    return [Image.fromarray(video[place]) for place in places]


def sheet(strips: list[Strip]) -> Image.Image:
    """All strips, one below the other, each below its label."""
    side = SIDE * SCALE
    row = side + LABEL + MARGIN
    size = (MARGIN + SHOWN * (side + MARGIN), MARGIN + len(strips) * row)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)
    for index, (label, frames, borders) in enumerate(strips):
        top = MARGIN + index * row
        draw.text((MARGIN, top), label, fill="black", font=font)
        for column, frame in enumerate(frames):
            corner = (MARGIN + column * (side + MARGIN), top + LABEL)
            canvas.paste(frame.resize((side, side)), corner)
            if column in borders:
                outline = (*(at - BORDER for at in corner), *(at + side + 3 for at in corner))
                draw.rectangle(outline, outline="black", width=BORDER)
    return canvas


if __name__ == "__main__":
    main()
