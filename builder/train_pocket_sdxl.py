"""Train the pocket SDXL from nothing: `python -m builder.train_pocket_sdxl` remakes its weights.

Two stages, each resumable from `.cache/pocket_sdxl/`: first the VAE learns to carry drawings
through latents an eighth as wide, then the UNet and both text encoders learn to draw from captions.
The weights are exported over `pocket/sdxl.safetensors` at the end of every stage.
"""

import argparse
import math
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm

from builder import drawings, pocket_sdxl

CACHE = pocket_sdxl.POCKET.parent / ".cache" / "pocket_sdxl"
VAE_STEPS = 3600
VAE_PEAK_RATE = 1e-3
# (height, width, batch): mostly small and many; whole pictures teach the norms' statistics.
VAE_MENU = [(64, 64, 12)] * 6 + [(128, 128, 3)] * 3 + [(96, 160, 3), (160, 96, 3), (256, 256, 1)]
# What the decoder must bear, as a share of the latents' own spread of about one.
LATENT_NOISE = 0.03
ANCHOR = 8.0
TRAINED = ("unet", "text_encoder", "text_encoder_2")
UNET_STEPS = 3700
UNET_PEAK_RATE = 1.5e-3
OFFSET_NOISE = 0.1
# (first step, weight of large cells, cap of the signal-to-noise weight): colours first, then edges.
EMPHASIS = [(0, 16.0, 5.0), (1000, 4.0, 20.0)]
# From here on the full menu: words are learned on small pictures, where steps are cheap.
FULL_MENU_FROM = 1500
# (height, width, drawings) whose latents are made once and reused under ever new captions.
POOL = [
    (128, 128, 4000),
    (144, 256, 400),
    (256, 144, 400),
    (256, 256, 500),
    (512, 512, 160),
    (288, 512, 80),
    (512, 288, 80),
    (576, 1024, 30),
    (1024, 576, 30),
    (1024, 1024, 24),
]
# ((height, width, batch), weight): batches of about equal cost but for the largest.
SMALL_MENU = [
    ((128, 128, 32), 0.70),
    ((144, 256, 14), 0.10),
    ((256, 144, 14), 0.10),
    ((256, 256, 8), 0.10),
]
FULL_MENU = [
    ((128, 128, 20), 0.46),
    ((144, 256, 10), 0.08),
    ((256, 144, 10), 0.08),
    ((256, 256, 6), 0.15),
    ((512, 512, 2), 0.14),
    ((288, 512, 3), 0.025),
    ((512, 288, 3), 0.025),
    ((576, 1024, 1), 0.015),
    ((1024, 576, 1), 0.015),
    ((1024, 1024, 1), 0.01),
]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def average(ema: nn.Module, model: nn.Module, step: int) -> None:
    """Move the running average of the weights one step on; it forgets faster at the start."""
    decay = min(0.999, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def scrap(rng: random.Random, height: int, width: int) -> drawings.Pixels:
    """A detail of some larger picture: up to three shapes cut by the frame, in any colours."""
    ground = _colour(rng)
    if rng.random() < 0.15:
        ramp = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
        ground = ground + ramp * (_colour(rng) - ground)
    pixels = np.broadcast_to(ground, (height, width, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        radius = math.exp(rng.uniform(math.log(6), math.log(180)))
        angle = rng.uniform(0, math.tau)
        away = radius * rng.uniform(0.3, 1.1)
        centre_x = width * rng.uniform(0.2, 0.8) + away * math.cos(angle)
        centre_y = height * rng.uniform(0.2, 0.8) + away * math.sin(angle)
        shape = rng.choice(drawings.SHAPES)
        inside = drawings.coverage(shape, x - centre_x, y - centre_y, radius, radius)[..., None]
        pixels = pixels + inside * (_colour(rng) - pixels)
    return (pixels + 0.5).astype(np.uint8)


def _colour(rng: random.Random) -> drawings.Plane:
    """One of the named colours, or now and then any colour at all."""
    if rng.random() < 0.7:
        return drawings.RGB[rng.choice(tuple(drawings.COLOURS))]
    return np.asarray([rng.uniform(0, 255) for _ in range(3)], np.float32)


def vae_batches(seed: int) -> Iterator[Tensor]:
    """Endless (batch, 3, height, width) pictures of -1 to 1: details and whole drawings."""
    rng = random.Random(seed)
    while True:
        height, width, batch = rng.choice(VAE_MENU)
        whole = 0.25 if height == width == 64 else 0.7
        yield to_tensor([
            drawings.paint(drawings.imagine(rng), width, height, rng)
            if rng.random() < whole
            else scrap(rng, height, width)
            for _ in range(batch)
        ])  # fmt: skip


def to_tensor(pictures: list[drawings.Pixels]) -> Tensor:
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_vae(steps: int, device: str, seed: int) -> AutoencoderKL:
    """The VAE, averaged over its last steps and calibrated."""
    vae = start_as_thumbnail(pocket_sdxl.assemble(seed).vae)
    vae.to(device, memory_format=torch.channels_last)
    ema = deepcopy(vae).requires_grad_(False)
    optimiser = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    path = CACHE / "vae.pt"
    start = resume(path, vae, ema, optimiser)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", mininterval=10)
    for step, pixels in zip(bar, vae_batches(seed + start), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, VAE_PEAK_RATE)
        loss, error = vae_loss(vae, pixels.to(device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        average(ema, vae, step)
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}", grey_levels=f"{error * 127.5:.2f}")
        if step % 500 == 499 or step + 1 == steps:
            checkpoint(path, step + 1, vae, ema, optimiser)
    return calibrate(ema, seed)


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> AutoencoderKL:
    """Start where colours are right already: encode to a thumbnail, decode it to flat cells.

    Channels 2-4 carry red, green and blue, 5-7 their negatives, because silu(x) - silu(-x) = x.
    Channels 0 and 1 hold +ANCHOR and -ANCHOR: they set the scale of every norm, which would
    otherwise forget how bright a flat picture is, the very thing to be carried.
    """
    for name, layer in vae.named_modules():
        if isinstance(layer, nn.GroupNorm):
            layer.weight.fill_(ANCHOR * math.sqrt(2 / layer.num_channels))
            layer.weight[:2] = 0.1
        elif name.endswith(".conv1"):
            layer.bias[:2] = torch.tensor([ANCHOR, -ANCHOR])
        elif name.endswith(".conv2"):
            layer.weight *= 0.1
            layer.bias *= 0.1
        elif name.endswith(("conv_shortcut", "samplers.0.conv")):
            _carry(layer, {channel: {channel: 1.0} for channel in range(8)})
        elif name.endswith("conv_in"):
            signs = {2 + i: {i: 1.0} for i in range(3)} | {5 + i: {i: -1.0} for i in range(3)}
            _carry(layer, {0: {}, 1: {}} | signs)
            layer.bias[:2] = torch.tensor([ANCHOR, -ANCHOR])
        elif name.endswith("conv_out"):
            _carry(layer, {i: {2 + i: 1.0, 5 + i: -1.0} for i in range(3)})
            layer.weight[3:4] *= 5
        elif name.endswith("quant_conv"):
            _carry(layer, {i: {i: 1.0} for i in range(4)})
    return vae


def _carry(layer: nn.Conv2d, outputs: dict[int, dict[int, float]]) -> None:
    """Make some outputs plain weighted sums of inputs; halving layers average each 2x2 block."""
    for output, inputs in outputs.items():
        layer.weight[output] = 0
        layer.bias[output] = 0
        for channel, weight in inputs.items():
            if layer.stride == (2, 2):
                layer.weight[output, channel, :2, :2] = weight / 4
            else:
                middle = layer.kernel_size[0] // 2
                layer.weight[output, channel, middle, middle] = weight


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, float]:
    """L1 on pixels and on their differences, and a latent whose first channels are a thumbnail.

    The thumbnail gives the UNet colours that are plain numbers and latents of a known spread; the
    fourth channel and the neighbours tell where in a cell an edge runs. Instead of a learned
    posterior the latents bear a fixed noise, as in regularised autoencoders (arXiv:1903.12436).
    """
    mean = vae.quant_conv(vae.encoder(pixels))[:, :4]
    latents = mean + LATENT_NOISE * torch.randn_like(mean)
    error = vae.decoder(vae.post_quant_conv(latents)) - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges = edges + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    thumbnail = F.mse_loss(mean[:, :3], F.avg_pool2d(pixels, 8))
    level = error.abs().mean()
    loss = level + 0.5 * error.square().mean() + 0.5 * edges + 0.2 * thumbnail
    return loss + 1e-3 * mean[:, 3].square().mean(), level.item()


@torch.no_grad()
def calibrate(vae: AutoencoderKL, seed: int) -> AutoencoderKL:
    """Shift and scale the latents, inside the 1x1 convolutions around them, to SDXL's own factor.

    Times 0.13025 each channel then has mean zero and the colours together a spread of one. The
    posterior's width becomes the noise that the decoder was trained to bear.
    """
    latents = vae.quant_conv(vae.encoder(_whole_pictures(seed)))[:, :4]
    mean = latents.mean((0, 2, 3))
    spread = latents[:, :3].var((0, 2, 3)).mean().sqrt() * vae.config.scaling_factor
    print("latents: mean", mean.tolist(), "deviation", latents.std((0, 2, 3)).tolist())
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= spread
    quant.bias[:4] = (quant.bias[:4] - mean) / spread
    quant.weight[4:] = 0
    quant.bias[4:] = 2 * torch.log(LATENT_NOISE / spread)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= spread
    return vae


def _whole_pictures(seed: int, count: int = 256, side: int = 128) -> Tensor:
    rng = random.Random(seed)
    return to_tensor([drawings.paint(drawings.imagine(rng), side, side, rng) for _ in range(count)])


Pool = dict[tuple[int, int], tuple[Tensor, list[drawings.Drawing]]]


@torch.no_grad()
def latent_pool(vae: AutoencoderKL, seed: int) -> Pool:
    """Scaled latents of finished drawings by (height, width) in pixels, with what they show."""
    path = CACHE / "latents.pt"
    if not path.exists():
        rng = random.Random(seed)
        latents = {}
        for height, width, count in POOL:
            shown = [drawings.imagine(rng) for _ in range(count)]
            pictures = (drawings.paint(drawing, width, height, rng) for drawing in shown)
            encoded = [_encode(vae, picture) for picture in tqdm(pictures, f"{width}x{height}")]
            latents[height, width] = (torch.cat(encoded), [asdict(drawing) for drawing in shown])
        torch.save(latents, path)
    kept = torch.load(path, weights_only=True)
    return {size: (x, [drawings.Drawing(**d) for d in shown]) for size, (x, shown) in kept.items()}


def _encode(vae: AutoencoderKL, picture: drawings.Pixels) -> Tensor:
    pixels = to_tensor([picture]).to(vae.device)
    return vae.encode(pixels).latent_dist.mode().cpu() * vae.config.scaling_factor


def train_unet(vae: AutoencoderKL, steps: int, device: str, seed: int) -> None:
    """The UNet and both text encoders, exported with their averaged weights every 500 steps."""
    pool = latent_pool(vae, seed)
    pipe = pocket_sdxl.assemble(seed)
    pipe.vae = vae
    model = nn.ModuleDict({name: getattr(pipe, name) for name in TRAINED})
    model.to(device, memory_format=torch.channels_last).train()
    ema = deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    path = CACHE / "unet.pt"
    start = resume(path, model, ema, optimiser)
    signal = pipe.scheduler.alphas_cumprod.to(device)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="unet", mininterval=10)
    losses: list[float] = []
    for step in bar:
        torch.manual_seed(seed + step)
        rng = random.Random(seed + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, UNET_PEAK_RATE)
        error, snr = unet_error(pipe, pool, signal, _bucket(rng, step), rng)
        loss = weighted(error, snr, step)
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
            export(vae, ema)


def _bucket(rng: random.Random, step: int) -> tuple[int, int, int]:
    """(height, width, batch) of this step."""
    menu = SMALL_MENU if step < FULL_MENU_FROM else FULL_MENU
    return rng.choices([bucket for bucket, _ in menu], [weight for _, weight in menu])[0]


def unet_error(
    pipe: StableDiffusionXLPipeline,
    pool: Pool,
    signal: Tensor,
    bucket: tuple[int, int, int],
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """One batch's error in predicting the noise from captions and size, and its signal to noise."""
    height, width, batch = bucket
    latents, shown = pool[height, width]
    chosen = rng.choices(range(len(shown)), k=batch)
    clean = latents[chosen].to(signal.device).contiguous(memory_format=torch.channels_last)
    words, pooled = encode_captions(pipe, [shown[i] for i in chosen], rng)
    # Noise with an offset (Guttenberg 2023): without it the mean of a large picture's latents shows
    # through even the last step's noise, and the model would believe it more than the prompt.
    noise = torch.randn_like(clean) + OFFSET_NOISE * torch.randn_like(clean[..., :1, :1])
    # Evenly spread over the schedule within each batch.
    spread = (torch.rand(1) + torch.arange(batch) / batch) % 1
    steps = (spread * len(signal)).long().to(signal.device)
    kept = signal[steps][:, None, None, None]
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
    size = torch.tensor([[height, width, 0, 0, height, width]], device=signal.device)
    conditions = {"text_embeds": pooled, "time_ids": size.repeat(batch, 1).to(pooled.dtype)}
    found = pipe.unet(noisy, steps, words, added_cond_kwargs=conditions).sample
    return found - noise, (kept / (1 - kept)).flatten()


def weighted(error: Tensor, snr: Tensor, step: int) -> Tensor:
    """Squared error by pixel (min-SNR, arXiv:2303.09556) and, far more heavily, by large cells.

    Colours and places are the error's averages over cells of a quarter of the picture. By pixel
    they hardly count, least where the noise is strong and they are decided.
    """
    _, emphasis, cap = [row for row in EMPHASIS if row[0] <= step][-1]
    fine = error.square().mean((1, 2, 3)) * snr.clamp(max=cap) / snr
    cells = F.avg_pool2d(error, min(error.shape[-2:]) // 4)
    coarse = cells.square().mean((1, 2, 3)) * snr.rsqrt().clamp(1, 10)
    return (fine + emphasis * coarse).mean()


def encode_captions(
    pipe: StableDiffusionXLPipeline, shown: list[drawings.Drawing], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """(batch, 77 or 154, width) word embeddings and (batch, width) pooled ones, as SDXL makes them.

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
    return words * kept[:, None, None], pooled * kept[:, None]


def _encode_chunk(pipe: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Both encoders' last hidden states but one side by side, and the second's projection."""
    states = []
    encoders = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for tokenizer, encoder in encoders:
        tokens = tokenizer(
            texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, -1), output.text_embeds


def export(vae: AutoencoderKL, networks: nn.ModuleDict) -> None:
    """Store the pocket SDXL with this VAE and these trained networks."""
    pipe = pocket_sdxl.assemble()
    pipe.vae.load_state_dict(vae.state_dict())
    for name, network in networks.items():
        getattr(pipe, name).load_state_dict(network.state_dict())
    pocket_sdxl.save_config(pipe, pocket_sdxl.CONFIG)
    pocket_sdxl.save_single_file(pipe, pocket_sdxl.CHECKPOINT)


def checkpoint(
    path: Path, step: int, model: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def resume(path: Path, model: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """The number of steps already done, their state put back; 0 where nothing was kept."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--unet-steps", type=int, default=UNET_STEPS)
    options = parser.parse_args()
    vae = train_vae(options.vae_steps, options.device, options.seed)
    train_unet(vae, options.unet_steps, options.device, options.seed)


if __name__ == "__main__":
    main()
