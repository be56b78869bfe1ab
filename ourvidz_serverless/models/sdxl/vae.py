"""The decoders of SDXL's latents: its VAE, the same VAE in bf16, or a tiny VAE.

The last two are approximations, so only presets of `config.speed` use them.

SDXL's own VAE overflows in fp16, so it stays in fp32. bf16 has the range of fp32, which is what
fp16 lacks: a decode in bf16 takes half the memory and runs on a GPU's 16-bit units. The weights are
cast. torch.autocast would compute every norm, and all that lies between two convolutions, in fp32
on CUDA.

A tiny VAE is diffusers' AutoencoderTiny. The public one for SDXL is TAESDXL
(https://github.com/madebyollin/taesd), distilled from the VAE's decoder. It takes latents as the
UNet makes them (its scaling factor is 1), and it cannot overflow, since it has convolutions and no
norms. References are always encoded by the VAE itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderTiny

from ourvidz_serverless.models.loading import checkpoints, weight_files
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.sdxl import tiled_vae
from ourvidz_serverless.settings import Settings

POCKET = Path(__file__).parents[3] / "pocket" / "sdxl_tiny_vae"


#: A decode holds at most so many tensors of its largest layer: before a norm, after it, and after
#: the activation.
LARGE_TENSORS = 3


class Decoder(Protocol):
    """Decodes latents. `part` is the part of the model that it needs on the device.

    `lever` is its name in a job's report of `speed`, or None for the VAE as it is.
    """

    @property
    def part(self) -> str: ...

    @property
    def lever(self) -> str | None: ...

    def decode(self, latent: torch.Tensor, is_tiled: bool) -> torch.Tensor:
        """The image (3, 8 h, 8 w), of about -1 to 1, of a UNet's latent (1, 4, h, w).

        A tiled decode takes less of the device's memory. Its image is in the host's memory.
        """

    def whole_bytes(self, width: int, height: int) -> int:
        """About what a decode that is not tiled takes, beside the weights."""


def normalised(latent: torch.Tensor, config: Any) -> torch.Tensor:
    """A VAE's latent (1, channels, h, w), scaled as its UNet was trained.

    SDXL scales by a factor. Some checkpoints, such as Playground v2.5, also have a mean and a
    standard deviation for each channel.
    """
    mean, deviation = _statistics(latent, config)
    return (latent - mean) * config.scaling_factor / deviation


def denormalised(latent: torch.Tensor, config: Any) -> torch.Tensor:
    """A UNet's latent (1, channels, h, w), scaled for its VAE."""
    mean, deviation = _statistics(latent, config)
    return latent * deviation / config.scaling_factor + mean


def has_statistics(config: Any) -> bool:
    """Whether a VAE has both a mean and a deviation; diffusers ignores one without the other."""
    return None not in (config.get("latents_mean"), config.get("latents_std"))


def _statistics(like: torch.Tensor, config: Any) -> tuple[Any, Any]:
    if not has_statistics(config):
        return 0.0, 1.0
    mean, deviation = (
        torch.tensor(config[name], dtype=like.dtype, device=like.device)[:, None, None]
        for name in ("latents_mean", "latents_std")
    )
    return mean, deviation


@dataclass(frozen=True, slots=True)
class Vae:
    """The checkpoint's own VAE, which decodes in `dtype`."""

    vae: Any
    device: Device
    dtype: torch.dtype

    @property
    def part(self) -> str:
        return "vae"

    @property
    def lever(self) -> str | None:
        return None if self.dtype == self.vae.dtype else "vae_bf16"

    def decode(self, latent: torch.Tensor, is_tiled: bool) -> torch.Tensor:
        latent = denormalised(latent.to(self.vae.dtype), self.vae.config).to(self.dtype)
        modules = (self.vae.post_quant_conv, self.vae.decoder)
        with cast(modules, self.dtype) if self.lever else nullcontext():
            if is_tiled:
                return tiled_vae.decode(self.vae, latent, self.device)[0]
            return self.vae.decode(latent, return_dict=False)[0][0]

    def whole_bytes(self, width: int, height: int) -> int:
        channels = self.vae.decoder.up_blocks[-1].resnets[0].conv1.in_channels
        return LARGE_TENSORS * channels * width * height * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TinyVae:
    """The decoder of an AutoencoderTiny."""

    network: Any
    device: Device
    scaling_factor: float

    @property
    def part(self) -> str:
        return "tiny"

    @property
    def lever(self) -> str | None:
        return "tiny_vae"

    def decode(self, latent: torch.Tensor, is_tiled: bool) -> torch.Tensor:
        latent = latent.to(self.device.dtype) / self.scaling_factor
        if is_tiled:
            return tiled_vae.decode_tiny(self.network, latent, self.device)[0]
        return self.network(latent)[0]

    def whole_bytes(self, width: int, height: int) -> int:
        convolutions = (m for m in self.network.modules() if isinstance(m, torch.nn.Conv2d))
        channels = max(each.in_channels for each in convolutions)
        return LARGE_TENSORS * channels * width * height * self.device.dtype.itemsize


