"""The layers of WAN's decoder, over whole frames or over tiles of them.

diffusers' tiled decoding begins each tile with zeros beyond its edges and blends the seams, which
changes the frames. Its tiles also pass through the attention of the decoder's middle, which reads
whole frames. Here the decoder has two halves. The first works on small frames: it decodes them
whole, and its outputs wait in the host's memory. The second begins where the number of frames
doubles for the last time, and needs most of the memory. It decodes one tile after another, each
through all frames, with a feature cache for that tile alone. A tile comes with as many cells of its
neighbours as its pixels depend on, so no seam has to be blended.

The price: the neighbours' cells are computed more than once, and no frame is complete before the
last tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanCausalConv3d, WanResample

from ourvidz_serverless.models.memory.device import Device

#: A tile takes at most so many bytes, as long as it has `MIN_CELLS` on each side. Less would gain
#: little: at 832x480 the first half takes about as much.
TILE_BYTES, MIN_CELLS = 3 << 29, 8


#: The rows and the columns of tiles, as `Span`s.
Grid = tuple[list["Span"], list["Span"]]


class FeatureCache:
    """The frames that the causal convolutions of some layers keep for the next frames."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        convolutions = (each for layer in layers for each in layer.modules())
        count = sum(isinstance(each, WanCausalConv3d) for each in convolutions)
        self._kept: list[Any] = [None] * count

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The layers' output for the next frames `x` (1, channels, frames, height, width)."""
        index = [0]
        for layer in self._layers:
            if isinstance(layer, WanCausalConv3d):
                x = self._convolve(layer, x, index)
            elif isinstance(layer, torch.nn.Sequential):
                x = layer(x)
            else:
                x = layer(x, feat_cache=self._kept, feat_idx=index)
        return x

    def _convolve(self, layer: Any, x: torch.Tensor, index: list[int]) -> torch.Tensor:
        """A convolution outside a block. Inside a block diffusers does the same."""
        before = self._kept[index[0]]
        kept = x[:, :, -CACHE_T:].clone()
        if kept.shape[2] < CACHE_T and before is not None:
            kept = torch.cat([before[:, :, -1:], kept], dim=2)
        x = layer(x, before)
        self._kept[index[0]] = kept
        index[0] += 1
        return x


@dataclass(frozen=True, slots=True)
class Span:
    """The rows or the columns of a tile, in cells: its own, and those with its neighbours'."""

    start: int
    end: int
    low: int
    high: int

    def pixels(self, scale: int) -> slice:
        """The tile's own pixels among those of the frame."""
        return slice(self.start * scale, self.end * scale)

    def crop(self, scale: int) -> slice:
        """The tile's own pixels among those that were decoded with it."""
        return slice((self.start - self.low) * scale, (self.end - self.low) * scale)


@dataclass(frozen=True, slots=True)
class Part:
    """Decoded pixels (3, frames, rows, columns), of about -1 to 1, of one latent frame.

    `rows` and `columns` are their place. With a part that `is_last` its frames are complete.
    """

    frame: int
    rows: slice
    columns: slice
    is_last: bool
    pixels: torch.Tensor


@dataclass(frozen=True, slots=True)
class Cost:
    """What layers take, in channels for each place of their input.

    Their output has `scale` pixels on each side of a place, which depend on `reach` places on each
    side of it. `kept` is for the feature cache, `working` for the largest convolution.
    """

    scale: int
    reach: int
    kept: int
    working: int

    @classmethod
    def of(cls, layers: Sequence[Any], frames: int) -> Cost:
        """`frames` is how many frames the layers compute at once."""
        scale, reach, kept, working = 1, 0.0, 0, 0
        for module in (each for layer in layers for each in layer.modules()):
            if isinstance(module, torch.nn.Upsample):
                scale *= 2
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                reach += module.kernel_size[-1] // 2 / scale
            if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:
                channels = module.in_channels * scale**2
                kept += CACHE_T * channels
                # The block's input, the convolution's, the same with the kept frames before it,
                # and that with padding around it.
                working = max(working, (4 * frames + 2 * CACHE_T) * channels)
        return cls(scale, math.ceil(reach), kept, working)


