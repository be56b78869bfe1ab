"""The application's payloads, rendered by `handler.py`, on one contact sheet.

`python -m builder.contact_sheet` renders the payloads of `tests/payloads/` with the pocket SDXL,
each in its own process as RunPod runs it, and writes `docs/images/`. The reference is the first
picture. This takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH = 1536
MARGIN = 16
LABEL = 34

#: The storage key of the reference picture.
REFERENCE = "user-1/job-reference/0.png"

Labelled = tuple[str, list[Image.Image]]

#: A label, a payload's name, and the changes to it: smaller sizes, other prompts, the reference.
Job = tuple[str, str, dict[str, Any]]

BOAT = "a blue sea under a pink sky, a yellow sun on the left, a boat on the right"
EVENING = "a green sea under an orange sky, a red sun on the left, a boat on the right"
HOUSE = "brown mountains under a blue sky, a house on the right, clouds"
NIGHT = "(white:1.4) mountains at night, a yellow moon on the left"
TREE = "(green:1.4) hills, a tree"

#: For each row its jobs. Their pictures fill the row.
ROWS: list[list[Job]] = [
    [
        (
            "a reference",
            "sdxl_image_fast",
            {
                "id": "job-reference",
                "prompt": BOAT,
                "config": {"resolution": "512x512", "num_images": 1, "seed": 11},
            },
        ),
        (
            f"modify it, denoise 0.8: '{EVENING}'",
            "sdxl_modify",
            {
                "prompt": EVENING,
                "config": {"resolution": "512x512", "num_images": 3, "denoise_strength": 0.8},
                "metadata": {"reference_image_url": REFERENCE},
            },
        ),
    ],
    [
        (
            f"text to image, 512x288: '{HOUSE}'",
            "sdxl_image_fast",
            {
                "prompt": HOUSE,
                "config": {"resolution": "512x288", "seed": 1},
            },
        ),
    ],
    [
        (
            "exact copy of the reference",
            "sdxl_exact_copy",
            {
                "config": {"resolution": "512x512"},
                "metadata": {"reference_image_url": REFERENCE},
            },
        ),
        (
            f"Compel with the reference, denoise 1: '{NIGHT}'",
            "sdxl_compel_batch",
            {
                "id": "job-compel-modify",
                "prompt": NIGHT,
                "config": {"resolution": "512x512", "num_images": 3, "denoise_strength": 1.0},
                "metadata": {"reference_image_url": REFERENCE},
            },
        ),
    ],
    [
        (
            f"batch of 6 with Compel: '{TREE}', weights '(masterpiece:1.3), (sharp:1.2)'",
            "sdxl_compel_batch",
            {"prompt": TREE, "config": {"resolution": "512x512"}},
        ),
    ],
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [[rendered(job, Path(folder)) for job in jobs] for jobs in tqdm(ROWS, unit="row")]
        first = run(json.loads((ROOT / "test_input.json").read_text())["input"], Path(folder))
        IMAGES.mkdir(parents=True, exist_ok=True)
        picture = Path(folder) / first["assets"][0]["url"]
        (IMAGES / "first-picture.png").write_bytes(picture.read_bytes())
        sheet(rows).save(IMAGES / "contact-sheet.jpg", quality=88)


def rendered(job: Job, storage: Path) -> Labelled:
    """A job's label and its pictures."""
    label, name, changes = job
    document = run(payload(name, changes), storage)
    return label, [Image.open(storage / each["url"]).convert("RGB") for each in document["assets"]]


def payload(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A payload of tests/payloads with changes. Those of `config` and `metadata` are merged."""
    kept: dict[str, Any] = json.loads((ROOT / f"tests/payloads/{name}.json").read_text())
    parts = {part: {**kept[part], **changes.get(part, {})} for part in ("config", "metadata")}
    return {**kept, **changes, **parts}


def run(job: dict[str, Any], storage: Path) -> dict[str, Any]:
    """The document that `handler.py` prints for a job."""
    process = subprocess.run(
        [sys.executable, "handler.py", "--test_input", json.dumps({"input": job})],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "STORAGE_URL": f"file:{storage}", "VERBOSE": "1"},
    )
    if process.returncode:
        raise SystemExit(f"{job['id']} failed:\n{process.stdout}{process.stderr}")
    document: dict[str, Any] = json.loads(process.stdout[process.stdout.index("{") :])
    return document


def sheet(rows: list[list[Labelled]]) -> Image.Image:
    """All rows, one below the other, each as wide as the sheet."""
    strips = [strip(row) for row in rows]
    canvas = Image.new("RGB", (WIDTH, sum(each.height for each in strips) + MARGIN), "white")
    top = 0
    for each in strips:
        canvas.paste(each, (0, top))
        top += each.height
    return canvas


def strip(row: list[Labelled]) -> Image.Image:
    """The pictures of a row at one height, each job's label above its first picture."""
    pictures = [picture for _, each in row for picture in each]
    free = WIDTH - MARGIN * (len(pictures) + 1)
    height = int(free / sum(picture.width / picture.height for picture in pictures))
    canvas = Image.new("RGB", (WIDTH, MARGIN + LABEL + height), "white")
    draw, left = ImageDraw.Draw(canvas), MARGIN
    font = ImageFont.load_default(size=18)
    for label, each in row:
        draw.text((left, MARGIN), label, fill="black", font=font)
        for picture in each:
            width = round(height * picture.width / picture.height)
            canvas.paste(picture.resize((width, height)), (left, MARGIN + LABEL))
            left += width + MARGIN
    return canvas


if __name__ == "__main__":
    main()
