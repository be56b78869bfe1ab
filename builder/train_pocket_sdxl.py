"""Train the pocket SDXL from random weights: `python -m builder.train_pocket_sdxl`.

There are four stages, in the order in which SDXL's parts were trained. The VAE is trained to encode
and decode landscapes, the text encoders to represent the content of captions. Both are then frozen,
and the UNet is trained on captions. At last the VAE's decoder is trained on latents that the UNet
made. Each stage continues from its last checkpoint in the cache folder. Every 250 steps of the UNet
the weights are exported to `pocket/sdxl.safetensors`.

With `--processes 2` the UNet is trained by two processes of one thread each, which is faster on two
cores than one process of two threads.
"""

import argparse
import math
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging
from torch import Tensor, nn
from tqdm import tqdm

from builder import pocket_sdxl
from builder.landscape_captions import caption, filler
from builder.landscapes import Scene, imagine, paint
from builder.train_pocket_vae import SPREAD, VAE_STEPS, to_tensor, train_vae, tune_decoder
from builder.train_pocket_vae import encode as vae_encode
from builder.train_pocket_words import ENCODERS, encode, teach_words
from builder.training import (
    average,
    average_gradients,
    checkpoint,
    in_processes,
    keep_level,
    kept,
    keyed,
    muon,
    rank,
    rate_share,
    resume,
)

CACHE = pocket_sdxl.POCKET.parent / ".cache" / "pocket_sdxl"
UNET_STEPS = 8000
UNET_PEAK_RATE = 2e-3
EMA = 0.998
# The first and the last layers and the embeddings, which are trained by AdamW.
PLAIN = ("conv_in", "conv_out", "time_embedding", "add_embedding")
OFFSET_NOISE = 0.1
# How often the pooled caption is set to zero, so that the UNet uses the words too.
POOLED_DROP = 0.2
SNR_CAP = 5.0
# The range of contrasts that a training latent may have too much, and how far it is below zero.
MORE_CONTRAST, LESS_CONTRAST = 0.7, 0.1
TUNING_STEPS = 1200
# (height, width, landscapes) whose latents are made once, and used with new captions each time.
POOL = [
    (128, 128, 3000),
    (256, 256, 3000),
    (144, 256, 400),
    (256, 144, 400),
    (512, 512, 900),
    (288, 512, 160),
    (512, 288, 160),
    (576, 1024, 24),
    (1024, 576, 24),
    (1024, 1024, 24),
]
# The most landscapes of one file of latents.
PART = 250
# For each stage of the training the sizes, (height, width): (batch, weight). It begins with small
# pictures, whose steps are cheap, and ends with large ones.
Menu = dict[tuple[int, int], tuple[int, float]]
SMALL: Menu = {(128, 128): (32, 0.8), (256, 256): (16, 0.2)}
MIDDLE: Menu = {
    (128, 128): (32, 0.2),
    (256, 256): (16, 0.7),
    (144, 256): (24, 0.05),
    (256, 144): (24, 0.05),
}
LARGE: Menu = {
    (128, 128): (32, 0.08),
    (256, 256): (16, 0.42),
    (144, 256): (24, 0.04),
    (256, 144): (24, 0.04),
    (512, 512): (5, 0.34),
    (288, 512): (8, 0.03),
    (512, 288): (8, 0.03),
    (576, 1024): (1, 0.01),
    (1024, 576): (1, 0.01),
    (1024, 1024): (1, 0.01),
}
#: The first step of each menu.
MENUS = [(0, SMALL), (500, MIDDLE), (1500, LARGE)]

Pool = dict[tuple[int, int], tuple[Tensor, list[Scene]]]


@dataclass(frozen=True)
class Run:
    """One training: its length, its seed and where its stages are kept."""

    cache: Path = CACHE
    seed: int = 0
    vae_steps: int = VAE_STEPS
    unet_steps: int = UNET_STEPS
    tuning_steps: int = TUNING_STEPS
    processes: int = 1
    pool_share: float = 1.0


