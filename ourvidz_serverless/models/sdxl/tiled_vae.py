"""Tiled VAE decoding: the same arithmetic as without tiles, in a fraction of the memory.

diffusers' tiled decoding normalises each tile of a latent by itself and blends the seams, which
changes the image. Here a tile is a number of rows, and every layer is computed over the whole image
before the next layer begins. A layer's input and output are in the host's memory. The device has
one tile at a time, with as many rows of its neighbours as the kernel reads, and group norms take
their statistics over all tiles. The pixels equal those of a decode without tiles within rounding.
The price is the time to copy to the host and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ourvidz_serverless.models.memory.device import Device

#: An image has at most so many tiles, and a tile at least so many rows.
MAX_TILES, MIN_ROWS = 8, 4


def decode(vae: Any, latent: torch.Tensor, device: Device) -> torch.Tensor:
    """The image (1, 3, 8 h, 8 w) of one latent (1, 4, h, w), in the host's memory."""
    layers, decoder = TiledLayers(device), vae.decoder
    if vae.post_quant_conv is not None:
        latent = vae.post_quant_conv(latent)
    x = layers.conv(device.copy_to_host(latent), decoder.conv_in)
    x = _middle(layers, x, decoder.mid_block)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(layers, x, resnet)
        for upsampler in block.upsamplers or ():
            x = layers.conv(x, upsampler.conv, is_doubled=True)
    return layers.conv(x, decoder.conv_out, norm=decoder.conv_norm_out)


def decode_tiny(decoder: Any, latent: torch.Tensor, device: Device) -> torch.Tensor:
    """The same by the decoder of an AutoencoderTiny, which has no norms.

    Without norms a tile depends only on the rows near it, so it is decoded through all layers
    together with these rows. To compute some rows twice costs less than copies between the layers.
    """
    reach, made = receptive_field(decoder.layers), []
    for start, end in _tiles(latent.shape[2]):
        top = max(start - reach, 0)
        rows = latent[:, :, top : end + reach]
        tile = decoder(rows)
        scale = tile.shape[2] // rows.shape[2]
        made.append(
            device.copy_to_host(tile[:, :, scale * (start - top) : scale * (end - top)].clone())
        )
    with device.uncounted():
        return torch.cat(made, 2)


def receptive_field(layers: Any) -> int:
    """How many rows of a latent, above and below, a row of pixels depends on."""
    reach, scale = 0.0, 1.0
    for layer in layers:
        if isinstance(layer, torch.nn.Upsample):
            # It reads one more row if it interpolates.
            reach, scale = reach + 1 / scale, scale * float(layer.scale_factor)
        convolutions = (each for each in layer.modules() if isinstance(each, torch.nn.Conv2d))
        reach += sum(each.kernel_size[0] // 2 for each in convolutions) / scale
    return math.ceil(reach)


def _middle(layers: TiledLayers, x: torch.Tensor, block: Any) -> torch.Tensor:
    x = _resnet(layers, x, block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            x = layers.attend(x, attention)
        x = _resnet(layers, x, resnet)
    return x


def _resnet(layers: TiledLayers, x: torch.Tensor, block: Any) -> torch.Tensor:
    inner = layers.conv(x, block.conv1, norm=block.norm1)
    return layers.conv(inner, block.conv2, norm=block.norm2, residual=(x, block.conv_shortcut))


class TiledLayers:
    """Layers over tensors (1, channels, rows, columns) in the host's memory."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def conv(
        self,
        x: torch.Tensor,
        layer: Any,
        norm: Any = None,
        is_doubled: bool = False,
        residual: tuple[torch.Tensor, Any] | None = None,
    ) -> torch.Tensor:
        """A convolution of `x`, which may be normalised and activated, or doubled in size, before.

        `residual` is a tensor to add, and its own 1x1 convolution, if it has one.
        """
        reach, scale = layer.kernel_size[0] // 2, 2 if is_doubled else 1
        affine = None if norm is None else self._affine(x, norm)
        made = None
        for start, end in _tiles(x.shape[2]):
            tile = self._to_device(x[:, :, max(start - reach, 0) : end + reach])
            if affine is not None:
                tile = F.silu(_normalised(tile, affine))
            if is_doubled:
                tile = F.interpolate(tile, scale_factor=2.0, mode="nearest")
            top = reach if start == 0 else -(scale - 1) * reach
            bottom = reach if end == x.shape[2] else -(scale - 1) * reach
            tile = F.pad(tile, (reach, reach, top, bottom))
            tile = F.conv2d(tile, layer.weight, layer.bias)
            if residual is not None:
                added, shortcut = self._to_device(residual[0][:, :, start:end]), residual[1]
                tile += added if shortcut is None else shortcut(added)
            if made is None:
                made = self._host_buffer(tile, scale * x.shape[2])
            made[:, :, scale * start : scale * end].copy_(tile)
        assert made is not None
        return made

    def attend(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """Self-attention with its residual: keys and values at once, queries tile by tile."""
        affine, (_, channels, rows, columns) = self._affine(x, layer.group_norm), x.shape
        tokens = _normalised(self._to_device(x), affine).flatten(2).transpose(1, 2)
        keys, values = (self._heads(each(tokens), layer) for each in (layer.to_k, layer.to_v))
        made = self._host_buffer(x, rows)
        for start, end in _tiles(rows):
            tile = tokens[:, start * columns : end * columns]
            queries = self._heads(layer.to_q(tile), layer)
            attended = F.scaled_dot_product_attention(queries, keys, values)
            attended = layer.to_out[0](attended.transpose(1, 2).flatten(2)).transpose(1, 2)
            attended = attended.reshape(1, channels, end - start, columns)
            if layer.residual_connection:
                attended += self._to_device(x[:, :, start:end])
            made[:, :, start:end].copy_(attended / layer.rescale_output_factor)
        return made

    @staticmethod
    def _heads(tokens: torch.Tensor, layer: Any) -> torch.Tensor:
        return tokens.unflatten(2, (layer.heads, -1)).transpose(1, 2)

    def _affine(self, x: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor and the summand with which a group norm changes each channel of `x`."""
        total = torch.zeros(2, norm.num_groups, dtype=torch.float64, device=self._device.name)
        for start, end in _tiles(x.shape[2]):
            groups = self._to_device(x[:, :, start:end]).float().reshape(norm.num_groups, -1)
            total[0] += groups.sum(1, dtype=torch.float64)
            total[1] += groups.square().sum(1, dtype=torch.float64)
        mean, square = total / (x[0].numel() / norm.num_groups)
        spread = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        each = x.shape[1] // norm.num_groups
        factor = spread.repeat_interleave(each) * norm.weight
        summand = norm.bias - mean.repeat_interleave(each) * factor
        return factor.float()[:, None, None], summand.float()[:, None, None]

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        return self._device.copy_to_device(rows)

    def _host_buffer(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """An empty tensor in the host's memory, which is not counted as the device's."""
        shape = (1, like.shape[1], rows, like.shape[3])
        with self._device.uncounted():
            return torch.empty(shape, dtype=like.dtype)


def _tiles(rows: int) -> Iterator[tuple[int, int]]:
    height = max(-(-rows // MAX_TILES), MIN_ROWS)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def _normalised(x: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    factor, summand = affine
    return (x * factor + summand).to(x.dtype)
