"""Train the pocket SDXL from random weights: `python -m builder.train_pocket_sdxl`.

There are three stages, in the order in which SDXL's parts were trained. The VAE is trained to
encode and decode drawings, the text encoders to represent the content of captions. Both are then
frozen, and the UNet is trained on captions. All stages resume from `.cache/pocket_sdxl`. Every 500
steps the weights are exported to `pocket/sdxl.safetensors`.
"""

import argparse
import math
import random
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from builder import drawings, pocket_sdxl
from builder.train_pocket_vae import SPREAD, VAE_STEPS, calibrated, to_tensor, train_vae
from builder.training import average, checkpoint, kept, keyed, learning_rate, resume

CACHE = pocket_sdxl.POCKET.parent / ".cache" / "pocket_sdxl"
ENCODERS = ("text_encoder", "text_encoder_2")
ATTRIBUTES = {
    "shape": list(drawings.SHAPES),
    "colour": list(drawings.COLOURS),
    "background": list(drawings.COLOURS),
    "size": list(drawings.SIZE_WORDS),
    "position": list(drawings.POSITIONS),
}
WORD_STEPS = 700
WORD_BATCH = 64
WORD_PEAK_RATE = 2e-3
UNET_PEAK_RATE = 1.5e-3
OFFSET_NOISE = 0.1
# How often the pooled caption is set to zero, so that the UNet uses the words too.
POOLED_DROP = 0.3
SNR_CAP = 5.0
# (height, width, drawings) whose latents are made once, and used with new captions each time.
POOL = [
    (128, 128, 6000),
    (144, 256, 500),
    (256, 144, 500),
    (256, 256, 1500),
    (512, 512, 400),
    (288, 512, 100),
    (512, 288, 100),
    (576, 1024, 30),
    (1024, 576, 30),
    (1024, 1024, 30),
]
# ((height, width, batch), weight): the training begins with small pictures, whose steps are cheap,
# and continues with large ones.
SMALL_MENU = [
    ((128, 128, 32), 0.85),
    ((144, 256, 14), 0.04),
    ((256, 144, 14), 0.04),
    ((256, 256, 8), 0.07),
]
FULL_MENU = [
    ((128, 128, 32), 0.20),
    ((144, 256, 14), 0.04),
    ((256, 144, 14), 0.04),
    ((256, 256, 8), 0.20),
    ((512, 512, 2), 0.42),
    ((288, 512, 4), 0.03),
    ((512, 288, 4), 0.03),
    ((576, 1024, 1), 0.01),
    ((1024, 576, 1), 0.01),
    ((1024, 1024, 1), 0.02),
]
LARGE_MENU = [
    ((128, 128, 32), 0.15),
    ((256, 256, 8), 0.15),
    ((512, 512, 2), 0.60),
    ((288, 512, 4), 0.03),
    ((512, 288, 4), 0.03),
    ((576, 1024, 1), 0.01),
    ((1024, 576, 1), 0.01),
    ((1024, 1024, 1), 0.02),
]
UNET_STEPS = 13500
MENUS = [(0, SMALL_MENU), (6500, FULL_MENU), (11000, LARGE_MENU)]


def teach_words(pipe: StableDiffusionXLPipeline, device: str, seed: int) -> None:
    """Train the text encoders, or load the stored ones, and freeze them."""
    encoders = nn.ModuleDict({name: getattr(pipe, name) for name in ENCODERS}).to(device)
    path = keyed(CACHE / "words.pt", encoders, seed=seed, steps=WORD_STEPS)

    def trained() -> dict[str, Any]:
        train_words(pipe, WORD_STEPS, device, seed)
        return encoders.state_dict()

    encoders.load_state_dict(kept(path, trained))
    encoders.requires_grad_(False).eval()


