"""How many tokens the caches of chat hold, so that what a worker claims of its device fits.

Keys and values of conversations and of kept prefixes are allocated as they are needed, up to these
numbers. They are claimed in the ledger from the start on, with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat.engine import Limits
from ourvidz_serverless.models.chat.kv_cache import (
    BLOCK,
    bytes_per_token,
    read_bytes_per_token,
    rounded,
)
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.settings import Settings

#: How much of what is free the cache may take. A forward needs the rest and, where other families
#: are served, their jobs.
CACHE_SHARE, SHARED_CACHE_SHARE = 0.8, 0.3

#: Copies of the widest layer's output, and of the logits, that live at the same time.
COPIES = 3

#: The share of the tokens, as one in so many, that prefixes may be where memory is short.
PREFIXES = 4


class Room:
    """The device's memory as tokens of these models, which are not registered yet.

    `models` are by the name of their setting. Raises ModelLoadError with one line where a model, or
    one conversation of `CHAT_CONTEXT` beside it, does not fit the device even alone. Where shorter
    ones will do, of `least_context` tokens or more, `context` is what fits.
    """

    def __init__(
        self,
        ledger: Ledger,
        device: Device,
        settings: Settings,
        models: Mapping[str, Any],
        least_context: int | None = None,
    ) -> None:
        self._ledger, self._settings = ledger, settings
        self._least_context = least_context
        self._sizes = [MovableTensors([each], device).num_bytes for each in models.values()]
        configs = [each.config for each in models.values()]
        self._token_bytes = max(
            bytes_per_token(each, device.dtype) + read_bytes_per_token(each, device.dtype)
            for each in configs
        )
        longest = max(each.max_position_embeddings for each in configs)
        #: Of the longest conversation, which has the cache for itself where it must.
        self.context = rounded(1, min(settings.chat_context, longest))[1]
        self._forward_bytes = max(_forward_bytes(each, device, self.context) for each in configs)
        for variable, size in zip(models, self._sizes, strict=True):
            self._check(variable, size)

    def limits(self) -> Limits:
        """For a worker that serves chat, from what is free beside as many models as fit."""
        kv_tokens = self._settings.chat_kv_tokens
        if kv_tokens is not None:
            return self.limits_with(kv_tokens, self._settings.chat_max_batch)
        most = self._settings.chat_prefix_tokens
        # One conversation and some prefixes, where other families have to leave for them.
        least = self.context + self.context // (PREFIXES - 1)
        tokens = min(max(self._free_tokens(), least), self._most_tokens)
        prefixes = min(most, tokens // PREFIXES, tokens - self.context)
        kv_tokens = tokens - prefixes
        if self._ledger.memory.is_host:
            kv_tokens = min(kv_tokens, max(Limits().kv_tokens, self.context))
        return Limits(self._settings.chat_max_batch, kv_tokens, prefix_tokens=prefixes)

    def limits_with(self, kv_tokens: int, max_batch: int) -> Limits:
        """For a cache of so many tokens; prefixes get what is left."""
        kv_tokens = max(kv_tokens, self.context)
        if kv_tokens > self._most_tokens:
            raise ModelLoadError(
                f"CHAT_KV_TOKENS: {kv_tokens} tokens do not fit beside the model, "
                f"{self._most_tokens} do"
            )
        prefixes = min(self._settings.chat_prefix_tokens, self._most_tokens - kv_tokens)
        return Limits(max_batch, kv_tokens, prefix_tokens=prefixes)

    @property
    def _most_tokens(self) -> int:
        """Of one model, the largest, that has the device for itself."""
        return self._tokens(self._ledger.max_model_bytes - max(self._sizes))

    def _free_tokens(self) -> int:
        """Of each model that is on the device."""
        free, places = self._ledger.free_bytes(), 0
        if self._ledger.memory.is_host:
            # Weights that were read have taken their memory already, mapped ones have not.
            free = min(free, self._ledger.memory.total_bytes - sum(self._sizes))
            return self._tokens(free / len(self._sizes))
        for size in self._sizes:
            if size < free:
                free, places = free - size, places + 1
        share = CACHE_SHARE if self._settings.families == ("chat",) else SHARED_CACHE_SHARE
        return self._tokens(free / max(places, 1), share)

    def _tokens(self, free_bytes: float, share: float = CACHE_SHARE) -> int:
        """That the caches may hold of so many bytes beside the weights."""
        return max(int(share * (free_bytes - self._forward_bytes) // self._token_bytes), 0)

    def _check(self, variable: str, size: int) -> None:
        has = self._ledger.max_model_bytes
        if size >= has:
            raise ModelLoadError(
                f"{variable}: its weights take {size >> 20} MiB, and the device has {has >> 20}"
            )
        tokens = self._tokens(has - size)
        if self._least_context is not None and self._least_context <= tokens < self.context:
            self.context = tokens // BLOCK * BLOCK
        if tokens < self.context:
            raise ModelLoadError(
                f"CHAT_CONTEXT: a conversation of {self.context} tokens does not fit beside "
                f"{variable}, {tokens} tokens do"
            )


def _forward_bytes(config: Any, device: Device, length: int) -> int:
    """What a forward over one piece of a prompt takes at the end of a text of that length."""
    tokens, itemsize = Limits().prefill_tokens, device.dtype.itemsize
    # The mask, once as numbers and once as truth values.
    mask = tokens * length * (itemsize + 1)
    widest = tokens * (config.intermediate_size + 2 * config.hidden_size) * itemsize
    logits = config.vocab_size * torch.float32.itemsize
    return int(mask + COPIES * (widest + logits))
