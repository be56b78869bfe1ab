"""WAN's text encoder: a prompt as UMT5's hidden states, 512 tokens long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.models.memory.movable_tensors import MovableParts
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.models.speed.embedding_cache import MAX_BYTES, EmbeddingCache

#: What WAN was trained with (its `text_len`). `encode_prompt` of diffusers defaults to 226, its
#: pipelines to 512.
MAX_TOKENS = 512


def block_by_block(model: Any, device: Device, read: Callable[[], Any]) -> MovableParts:
    """UMT5 for a device that has no room for all of it: one block at a time is on the device.

    In bf16 the largest part is the token embedding, 2 GiB of the encoder's 10.6. `read` reads the
    model from disk again.
    """
    blocks = encoder_blocks(model)
    parts = MovableParts(
        blocks, device, lambda: encoder_blocks(read()), stages=[[name] for name in blocks]
    )
    for name, modules in blocks.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, name=name: parts.to_device_only(name))
    return parts


def encoder_blocks(model: Any) -> dict[str, list[Any]]:
    """The modules of each part of UMT5's encoder, in the order in which they compute."""
    encoder = model.encoder
    return {
        "words": [encoder.embed_tokens, model.shared],
        **{f"block {index}": [block] for index, block in enumerate(encoder.block)},
        "norm": [encoder.final_layer_norm],
    }


class WanTextEncoder:
    """UMT5 with its tokenizer, shared by all of WAN's networks.

    Texts beyond 512 tokens are truncated, as WAN's own code does.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        device: Device,
        handle: ModelHandle,
        cache_bytes: int = MAX_BYTES,
    ) -> None:
        self.model, self.handle, self.cache = model, handle, EmbeddingCache(device, cache_bytes)
        self._tokenizer, self._device = tokenizer, device

    def encode(self, texts: Sequence[str], check: Check = lambda: None) -> list[torch.Tensor]:
        """Hidden states (1, 512, dim) of each text; those after its last token are zeros.

        The weights move to the device only if a text is not in the cache. Meanwhile `check` is
        called, and what it raises ends the wait.
        """
        texts = [prompt_clean(text) for text in texts]
        if all(text in self.cache for text in texts):
            return self._encode_or_recall(texts)
        with self.handle.using(check, "prompt") as lease:
            before = self._device.begin_stage()
            hidden = self._encode_or_recall(texts)
            lease.measured_bytes = self._device.stage_peak_bytes(before)
            return hidden

    def _encode_or_recall(self, texts: Sequence[str]) -> list[torch.Tensor]:
        with self._device.computing():
            return [self.cache.get(self._encode, text)[0] for text in texts]

    def _encode(self, text: str) -> tuple[torch.Tensor]:
        tokens = self._tokenizer(
            [text],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(self._device.name)
        hidden = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return (hidden * tokens.attention_mask[..., None].to(hidden.dtype),)
