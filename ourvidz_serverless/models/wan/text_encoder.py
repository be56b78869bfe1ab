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


def in_blocks(model: Any, device: Device, read: Callable[[], Any]) -> MovableParts:
    """UMT5 for a device that has no room for it: each block comes when its turn comes, and goes.

    In bf16 that is at most the words' table, 2 GiB of the encoder's 10.6. `read` reads it anew.
    """
    blocks = _blocks(model)
    parts = MovableParts(
        blocks, device, lambda: _blocks(read()), stages=[[name] for name in blocks]
    )
    for name, modules in blocks.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, name=name: parts.to_device_only(name))
    return parts


def _blocks(model: Any) -> dict[str, list[Any]]:
    """Its modules in the order of their turns."""
    encoder = model.encoder
    return {
        "words": [encoder.embed_tokens, model.shared],
        **{f"block {index}": [block] for index, block in enumerate(encoder.block)},
        "norm": [encoder.final_layer_norm],
    }


class TextEncoder:
    """UMT5 with its tokenizer. Texts beyond 512 tokens are cut there, as WAN's own code does."""

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        device: Device,
        handle: ModelHandle,
        kept_bytes: int = MAX_BYTES,
    ) -> None:
        self._tokenizer, self._model, self._device = tokenizer, model, device
        self.handle, self._kept = handle, EmbeddingCache(device, kept_bytes)

    def encode(self, texts: Sequence[str], check: Check = lambda: None) -> list[torch.Tensor]:
        """Hidden states (1, 512, dim) of each; those behind a text's last token are zeros.

        The weights come to the device only for a text that is new; `check` is heard while they
        are waited for.
        """
        texts = [prompt_clean(text) for text in texts]
        if all(text in self._kept for text in texts):
            return self._read_or_kept(texts)
        with self.handle.using(check, "prompt") as lease:
            before = self._device.begin_stage()
            found = self._read_or_kept(texts)
            lease.measured_bytes = self._device.stage_peak_bytes(before)
            return found

    def _read_or_kept(self, texts: Sequence[str]) -> list[torch.Tensor]:
        with self._device.computing():
            return [self._kept.get(self._read, text)[0] for text in texts]

    def _read(self, text: str) -> tuple[torch.Tensor]:
        row = self._tokenizer(
            [text],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(self._device.name)
        hidden = self._model(row.input_ids, row.attention_mask).last_hidden_state
        return (hidden * row.attention_mask[..., None].to(hidden.dtype),)
