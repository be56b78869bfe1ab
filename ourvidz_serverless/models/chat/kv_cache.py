"""Keys and values of all running requests: one row a request, one pair of tensors a layer.

A row is as long as the longest conversation in the batch. So memory is rows x longest, not the sum
of lengths. In return a decoding batch is a plain slice of these tensors, read without a copy, and
the index of a token is its position: there is no padding on the left, and nothing moves when a
request is added. When a request leaves, the last row moves into its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ourvidz_serverless.models.memory.device import to_device_async

#: Lengths are rounded up to a multiple of this, so that the cache does not grow at each token.
BLOCK = 256

#: Keys and values (heads, tokens, dim) of each layer.
Prefix = list[tuple[torch.Tensor, torch.Tensor]]


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not less than the number."""
    return 1 << (number - 1).bit_length()


def rounded_shape(rows: int, length: int) -> tuple[int, int]:
    """The rows and tokens that a cache for `rows` requests of `length` tokens allocates."""
    return next_power_of_two(rows), -(-length // BLOCK) * BLOCK


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """The bytes of one token in the cache, in all layers."""
    heads, dim = _shape(config)
    return 2 * config.num_hidden_layers * heads * dim * dtype.itemsize


def attention_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """The bytes that attention needs beside the cache to read one token, in one layer.

    Several query heads share keys and values. With a mask, transformers repeats them for each head.
    """
    _, dim = _shape(config)
    return 2 * int(config.num_attention_heads) * dim * dtype.itemsize


def _shape(config: Any) -> tuple[int, int]:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, dim


class KVCache:
    """The cache of a batch. `reserve` before writing.

    Its tensors keep their addresses as long as `version` is the same.
    """

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._options = {"device": device, "dtype": dtype}
        self._shape = _shape(config)
        self._num_layers = config.num_hidden_layers
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Free the memory."""
        self.rows = self.length = 0
        self.version += 1
        self.layers = [(self._empty(0, 0), self._empty(0, 0)) for _ in range(self._num_layers)]

    def reserve(self, rows: int, length: int, spare_tokens: int = 0) -> None:
        """Allocate at least that many rows and tokens. What the cache holds stays.

        As long as rows x length is not more than `spare_tokens`, the length is a power of two and
        neither rows nor length shrink: the cache then moves seldom.
        """
        if rows <= self.rows and length <= self.length:
            return
        least = rounded_shape(rows, length)
        ample = max(least[0], self.rows), max(next_power_of_two(least[1]), self.length)
        self.rows, self.length = ample if ample[0] * ample[1] <= spare_tokens else least
        self.version += 1
        # One layer at a time, so that the old and the new cache are never both there.
        for index, (keys, values) in enumerate(self.layers):
            self.layers[index] = (self._resized(keys), self._resized(values))

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        for keys, values in self.layers:
            keys[target].copy_(keys[source])
            values[target].copy_(values[source])

    def read_prefix(self, row: int, length: int) -> Prefix:
        """A copy of the first `length` tokens of a row."""
        return [(k[row, :, :length].clone(), v[row, :, :length].clone()) for k, v in self.layers]

    def write_prefix(self, row: int, prefix: Prefix) -> None:
        """Write what `read_prefix` returned to the beginning of a row."""
        for (keys, values), (k, v) in zip(self.layers, prefix, strict=True):
            keys[row, :, : k.shape[1]].copy_(k)
            values[row, :, : v.shape[1]].copy_(v)

    def view(self, rows: Sequence[int], positions: Sequence[Sequence[int]]) -> CacheView:
        """The cache for one forward of some rows, at positions (rows, tokens)."""
        device = self.layers[0][0].device
        row_ids = to_device_async(rows, device)
        # A slice needs no copy; other rows are gathered.
        in_order = list(rows) == list(range(len(rows)))
        read_rows = slice(0, len(rows)) if in_order else row_ids
        length = max(map(max, positions)) + 1
        return CacheView(
            self.layers, row_ids, read_rows, to_device_async(positions, device), length
        )

    def view_of_first_rows(self, positions: torch.Tensor, length: int) -> CacheView:
        """The cache for one forward of the first rows, which reads `length` tokens of each.

        The host needs no number from the device, so a CUDA graph can capture the forward.
        """
        rows = torch.arange(len(positions), device=positions.device)
        return CacheView(self.layers, rows, slice(0, len(positions)), positions, length)

    def _empty(self, rows: int, length: int) -> torch.Tensor:
        heads, dim = self._shape
        return torch.zeros((rows, heads, length, dim), **self._options)

    def _resized(self, old: torch.Tensor) -> torch.Tensor:
        new = self._empty(self.rows, self.length)
        rows, length = min(self.rows, old.shape[0]), min(self.length, old.shape[2])
        new[:rows, :, :length] = old[:rows, :, :length]
        return new


class CacheView:
    """The `past_key_values` that transformers gets for one forward."""

    def __init__(
        self,
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        rows: torch.Tensor,
        read_rows: slice | torch.Tensor,
        positions: torch.Tensor,
        length: int,
    ) -> None:
        self._layers, self._rows, self._read_rows = layers, rows, read_rows
        self.positions, self.length = positions, length

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (rows, heads, tokens, dim) at the positions. Returns all tokens of the rows."""
        all_keys, all_values = self._layers[layer_idx]
        where = (self._rows[:, None], slice(None), self.positions)
        all_keys[where] = keys.transpose(1, 2)
        all_values[where] = values.transpose(1, 2)
        return (
            all_keys[self._read_rows, :, : self.length],
            all_values[self._read_rows, :, : self.length],
        )

    def mask(self) -> torch.Tensor:
        """The causal mask that is added to attention's scores, (rows, 1, tokens, length).

        Not as booleans: every layer would convert them again.
        """
        columns = torch.arange(self.length, device=self.positions.device)
        is_later = (columns > self.positions[..., None])[:, None]
        dtype = self._layers[0][0].dtype
        return torch.zeros_like(is_later, dtype=dtype).masked_fill_(is_later, -torch.inf)


class PrefixCache:
    """Keys and values of prefixes that many requests share.

    If they have more than `max_tokens` together, those that were not used longest are removed.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def find(self, ids: Sequence[int]) -> tuple[int, Prefix]:
        """The longest prefix of `ids` that is cached: its number of tokens, its keys and values."""
        matching = [key for key in self._prefixes if tuple(ids[: len(key)]) == key]
        if not matching:
            return 0, []
        key = max(matching, key=len)
        self._prefixes.move_to_end(key)
        return len(key), self._prefixes[key]

    def add(self, ids: Sequence[int], prefix: Prefix) -> None:
        self._prefixes[tuple(ids)] = prefix
        while sum(map(len, self._prefixes)) > self.max_tokens:
            self._prefixes.popitem(last=False)

    def clear(self) -> None:
        self._prefixes.clear()