class SplitDecoder:
    """A `WanDecoder3d` that decodes whole frames, or tiles of at most about `tile_bytes`."""

    def __init__(self, decoder: Any, device: Device, tile_bytes: int = TILE_BYTES) -> None:
        self.tile_bytes, self._device = tile_bytes, device
        blocks = [
            layer
            for block in decoder.up_blocks
            for layer in (*block.resnets, *(block.upsamplers or ()))
        ]
        head = torch.nn.Sequential(decoder.norm_out, decoder.nonlinearity)
        self._layers = [decoder.conv_in, decoder.mid_block, *blocks, head, decoder.conv_out]
        doubling = [index for index, each in enumerate(self._layers) if _doubles_frames(each)]
        self._first, self._second = self._layers[: doubling[-1]], self._layers[doubling[-1] :]
        frames = 2 ** len(doubling)
        self._itemsize = decoder.conv_in.weight.itemsize
        self._before, self._after = Cost.of(self._first, frames // 2), Cost.of(self._second, frames)

    def num_bytes(self, rows: int, columns: int, is_tiled: bool) -> int:
        """About what decoding takes beside the weights, for latents of so many rows and columns."""
        places, scale = rows * columns * self._itemsize, self._before.scale
        kept = self._before.kept * places
        if not is_tiled:
            return kept + (self._after.kept + self._after.working) * scale**2 * places
        grid = self._grid(rows * scale, columns * scale)
        return max(kept + self._before.working * places, self._largest(grid))

    def whole(self, hidden: torch.Tensor) -> Iterator[Part]:
        """One part for each latent frame.

        `hidden` (1, channels, frames, rows, columns) are latents after `post_quant_conv`.
        """
        cache = FeatureCache(self._layers)
        for index, frame in enumerate(hidden.split(1, dim=2)):
            yield Part(index, slice(None), slice(None), True, cache.run(frame)[0])

    def tiled(self, hidden: torch.Tensor) -> Iterator[Part]:
        """The parts of one tile after another, each through all latent frames."""
        kept = self._decode_first_half(hidden)
        tiles = list(itertools.product(*self._grid(*kept[0].shape[3:])))
        scale = self._after.scale
        for tile in tiles:
            rows, columns = tile
            cache = FeatureCache(self._second)
            for index, frame in enumerate(kept):
                cells = frame[..., rows.low : rows.high, columns.low : columns.high]
                pixels = cache.run(self._device.copy_to_device(cells))[0]
                pixels = pixels[..., rows.crop(scale), columns.crop(scale)]
                is_last = tile == tiles[-1]
                yield Part(index, rows.pixels(scale), columns.pixels(scale), is_last, pixels)

    def _decode_first_half(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The first half's output for each latent frame, in the host's memory."""
        cache = FeatureCache(self._first)
        frames = hidden.split(1, dim=2)
        return [self._device.copy_to_host(cache.run(frame)) for frame in frames]

    def _grid(self, rows: int, columns: int) -> Grid:
        """As few tiles of so many cells as `tile_bytes` allows, and no more than make sense."""
        most = max(rows * columns // MIN_CELLS**2, 1)
        for count in range(1, most + 1):
            grid = min(self._grids(rows, columns, count), key=self._largest)
            if self._largest(grid) <= self.tile_bytes:
                break
        return grid

    def _grids(self, rows: int, columns: int, count: int) -> Iterator[Grid]:
        """The grids of `count` tiles."""
        for down in range(1, count + 1):
            if count % down == 0:
                yield self._spans(rows, down), self._spans(columns, count // down)

    def _spans(self, cells: int, count: int) -> list[Span]:
        edges, reach = [cells * index // count for index in range(count + 1)], self._after.reach
        return [
            Span(start, end, max(start - reach, 0), min(end + reach, cells))
            for start, end in itertools.pairwise(edges)
        ]

    def _largest(self, grid: Grid) -> int:
        """The bytes of a grid's largest tile."""
        height, width = (max(span.high - span.low for span in spans) for spans in grid)
        return height * width * (self._after.kept + self._after.working) * self._itemsize


def _doubles_frames(layer: Any) -> bool:
    return isinstance(layer, WanResample) and layer.mode == "upsample3d"
