"""Distil the pocket SDXL's VAE into a tiny one: `python -m builder.train_pocket_tiny_vae`.

An AutoencoderTiny, TAESDXL's architecture (https://github.com/madebyollin/taesd), is trained to
decode latents as the pocket's VAE does, and to encode landscapes to the same latents. It gets the
pictures of the VAE's training. Noise is added to their latents, since the latents of a UNet differ
from those of an encoder. The training resumes from `.cache/pocket_sdxl` and stores the averaged
weights in `pocket/sdxl_tiny_vae`, a folder of diffusers.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from builder import pocket_sdxl
from builder.landscapes import imagine, paint
from builder.train_pocket_vae import (
    SPREAD,
    decode,
    encode,
    picture_loss,
    to_tensor,
    vae_batches,
)
from builder.training import keyed, learn

FOLDER = pocket_sdxl.POCKET / "sdxl_tiny_vae"
CACHE = pocket_sdxl.POCKET.parent / ".cache" / "pocket_sdxl"

# A quarter of TAESDXL's 64 channels, and fewer blocks.
TINY = {
    "encoder_block_out_channels": (16,) * 4,
    "decoder_block_out_channels": (16,) * 4,
    "num_encoder_blocks": (0, 1, 1, 1),
    "num_decoder_blocks": (3, 2, 2, 1),
}
STEPS = 3000
PEAK_RATE = 2e-3
# The most noise on a latent, as a share of the latents' spread.
LATENT_NOISE = 0.5
HELD_OUT = 10**6


def distil(vae: AutoencoderKL, path: Path, steps: int, seed: int) -> AutoencoderTiny:
    """The tiny VAE, averaged over its last steps."""
    torch.manual_seed(seed)
    tiny = AutoencoderTiny(**TINY).to(memory_format=torch.channels_last)
    return learn(
        tiny,
        keyed(path, vae, tiny, seed=seed, steps=steps),
        batches=lambda start: vae_batches(seed + start),
        loss_of=lambda pixels: tiny_loss(vae, tiny, pixels),
        steps=steps,
        peak=PEAK_RATE,
        name="tiny vae",
    )


def tiny_loss(vae: AutoencoderKL, tiny: AutoencoderTiny, pixels: Tensor) -> tuple[Tensor, float]:
    """L1 and L2 on pixels, L1 on their differences, and L2 on the encoder's latents."""
    with torch.no_grad():
        latents = encode(vae, pixels)
        amount = LATENT_NOISE * SPREAD * torch.rand(len(latents), 1, 1, 1)
        noisy = latents + amount * torch.randn_like(latents)
        wanted = decode(vae, noisy)
    loss, level = picture_loss(tiny.decoder(noisy) - wanted)
    return loss + F.mse_loss(tiny.encoder(pixels), latents), level


@torch.no_grad()
def likeness(vae: AutoencoderKL, tiny: AutoencoderTiny, side: int, count: int) -> float:
    """PSNR in dB of the tiny VAE's pictures against the VAE's, for new landscapes."""
    squares = []
    for pixels in held_out(side, count):
        latents = encode(vae, pixels)
        pictures = [each.clamp(-1, 1) for each in (tiny.decoder(latents), decode(vae, latents))]
        squares.append(F.mse_loss(*pictures))
    # Pixels are from -1 to 1.
    return float(10 * torch.log10(4 / torch.stack(squares).mean()))


def held_out(side: int, count: int) -> Iterator[Tensor]:
    rng = random.Random(HELD_OUT)
    for _ in range(count):
        yield to_tensor([paint(imagine(rng), side, side)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="the folder of checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--measure", action="store_true", help="only measure the stored one")
    options = parser.parse_args()
    vae = pocket_sdxl.load().vae.requires_grad_(False)
    if not options.measure:
        tiny = distil(vae, options.cache / "tiny_vae.pt", options.steps, options.seed)
        tiny.half().save_pretrained(FOLDER)
        (FOLDER / "diffusion_pytorch_model.safetensors").chmod(0o644)
    tiny = AutoencoderTiny.from_pretrained(FOLDER, local_files_only=True).float()
    for side in (256, 512):
        print(f"{side}x{side}, 24 landscapes: {likeness(vae, tiny, side, 24):.1f} dB")


if __name__ == "__main__":
    main()
