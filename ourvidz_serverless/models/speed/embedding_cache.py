"""A cache of text embeddings, so that a text that comes again is not encoded again.

Most jobs of an application have the same negative prompt, and many prompts come more than once.
The cache is in the host's memory and holds the exact bits that the encoder gave. The copy to the
device takes a fraction of a millisecond.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from ourvidz_serverless.models.memory.device import Device

#: Host memory for the cache of one model. An embedding of WAN takes 4 MiB in bf16, one of SDXL a
#: third of a MiB.
MAX_BYTES = 128 << 20

#: The key of an embedding: a text, and how it is encoded.
Key = TypeVar("Key", bound=Hashable)

#: What an encoder gives for one text.
Embedding = tuple[torch.Tensor, ...]


class EmbeddingCache:
    """The most recently used embeddings, at most `max_bytes`. `hits` and `misses` are counts."""

    def __init__(self, device: Device, max_bytes: int = MAX_BYTES) -> None:
        self._device, self._max_bytes = device, max_bytes
        self._embeddings: OrderedDict[Hashable, Embedding] = OrderedDict()
        self.num_bytes = self.hits = self.misses = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._embeddings

    def get(self, encode: Callable[[Key], Embedding], key: Key) -> Embedding:
        """The embedding for a key, on the device: from the cache, or made from the key by `encode`.

        `encode` gets only the key, so everything that changes an embedding must be part of its key.
        """
        found = self._embeddings.get(key)
        if found is not None:
            self.hits += 1
            self._embeddings.move_to_end(key)
            return tuple(self._device.copy_to_device(each) for each in found)
        made = encode(key)
        self.misses += 1
        self._store(key, tuple(self._device.copy_to_host(each.clone()) for each in made))
        return made

    def clear(self) -> None:
        self._embeddings.clear()
        self.num_bytes = 0

    def _store(self, key: Hashable, embedding: Embedding) -> None:
        self._embeddings[key] = embedding
        self.num_bytes += _num_bytes(embedding)
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= _num_bytes(self._embeddings.popitem(last=False)[1])


def _num_bytes(embedding: Embedding) -> int:
    return sum(each.nbytes for each in embedding)