def train(run: Run) -> None:
    """All stages. Those that the cache has are not repeated."""
    pipe = prepare(run)
    in_processes(run.processes, _train_unet, run)
    pipe.unet.load_state_dict(torch.load(unet_path(run, pipe), weights_only=True)["ema"])
    pipe.vae = tune_decoder(
        pipe.vae,
        keyed(run.cache / "decoder.pt", pipe.vae, pipe.unet, seed=run.seed, steps=run.tuning_steps),
        lambda start: guesses(pipe, latent_pool(pipe.vae, run), run.seed + start),
        run.tuning_steps,
    )
    export(pipe, pipe.unet)


def prepare(run: Run) -> StableDiffusionXLPipeline:
    """The pipeline with a trained VAE and trained text encoders, and its latents in the cache."""
    pipe = pocket_sdxl.assemble(run.seed)
    pipe.vae = train_vae(run.cache / "vae.pt", run.vae_steps, run.seed)
    teach_words(pipe, run.cache, run.seed)
    latent_pool(pipe.vae, run)
    return pipe


def _train_unet(run: Run) -> None:
    """Train the UNet in this process."""
    train_unet(run, prepare(run))


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, run: Run) -> Pool:
    """Scaled latents of landscapes by (height, width) in pixels, with the scenes.

    They are made in parts, each once for a VAE and a seed.
    """
    pool = {}
    for height, width, count in POOL:
        parts = [
            _pool_part(vae, run, (height, width), part, min(PART, count - part))
            for part in range(0, max(1, round(count * run.pool_share)), PART)
        ]
        pool[height, width] = (
            torch.cat([latents for latents, _ in parts]),
            [Scene(**fields) for _, shown in parts for fields in shown],
        )
    return pool


