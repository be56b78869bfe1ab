"""SDXL's networks from a diffusers folder or a single file, in the host's memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ourvidz_serverless.models.chat.cuda_graphs import Capture, CudaGraphs
from ourvidz_serverless.models.loading import checkpoints, fetch, names, weight_files
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableParts
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, SdxlMemoryPlan
from ourvidz_serverless.models.schedulers import try_one_step
from ourvidz_serverless.models.sdxl import single_file, vae
from ourvidz_serverless.models.sdxl.ip_adapter import IpAdapter
from ourvidz_serverless.models.sdxl.loras import LoraStore
from ourvidz_serverless.models.sdxl.networks import SdxlNetworks, check_networks
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.resnets import move_fewer_bytes
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.regional_compile import check_cache_dir, compile_blocks
from ourvidz_serverless.settings import Settings

POCKET = Path(__file__).parents[3] / "pocket" / "sdxl.safetensors"

#: Each network's class, and the name of its weights in a folder.
CLASSES = {
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
}

#: The networks that `LOW_VRAM` has on the device at the same time.
STAGES = (("text",), ("image", "unet"), ("vae",), ("tiny",))


def load(settings: Settings, ledger: Ledger | None = None) -> SdxlModel:
    """SDXL from `SDXL_MODEL`: `pocket`, or the name of a diffusers folder or a single file.

    Raises ModelLoadError with one line when the weights are missing, corrupt or of another kind.
    """
    ledger = ledger or open_ledger(settings)
    device = Device.choose(settings, on_gpu=torch.float16, memory=ledger.memory)
    networks = read_networks(settings, device)
    for network in (networks.unet, networks.vae):
        move_fewer_bytes(network)
    attention.set_backend(networks.unet, settings.attention_backend, device)
    stages = STAGES if settings.low_vram else ()
    read = functools.partial(_read_parts, settings, device)
    parts = MovableParts(networks.parts(), device, read, stages)
    # The specification calls SDXL "always loaded": its weights are the last to leave the device.
    source = names.short(settings.sdxl_model)
    handle = ledger.register(parts, "sdxl", "sdxl", source=source, is_pinned=True)
    ledger.preload(parts)
    return SdxlModel(
        networks,
        device,
        loras=LoraStore.of(settings),
        handle=handle,
        plans=low_vram_plans()
        if settings.low_vram
        else MemoryPlans(SdxlMemoryPlan(settings.sdxl_max_batch)),
        compiled_blocks=compile_blocks(networks.unet, handle, device, settings),
        capture=_capture(settings, device),
    )


def _capture(settings: Settings, device: Device) -> Capture | None:
    """The capture that `SDXL_GRAPHS` asks for; None for none. Compiled blocks have no graphs."""
    is_asked = settings.sdxl_graphs == "auto" and settings.compile == "off"
    return CudaGraphs(device.name) if is_asked and device.is_cuda else None


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError if the device does not support SDXL's settings."""
    device = Device.choose(settings, on_gpu=torch.float16, memory=ledger.memory)
    attention.check(settings.attention_backend, device)
    check_cache_dir(settings)


def low_vram_plans() -> MemoryPlans[SdxlMemoryPlan]:
    """The plan with the smallest memory: one image, and one stage of the networks at a time.

    The VAE decodes in tiles where a whole decode would take more than the UNet.
    """
    return MemoryPlans(SdxlMemoryPlan(1, offload=True, lean=True), always_report=True)


def read_networks(settings: Settings, device: Device) -> SdxlNetworks:
    """The networks that the settings name, in the host's memory."""
    path = POCKET
    if settings.sdxl_model != "pocket":
        path = checkpoints.find("SDXL_MODEL", settings.sdxl_model, settings.model_dirs)
    with checkpoints.loading("SDXL_MODEL", path, "SDXL"):
        pipe = _read_pipe(path, settings, device.dtype)
    # A distilled checkpoint was trained from pure noise, where its spacing begins.
    own_spacing = "trailing" if settings.sdxl_distilled_steps else None
    if spacing := settings.sdxl_timestep_spacing or own_spacing:
        pipe.scheduler.register_to_config(timestep_spacing=spacing)
    if settings.memory_format == "channels_last":
        # Here, so that weights that are read again have the same memory format.
        for network in (pipe.unet, pipe.vae):
            network.to(memory_format=torch.channels_last)
    return SdxlNetworks(
        pipe, _read_ip_adapter(pipe, settings), vae.read_tiny(settings, device, pipe.vae)
    )


def _read_parts(settings: Settings, device: Device) -> dict[str, list[Any]]:
    return read_networks(settings, device).parts()


def _read_ip_adapter(pipe: Any, settings: Settings) -> IpAdapter | None:
    if settings.sdxl_ip_adapter is None:
        return None
    path = checkpoints.find("SDXL_IP_ADAPTER", settings.sdxl_ip_adapter, settings.model_dirs)
    with checkpoints.loading("SDXL_IP_ADAPTER", path, "an IP-Adapter"):
        return IpAdapter(pipe, path)


def _read_pipe(path: Path, settings: Settings, dtype: torch.dtype) -> Any:
    folder = path if path.is_dir() else _config_folder(path, settings)
    is_mapped = checkpoints.is_mapped(path, settings.mmap_weights)
    weight_files.check_configs(folder, CLASSES)
    checkpoint = None if path.is_dir() else weight_files.read(path, is_mapped)
    networks = {}
    for name, (kind, file) in CLASSES.items():
        config = _read_config(kind, folder / name)
        if checkpoint is not None and name == "unet":
            config = single_file.with_own_channels(config, checkpoint)
        own_dtype = torch.float32 if name == "vae" and _overflows(config, dtype) else dtype
        if checkpoint is None:
            files = weight_files.file_names(file, own_dtype)
            tensors = weight_files.read_first(folder / name, files, is_mapped)
        else:
            tensors = single_file.convert(name, checkpoint, config)
        networks[name] = _build(kind, config, tensors, own_dtype)
    check_networks(**{name: network.config for name, network in networks.items()})
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, **networks, local_files_only=True, add_watermarker=False
    )
    try_one_step(pipe.scheduler.config)
    return pipe


def _config_folder(path: Path, settings: Settings) -> Path:
    """The folder with a single file's configurations and tokenizers: the file has weights only."""
    folder = path.with_suffix("")
    if name := settings.sdxl_config or fetch.sdxl_config(settings):
        folder = checkpoints.find("SDXL_CONFIG", name, settings.model_dirs)
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"no configuration in {folder.name}, see SDXL_CONFIG")
    return folder


def _read_config(kind: Any, folder: Path) -> Any:
    if issubclass(kind, ModelMixin):
        return kind.load_config(folder, local_files_only=True)
    return kind.config_class.from_pretrained(folder, local_files_only=True)


def _overflows(config: Any, dtype: torch.dtype) -> bool:
    """Whether a VAE overflows in fp16, as SDXL's own does.

    diffusers converts it to fp32 and back in every job. Here it always stays in fp32.
    """
    return dtype == torch.float16 and config.get("force_upcast", True)


def _build(kind: Any, config: Any, tensors: weight_files.Tensors, dtype: torch.dtype) -> Any:
    if issubclass(kind, ModelMixin):
        return weight_files.build(lambda: kind.from_config(config), tensors, dtype)
    if kind is CLIPTextModel:
        # transformers has removed this level of names. Published checkpoints still have it.
        tensors = {name.removeprefix("text_model."): each for name, each in tensors.items()}
    return weight_files.build(lambda: kind(config), tensors, dtype)
