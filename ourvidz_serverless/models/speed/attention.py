"""Which of torch's kernels computes the attention of SDXL's UNet and of WAN's networks.

`set_attention_backend` of diffusers does nothing to an SDXL UNet, whose processor calls torch by
itself (diffusers 0.42), and changes the whole process where it does something. Here each network is
told by itself, and a kernel that the device does not have is refused at the start.

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

#: Our names and diffusers'. `native` lets torch choose. None needs a package beside torch.
BACKENDS = {
    "native": AttentionBackendName.NATIVE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
    "math": AttentionBackendName._NATIVE_MATH,
}

#: What a kernel is tried on at the start: (batch, tokens, heads, head size), as SDXL has them.
TRIED_SHAPE = (1, 64, 2, 64)


@dataclass(frozen=True, slots=True)
class Heard:
    """Keys and values (rows, tokens, heads, head size) of the very prompt that `of` is."""

    of: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Dispatched:
    """`AttnProcessor2_0` for the transformer blocks of a UNet, whose kernel can be chosen.

    Those blocks have three dimensions, no mask, no norm and no residual of their own; `choose`
    leaves every other attention as it is.
    """

    def __init__(self, backend: AttentionBackendName) -> None:
        # By this name diffusers' own processors have it.
        self._attention_backend = backend
        self.remembers = False
        self.heard: Heard | None = None

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
            keys, values = self._of_prompt(attn, encoder_hidden_states)
        made = dispatch_attention_fn(
            attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)),
            keys,
            values,
            attn_mask=attention_mask,
            backend=self._attention_backend,
        )
        projection, dropout = attn.to_out
        return dropout(projection(made.flatten(2)))

    def _of_prompt(
        self, attn: Attention, prompt: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Compiled code would hold to what it was traced with.
        if torch.compiler.is_compiling() or not self.remembers:
            return _keys_and_values(attn, prompt)
        heard = self.heard
        if heard is None or heard.of is not prompt:
            # First, so that the last prompt's are gone when this one's are made.
            heard = self.heard = None
            heard = self.heard = Heard(prompt, *_keys_and_values(attn, prompt))
        return heard.keys, heard.values


def _keys_and_values(attn: Attention, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = (attn.heads, -1)
    return attn.to_k(seen).unflatten(-1, heads), attn.to_v(seen).unflatten(-1, heads)


@contextmanager
def prompts_remembered(unet: Any) -> Iterator[None]:
    """A UNet whose attentions compute a prompt's keys and values once, not at every step.

    The prompt is known by its tensor, which must not change meanwhile, nor the weights. Each
    attention remembers the last one alone, and nothing outlives the context.
    """
    processors = [each.processor for each in _with_processor(unet)]
    ours = [each for each in processors if isinstance(each, Dispatched)]
    try:
        for each in ours:
            each.remembers = True
        yield
    finally:
        for each in ours:
            each.remembers, each.heard = False, None


def choose(network: Any, name: str, device: Device) -> None:
    """Let a UNet or a transformer compute its attention by the kernel of that name.

    Raises ModelLoadError where this device has none.
    """
    check(name, device)
    backend = BACKENDS[name]
    for module in _with_processor(network):
        if type(module.processor) is AttnProcessor2_0 and _is_plain(module):
            module.set_processor(Dispatched(backend))
        if hasattr(module.processor, "_attention_backend"):
            module.processor._attention_backend = backend


def _with_processor(network: Any) -> Iterator[Any]:
    return (each for each in network.modules() if getattr(each, "processor", None) is not None)


def _is_plain(attention: Attention) -> bool:
    """Whether it is one of a transformer block, which does nothing but attend."""
    extras = (attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k)
    return (
        not any(extras)
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def check(name: str, device: Device) -> None:
    """Raise ModelLoadError where this device has no kernel of that name."""
    tried = torch.zeros(TRIED_SHAPE, device=device.name, dtype=device.dtype)
    try:
        dispatch_attention_fn(tried, tried, tried, backend=BACKENDS[name])
    except (RuntimeError, ValueError) as exc:
        raise ModelLoadError(
            f"ATTENTION_BACKEND: this device has no {name} for {device.dtype}"
        ) from exc
