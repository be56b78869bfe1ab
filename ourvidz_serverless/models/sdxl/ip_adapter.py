"""IP-Adapter (arXiv:2308.06721): a reference's style, composition or character, not its pixels.

The blocks of the UNet in which the adapter acts decide which of them is kept. InstantStyle
(arXiv:2404.02733) found that in SDXL one block draws the style (up 0, attention 1) and one the
layout (the last attention of down 2), and that all blocks together draw the subject.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)

from ourvidz_serverless.models.sdxl.request import IpAdapterImage, Keeps

#: The projections that read the image's embedding, and those that read its patches' hidden states.
READS_EMBEDDING = (ImageProjection,)
READS_PATCHES = (IPAdapterPlusImageProjection, IPAdapterFullImageProjection)

STYLE_BLOCK = "up_blocks.0.attentions.1."
LAYOUT_STAGE = "down_blocks.2.attentions."


class IpAdapter:
    """An IP-Adapter in a pipeline's UNet. It acts only for requests that bring an image for it."""

    def __init__(self, pipe: Any, path: Path) -> None:
        """Load `path` (.safetensors), with its CLIP image encoder in `image_encoder/` beside it."""
        pipe.load_ip_adapter(
            str(path.parent),
            subfolder="",
            weight_name=path.name,
            image_encoder_folder="image_encoder",
            local_files_only=True,
        )
        self._pipe = pipe
        self._empty_shape = _empty_shape(pipe)
        self._processors = {
            name: processor
            for name, processor in pipe.unet.attn_processors.items()
            if hasattr(processor, "to_k_ip")
        }
        self._set_scale(None)

    def encode(self, reference: IpAdapterImage | None, is_guided: bool) -> torch.Tensor:
        """The image embeddings for the UNet, those of an empty image first if guided.

        The shape is (1 or 2, 1, dim), or (1 or 2, 1, patches, dim) for an IP-Adapter Plus. From
        now on the adapter acts in the UNet as the reference says; without one it does not act.
        """
        self._set_scale(reference)
        if reference is None:
            rows, unet = 2 if is_guided else 1, self._pipe.unet
            return torch.zeros(rows, *self._empty_shape, device=unet.device, dtype=unet.dtype)
        with torch.inference_mode():
            (embeds,) = self._pipe.prepare_ip_adapter_image_embeds(
                [reference.image], None, self._pipe.device, 1, is_guided
            )
        return embeds

    def _set_scale(self, reference: IpAdapterImage | None) -> None:
        """Set the adapter's scale in each of the UNet's attentions.

        At 0 diffusers leaves the adapter's attention out, so a job without a reference is
        computed as if there were no adapter.
        """
        for name, processor in self._processors.items():
            acts = reference and name.startswith(self._blocks(reference.keeps))
            processor.scale = [reference.scale if reference and acts else 0.0]

    def _blocks(self, keeps: Keeps) -> str:
        """How the names begin of the attentions that keep this of a reference."""
        if keeps == "style":
            return STYLE_BLOCK
        if keeps == "composition":
            stage = [name for name in self._processors if name.startswith(LAYOUT_STAGE)]
            last = max(int(name.removeprefix(LAYOUT_STAGE).split(".")[0]) for name in stage)
            return f"{LAYOUT_STAGE}{last}."
        return ""


def _empty_shape(pipe: Any) -> tuple[int, ...]:
    """The shape of the image embeddings of one row of the UNet, for a job without an image.

    Raises ValueError, with the reason, if the adapter reads another input, as FaceID does, or was
    trained with another image encoder.
    """
    (projection,) = pipe.unet.encoder_hid_proj.image_projection_layers
    encoder = pipe.image_encoder.config
    shape: tuple[int, ...]
    if isinstance(projection, READS_EMBEDDING):
        width, shape = encoder.projection_dim, (1, encoder.projection_dim)
    elif isinstance(projection, READS_PATCHES):
        patches = (encoder.image_size // encoder.patch_size) ** 2 + 1
        width, shape = encoder.hidden_size, (1, patches, encoder.hidden_size)
    else:
        raise ValueError(f"{type(projection).__name__} does not read an image encoder's output")
    linear = next(each for each in projection.modules() if isinstance(each, torch.nn.Linear))
    if linear.in_features != width:
        raise ValueError(
            f"it reads {linear.in_features} numbers, and image_encoder has {width}: "
            "it was trained with another encoder"
        )
    return shape
