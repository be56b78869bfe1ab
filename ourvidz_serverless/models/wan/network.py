"""WAN's denoising networks: one forward of each, and weights that two of them share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanVACETransformer3DModel
from PIL import Image

from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.models.speed.regional_compile import CompiledBlocks
from ourvidz_serverless.models.wan.conditioning import Conditioning

#: For what a count of tensors does not see: fragments, and the libraries' workspaces.
MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """The CLIP encoder through which a 14B image-to-video network reads images."""

    processor: Any
    model: Any

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image], device: torch.device) -> torch.Tensor:
        """Hidden states of the layer before the last: (images, patches, dim)."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(
            device, self.model.dtype
        )
        return self.model(**inputs, output_hidden_states=True).hidden_states[-2]


@dataclass(frozen=True, slots=True)
class WanNetwork:
    """A denoising network, and the ledger's handle by which it moves to the device.

    Two networks that share weights have one handle. `image_encoder` moves with the transformer.
    """

    transformer: Any
    handle: ModelHandle
    image_encoder: ImageEncoder | None = None
    compiled_blocks: CompiledBlocks | None = None

    @property
    def is_vace(self) -> bool:
        return isinstance(self.transformer, WanVACETransformer3DModel)

    def expected_bytes(self, latent_shape: Sequence[int]) -> int:
        """What a forward takes beside the weights, before one was measured.

        `python -m benchmarks.dry_run` counted it: at each token two tensors of the feed-forward's
        width and five of the network's own, and one more for each of VACE's layers.
        """
        config = self.transformer.config
        frames, height, width = latent_shape[2:]
        _, rows, columns = config.patch_size
        tokens = frames * (height // rows) * (width // columns)
        own = config.num_attention_heads * config.attention_head_dim
        layers = len(config.vace_layers) if self.is_vace else 0
        per_token = 2 * config.ffn_dim + (5 + layers) * own
        return int(MARGIN * tokens * per_token * self.transformer.dtype.itemsize)

    def compiled(self) -> AbstractContextManager[None]:
        """A context in which blocks that are already compiled are used."""
        return self.compiled_blocks.job() if self.compiled_blocks else nullcontext()

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt: torch.Tensor,
        conditioning: Conditioning,
    ) -> torch.Tensor:
        """One forward: the flow (1, channels, frames, h, w) that is predicted for the latents."""
        if conditioning.concat_latents is not None:
            latents = torch.cat([latents, conditioning.concat_latents], dim=1)
        predicted: torch.Tensor = self.transformer(
            hidden_states=latents.to(self.transformer.dtype),
            timestep=timestep.expand(1),
            encoder_hidden_states=prompt.to(self.transformer.dtype),
            **conditioning.extra_kwargs,
            return_dict=False,
        )[0]
        return predicted


def share_equal_tensors(base: Any, other: Any) -> tuple[int, int]:
    """Replace the parameters of `other` that equal those of `base`, bit for bit, by these.

    Returns how many are shared now, and how many have a name that both know.
    """
    theirs = dict(base.named_parameters())
    mine = {name: each for name, each in other.named_parameters() if name in theirs}
    equal = [name for name, each in mine.items() if _same_bits(each, theirs[name])]
    for name in equal:
        module, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(module), leaf, theirs[name])
    return len(equal), len(mine)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # Equal numbers are not enough: -0.0 equals 0.0.
    return torch.equal(one.detach().view(torch.uint8), other.detach().view(torch.uint8))