def in_bf16(vae: Any, device: Device) -> Vae:
    """A VAE that decodes in bf16 if that saves memory.

    It does if the VAE is in fp32, the other networks are in fp16, and the device computes in bf16.
    A VAE in 16 bits is as small already, and `DTYPE=float32` asks for fp32 everywhere.
    """
    is_wide = (vae.dtype, device.dtype) == (torch.float32, torch.float16)
    return Vae(vae, device, torch.bfloat16 if is_wide and device.has_bf16 else vae.dtype)


@contextmanager
def cast(modules: Sequence[Any], dtype: torch.dtype) -> Iterator[None]:
    """Modules with their weights in another dtype; they have their own weights again afterwards."""
    parts = [part for module in modules if module is not None for part in module.modules()]
    kept = [(part, dict(part._parameters)) for part in parts]
    try:
        for part, own in kept:
            part._parameters.update({name: _as(each, dtype) for name, each in own.items()})
        yield
    finally:
        for part, own in kept:
            part._parameters.update(own)


def _as(parameter: Any, dtype: torch.dtype) -> Any:
    if parameter is None or parameter.dtype == dtype:
        return parameter
    return torch.nn.Parameter(parameter.to(dtype), requires_grad=False)


def read_tiny(settings: Settings, device: Device, like: Any) -> TinyVae | None:
    """The tiny VAE of `SDXL_TINY_VAE`, or None if it is not set; `like` is the VAE it replaces.

    A folder has its own configuration. A file has TAESDXL's size, AutoencoderTiny's default.
    Raises ModelLoadError with one line when it is missing, corrupt, or another model's.
    """
    if settings.sdxl_tiny_vae is None:
        return None
    path = POCKET
    if settings.sdxl_tiny_vae != "pocket":
        path = checkpoints.find("SDXL_TINY_VAE", settings.sdxl_tiny_vae, settings.model_dirs)
    with checkpoints.loading("SDXL_TINY_VAE", path, "a tiny VAE"):
        is_mapped = checkpoints.is_mapped(path, settings.mmap_weights)
        if path.is_dir():
            weight_files.check_configs(path, ["."])
            config = AutoencoderTiny.load_config(path, local_files_only=True)
            names = weight_files.file_names("diffusion_pytorch_model", device.dtype)
            tensors = weight_files.read_first(path, names, is_mapped)
        else:
            config, tensors = {}, weight_files.read(path, is_mapped)
        return _tiny(config, tensors, device, like)


def _tiny(config: Any, tensors: weight_files.Tensors, device: Device, like: Any) -> TinyVae:
    kind = config.get("_class_name", AutoencoderTiny.__name__)
    if kind != AutoencoderTiny.__name__:
        raise ValueError(f"it is an {kind}, where AutoencoderTiny is wanted")
    # diffusers writes this field, and warns of it when it reads it.
    config = {name: each for name, each in config.items() if name != "block_out_channels"}
    with init_empty_weights():
        read = AutoencoderTiny.from_config(config).config
    _check_latents(read, like.config)
    decoder = weight_files.build(
        lambda: AutoencoderTiny.from_config(config).decoder,
        {name.removeprefix("decoder."): each for name, each in tensors.items()},
        device.dtype,
    )
    return TinyVae(decoder, device, read.scaling_factor)


def _check_latents(tiny: Any, like: Any) -> None:
    """Raise ValueError, with the reason, if a tiny VAE does not decode the latents of a VAE."""
    if has_statistics(like):
        raise ValueError(
            "SDXL_MODEL scales its latents by latents_mean and latents_std, which no tiny VAE knows"
        )
    doublings = len(tiny.num_decoder_blocks) - 1
    found = tiny.latent_channels, tiny.upsampling_scaling_factor**doublings
    wanted = like.latent_channels, 2 ** (len(like.block_out_channels) - 1)
    if found != wanted:
        raise ValueError(
            f"it is for latents of {found[0]} channels and 1/{found[1]} of a picture's size, "
            f"where SDXL_MODEL has {wanted[0]} and 1/{wanted[1]}"
        )