def _pool_part(
    vae: AutoencoderKL, run: Run, size: tuple[int, int], part: int, count: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Latents and scenes number `part` to `part + count` of one size."""
    height, width = size
    path = keyed(run.cache / f"{width}x{height}.pt", vae, seed=run.seed, part=part, count=count)
    encoded: tuple[Tensor, list[dict[str, Any]]] = kept(
        path, lambda: _encoded_scenes(vae, f"{run.seed} {size} {part}", size, count)
    )
    return encoded


def _encoded_scenes(
    vae: AutoencoderKL, seed: str, size: tuple[int, int], count: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    height, width = size
    rng = random.Random(seed)
    shown = [imagine(rng) for _ in range(count)]
    pictures = (paint(scene, width, height) for scene in tqdm(shown, f"{width}x{height}"))
    latents = [vae_encode(vae, to_tensor([picture])) for picture in pictures]
    return torch.cat(latents), [*map(asdict, shown)]


def unet_path(run: Run, pipe: StableDiffusionXLPipeline) -> Path:
    """The checkpoint of this training's UNet, which depends on everything that is frozen.

    It does not depend on the number of steps, so that a training can be made longer or shorter.
    """
    start = pocket_sdxl.assemble(run.seed).unet
    parts = (start, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    return keyed(run.cache / "unet.pt", *parts, seed=run.seed)


def train_unet(run: Run, pipe: StableDiffusionXLPipeline) -> None:
    """Train the UNet, alone or as one of several processes that average their gradients."""
    pool, path = latent_pool(pipe.vae, run), unet_path(run, pipe)
    model = pipe.unet.to(memory_format=torch.channels_last).train()
    ema = deepcopy(model).requires_grad_(False)
    optimiser = muon(model, PLAIN)
    start = resume(path, model, ema, optimiser)
    signal = pipe.scheduler.alphas_cumprod
    number, world = rank()
    bar = tqdm(
        range(start, run.unet_steps),
        initial=start,
        total=run.unet_steps,
        desc="unet",
        mininterval=10,
        disable=number > 0,
    )
    losses: dict[tuple[int, int], float] = {}
    for step in bar:
        height, width, batch = bucket(random.Random(run.seed + step), step)
        torch.manual_seed((run.seed + step) * world + number)
        rng = random.Random((run.seed + step) * world + number)
        for group in optimiser.param_groups:
            group["lr"] = UNET_PEAK_RATE * rate_share(step, run.unet_steps)
        loss = unet_loss(pipe, pool, signal, (height, width, batch), rng)
        optimiser.zero_grad()
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average(ema, model, step, EMA)
        last = losses.get((height, width), loss.item())
        losses[height, width] = last + 0.03 * (loss.item() - last)
        if step % 50 == 49:
            bar.set_postfix({f"{w}x{h}": f"{mean:.4f}" for (h, w), mean in sorted(losses.items())})
        if number == 0 and (step % 250 == 249 or step + 1 == run.unet_steps):
            checkpoint(path, step + 1, model, ema, optimiser)
            if rate_share(step, run.unet_steps) == 1:
                keep_level(path)
            export(pipe, ema)


def bucket(rng: random.Random, step: int) -> tuple[int, int, int]:
    """(height, width, batch) of a step."""
    menu = [menu for first, menu in MENUS if first <= step][-1]
    weights = [weight for _, weight in menu.values()]
    (size,) = rng.choices([*menu], weights)
    return *size, menu[size][0]


def unet_loss(
    pipe: StableDiffusionXLPipeline,
    pool: Pool,
    signal: Tensor,
    size: tuple[int, int, int],
    rng: random.Random,
) -> Tensor:
    """One batch's error in the picture that the predicted velocity (arXiv:2202.00512) gives.

    Weighted by min-SNR (arXiv:2303.09556) plus one: colours and places, which are decided under
    strong noise, weigh as much as outlines, which are decided under little.
    """
    height, width, batch = size
    latents, shown = pool[height, width]
    chosen = rng.choices(range(len(shown)), k=batch)
    clean = latents[chosen].contiguous(memory_format=torch.channels_last)
    words, pooled = encode_captions(pipe, [shown[i] for i in chosen], rng)
    noise = offset_noise(clean)
    # Steps are evenly spread over the schedule within each batch. For large pictures, whose
    # outlines are visible under more noise, they are shifted to its end (arXiv:2403.03206, section
    # 5.3.2).
    spread = (torch.rand(1) + torch.arange(batch) / batch) % 1
    shift = math.sqrt(height * width) / 128
    spread = shift * spread / (1 + (shift - 1) * spread)
    steps = (spread * len(signal)).long().clamp(max=len(signal) - 1)
    kept = signal[steps][:, None, None, None]
    noisy = _noisy(too_vivid(clean, kept), noise, kept)
    velocity = predict(pipe, noisy, steps, words, pooled)
    error = (velocity - (kept.sqrt() * noisy - clean) / (1 - kept).sqrt()) / SPREAD
    snr = (SPREAD**2 * kept / (1 - kept)).flatten()
    weight = (1 - kept).flatten() * (1 + snr.clamp(max=SNR_CAP))
    return (weight * error.square().mean((1, 2, 3))).mean()


def too_vivid(clean: Tensor, kept: Tensor) -> Tensor:
    """Half of the latents with too much contrast, or a little too little, under strong noise.

    Guidance makes such states on its way. The model learns to lead them to the right colours.
    """
    bends = torch.rand(len(clean), 1, 1, 1) < 0.5
    contrast = MORE_CONTRAST * torch.rand(len(clean), 1, 1, 1) - LESS_CONTRAST
    return clean * (1 + bends * contrast * (1 - kept).sqrt())


def offset_noise(clean: Tensor) -> Tensor:
    """Noise with an offset (Guttenberg 2023).

    Without it the mean of a large picture's latents is visible even under the last step's noise,
    and the model would follow it, not the prompt.
    """
    return torch.randn_like(clean) + OFFSET_NOISE * torch.randn_like(clean[..., :1, :1])


def _noisy(clean: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def predict(
    pipe: StableDiffusionXLPipeline, noisy: Tensor, steps: Tensor, words: Tensor, pooled: Tensor
) -> Tensor:
    """The UNet's velocity, with the size conditions of a picture that was not cropped."""
    height, width = (8 * side for side in noisy.shape[-2:])
    size = torch.tensor([[height, width, 0, 0, height, width]], dtype=pooled.dtype)
    conditions = {"text_embeds": pooled, "time_ids": size.repeat(len(noisy), 1)}
    return pipe.unet(noisy, steps, words, added_cond_kwargs=conditions).sample


def encode_captions(
    pipe: StableDiffusionXLPipeline, shown: list[Scene], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """(batch, 77 or 154, width) word embeddings and (batch, width) pooled ones, as SDXL's.

    One batch in twelve is a long prompt of two chunks, caption and filler in either order. Half of
    the empty captions become zeros, which is what the pipeline makes of a missing negative prompt.
    """
    captions = [caption(scene, rng).text for scene in shown]
    kept = torch.tensor([float(bool(text) or rng.random() < 0.5) for text in captions])
    words, pooled = encode(pipe, captions)
    if rng.random() < 1 / 12:
        others = encode(pipe, [filler(rng) for _ in captions])
        if rng.random() < 0.3:
            words, pooled, others = others[0], others[1], (words, pooled)
        words = torch.cat([words, others[0]], 1)
    keeps_pooled = torch.tensor([float(rng.random() >= POOLED_DROP) for _ in shown])
    return words * kept[:, None, None], pooled * (kept * keeps_pooled)[:, None]


@torch.no_grad()
def guesses(
    pipe: StableDiffusionXLPipeline, pool: Pool, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless pairs of latents, such as the UNet makes, and their pictures of -1 to 1.

    The UNet's guess of a landscape's latents under some noise has the faults of its own pictures.
    """
    rng = random.Random(seed)
    signal = pipe.scheduler.alphas_cumprod
    sizes = [size for size in pool if size[0] * size[1] <= 512 * 512]
    weights = [1 / math.sqrt(height * width) for height, width in sizes]
    while True:
        torch.manual_seed(rng.randrange(1 << 40))
        (size,) = rng.choices(sizes, weights)
        latents, shown = pool[size]
        index = rng.randrange(len(shown))
        clean = latents[index : index + 1]
        step = torch.tensor([rng.randint(0, 350)])
        kept = signal[step][:, None, None, None]
        noisy = _noisy(clean, torch.randn_like(clean), kept)
        words, pooled = encode(pipe, [caption(shown[index], rng).text])
        velocity = predict(pipe, noisy, step, words, pooled)
        guess = kept.sqrt() * noisy - (1 - kept).sqrt() * velocity
        yield guess, to_tensor([paint(shown[index], size[1], size[0])])


def export(pipe: StableDiffusionXLPipeline, unet: nn.Module) -> None:
    """Store the pocket SDXL with the pipeline's parts and this UNet."""
    stored = pocket_sdxl.assemble()
    stored.unet.load_state_dict(unet.state_dict())
    for name in ("vae", *ENCODERS):
        getattr(stored, name).load_state_dict(getattr(pipe, name).state_dict())
    pocket_sdxl.save_config(stored, pocket_sdxl.CONFIG)
    pocket_sdxl.save_single_file(stored, pocket_sdxl.CHECKPOINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="the folder of checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--unet-steps", type=int, default=UNET_STEPS)
    parser.add_argument("--tuning-steps", type=int, default=TUNING_STEPS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--pool-share", type=float, default=1.0, help="less than 1 for a quick try")
    logging.disable_progress_bar()  # diffusers' own, for each export
    train(Run(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
