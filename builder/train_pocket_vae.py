"""Train the pocket SDXL's VAE: drawings to latents an eighth as wide, and back."""

import math
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from builder import drawings, pocket_sdxl
from builder.training import kept, keyed, learn

VAE_STEPS = 3600
VAE_PEAK_RATE = 1e-3
# (height, width, batch): mostly small and many. Whole pictures train the norms' statistics.
VAE_MENU = [(64, 64, 12)] * 6 + [(128, 128, 3)] * 3 + [(96, 160, 3), (160, 96, 3), (256, 256, 1)]
# The noise on latents in training, as a share of their spread of about one.
LATENT_NOISE = 0.03
# The scaled latents' spread. SDXL's is one. With a smaller spread the schedule's last noise hides
# the outlines of a large picture too, which otherwise remain visible (arXiv:2301.10972, section 2).
SPREAD = 0.4
ANCHOR = 8.0
#: The number and the side of the pictures whose latents are measured.
CALIBRATION = (256, 128)


def train_vae(path: Path, steps: int, device: str, seed: int) -> AutoencoderKL:
    """The VAE, averaged over its last steps and calibrated."""
    vae = start_as_thumbnail(pocket_sdxl.assemble(seed).vae)
    vae.to(device, memory_format=torch.channels_last)
    ema = learn(
        vae,
        keyed(path, vae, seed=seed, steps=steps),
        batches=lambda start: vae_batches(seed + start),
        loss_of=lambda pixels: vae_loss(vae, pixels.to(device)),
        steps=steps,
        peak=VAE_PEAK_RATE,
        name="vae",
    )
    with torch.no_grad():  # the posterior's width is the noise of the training
        ema.quant_conv.weight[4:] = 0
        ema.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE)
    return calibrated(ema, path.parent, seed)


def calibrated(vae: AutoencoderKL, folder: Path, seed: int) -> AutoencoderKL:
    """The VAE with its stored calibration, so that every later run has the same one."""
    path = keyed(folder / "calibrated.pt", vae, seed=seed)
    vae.load_state_dict(kept(path, lambda: calibrate(deepcopy(vae), seed).state_dict()))
    return vae


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


def scrap(rng: random.Random, height: int, width: int) -> drawings.Pixels:
    """A detail of a larger picture: up to three shapes, cut off by the borders, in any colours."""
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
    """One of the named colours, or sometimes a random one."""
    if rng.random() < 0.7:
        return drawings.RGB[rng.choice(tuple(drawings.COLOURS))]
    return np.asarray([rng.uniform(0, 255) for _ in range(3)], np.float32)


def to_tensor(pictures: list[drawings.Pixels]) -> Tensor:
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (stacked.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> AutoencoderKL:
    """Initialise the VAE with right colours: it encodes to a thumbnail and decodes to flat cells.

    Channels 2-4 carry red, green and blue, 5-7 their negatives, because silu(x) - silu(-x) = x.
    Channels 0 and 1 are +ANCHOR and -ANCHOR. They set the scale of every norm. Without them a norm
    would remove the brightness of a flat picture.
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
    """Make some outputs weighted sums of inputs. Layers with stride 2 average each 2x2 block."""
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

    With the thumbnail the UNet gets colours as plain numbers, and latents of a known spread. The
    fourth channel and the neighbours give an edge's place within a cell. Instead of a learned
    posterior the latents have a fixed noise, as in regularised autoencoders (arXiv:1903.12436).
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
    """Shift and scale the latents to SDXL's factor, in the 1x1 convolutions around them.

    Multiplied by 0.13025, each channel has mean zero, and the colours have a spread of `SPREAD`.
    """
    latents = vae.quant_conv(vae.encoder(_whole_pictures(seed)))[:, :4]
    mean = latents.mean((0, 2, 3))
    spread = latents[:, :3].var((0, 2, 3)).mean().sqrt() * vae.config.scaling_factor / SPREAD
    print("latents: mean", mean.tolist(), "deviation", latents.std((0, 2, 3)).tolist())
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= spread
    quant.bias[:4] = (quant.bias[:4] - mean) / spread
    quant.bias[4:] -= 2 * torch.log(spread)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= spread
    return vae


def _whole_pictures(seed: int) -> Tensor:
    rng, (count, side) = random.Random(seed), CALIBRATION
    return to_tensor([drawings.paint(drawings.imagine(rng), side, side, rng) for _ in range(count)])