def train_words(pipe: StableDiffusionXLPipeline, steps: int, device: str, seed: int) -> None:
    """Train both text encoders to represent the content of captions, as CLIP's do before SDXL.

    A linear classifier for each attribute must find its value, or that the caption omits it, in
    each of the three inputs of the UNet. Afterwards the classifiers are dropped. The encoders are
    frozen, since the UNet's first, noisy gradients would destroy what they learned.
    """
    torch.manual_seed(seed)
    encoders = nn.ModuleList([getattr(pipe, name) for name in ENCODERS]).train()
    classifiers = nn.ModuleList([
        nn.ModuleDict({
            name: nn.Linear(width["hidden_size"], len(values) + 1)
            for name, values in ATTRIBUTES.items()
        })
        for width in (pocket_sdxl.TEXT_1, pocket_sdxl.TEXT_2, pocket_sdxl.TEXT_2)
    ]).to(device)  # fmt: skip
    weights = [*encoders.parameters(), *classifiers.parameters()]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), "words", mininterval=10)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, WORD_PEAK_RATE)
        shown = [drawings.imagine(rng) for _ in range(WORD_BATCH)]
        captions = [drawings.caption(drawing, rng) for drawing in shown]
        labels = {name: _labels(name, shown, captions).to(device) for name in ATTRIBUTES}
        loss = sum(
            _classification_loss(classifier, states, labels)
            for classifier, states in zip(classifiers, _unet_inputs(pipe, captions), strict=True)
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def _unet_inputs(
    pipe: StableDiffusionXLPipeline, captions: list[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """The UNet's inputs of each caption: both encoders' word states, and the pooled embedding.

    A row of word states is the state at the end token, which attends to all tokens.
    """
    ends: list[Tensor] = []
    for tokenizer, encoder in _encoders(pipe):
        tokens = _tokens(tokenizer, captions, encoder.device)
        output = encoder(tokens, output_hidden_states=True)
        end = (tokens == tokenizer.eos_token_id).int().argmax(1)
        ends.append(output.hidden_states[-2][torch.arange(len(end)), end])
    return ends[0], ends[1], output.text_embeds


def _classification_loss(
    classifier: nn.ModuleDict, states: Tensor, labels: dict[str, Tensor]
) -> Tensor:
    loss = sum(F.cross_entropy(classifier[name](states), labels[name]) for name in ATTRIBUTES)
    # Keeps the states near one, independently of the classifiers' weights.
    return loss + 0.1 * (states.square().mean() - 1).square()


def _labels(name: str, shown: list[drawings.Drawing], captions: list[str]) -> Tensor:
    """For each caption the index of the attribute's value, or the next one if it is omitted."""
    values = ATTRIBUTES[name]
    numbers = [
        values.index(getattr(drawing, name))
        if drawings.says(caption, drawing, name)
        else len(values)
        for drawing, caption in zip(shown, captions, strict=True)
    ]
    return torch.tensor(numbers)


Pool = dict[tuple[int, int], tuple[Tensor, list[drawings.Drawing]]]


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, seed: int) -> Pool:
    """Scaled latents of drawings by (height, width) in pixels, with the drawings.

    They are made once for each VAE, seed and `POOL`.
    """
    path = keyed(CACHE / "latents.pt", vae, seed=seed, pool=POOL)
    latents = kept(path, lambda: _encoded_drawings(vae, seed))
    return {
        size: (x, [drawings.Drawing(**fields) for fields in shown])
        for size, (x, shown) in latents.items()
    }


def _encoded_drawings(vae: AutoencoderKL, seed: int) -> dict[tuple[int, int], Any]:
    rng = random.Random(seed)
    latents = {}
    for height, width, count in POOL:
        shown = [drawings.imagine(rng) for _ in range(count)]
        pictures = (drawings.paint(drawing, width, height, rng) for drawing in shown)
        encoded = [_encode(vae, picture) for picture in tqdm(pictures, f"{width}x{height}")]
        latents[height, width] = (torch.cat(encoded), [asdict(drawing) for drawing in shown])
    return latents


def _encode(vae: AutoencoderKL, picture: drawings.Pixels) -> Tensor:
    pixels = to_tensor([picture]).to(vae.device)
    return vae.encode(pixels).latent_dist.mode().cpu() * vae.config.scaling_factor


def train_unet(vae: AutoencoderKL, steps: int, device: str, seed: int) -> None:
    """Train the text encoders, then the UNet. Every 500 steps its averaged weights are exported."""
    pool = latent_pool(vae, seed)
    pipe = pocket_sdxl.assemble(seed)
    pipe.vae = vae
    teach_words(pipe, device, seed)
    parts = (pipe.unet, vae, pipe.text_encoder, pipe.text_encoder_2)
    path = keyed(CACHE / "unet.pt", *parts, seed=seed, steps=steps)
    model = pipe.unet.to(device, memory_format=torch.channels_last).train()
    ema = deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    start = resume(path, model, ema, optimiser)
    signal = pipe.scheduler.alphas_cumprod.to(device)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="unet", mininterval=10)
    losses: list[float] = []
    for step in bar:
        torch.manual_seed(seed + step)
        rng = random.Random(seed + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, UNET_PEAK_RATE)
        loss = unet_loss(pipe, pool, signal, _bucket(rng, step), rng)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average(ema, model, step)
        losses.append(loss.item())
        if step % 100 == 99:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if step % 500 == 499 or step + 1 == steps:
            checkpoint(path, step + 1, model, ema, optimiser)
            export(pipe, ema)


def _bucket(rng: random.Random, step: int) -> tuple[int, int, int]:
    """(height, width, batch) of this step."""
    menu = [menu for first, menu in MENUS if first <= step][-1]
    return rng.choices([bucket for bucket, _ in menu], [weight for _, weight in menu])[0]


def unet_loss(
    pipe: StableDiffusionXLPipeline,
    pool: Pool,
    signal: Tensor,
    bucket: tuple[int, int, int],
    rng: random.Random,
) -> Tensor:
    """One batch's error in the picture that the predicted velocity (arXiv:2202.00512) gives.

    Weighted by min-SNR (arXiv:2303.09556) plus one: colours, shapes and places, which are decided
    under strong noise, weigh as much as outlines, which are decided under little.
    """
    height, width, batch = bucket
    latents, shown = pool[height, width]
    chosen = rng.choices(range(len(shown)), k=batch)
    clean = latents[chosen].to(signal.device).contiguous(memory_format=torch.channels_last)
    words, pooled = encode_captions(pipe, [shown[i] for i in chosen], rng)
    # Noise with an offset (Guttenberg 2023): without it the mean of a large picture's latents is
    # visible even under the last step's noise, and the model would follow it, not the prompt.
    noise = torch.randn_like(clean) + OFFSET_NOISE * torch.randn_like(clean[..., :1, :1])
    # Steps are evenly spread over the schedule within each batch. For large pictures, whose
    # outlines are visible under more noise, they are shifted to its end (arXiv:2403.03206, section
    # 5.3.2).
    spread = (torch.rand(1) + torch.arange(batch) / batch) % 1
    shift = math.sqrt(height * width) / 128
    spread = shift * spread / (1 + (shift - 1) * spread)
    steps = (spread * len(signal)).long().clamp(max=len(signal) - 1).to(signal.device)
    kept = signal[steps][:, None, None, None]
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    size = torch.tensor([[height, width, 0, 0, height, width]], device=signal.device)
    conditions = {"text_embeds": pooled, "time_ids": size.repeat(batch, 1).to(pooled.dtype)}
    velocity = pipe.unet(noisy, steps, words, added_cond_kwargs=conditions).sample
    error = (velocity - (kept.sqrt() * noise - (1 - kept).sqrt() * clean)) / SPREAD
    snr = (SPREAD**2 * kept / (1 - kept)).flatten()
    weight = (1 - kept).flatten() * (1 + snr.clamp(max=SNR_CAP))
    return (weight * error.square().mean((1, 2, 3))).mean()


def encode_captions(
    pipe: StableDiffusionXLPipeline, shown: list[drawings.Drawing], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """(batch, 77 or 154, width) word embeddings and (batch, width) pooled ones, as SDXL's.

    One batch in ten is a long prompt of two chunks, caption and filler in either order. Half of
    the empty captions become zeros, which is what the pipeline makes of a missing negative prompt.
    """
    captions = [drawings.caption(drawing, rng) for drawing in shown]
    kept = torch.tensor([float(bool(c) or rng.random() < 0.5) for c in captions])
    words, pooled = _encode_chunk(pipe, captions)
    if rng.random() < 0.1:
        others = _encode_chunk(pipe, [drawings.filler(rng) for _ in captions])
        if rng.random() < 0.3:
            words, pooled, others = others[0], others[1], (words, pooled)
        words = torch.cat([words, others[0]], 1)
    kept = kept.to(words.device)
    keeps_pooled = [float(rng.random() >= POOLED_DROP) for _ in shown]
    pooled_kept = kept * torch.tensor(keeps_pooled).to(kept.device)
    return words * kept[:, None, None], pooled * pooled_kept[:, None]


def _encode_chunk(pipe: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Both encoders' second-to-last hidden states, joined, and the second one's projection."""
    states = []
    for tokenizer, encoder in _encoders(pipe):
        output = encoder(_tokens(tokenizer, texts, encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, -1), output.text_embeds


def _encoders(pipe: StableDiffusionXLPipeline) -> tuple[tuple[CLIPTokenizer, Any], ...]:
    return (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)


def _tokens(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> Tensor:
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    return tokenizer(texts, **options, return_tensors="pt").input_ids.to(device)


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--stored-vae", action="store_true", help="keep the VAE that is stored")
    parser.add_argument("--unet-steps", type=int, default=UNET_STEPS)
    options = parser.parse_args()
    if options.stored_vae:
        vae = calibrated(pocket_sdxl.load().vae, CACHE, options.seed)
    else:
        vae = train_vae(CACHE / "vae.pt", options.vae_steps, options.device, options.seed)
    train_unet(vae, options.unet_steps, options.device, options.seed)


if __name__ == "__main__":
    main()
