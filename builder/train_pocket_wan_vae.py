"""Make the pocket WAN's VAE: its encoder is constructed, its decoder is trained.

The encoder is linear on purpose. A latent describes a cell of 4 frames by 8x8 pixels: the mean
colour, and the gradients of red, green and blue across, down, over time and along the diagonal.
These give the place and the motion of a straight edge in the cell. So the latents do not depend on
a training, and colours are plain numbers for the transformer. The decoder starts as a thumbnail of
the means, and is trained to draw the edges.
"""

import math
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from builder import drawings, pocket_wan
from builder.training import average, checkpoint, keyed, learning_rate, resume

VAE_STEPS = 1400
VAE_PEAK_RATE = 1e-3
# The layers that pass the colours on are right from the start, and have a lower learning rate.
CARRYING = ("conv_in.", "resample.1.", "time_conv.", "conv_shortcut.")
CARRYING_RATE = 0.1
# (frames, height, width, batch)
VAE_MENU = [(9, 48, 48, 3)] * 4 + [(9, 64, 64, 2)] * 2
VAE_MENU += [(17, 48, 48, 2), (9, 48, 80, 2), (5, 64, 64, 3), (1, 96, 96, 4)]
# The noise on latents in training, as a share of their spread.
LATENT_NOISE = 0.04
# The scaled colours' spread. The gradients have twice the weight of colours. At half of this spread
# only the ground's colour was visible through most of the schedule's noise.
SPREAD = 1.0
DETAIL = 2.0
# A constant channel sets the scale of every norm. Without it a norm would remove the brightness of
# a flat cell.
ANCHOR = 64.0
DECODER_ANCHOR = 8.0
DECODER_CONSTANT = 6

MEAN, ACROSS, DOWN, OVER_TIME, DIAGONAL = (range(3 * k, 3 * k + 3) for k in range(5))
FLICKER = 15  # brightness, the middle two frames against the outer two
FEATURES = 15  # those that are passed on as a pair, because silu(x) - silu(-x) = x
# The channels in use. The colours of the cells around it give an edge's place in a cell.
USED = (*MEAN, *OVER_TIME)
IDLE = tuple(channel for channel in range(16) if channel not in USED)

Weights = dict[int, dict[int, NDArray[np.float64]]]


