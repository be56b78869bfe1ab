"""WAN's VAE: videos to latents, and latents to frames as they are decoded.

The VAE is causal: it decodes one latent frame at a time and remembers, in a feature cache, what
it needs of those before. `AutoencoderKLWan.decode` runs that loop to its end and joins the
pieces; here the pieces leave one by one, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from PIL import Image

from ourvidz_serverless.models.finite import check_finite
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import ModelHandle


class VideoVae:
    """One `AutoencoderKLWan`, in the dtype that it was loaded in.

    Whoever encodes or decodes is `handle.using()` it.
    """

    def __init__(self, vae: Any, device: Device, handle: ModelHandle) -> None:
        self._vae, self.device, self.handle = vae, device.name, handle
        self.channels: int = vae.config.z_dim
        self.spatial: int = vae.config.scale_factor_spatial
        self.temporal: int = vae.config.scale_factor_temporal
        self._convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())

    @property
    def dtype(self) -> torch.dtype:
        return self._vae.dtype

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """The shape (1, channels, frames, height, width) of a video's latents."""
        frames = (num_frames - 1) // self.temporal + 1
        return (1, self.channels, frames, height // self.spatial, width // self.spatial)

    @torch.inference_mode()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Normalised latents of a video (1, 3, frames, height, width) of values from -1 to 1.

        The most likely ones, in fp32: no seed is needed.
        """
        latents = self._vae.encode(video.to(self.dtype)).latent_dist.mode().float()
        return (latents - self._per_channel("latents_mean", torch.float32)) * self._scale(
            torch.float32
        )

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """The frames of normalised latents, uint8 (frames, height, width, 3), a few at a time.

        First one frame, then four for each further latent frame. Device and host hold one piece
        at a time, whatever the video's length.
        """
        latents = check_finite(latents, "the latent").to(self.dtype)
        latents = latents / self._scale(self.dtype) + self._per_channel("latents_mean", self.dtype)
        hidden = self._vae.post_quant_conv(latents)
        cache: list[torch.Tensor | None] = [None] * self._convolutions
        for index in range(hidden.shape[2]):
            piece = self._vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=cache,
                feat_idx=[0],
                first_chunk=index == 0,
            )
            yield _as_bytes(check_finite(piece[0], "the decoded video").clamp(-1.0, 1.0))

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Images of one size as a video (1, 3, frames, height, width) from -1 to 1, in fp32."""
        frames = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
        return frames.to(self.device).permute(3, 0, 1, 2)[None].float() / 255.0 * 2.0 - 1.0

    def _scale(self, dtype: torch.dtype) -> torch.Tensor:
        return 1.0 / self._per_channel("latents_std", dtype)

    def _per_channel(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        values = torch.tensor(self._vae.config[name], device=self.device, dtype=dtype)
        return values.view(1, -1, 1, 1, 1)


def _as_bytes(frames: torch.Tensor) -> np.ndarray:
    """(3, frames, height, width) from -1 to 1 as bytes (frames, height, width, 3), made there."""
    pixels = (frames / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
