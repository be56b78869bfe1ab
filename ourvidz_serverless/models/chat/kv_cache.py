"""Keys and values of all running requests: one row a request, one pair of tensors a layer.

A row is as long as the longest conversation in the batch, so memory is rows x longest, not the
sum of lengths; in return a decoding batch is a plain slice of these tensors, read where it lies,
and a token's place is its position: nothing is padded on the left, nothing moves when requests
join. When one leaves, the last row takes its place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ourvidz_serverless.models.memory.device import to_device_async

#: Lengths are rounded up to this, so that a batch does not grow token by token.
BLOCK = 256

#: Keys and values (heads, tokens, dim) of each layer.
Prefix = list[tuple[torch.Tensor, torch.Tensor]]


def next_power(number: int) -> int:
    """The power of two that is no less."""
    return 1 << (number - 1).bit_length()


def rounded(rows: int, length: int) -> tuple[int, int]:
    """The rows and tokens that a cache for `rows` requests of `length` tokens really has."""
    return next_power(rows), -(-length // BLOCK) * BLOCK


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """What one token of a conversation takes in the cache, in all layers."""
    heads, dim = _shape(config)
    return 2 * config.num_hidden_layers * heads * dim * dtype.itemsize


def read_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """What attention takes beside the cache to read a token in one layer after the other.

    Heads of queries share keys and values, and with a mask transformers repeats them for each head.
    """
    _, dim = _shape(config)
    return 2 * int(config.num_attention_heads) * dim * dtype.itemsize


def _shape(config: Any) -> tuple[int, int]:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, dim


class KVCache:
    """The rows; `reserve` before writing. Another `version` lies at other addresses."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._options = {"device": device, "dtype": dtype}
        self._shape = _shape(config)
        self._num_layers = config.num_hidden_layers
        self.version = 0
        self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.rows = self.length = 0
        self.version += 1
        self.layers = [(self._empty(0, 0), self._empty(0, 0)) for _ in range(self._num_layers)]

    def reserve(self, rows: int, length: int, cells: int = 0) -> None:
        """Have room for that many rows and tokens; what is there stays.

        Up to so many `cells` of rows x length there is more, so that it moves seldom: the length is
        a power of two as well, and neither shrinks.
        """
        if rows <= self.rows and length <= self.length:
            return
        least = rounded(rows, length)
        ample = max(least[0], self.rows), max(next_power(least[1]), self.length)
        self.rows, self.length = ample if ample[0] * ample[1] <= cells else least
        self.version += 1
        # Layer by layer, so that old and new do not stand beside one another whole.
        for index, (keys, values) in enumerate(self.layers):
            self.layers[index] = (self._resized(keys), self._resized(values))

    def move(self, source: int, target: int) -> None:
        """Put row `source` in the place of row `target`."""
        for keys, values in self.layers:
            keys[target].copy_(keys[source])
            values[target].copy_(values[source])

    def read(self, row: int, length: int) -> Prefix:
        """A copy of a row's first `length` tokens."""
        return [(k[row, :, :length].clone(), v[row, :, :length].clone()) for k, v in self.layers]

    def write(self, row: int, prefix: Prefix) -> None:
        """Begin a row with what `read` gave."""
        for (keys, values), (k, v) in zip(self.layers, prefix, strict=True):
            keys[row, :, : k.shape[1]].copy_(k)
            values[row, :, : v.shape[1]].copy_(v)

    def view(self, rows: Sequence[int], places: Sequence[Sequence[int]]) -> View:
        """What one forward of these rows writes to and reads; places are (rows, tokens)."""
        device = self.layers[0][0].device
        there = to_device_async(rows, device)
        # A slice is read in place; rows that do not lie side by side are gathered.
        in_order = list(rows) == list(range(len(rows)))
        taken = slice(0, len(rows)) if in_order else there
        return View(
            self.layers, there, taken, to_device_async(places, device), max(map(max, places)) + 1
        )

    def first_rows(self, places: torch.Tensor, length: int) -> View:
        """The same of the first rows, of which all `length` tokens are read.

        It asks the host for no number, so it can be recorded.
        """
        rows = torch.arange(len(places), device=places.device)
        return View(self.layers, rows, slice(0, len(places)), places, length)

    def _empty(self, rows: int, length: int) -> torch.Tensor:
        heads, dim = self._shape
        return torch.zeros((rows, heads, length, dim), **self._options)

    def _resized(self, old: torch.Tensor) -> torch.Tensor:
        new = self._empty(self.rows, self.length)
        rows, length = min(self.rows, old.shape[0]), min(self.length, old.shape[2])
        new[:rows, :, :length] = old[:rows, :, :length]
        return new


class View:
    """Stands where transformers expects its own cache, for one forward."""

    def __init__(
        self,
        layers: list[tuple[torch.Tensor, torch.Tensor]],
        rows: torch.Tensor,
        taken: slice | torch.Tensor,
        positions: torch.Tensor,
        length: int,
    ) -> None:
        self._layers, self._rows, self._taken = layers, rows, taken
        self.positions, self.length = positions, length

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (rows, heads, tokens, dim) at their positions; all that a row has so far."""
        all_keys, all_values = self._layers[layer_idx]
        where = (self._rows[:, None], slice(None), self.positions)
        all_keys[where] = keys.transpose(1, 2)
        all_values[where] = values.transpose(1, 2)
        return (
            all_keys[self._taken, :, : self.length],
            all_values[self._taken, :, : self.length],
        )

    def mask(self) -> torch.Tensor:
        """What is added to attention's scores, (rows, 1, tokens, length): each token may look at
        itself and those before. As truth values every layer would convert it anew.
        """
        every = torch.arange(self.length, device=self.positions.device)
        after = (every > self.positions[..., None])[:, None]
        dtype = self._layers[0][0].dtype
        return torch.zeros_like(after, dtype=dtype).masked_fill_(after, -torch.inf)


class PrefixStore:
    """Prefixes that many requests begin with, the longest unused one leaves first."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def find(self, ids: Sequence[int]) -> tuple[int, Prefix]:
        """The longest kept beginning of `ids`: how many tokens it has, and what they left."""
        matching = [key for key in self._kept if tuple(ids[: len(key)]) == key]
        if not matching:
            return 0, []
        key = max(matching, key=len)
        self._kept.move_to_end(key)
        return len(key), self._kept[key]

    def keep(self, ids: Sequence[int], prefix: Prefix) -> None:
        """Remember a prefix, and forget others until all fit."""
        self._kept[tuple(ids)] = prefix
        while sum(map(len, self._kept)) > self.max_tokens:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()
