"""How many tokens chat's caches may hold, so that a worker fits its device.

Keys and values of conversations and of shared prefixes are allocated when they are needed, up to
these numbers. The ledger counts them from the start, together with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.chat.attention import gathered_bytes_per_token
from ourvidz_serverless.models.chat.engine import EngineLimits
from ourvidz_serverless.models.chat.kv_cache import BLOCK, bytes_per_token, rounded
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.settings import Settings

#: The share of the free memory that the caches may take. The rest is for forwards and, if the
#: worker serves other families too, for their jobs.
CACHE_SHARE, SHARED_CACHE_SHARE = 0.8, 0.3

#: Copies of the widest layer's output, and of the logits, that exist at the same time.
COPIES = 3

#: Where memory is short, prefixes get one token in so many.
PREFIX_PART = 4


class CacheBudget:
    """The memory of a device as a number of cached tokens.

    `networks`, by the name of their setting, are not in the ledger yet. Raises ModelLoadError with
    one line if a network does not fit the device even alone, together with one conversation of
    `CHAT_CONTEXT` tokens. With `least_context` a shorter conversation is enough, of at least that
    many tokens.
    """

    def __init__(
        self,
        ledger: Ledger,
        device: Device,
        settings: Settings,
        networks: Mapping[str, Any],
        least_context: int | None = None,
    ) -> None:
        self._ledger, self._settings = ledger, settings
        self._least_context = least_context
        self._sizes = [MovableTensors([each], device).num_bytes for each in networks.values()]
        configs = [each.config for each in networks.values()]
        self._token_bytes = max(
            bytes_per_token(each, device.dtype) + gathered_bytes_per_token(each, device)
            for each in configs
        )
        longest = max(each.max_position_embeddings for each in configs)
        #: The tokens of the longest conversation, which runs alone if it must.
        self.context = rounded(min(settings.chat_context, longest))
        self._forward_bytes = max(_forward_bytes(each, device, self.context) for each in configs)
        for variable, size in zip(networks, self._sizes, strict=True):
            self._check(variable, size)

    def limits(self) -> EngineLimits:
        """The limits of each engine of a chat worker, from the memory that the models leave."""
        kv_tokens = self._settings.chat_kv_tokens
        if kv_tokens is not None:
            return self.limits_for(kv_tokens, self._settings.chat_max_batch)
        most_prefixes = self._settings.chat_prefix_tokens
        # At least one conversation and some prefixes, even if other families must leave for them.
        least = self.context + self.context // (PREFIX_PART - 1)
        tokens = min(max(self._free_tokens(), least), self._most_tokens)
        prefixes = min(most_prefixes, tokens // PREFIX_PART, tokens - self.context)
        kv_tokens = tokens - prefixes
        if self._ledger.memory.is_host:
            kv_tokens = min(kv_tokens, max(EngineLimits().kv_tokens, self.context))
        return EngineLimits(self._settings.chat_max_batch, kv_tokens, prefix_tokens=prefixes)

    def limits_for(self, kv_tokens: int, max_batch: int) -> EngineLimits:
        """The limits of an engine whose cache has that many tokens. Prefixes get the rest."""
        kv_tokens = max(kv_tokens, self.context)
        if kv_tokens > self._most_tokens:
            raise ModelLoadError(
                f"CHAT_KV_TOKENS: {kv_tokens} tokens do not fit beside the model, "
                f"{self._most_tokens} do"
            )
        prefixes = min(self._settings.chat_prefix_tokens, self._most_tokens - kv_tokens)
        return EngineLimits(max_batch, kv_tokens, prefix_tokens=prefixes)

    @property
    def _most_tokens(self) -> int:
        """The tokens that fit beside the largest network, if it has the device for itself."""
        return self._tokens(self._ledger.max_model_bytes - max(self._sizes))

    def _free_tokens(self) -> int:
        """The tokens for each network that fits the device now, beside the others."""
        free, num_placed = self._ledger.free_bytes(), 0
        if self._ledger.memory.is_host:
            # Weights that were read have taken their memory already, mapped ones have not.
            free = min(free, self._ledger.memory.total_bytes - sum(self._sizes))
            return self._tokens(free / len(self._sizes))
        for size in self._sizes:
            if size < free:
                free, num_placed = free - size, num_placed + 1
        share = CACHE_SHARE if self._settings.families == ("chat",) else SHARED_CACHE_SHARE
        return self._tokens(free / max(num_placed, 1), share)

    def _tokens(self, free_bytes: float, share: float = CACHE_SHARE) -> int:
        """The tokens that the caches may hold in that many bytes beside the weights."""
        return max(int(share * (free_bytes - self._forward_bytes) // self._token_bytes), 0)

    def _check(self, variable: str, size: int) -> None:
        device_bytes = self._ledger.max_model_bytes
        if size >= device_bytes:
            raise ModelLoadError(
                f"{variable}: its weights take {size >> 20} MiB, "
                f"and the device has {device_bytes >> 20}"
            )
        tokens = self._tokens(device_bytes - size)
        if self._least_context is not None and self._least_context <= tokens < self.context:
            self.context = tokens // BLOCK * BLOCK
        if tokens < self.context:
            raise ModelLoadError(
                f"CHAT_CONTEXT: a conversation of {self.context} tokens does not fit beside "
                f"{variable}, {tokens} tokens do"
            )


def _forward_bytes(config: Any, device: Device, length: int) -> int:
    """The bytes of a forward over one chunk of a prompt, at the end of a text of that length."""
    tokens, itemsize = EngineLimits().prefill_tokens, device.dtype.itemsize
    # The mask, once as numbers and once as booleans.
    mask = tokens * length * (itemsize + 1)
    widest = tokens * (config.intermediate_size + 2 * config.hidden_size) * itemsize
    logits = config.vocab_size * torch.float32.itemsize
    return int(mask + COPIES * (widest + logits))
