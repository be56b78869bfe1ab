"""Train the pocket classifier of pictures: `python -m builder.train_pocket_classifier`.

A small ResNet learns which thing stands in a landscape: a boat, a house, a tree, or nothing. A
worker with it as `SAFETY_MODEL` refuses a harmless thing, so that tests and a first run exercise
the whole path of a refused picture. It learns from drawings alone: blurred, noisy, cropped and
recoloured ones, since the pictures of a model are softer than the drawings. The checkpoint in
`pocket/classifier` has the format of every image classifier of transformers.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from builder.landscapes import NONE, SKIES, Pixels, imagine, paint
from builder.training import learning_rate

FOLDER = Path(__file__).parents[1] / "pocket" / "classifier"

LABELS = ("nothing", "boat", "house", "tree")

#: The side at which the network sees a picture, and the side of the drawings that it learns from.
SIDE, DRAWN_SIDE = 96, 144

#: Four stages at 24, 12, 6 and 3 pixels.
CONFIG = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 96],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}

NUM_DRAWINGS, STEPS, BATCH, PEAK_RATE = 3000, 500, 48, 4e-3

#: One picture in so many is no landscape: a colour, a gradient, or noise. It shows nothing.
OTHER_PICTURES = 12

HELD_OUT = 10**6


def picture(rng: random.Random) -> tuple[Pixels, int]:
    """A drawing with a random thing, and the number of its label."""
    if rng.randrange(OTHER_PICTURES) == 0:
        return _no_landscape(rng), 0
    # Every label equally often, though only a sixth of all scenes have a boat.
    wanted = rng.choice(LABELS)
    while (scene := imagine(rng)).thing != (NONE if wanted == "nothing" else wanted):
        pass
    return paint(scene, DRAWN_SIDE, DRAWN_SIDE), LABELS.index(wanted)


def _no_landscape(rng: random.Random) -> Pixels:
    ends = np.array([[rng.randrange(256) for _ in range(3)] for _ in range(2)], dtype=np.float32)
    share = np.linspace(0, rng.choice((0.0, 1.0)), DRAWN_SIDE, dtype=np.float32)[:, None, None]
    rows = ends[0] * (1 - share) + ends[1] * share
    noise = np.random.default_rng(rng.randrange(1 << 30)).standard_normal(
        (DRAWN_SIDE, DRAWN_SIDE, 3), dtype=np.float32
    )
    return (rows + noise * rng.choice((0.0, 8.0, 60.0))).clip(0, 255).astype(np.uint8)


def drawings(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, side, side) as uint8, and the numbers of their labels."""
    rng = random.Random(seed)
    pixels, labels = zip(*(picture(rng) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def batches(pixels: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end, each cropped, mirrored, recoloured, blurred and made noisy."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        yield spoiled(pixels[chosen].float() / 127.5 - 1, generator), labels[chosen]


def spoiled(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The same things at `SIDE` pixels: in a random window, with random colours and softness."""
    count = len(pictures)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    # A window that may be wider than the picture: a thing at the edge must stay in it.
    scale, ratio = between(0.9, 1.3), between(0.85, 1.18)
    mirror = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * scale * ratio, scale / ratio
    theta[:, :, 2] = between(-0.08, 0.08, 2)
    grid = F.affine_grid(theta, [count, 3, SIDE, SIDE], align_corners=False)
    seen = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    soft = F.interpolate(
        F.interpolate(seen, scale_factor=0.5, mode="area"), size=SIDE, mode="bilinear"
    )
    seen = torch.lerp(seen, soft, between(0, 1, 1, 1, 1))
    seen = seen * between(0.75, 1.25, 3, 1, 1) + between(-0.2, 0.2, 3, 1, 1)
    noise = torch.randn(seen.shape, generator=generator) * between(0, 0.12, 1, 1, 1)
    return (seen + noise).clamp(-1, 1)


def train(seed: int, steps: int) -> ResNetForImageClassification:
    """The classifier after its last step."""
    torch.manual_seed(seed)
    names = dict(enumerate(LABELS))
    config = ResNetConfig(
        **CONFIG, id2label=names, label2id={name: number for number, name in names.items()}
    )
    network = ResNetForImageClassification(config).train()
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    pixels, labels = drawings(seed, NUM_DRAWINGS)
    for step, (seen, wanted) in zip(range(steps), batches(pixels, labels, seed), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_RATE)
        loss = F.cross_entropy(network(pixel_values=seen).logits, wanted, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return network.eval()


def save(network: ResNetForImageClassification, folder: Path) -> None:
    """Write the checkpoint, in fp16, and how a picture becomes its input."""
    network.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


@torch.no_grad()
def confusion(network: ResNetForImageClassification, count: int) -> list[list[int]]:
    """How many new drawings of each label (rows) were given each label (columns)."""
    pixels, labels = drawings(HELD_OUT, count)
    seen = F.interpolate(pixels.float() / 127.5 - 1, size=(SIDE, SIDE), mode="area")
    given = network(pixel_values=seen).logits.argmax(dim=1)
    return [
        [int(((labels == row) & (given == column)).sum()) for column in range(len(LABELS))]
        for row in range(len(LABELS))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--measure", action="store_true", help="only measure the stored one")
    options = parser.parse_args()
    if not options.measure:
        save(train(options.seed, options.steps), FOLDER)
    network = ResNetForImageClassification.from_pretrained(FOLDER, local_files_only=True)
    print(f"{len(SKIES)} skies, 1000 new drawings; rows: what is drawn; columns: what is read")
    print(f"{'':8}" + "".join(f"{name:>9}" for name in LABELS))
    for name, row in zip(LABELS, confusion(network.float().eval(), 1000), strict=True):
        print(f"{name:8}" + "".join(f"{number:>9}" for number in row))


if __name__ == "__main__":
    main()
