"""WAN's VAE: videos to latents, and latents to frames, a few at a time.

The VAE is causal: it decodes one latent frame at a time, and a feature cache holds what it needs
of the frames before. `AutoencoderKLWan.decode` runs that loop to its end and concatenates the
pieces. Here each piece is given out as soon as it is complete, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ourvidz_serverless.models.finite import check_finite
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.models.wan.tiled_vae import Part, SplitDecoder


class VideoVae:
    """One `AutoencoderKLWan`, in the dtype in which it was loaded.

    Callers encode and decode inside `handle.using()`.
    """

    def __init__(self, model: Any, device: Device, handle: ModelHandle) -> None:
        self.model, self.device, self.handle = model, device.name, handle
        self.channels: int = model.config.z_dim
        self.spatial: int = model.config.scale_factor_spatial
        self.temporal: int = model.config.scale_factor_temporal
        self.decoder = SplitDecoder(model.decoder, device)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """The shape (1, channels, frames, height, width) of a video's latents."""
        frames = (num_frames - 1) // self.temporal + 1
        return (1, self.channels, frames, height // self.spatial, width // self.spatial)

    @torch.inference_mode()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Normalised latents, fp32, of a video (1, 3, frames, height, width) from -1 to 1.

        The mode of their distribution, so that no seed is needed.
        """
        latents = self.model.encode(video.to(self.dtype)).latent_dist.mode().float()
        return (latents - self._per_channel("latents_mean", torch.float32)) * self._scale(
            torch.float32
        )

    @torch.inference_mode()
    def decode(
        self, latents: torch.Tensor, is_tiled: bool = False, check: Check = lambda: None
    ) -> Iterator[np.ndarray]:
        """The frames of normalised latents, uint8 (frames, height, width, 3), a few at a time.

        The first piece has one frame, each further one has four. Device and host hold one piece
        at a time, however long the video is. A tiled decode takes less of the device's memory and
        more of the host's, and gives out the first piece late; meanwhile it calls `check`.
        """
        latents = check_finite(latents, "the latent").to(self.dtype)
        latents = latents / self._scale(self.dtype) + self._per_channel("latents_mean", self.dtype)
        hidden = self.model.post_quant_conv(latents)
        size = [side * self.spatial for side in hidden.shape[3:]]
        pieces: dict[int, np.ndarray] = {}
        for part in self.decoder.tiled(hidden) if is_tiled else self.decoder.whole(hidden):
            _paint(part, pieces, size)
            if part.is_last:
                yield pieces.pop(part.frame)
            else:
                check()

    def decode_bytes(self, size: tuple[int, int], is_tiled: bool) -> int:
        """About what `decode` takes beside the weights, for frames of a width and a height."""
        width, height = size
        return self.decoder.num_bytes(height // self.spatial, width // self.spatial, is_tiled)

    def video_of(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Images of one size as a video (1, 3, frames, height, width) from -1 to 1, in fp32."""
        frames = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
        return frames.to(self.device).permute(3, 0, 1, 2)[None].float() / 255.0 * 2.0 - 1.0

    def _scale(self, dtype: torch.dtype) -> torch.Tensor:
        return 1.0 / self._per_channel("latents_std", dtype)

    def _per_channel(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        values = torch.tensor(self.model.config[name], device=self.device, dtype=dtype)
        return values.view(1, -1, 1, 1, 1)


def _paint(part: Part, pieces: dict[int, np.ndarray], size: Sequence[int]) -> None:
    """Put a part's pixels in their place among the pieces, which are made at the first part."""
    pixels = as_uint8(check_finite(part.pixels, "the decoded video").clamp(-1.0, 1.0))
    if part.frame not in pieces:
        pieces[part.frame] = np.empty((len(pixels), *size, 3), dtype=np.uint8)
    pieces[part.frame][:, part.rows, part.columns] = pixels


def as_uint8(frames: torch.Tensor) -> np.ndarray:
    """(3, frames, height, width) from -1 to 1 as uint8 (frames, height, width, 3).

    The bytes are computed on the device, so that a quarter of the data leaves it.
    """
    pixels = (frames / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()
