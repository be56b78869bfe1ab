"""Embeddings of texts that were read before, so that they need not be read again.

Most jobs of an application bring the same negative prompt, and many a prompt comes more than once.
What is kept lies in the host's memory, as the very bits that the encoder gave; the way to the
device is a fraction of a millisecond.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from ourvidz_serverless.models.memory.device import Device

#: The most bytes that one model's embeddings take of the host: WAN's are 4 MiB each in bf16,
#: SDXL's a third of one.
KEPT_BYTES = 128 << 20

#: The key of an embedding: a text, and how it is read.
Key = TypeVar("Key", bound=Hashable)

#: What an encoder gives for one text.
Row = tuple[torch.Tensor, ...]


class Kept:
    """The embeddings that were asked for last, within so many bytes; `hits` and `reads` count."""

    def __init__(self, device: Device, max_bytes: int = KEPT_BYTES) -> None:
        self._device, self._max_bytes = device, max_bytes
        self._rows: OrderedDict[Hashable, Row] = OrderedDict()
        self.num_bytes = self.hits = self.reads = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, read: Callable[[Key], Row], key: Key) -> Row:
        """The embedding for a key, on the device: from the cache, or made from the key by `read`.

        `read` gets only the key, so everything that changes an embedding must be part of its key.
        """
        found = self._rows.get(key)
        if found is not None:
            self.hits += 1
            self._rows.move_to_end(key)
            return tuple(self._device.brought(each) for each in found)
        made = read(key)
        self.reads += 1
        self._keep(key, tuple(self._device.parked(each.clone()) for each in made))
        return made

    def clear(self) -> None:
        self._rows.clear()
        self.num_bytes = 0

    def _keep(self, key: Hashable, row: Row) -> None:
        self._rows[key] = row
        self.num_bytes += _size(row)
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= _size(self._rows.popitem(last=False)[1])


def _size(row: Row) -> int:
    return sum(each.nbytes for each in row)