def train_vae(path: Path, steps: int, device: str, seed: int) -> AutoencoderKLWan:
    """The VAE, its decoder averaged over its last steps."""
    vae = construct(seed).to(device)
    ema = deepcopy(vae).requires_grad_(False)
    carrying, free = _carrying_and_free(vae.decoder)
    groups = [{"params": free, "pace": 1.0}, {"params": carrying, "pace": CARRYING_RATE}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))
    path = keyed(path, seed=seed, steps=steps)
    start = resume(path, vae, ema, optimiser)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", mininterval=10)
    errors: list[float] = []
    first = vae.decoder.conv_in.weight
    for step, pixels in zip(bar, clips(seed + start), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = group["pace"] * learning_rate(step, steps, VAE_PEAK_RATE)
        loss, error = vae_loss(vae, pixels.to(device))
        optimiser.zero_grad()
        loss.backward()
        for weight in carrying:
            # The constant channel is large: a step along it would shift all colours. (A single
            # first frame gives no gradient to the layers that make two frames of one.)
            if weight.dim() > 1 and weight.grad is not None and weight is not first:
                weight.grad[:, DECODER_CONSTANT] = 0
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        average(ema, vae, step)
        errors.append(error * 127.5)
        if step % 100 == 99:
            bar.set_postfix(grey_levels=f"{np.mean(errors[-100:]):.2f}")
        if step % 250 == 249 or step + 1 == steps:
            checkpoint(path, step + 1, vae, ema, optimiser)
    return ema


def _carrying_and_free(decoder: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    weights = [(name, w) for name, w in decoder.named_parameters() if w.requires_grad]
    carrying = [w for name, w in weights if any(layer in name for layer in CARRYING)]
    return carrying, [w for name, w in weights if not any(layer in name for layer in CARRYING)]


def vae_loss(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, float]:
    """L1 and L2 on pixels, and L1 on their differences, from latents with some noise."""
    with torch.no_grad():
        latents = encode(vae, pixels)
        latents = latents + LATENT_NOISE * SPREAD * torch.randn_like(latents)
    error = decode(vae, latents) - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges = edges + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    level = error.abs().mean()
    return level + 0.5 * error.square().mean() + 0.5 * edges, level.item()


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """(batch, 16, 1 + frames / 4, height / 8, width / 8) scaled latents, as WAN's pipelines do."""
    mean, deviation = _statistics(vae)
    return (vae.encode(pixels).latent_dist.mode() - mean) / deviation


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames of about -1 to 1, not clamped, so that an overshoot still has a gradient."""
    mean, deviation = _statistics(vae)
    hidden = vae.post_quant_conv(latents * deviation + mean)
    vae.clear_cache()
    frames = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    return torch.cat(frames, 2)


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    device = vae.device
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    return mean, torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)


def clips(seed: int) -> Iterator[Tensor]:
    """Endless (batch, 3, frames, height, width) clips of -1 to 1."""
    rng = random.Random(seed)
    while True:
        frames, height, width, batch = rng.choice(VAE_MENU)
        yield to_tensor([clip(rng, frames, height, width) for _ in range(batch)])


def clip(rng: random.Random, frames: int, height: int, width: int) -> drawings.Pixels:
    """A detail of a video: up to two shapes, still or moving, cut off by the borders."""
    video = np.broadcast_to(_colour(rng), (frames, height, width, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    for _ in range(rng.choice((1, 1, 1, 2))):
        radius = math.exp(rng.uniform(math.log(12), math.log(90)))
        angle = rng.uniform(0, math.tau)
        away = radius * rng.uniform(0.0, 1.1)
        begin_x = width * rng.uniform(0.2, 0.8) + away * math.cos(angle)
        begin_y = height * rng.uniform(0.2, 0.8) + away * math.sin(angle)
        speed_x, speed_y = _speed(rng)
        shape, colour = rng.choice(drawings.SHAPES), _colour(rng)
        extents = drawings.EXTENTS[shape]
        for index in range(frames):
            elapsed = index - frames / 2
            inside = drawings.coverage(
                shape,
                x - begin_x - elapsed * speed_x,
                y - begin_y - elapsed * speed_y,
                radius * extents[0],
                radius * extents[1],
            )[..., None]
            video[index] += inside * (colour - video[index])
    return (video + 0.5).astype(np.uint8)


def _speed(rng: random.Random) -> tuple[float, float]:
    """Pixels a frame across and down: mostly along one axis, as the drawings move."""
    kind = rng.random()
    fast = rng.choice((-1, 1)) * rng.uniform(0.3, 6.0)
    if kind < 0.2:
        return 0.0, 0.0
    if kind < 0.5:
        return fast, 0.0
    return (0.0, fast) if kind < 0.8 else (fast, rng.uniform(-4, 4))


def _colour(rng: random.Random) -> drawings.Plane:
    """One of the named colours, or sometimes a random one."""
    if rng.random() < 0.75:
        return drawings.RGB[rng.choice(tuple(drawings.COLOURS))]
    return np.asarray([rng.uniform(0, 255) for _ in range(3)], np.float32)


def to_tensor(videos: list[drawings.Pixels]) -> Tensor:
    stacked = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3)
    return stacked.float() / 127.5 - 1


def construct(seed: int = 0) -> AutoencoderKLWan:
    """The VAE before training: the final encoder, frozen, and a decoder that draws a thumbnail."""
    vae = pocket_wan.assemble(seed).vae
    with torch.no_grad():
        _construct_encoder(vae.encoder)
        _calibrate(vae)
        _start_decoder(vae.decoder)
    for part in (vae.encoder, vae.quant_conv, vae.post_quant_conv):
        part.requires_grad_(False)
    # The attention in the middle stays at zero: then a cell's pixels depend on its neighbourhood
    # alone, not on the picture's size.
    vae.decoder.mid_block.attentions.requires_grad_(False)
    return vae


def _construct_encoder(encoder: nn.Module) -> None:
    """Halve three times, from the second time on with gradients. All other layers add zero."""
    for name, layer in encoder.named_modules():
        if name.endswith((".conv2", ".proj")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    same, half = np.ones((1, 1)), np.full((2, 2), 0.25)
    right = np.array([[-0.25, 0.25], [-0.25, 0.25]])
    below, twist = right.T, np.array([[0.25, -0.25], [-0.25, 0.25]])
    blocks = encoder.down_blocks
    colours = {c: {c: same} for c in MEAN}
    _write(encoder.conv_in, colours, bias={7: ANCHOR})
    _write(blocks[1].resample[1], {c: {c: half} for c in (*MEAN, 7)})
    _write(blocks[2].conv_shortcut, colours | {15: {7: same}})
    leaning = {c: {c: half} for c in (*MEAN, 15)}
    leaning |= {ACROSS[c]: {c: right} for c in range(3)} | {DOWN[c]: {c: below} for c in range(3)}
    _write(blocks[3].resample[1], leaning)
    mixed, later = np.array([0, 0.5, 0.5]), np.array([0, -0.5, 0.5])
    in_time = {c: {c: mixed} for c in (*MEAN, *ACROSS, *DOWN, 15)}
    in_time |= {OVER_TIME[c]: {c: later} for c in range(3)}
    _write(blocks[3].time_conv, in_time)
    _write(blocks[4].conv_shortcut, {c: {c: same} for c in range(12)} | {30: {15: same}})
    leaning = {c: {c: half} for c in (*MEAN, *OVER_TIME)}
    for c in range(3):
        leaning[ACROSS[c]] = {c: 2 * right, ACROSS[c]: half}
        leaning[DOWN[c]] = {c: 2 * below, DOWN[c]: half}
        leaning[DIAGONAL[c]] = {c: 2 * twist}
    _write(blocks[5].resample[1], _paired(leaning) | {30: {30: half}}, bias={31: 8.0})
    in_time = {c: {c: mixed} for c in (*MEAN, *ACROSS, *DOWN, *DIAGONAL)}
    in_time |= {OVER_TIME[c]: {c: 2 * later, OVER_TIME[c]: mixed} for c in range(3)}
    flicker = {c: later for c in OVER_TIME} | {31: mixed}
    _write(blocks[5].time_conv, _paired(in_time) | {30: {30: mixed}, 31: flicker})
    encoder.norm_out.gamma.fill_(math.hypot(ANCHOR, 8.0) / math.sqrt(32))
    outputs = {c: {c: same, FEATURES + c: -same} for c in range(FEATURES)}
    _write(encoder.conv_out, outputs | {FLICKER: {31: same}}, bias={FLICKER: -8.0})
    encoder.conv_out.bias[16:] = 2 * math.log(LATENT_NOISE)


def _paired(outputs: Weights) -> Weights:
    """The outputs, and after them their negatives."""
    negatives = {
        FEATURES + output: {channel: -kernel for channel, kernel in inputs.items()}
        for output, inputs in outputs.items()
        if output < FEATURES
    }
    return outputs | negatives


def _write(layer: nn.Module, outputs: Weights, bias: dict[int, float] | None = None) -> None:
    """Make a convolution's outputs these weighted sums of inputs. All other weights are 0."""
    layer.weight.zero_()
    layer.bias.zero_()
    for output, value in (bias or {}).items():
        layer.bias[output] = value
    for output, inputs in outputs.items():
        for channel, kernel in inputs.items():
            _place(layer.weight[output, channel], torch.from_numpy(kernel).float())


def _place(weight: Tensor, kernel: Tensor) -> None:
    """Place a kernel: in time as it is, in space at the newest frame, 2x2 first or centred."""
    if kernel.dim() == 1:
        weight[:, 0, 0] = kernel
        return
    if weight.dim() == 3:
        weight = weight[-1]
    if kernel.shape == (2, 2):
        weight[:2, :2] = kernel
    else:
        weight[weight.shape[0] // 2, weight.shape[1] // 2] = kernel[0, 0]


def _calibrate(vae: AutoencoderKLWan) -> None:
    """Scale the latents to WAN's means and deviations, in the 1x1 convolutions around them.

    In the scale of WAN's pipelines colours then have mean zero and a spread of `SPREAD`.
    """
    spread = float(np.std(np.stack(list(drawings.RGB.values())))) / 127.5
    mean, deviation = (each.flatten() for each in _statistics(vae))
    gain = torch.full((16,), SPREAD / spread)
    gain[3:] *= DETAIL
    keep = torch.zeros(16)
    keep[list(USED)] = 1
    quant, post = vae.quant_conv, vae.post_quant_conv
    for layer in (quant, post):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    quant.weight[:16, :16, 0, 0, 0] = torch.diag(keep * gain * deviation)
    quant.weight[16:, 16:, 0, 0, 0] = torch.eye(16)
    quant.bias[:16] = mean
    quant.bias[16:] = 2 * torch.log(SPREAD * deviation)
    post.weight[:, :, 0, 0, 0] = torch.diag(keep / (gain * deviation))
    post.bias.copy_(-keep * mean / (gain * deviation))


def _start_decoder(decoder: nn.Module) -> None:
    """Initialise the decoder with right colours: cells are flat and change in time.

    Channels 0-2 carry the colours and 3-5 their negatives, 6 the anchor, 7-9 the change in time.
    """
    same = np.ones((1, 1))
    carried = {c: {c: same} for c in range(7)}
    for name, layer in decoder.named_modules():
        if type(layer).__name__ == "WanRMS_norm":
            layer.gamma.fill_(DECODER_ANCHOR / math.sqrt(layer.gamma.numel()))
            layer.gamma[DECODER_CONSTANT] = 0.1
        elif name.endswith(".conv1"):
            layer.bias[DECODER_CONSTANT] = DECODER_ANCHOR
        elif name.endswith(".conv2"):
            layer.weight *= 0.1
            layer.bias.zero_()
        elif name.endswith((".conv_shortcut", "resample.1")) and hasattr(layer, "weight"):
            _carry(layer, carried)
        elif name.endswith("time_conv"):
            _carry_in_time(layer, changing="up_blocks.0" in name)
        elif name.endswith(".proj"):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    inputs = {c: {c: same} for c in range(3)} | {3 + c: {c: -same} for c in range(3)}
    _carry(
        decoder.conv_in,
        inputs | {DECODER_CONSTANT: {}} | {7 + c: {OVER_TIME[c]: same} for c in range(3)},
    )
    decoder.conv_in.bias[DECODER_CONSTANT] = DECODER_ANCHOR
    _carry(decoder.conv_out, {c: {c: same, 3 + c: -same} for c in range(3)})


def _carry(layer: nn.Module, outputs: Weights) -> None:
    """Make some outputs of a convolution sums of inputs. The other outputs stay as they are."""
    for output, inputs in outputs.items():
        layer.weight[output] = 0
        layer.bias[output] = 0
        for channel, kernel in inputs.items():
            _place(layer.weight[output, channel], torch.from_numpy(kernel).float())


def _carry_in_time(layer: nn.Module, changing: bool) -> None:
    """Make two frames of one: equal, or with the change in time subtracted and added."""
    newest, channels = np.array([0.0, 0.0, 1.0]), layer.weight.shape[1]
    for frame, sign in ((0, -0.4), (1, 0.4)):
        outputs = {frame * channels + c: {c: newest} for c in range(7)}
        if changing:
            for c in range(3):
                outputs[frame * channels + c][7 + c] = sign * newest
                outputs[frame * channels + 3 + c][7 + c] = -sign * newest
        _carry(layer, outputs)
