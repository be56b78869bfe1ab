"""What a job of SDXL takes of the device beside the weights, before one of its shape was measured.

`python -m benchmarks.dry_run` counted it, for the published networks in fp16 at 1024x1024: 0.35 GiB
to denoise one picture, 2.1 for six, and 3.0 to decode in fp32. It grows with the pixels and the
widths of the networks. `tests/benchmarks/test_dry_run.py` compares these formulas with the counts.
"""

from __future__ import annotations

from typing import Any

import torch

#: How many tensors as wide as the UNet's first block, and as large as the latents of a forward,
#: exist at the same time.
UNET_TENSORS = 18

#: The same for the VAE's last block and a picture.
VAE_TENSORS = 6

#: For what a count does not see: fragments, and the libraries' workspaces.
MARGIN = 1.25


def denoising_bytes(unet: Any, rows: int, latent_cells: int) -> int:
    """The bytes of a forward of so many rows, each of so many cells of a latent."""
    tensor = rows * latent_cells * unet.config.block_out_channels[0] * unet.dtype.itemsize
    return int(MARGIN * UNET_TENSORS * tensor)


def decoding_bytes(vae: Any, dtype: torch.dtype, pixels: int) -> int:
    """The bytes of decoding one picture of so many pixels in a dtype."""
    tensor = pixels * vae.config.block_out_channels[0] * dtype.itemsize
    return int(MARGIN * VAE_TENSORS * tensor)
