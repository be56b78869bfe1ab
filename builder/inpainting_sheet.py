"""Jobs that repaint a part of a picture or extend it, by the pocket model, on one contact sheet.

`python -m builder.inpainting_sheet` writes `docs/images/inpainting.jpg`. Each row has a picture
that the model painted, the mask of the job, and the job's pictures. It takes about a minute on two
idle cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from builder.contact_sheet import IMAGES, Labelled, sheet
from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.jobs import sdxl
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.settings import Settings

SIDE = 512

#: The size and the guidance at which the pocket model's colours are those of its drawings.
CONFIG = {"resolution": f"{SIDE}x{SIDE}", "guidance_scale": 2.5, "num_inference_steps": 20}

HOUSE = "green hills under a blue sky, a yellow sun on the right, a house on the left"
BOAT = "a blue sea under a pink sky, a yellow sun on the left, a boat on the right"


@dataclass(frozen=True, slots=True)
class Repaint:
    """A picture by its prompt and seed, the white ellipse of its mask, and how it is repainted."""

    prompt: str
    seed: int
    #: Left, top, right and bottom.
    ellipse: tuple[int, int, int, int]
    label: str
    new_prompt: str
    mask_blur: int = 8


REPAINTED = [
    Repaint(
        BOAT, 11, (295, 285, 505, 500),
        "without the boat", "a blue sea under a pink sky, a yellow sun on the left",
    ),
    Repaint(
        HOUSE, 3, (0, 200, 240, 500),
        "a tree in place of the house", "green hills under a blue sky, a tree on the left",
    ),
    Repaint(
        HOUSE, 3, (190, -80, 620, 330),
        "without the sun, mask_blur 64", "green hills under a blue sky, a house on the left",
        mask_blur=64,
    ),
]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    model = loader.load(Settings())
    rows = [repainted(model, each) for each in tqdm(REPAINTED, unit="row")]
    rows.append(extended(model))
    sheet(rows).save(IMAGES / "inpainting.jpg", quality=88)


def repainted(model: SdxlModel, row: Repaint) -> list[Labelled]:
    """A picture, its mask, and two pictures in which the white of the mask was made anew."""
    (picture,) = pictures(model, {}, prompt=row.prompt, config={"seed": row.seed})
    mask = Image.new("RGB", picture.size)
    ImageDraw.Draw(mask).ellipse(row.ellipse, fill="white")
    given = {"reference": picture, "mask": mask}
    config = {"num_images": 2, "seed": 1, "mask_blur": row.mask_blur}
    made = pictures(model, given, prompt=row.new_prompt, config=config)
    label = f"{row.label}: '{row.new_prompt}'"
    return [("a picture", [picture]), ("its mask", [mask]), (label, made)]


def extended(model: SdxlModel) -> list[Labelled]:
    """A picture, and the same extended to the left and to the right."""
    prompt = "green hills under a blue sky, a house in the middle"
    (picture,) = pictures(model, {}, prompt=prompt, config={"seed": 3})
    prompt = "green hills under a blue sky, a tree on the left"
    config = {"resolution": "1024x512", "resize_mode": "extend", "seed": 2}
    made = pictures(model, {"reference": picture}, prompt=prompt, config=config)
    return [("a picture", [picture]), (f"extended to 1024x512: '{prompt}'", made)]


def pictures(
    model: SdxlModel, references: Mapping[str, Image.Image], prompt: str, config: dict[str, Any]
) -> list[Image.Image]:
    """The pictures of a job with these references."""
    fields = {"reference": "image", "mask": "mask"}
    given = {fields[role]: f"user-1/{role}.png" for role in references}
    payload = {
        "id": "job-1",
        "type": "sdxl_image_fast",
        "prompt": prompt,
        "config": {**CONFIG, **given, **config},
    }
    job = sdxl.parse(payload, Settings())
    context = JobContext(Stop(), lambda progress: None, Bounds(3600))
    return [Image.fromarray(each.pixels) for each in sdxl.run(job, model, references, context)]


if __name__ == "__main__":
    main()
