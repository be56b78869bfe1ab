"""The attention kernel of SDXL's UNet and of WAN's networks, and a cache of a prompt's keys.

`set_attention_backend` of diffusers has no effect on an SDXL UNet, whose processor calls torch
directly (diffusers 0.42), and elsewhere it changes the whole process. Here the kernel is set for
each network, and a kernel that the device does not have ends the start.

A prompt's keys and values are the same at every step, so a job computes them once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.memory.device import Device

#: Our names and diffusers'. With `native` torch chooses. No kernel needs another package.
BACKENDS = {
    "native": AttentionBackendName.NATIVE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "math": AttentionBackendName._NATIVE_MATH,
}

#: The shape that a kernel is tried with: (batch, tokens, heads, head size), as in SDXL.
TRIED_SHAPE = (1, 64, 2, 64)


@dataclass(frozen=True, slots=True)
class PromptKeys:
    """Cross-attention keys and values (rows, tokens, heads, head size) of a prompt.

    They are valid while the prompt tensor `of` is unchanged.
    """

    of: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class DispatchedProcessor:
    """`AttnProcessor2_0` for the transformer blocks of a UNet, with a kernel that can be set.

    The attentions of those blocks have no mask, no norm and no residual of their own;
    `set_backend` leaves every other attention's processor as it is.
    """

    def __init__(self, backend: AttentionBackendName) -> None:
        # diffusers' own processors use this attribute name.
        self._attention_backend = backend
        self.is_caching = False
        self.cached: PromptKeys | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is None:
            keys, values = _keys_and_values(attn, hidden_states)
        else:
            keys, values = self._keys_of_prompt(attn, encoder_hidden_states)
        made = dispatch_attention_fn(
            attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)),
            keys,
            values,
            attn_mask=attention_mask,
            backend=self._attention_backend,
        )
        projection, dropout = attn.to_out
        return dropout(projection(made.flatten(2)))

    def _keys_of_prompt(
        self, attn: Attention, prompt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Compiled code would always use the keys that it was traced with.
        if torch.compiler.is_compiling() or not self.is_caching:
            return _keys_and_values(attn, prompt)
        cached = self.cached
        if cached is None or cached.of is not prompt:
            # First free the last prompt's keys, then make those of this prompt.
            cached = self.cached = None
            cached = self.cached = PromptKeys(prompt, *_keys_and_values(attn, prompt))
        return cached.keys, cached.values


def _keys_and_values(attn: Attention, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = (attn.heads, -1)
    return attn.to_k(source).unflatten(-1, heads), attn.to_v(source).unflatten(-1, heads)


@contextmanager
def cached_prompt_keys(unet: Any) -> Iterator[None]:
    """Let a UNet compute a prompt's keys and values once, not at every step.

    A prompt is identified by its tensor object. Neither the tensor nor the weights may change in
    the context. Each attention caches one prompt, and the cache ends with the context.
    """
    processors = [each.processor for each in _with_processor(unet)]
    ours = [each for each in processors if isinstance(each, DispatchedProcessor)]
    try:
        for each in ours:
            each.is_caching = True
        yield
    finally:
        for each in ours:
            each.is_caching, each.cached = False, None


def set_backend(network: Any, name: str, device: Device) -> None:
    """Set the attention kernel of a UNet or a transformer.

    Raises ModelLoadError if the device does not have it.
    """
    check(name, device)
    backend = BACKENDS[name]
    for module in _with_processor(network):
        if type(module.processor) is AttnProcessor2_0 and _is_plain(module):
            module.set_processor(DispatchedProcessor(backend))
        if hasattr(module.processor, "_attention_backend"):
            module.processor._attention_backend = backend


def _with_processor(network: Any) -> Iterator[Any]:
    return (each for each in network.modules() if getattr(each, "processor", None) is not None)


def _is_plain(attention: Attention) -> bool:
    """Whether it belongs to a transformer block: without a norm or residual of its own."""
    extras = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k)
    return (
        not any(extras)
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def check(name: str, device: Device) -> None:
    """Raise ModelLoadError if the device does not have the kernel."""
    tried = torch.zeros(TRIED_SHAPE, device=device.name, dtype=device.dtype)
    try:
        dispatch_attention_fn(tried, tried, tried, backend=BACKENDS[name])
    except (RuntimeError, ValueError) as exc:
        raise ModelLoadError(
            f"ATTENTION_BACKEND: this device has no {name} for {device.dtype}"
        ) from exc
