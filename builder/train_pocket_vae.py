"""Train the pocket SDXL's VAE: landscapes to latents an eighth as wide, and back."""

import math
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from builder import pocket_sdxl
from builder.landscapes import Pixels, imagine, paint
from builder.training import kept, keyed, learn, muon

VAE_STEPS = 2400
VAE_PEAK_RATE = 2e-3
TUNING_RATE = 3e-4
# (height, width, batch). Whole pictures train the norms' statistics.
DETAIL = (160, 256)
VAE_MENU = [(128, 128, 4)] * 4 + [(256, 256, 1)] * 3 + [(144, 256, 2), (256, 144, 2)]
VAE_MENU += [(*DETAIL, 2)] * 3
# The first and the last layers, which are trained by AdamW.
PLAIN = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv",
         "post_quant_conv")  # fmt: skip
# The noise on latents in training, as a share of their spread of about one.
LATENT_NOISE = 0.03
# The scaled latents' spread. SDXL's is one. With a smaller spread the schedule's last noise hides
# the outlines of a large picture too, which otherwise remain visible (arXiv:2301.10972, section 2).
SPREAD = 0.4
ANCHOR = 8.0
#: The number and the side of the pictures whose latents are measured.
CALIBRATION = (256, 128)


def train_vae(path: Path, steps: int, seed: int) -> AutoencoderKL:
    """The VAE, averaged over its last steps and calibrated."""
    vae = start_as_thumbnail(pocket_sdxl.assemble(seed).vae)
    vae.to(memory_format=torch.channels_last)
    ema = learn(
        vae,
        keyed(path, vae, seed=seed, steps=steps),
        batches=lambda start: vae_batches(seed + start),
        loss_of=lambda pixels: vae_loss(vae, pixels),
        steps=steps,
        peak=VAE_PEAK_RATE,
        name="vae",
        optimiser=muon(vae, PLAIN, weight_decay=0.0),
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
    """Endless (batch, 3, height, width) pictures of -1 to 1: whole landscapes and details."""
    rng = random.Random(seed)
    while True:
        height, width, batch = rng.choice(VAE_MENU)
        yield to_tensor([
            paint(imagine(rng), width, height)
            if (height, width) != DETAIL
            else detail(rng, height, width)
            for _ in range(batch)
        ])  # fmt: skip


def detail(rng: random.Random, height: int, width: int) -> Pixels:
    """A part of a landscape of 512x512, mostly of its lower half, where most outlines are."""
    whole = paint(imagine(rng), 512, 512)
    top = rng.randint(0, 512 - height) if rng.random() < 0.3 else rng.randint(160, 512 - height)
    left = rng.randint(0, 512 - width)
    return whole[top : top + height, left : left + width]


def to_tensor(pictures: list[Pixels]) -> Tensor:
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
    loss, level = picture_loss(vae.decoder(vae.post_quant_conv(latents)) - pixels)
    thumbnail = F.mse_loss(mean[:, :3], F.avg_pool2d(pixels, 8))
    return loss + 0.2 * thumbnail + 1e-3 * mean[:, 3].square().mean(), level


def picture_loss(error: Tensor) -> tuple[Tensor, float]:
    """L1 and L2 on pixels and L1 on their differences; and the L1 on pixels alone."""
    edges = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges = edges + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    level = error.abs().mean()
    return level + 0.5 * error.square().mean() + 0.5 * edges, level.item()


def tune_decoder(
    vae: AutoencoderKL,
    path: Path,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    steps: int,
) -> AutoencoderKL:
    """The VAE, its decoder trained further on pairs of scaled latents and pictures.

    Half of the latents are the pictures' own, so that a reference is still decoded as it was.
    """
    tuned = deepcopy(vae)
    tuned.requires_grad_(False)
    for part in (tuned.decoder, tuned.post_quant_conv):
        part.requires_grad_(True)

    def loss_of(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
        latents, pixels = pair
        if torch.rand(1) < 0.5:
            with torch.no_grad():
                latents = encode(tuned, pixels)
        return picture_loss(decode(tuned, latents) - pixels)

    optimiser = muon(tuned, PLAIN, weight_decay=0.0)
    return learn(tuned, path, batches, loss_of, steps, TUNING_RATE, "decoder", optimiser)


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled latents, as the UNet's output and a tiny VAE's input are."""
    return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return vae.decode(latents / vae.config.scaling_factor).sample


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
    return to_tensor([paint(imagine(rng), side, side) for _ in range(count)])
