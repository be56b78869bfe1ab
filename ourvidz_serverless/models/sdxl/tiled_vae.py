"""The VAE's decoder in strips of rows: the same arithmetic, in a fraction of the memory.

diffusers' tiled decoding cuts a latent into tiles, normalises each by itself and blends the seams:
another picture. Here every layer is computed over the whole picture before the next one begins.
Its input and output lie in the host's memory, and the device sees one strip at a time, with as many
rows of its neighbours as the kernel reads; group norms take their statistics over all strips. So
the pixels are those of a whole decode within rounding, at the price of the way to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ourvidz_serverless.models.memory.device import Device

#: Into so many strips a picture is cut, and a strip has no fewer rows than that.
STRIPS, FEWEST_ROWS = 8, 4


def decode(vae: Any, latent: torch.Tensor, device: Device) -> torch.Tensor:
    """The picture (1, 3, 8 h, 8 w) of one latent (1, 4, h, w), in the host's memory."""
    strips, decoder = Strips(device), vae.decoder
    if vae.post_quant_conv is not None:
        latent = vae.post_quant_conv(latent)
    x = strips.conv(device.copy_to_host(latent), decoder.conv_in)
    x = _middle(strips, x, decoder.mid_block)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(strips, x, resnet)
        for upsampler in block.upsamplers or ():
            x = strips.conv(x, upsampler.conv, is_doubled=True)
    return strips.conv(x, decoder.conv_out, norm=decoder.conv_norm_out)


def decode_tiny(decoder: Any, latent: torch.Tensor, device: Device) -> torch.Tensor:
    """The same by the decoder of an AutoencoderTiny, which has no norms.

    So a strip needs no more than the rows around it that its pixels hang on, and is decoded with
    them from end to end: what is computed twice costs a tiny decoder less than the way to the host.
    """
    reach, made = _reach(decoder.layers), []
    for start, end in _spans(latent.shape[2]):
        top = max(start - reach, 0)
        rows = latent[:, :, top : end + reach]
        strip = decoder(rows)
        scale = strip.shape[2] // rows.shape[2]
        made.append(
            device.copy_to_host(strip[:, :, scale * (start - top) : scale * (end - top)].clone())
        )
    with device.uncounted():
        return torch.cat(made, 2)


def _reach(layers: Any) -> int:
    """How many rows of a latent, up and down, one row of pixels hangs on."""
    reach, scale = 0.0, 1.0
    for layer in layers:
        if isinstance(layer, torch.nn.Upsample):
            # One row where it blends neighbours.
            reach, scale = reach + 1 / scale, scale * float(layer.scale_factor)
        convolutions = (each for each in layer.modules() if isinstance(each, torch.nn.Conv2d))
        reach += sum(each.kernel_size[0] // 2 for each in convolutions) / scale
    return math.ceil(reach)


def _middle(strips: Strips, x: torch.Tensor, block: Any) -> torch.Tensor:
    x = _resnet(strips, x, block.resnets[0])
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            x = strips.attend(x, attention)
        x = _resnet(strips, x, resnet)
    return x


def _resnet(strips: Strips, x: torch.Tensor, block: Any) -> torch.Tensor:
    inner = strips.conv(x, block.conv1, norm=block.norm1)
    return strips.conv(inner, block.conv2, norm=block.norm2, beside=(x, block.conv_shortcut))


class Strips:
    """Layers over tensors (1, channels, rows, columns) that lie in the host's memory."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def conv(
        self,
        x: torch.Tensor,
        layer: Any,
        norm: Any = None,
        is_doubled: bool = False,
        beside: tuple[torch.Tensor, Any] | None = None,
    ) -> torch.Tensor:
        """A convolution, of `x` as it is, or normalised and activated, or at twice the size.

        `beside` is a residual and its own 1x1 convolution, if it has one, to be added.
        """
        reach, scale = layer.kernel_size[0] // 2, 2 if is_doubled else 1
        affine = None if norm is None else self._affine(x, norm)
        made = None
        for start, end in _spans(x.shape[2]):
            strip = self._up(x[:, :, max(start - reach, 0) : end + reach])
            if affine is not None:
                strip = F.silu(_scaled(strip, affine))
            if is_doubled:
                strip = F.interpolate(strip, scale_factor=2.0, mode="nearest")
            top = reach if start == 0 else -(scale - 1) * reach
            bottom = reach if end == x.shape[2] else -(scale - 1) * reach
            strip = F.pad(strip, (reach, reach, top, bottom))
            strip = F.conv2d(strip, layer.weight, layer.bias)
            if beside is not None:
                residual, shortcut = self._up(beside[0][:, :, start:end]), beside[1]
                strip += residual if shortcut is None else shortcut(residual)
            if made is None:
                made = self._room(strip, scale * x.shape[2])
            made[:, :, scale * start : scale * end].copy_(strip)
        assert made is not None
        return made

    def attend(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        """Self-attention with its residual; keys and values whole, queries strip by strip."""
        affine, (_, channels, rows, columns) = self._affine(x, layer.group_norm), x.shape
        whole = _scaled(self._up(x), affine).flatten(2).transpose(1, 2)
        keys, values = (self._heads(each(whole), layer) for each in (layer.to_k, layer.to_v))
        made = self._room(x, rows)
        for start, end in _spans(rows):
            strip = whole[:, start * columns : end * columns]
            queries = self._heads(layer.to_q(strip), layer)
            seen = F.scaled_dot_product_attention(queries, keys, values)
            seen = layer.to_out[0](seen.transpose(1, 2).flatten(2)).transpose(1, 2)
            seen = seen.reshape(1, channels, end - start, columns)
            if layer.residual_connection:
                seen += self._up(x[:, :, start:end])
            made[:, :, start:end].copy_(seen / layer.rescale_output_factor)
        return made

    @staticmethod
    def _heads(tokens: torch.Tensor, layer: Any) -> torch.Tensor:
        return tokens.unflatten(2, (layer.heads, -1)).transpose(1, 2)

    def _affine(self, x: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a group norm does to each channel of all of `x`: a factor and a summand."""
        total = torch.zeros(2, norm.num_groups, dtype=torch.float64, device=self._device.name)
        for start, end in _spans(x.shape[2]):
            groups = self._up(x[:, :, start:end]).float().reshape(norm.num_groups, -1)
            total[0] += groups.sum(1, dtype=torch.float64)
            total[1] += groups.square().sum(1, dtype=torch.float64)
        mean, square = total / (x[0].numel() / norm.num_groups)
        spread = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        each = x.shape[1] // norm.num_groups
        factor = spread.repeat_interleave(each) * norm.weight
        summand = norm.bias - mean.repeat_interleave(each) * factor
        return factor.float()[:, None, None], summand.float()[:, None, None]

    def _up(self, rows: torch.Tensor) -> torch.Tensor:
        return self._device.copy_to_device(rows)

    def _room(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """An empty tensor in the host's memory, which no device counts."""
        shape = (1, like.shape[1], rows, like.shape[3])
        with self._device.uncounted():
            return torch.empty(shape, dtype=like.dtype)


def _spans(rows: int) -> Iterator[tuple[int, int]]:
    height = max(-(-rows // STRIPS), FEWEST_ROWS)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def _scaled(x: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    factor, summand = affine
    return (x * factor + summand).to(x.dtype)
