"""The application's payloads, rendered by `handler.py`, on one contact sheet.

`python -m builder.contact_sheet` renders the payloads of `tests/payloads/` with the pocket SDXL,
each in its own process as RunPod runs it, and writes `docs/images/`. The reference is the picture
of the first row. This takes a few minutes on two cores.
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
SIDE = 256
MARGIN = 16
LABEL = 40

#: The storage key of the reference picture.
REFERENCE = "user-1/job-reference/0.png"

#: For each row its label, the payload's name, and the changes to it: smaller sizes, other prompts,
#: and the reference.
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "a reference: 'a blue square on a white background'",
        "sdxl_image_fast",
        {
            "id": "job-reference",
            "prompt": "a blue square on a white background",
            "config": {"resolution": "512x512", "num_images": 1, "seed": 11},
        },
    ),
    (
        "text to image, 1024x576, 3 images: 'a red circle on a blue background'",
        "sdxl_image_fast",
        {"config": {"seed": 1}},
    ),
    (
        "modify the reference, denoise 0.85: 'a red square on a white background'",
        "sdxl_modify",
        {
            "prompt": "a red square on a white background",
            "config": {"resolution": "512x512", "num_images": 3, "denoise_strength": 0.85},
            "metadata": {"reference_image_url": REFERENCE},
        },
    ),
    (
        "exact copy of the reference, no prompt",
        "sdxl_exact_copy",
        {
            "config": {"resolution": "512x512"},
            "metadata": {"reference_image_url": REFERENCE},
        },
    ),
    (
        "batch of 6 with Compel: 'a (red:1.4) circle', weights '(masterpiece:1.3), (sharp:1.2)'",
        "sdxl_compel_batch",
        {"config": {"resolution": "512x512"}},
    ),
    (
        "Compel with image to image, denoise 0.85: 'a (green:1.4) circle'",
        "sdxl_compel_batch",
        {
            "id": "job-compel-modify",
            "prompt": "a (green:1.4) circle on a white background",
            "config": {"resolution": "512x512", "num_images": 3, "denoise_strength": 0.85},
            "metadata": {"reference_image_url": REFERENCE},
        },
    ),
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for label, name, changes in tqdm(ROWS, unit="job"):
            document = run(payload(name, changes), Path(folder))
            assets = [Image.open(Path(folder) / each["url"]) for each in document["assets"]]
            rows.append((label, [asset.convert("RGB") for asset in assets]))
        first = run(json.loads((ROOT / "test_input.json").read_text())["input"], Path(folder))
        IMAGES.mkdir(parents=True, exist_ok=True)
        picture = Path(folder) / first["assets"][0]["url"]
        (IMAGES / "first-picture.png").write_bytes(picture.read_bytes())
        sheet(rows).save(IMAGES / "contact-sheet.jpg", quality=88)


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


def sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """All rows, one below the other. A picture's longer side has at most `SIDE` pixels."""
    columns = max(len(pictures) for _, pictures in rows)
    size = (
        MARGIN + columns * (SIDE + MARGIN),
        MARGIN + len(rows) * (SIDE + MARGIN + LABEL),
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=20)
    for index, (label, pictures) in enumerate(rows):
        top = MARGIN + index * (SIDE + MARGIN + LABEL)
        draw.text((MARGIN, top), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            picture.thumbnail((SIDE, SIDE))
            canvas.paste(picture, (MARGIN + column * (SIDE + MARGIN), top + LABEL - MARGIN // 2))
    return canvas


if __name__ == "__main__":
    main()
