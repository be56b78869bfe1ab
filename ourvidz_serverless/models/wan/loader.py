"""Reads WAN's weights from disk and registers them in the ledger.

Each part is a model of its own in the worker's ledger, because no job needs two of them at once:
it encodes a text, encodes references, denoises, decodes. So a device needs room for the largest
part, not for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from transformers import AutoTokenizer, PreTrainedModel, UMT5EncoderModel

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat import loader as chat_loader
from ourvidz_serverless.models.chat.model import Chat
from ourvidz_serverless.models.loading import checkpoints, weight_files
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger, ModelHandle
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, WanMemoryPlan
from ourvidz_serverless.models.speed import attention
from ourvidz_serverless.models.speed.regional_compile import check_cache_dir, compile_blocks
from ourvidz_serverless.models.wan.blocks import move_fewer_bytes
from ourvidz_serverless.models.wan.network import (
    ImageEncoder,
    WanNetwork,
    share_equal_tensors,
)
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.models.wan.request import Route
from ourvidz_serverless.models.wan.sampling import sampling_defaults
from ourvidz_serverless.models.wan.text_encoder import WanTextEncoder, block_by_block
from ourvidz_serverless.models.wan.vae import VideoVae
from ourvidz_serverless.settings import Settings

ROOT = Path(__file__).parents[3]
POCKET, POCKET_VACE = ROOT / "pocket" / "wan", ROOT / "pocket" / "wan_vace"

#: Reads the modules of one model of the ledger, always in the same order.
Read = Callable[[], Sequence[Any]]


def load(settings: Settings, ledger: Ledger | None = None) -> WanModel:
    """WAN from `WAN_MODEL` and the optional networks of the other settings.

    Raises ModelLoadError, with one line that names the setting, if weights are missing, corrupt or
    of another kind.
    """
    ledger = ledger or open_ledger(settings)
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    loader = WanLoader(settings, device, ledger)
    text_encoder, vae = loader.text_encoder(), loader.vae()
    networks = loader.networks(vae)
    wan = WanModel(
        device=device,
        text_encoder=text_encoder,
        vae=vae,
        networks=networks,
        scheduler_config=loader.scheduler_config,
        sampling=sampling_defaults(settings, loader.scheduler_config),
        plans=MemoryPlans(
            WanMemoryPlan(offload=settings.low_vram, tiled_decode=settings.low_vram),
            always_report=settings.low_vram,
        ),
        enhancement_prompt=read_enhancement_prompt(settings),
        enhancer=load_enhancer(settings, device, ledger),
    )
    handles = (*(network.handle for network in networks.values()), vae.handle, text_encoder.handle)
    ledger.preload(*(handle.model for handle in handles))
    return wan


def connect(models: Mapping[str, Any], settings: Settings) -> None:
    """Make the chat family's model WAN's enhancer, if the settings say so."""
    if settings.wan_uses_chat_model:
        models["wan"].enhancer = models["chat"]


def check(settings: Settings, ledger: Ledger) -> None:
    """Raise ModelLoadError if the device does not support WAN's settings."""
    device = Device.choose(settings, on_gpu=torch.bfloat16, memory=ledger.memory)
    attention.check(settings.attention_backend, device)
    check_cache_dir(settings)
    read_enhancement_prompt(settings)


class WanLoader:
    """Loads the parts of WAN that the settings name. Raises ModelLoadError, as `load`."""

    def __init__(self, settings: Settings, device: Device, ledger: Ledger) -> None:
        self._settings, self._device, self._ledger = settings, device, ledger
        self._base = self._find("WAN_MODEL", settings.wan_model, POCKET)
        with checkpoints.loading("WAN_MODEL", self._base, "WAN 2.1"):
            if not (self._base / "model_index.json").exists():
                raise ValueError("there is no model_index.json in it")
            weight_files.check_configs(self._base, ("text_encoder", "transformer", "vae"))
            index = WanPipeline.load_config(self._base, local_files_only=True)
            if index.get("transformer_2", [None])[0] or index.get("expand_timesteps"):
                raise ValueError("it is WAN 2.2")
            self.scheduler_config = UniPCMultistepScheduler.load_config(self._base / "scheduler")

    def text_encoder(self) -> WanTextEncoder:
        """The UMT5 text encoder, shared by all of WAN's networks."""

        def read() -> list[Any]:
            with checkpoints.loading("WAN_MODEL", self._base, "WAN 2.1"):
                return [self._read(UMT5EncoderModel, self._base / "text_encoder")]

        (model,) = modules = read()
        with checkpoints.loading("WAN_MODEL", self._base, "WAN 2.1"):
            tokenizer = AutoTokenizer.from_pretrained(
                self._base / "tokenizer", local_files_only=True
            )
        if self._settings.low_vram:
            parts = block_by_block(model, self._device, lambda: read()[0])
            handle = self._ledger.register(parts, "wan_text_encoder", "wan", source=self._base.name)
        else:
            handle = self._register("wan_text_encoder", self._base, modules, read)
        return WanTextEncoder(tokenizer, model, self._device, handle)

    def vae(self) -> VideoVae:
        """The VAE, shared by all of WAN's networks.

        It stays in fp32, as WAN's authors run it; its convolutions use TF32 on a GPU.
        """

        def read() -> list[Any]:
            with checkpoints.loading("WAN_MODEL", self._base, "WAN 2.1"):
                vae = self._read(AutoencoderKLWan, self._base / "vae", torch.float32)
                if vae.config.patch_size:
                    raise ValueError("it is WAN 2.2")
                return [vae]

        (model,) = modules = read()
        return VideoVae(model, self._device, self._register("wan_vae", self._base, modules, read))

    def networks(self, vae: VideoVae) -> dict[Route, WanNetwork]:
        """The text-to-video network, and the optional ones that the settings name."""
        base = self._read_t2v(vae)
        networks = self._t2v_and_vace(base, vae)
        for route in ("i2v", "flf2v"):
            place = getattr(self._settings, f"wan_{route}_model")
            if place is not None:
                networks[route] = self._image_to_video(route, place, base, vae)
        return networks

    def _t2v_and_vace(self, base: Any, vae: VideoVae) -> dict[Route, WanNetwork]:
        def read_t2v() -> list[Any]:
            return [self._read_t2v(vae)]

        path = self._vace_path
        if path is None:
            return {"t2v": self._network("t2v", self._base, read_t2v, [base])}
        vace = self._read_vace(path, base, vae)
        shared, common = share_equal_tensors(base, vace)
        log.info("WAN_VACE_MODEL: %d of %d tensors are WAN_MODEL's, held once", shared, common)
        if not shared:
            return {
                "t2v": self._network("t2v", self._base, read_t2v, [base]),
                "vace": self._network(
                    "vace", path, lambda: [self._read_vace(path, base, vae)], [vace]
                ),
            }

        def read_both() -> list[Any]:
            (fresh,) = read_t2v()
            fresh_vace = self._read_vace(path, fresh, vae)
            share_equal_tensors(fresh, fresh_vace)
            return [fresh, fresh_vace]

        t2v = self._network("t2v", self._base, read_both, [base, vace])
        return {"t2v": t2v, "vace": self._with_settings(vace, t2v.handle)}

    def _image_to_video(self, route: Route, place: Path, base: Any, vae: VideoVae) -> WanNetwork:
        variable = f"WAN_{route.upper()}_MODEL"
        path = checkpoints.find(variable, place, self._settings.model_dirs)

        def read() -> list[Any]:
            with checkpoints.loading(variable, path, "WAN 2.1 image-to-video"):
                transformer = self._read(WanTransformer3DModel, path / "transformer")
                _check_width("input channels", transformer, "in_channels", 2 * vae.channels + 4)
                _check_width("text", transformer, "text_dim", base.config.text_dim)
                has_encoder = transformer.config.image_dim is not None
                return [transformer, *([_read_image_encoder(path)] if has_encoder else [])]

        modules = read()
        image_encoder = None
        if len(modules) == 2:
            with checkpoints.loading(variable, path, "WAN 2.1 image-to-video"):
                image_encoder = ImageEncoder(_read_image_processor(path), modules[1])
        return self._network(route, path, read, modules, image_encoder)

    def _network(
        self,
        route: Route,
        path: Path,
        read: Read,
        modules: Sequence[Any],
        image_encoder: ImageEncoder | None = None,
    ) -> WanNetwork:
        handle = self._register(f"wan_{route}", path, modules, read)
        return self._with_settings(modules[0], handle, image_encoder)

    def _with_settings(
        self, transformer: Any, handle: ModelHandle, image_encoder: ImageEncoder | None = None
    ) -> WanNetwork:
        """A network with the attention kernel and the compiled blocks that the settings ask for."""
        move_fewer_bytes(transformer)
        attention.set_backend(transformer, self._settings.attention_backend, self._device)
        blocks = compile_blocks(transformer, handle, self._device, self._settings)
        return WanNetwork(transformer, handle, image_encoder, blocks)

    def _register(self, name: str, path: Path, modules: Sequence[Any], read: Read) -> ModelHandle:
        tensors = MovableTensors(modules, self._device, read)
        return self._ledger.register(tensors, name, "wan", source=path.name)

    @property
    def _vace_path(self) -> Path | None:
        place = self._settings.wan_vace_model
        if place is None and self._settings.wan_model == "pocket":
            place = "pocket"
        return None if place is None else self._find("WAN_VACE_MODEL", place, POCKET_VACE)

    def _find(self, variable: str, place: str | Path, pocket: Path) -> Path:
        if place == "pocket":
            return pocket
        return checkpoints.find(variable, place, self._settings.model_dirs)

    def _read_t2v(self, vae: VideoVae) -> Any:
        with checkpoints.loading("WAN_MODEL", self._base, "WAN 2.1"):
            transformer = self._read(WanTransformer3DModel, self._base / "transformer")
            _check_width("input channels", transformer, "in_channels", vae.channels)
            return transformer

    def _read_vace(self, path: Path, base: Any, vae: VideoVae) -> Any:
        with checkpoints.loading("WAN_VACE_MODEL", path, "VACE"):
            vace = self._read(WanVACETransformer3DModel, path / "transformer")
            # Known and unknown latents, and a mask for each pixel of a latent cell.
            channels = 2 * vae.channels + vae.spatial**2
            _check_width("control channels", vace, "vace_in_channels", channels)
            _check_width("text", vace, "text_dim", base.config.text_dim)
            return vace

    def _read(self, kind: Any, path: Path, dtype: torch.dtype | None = None) -> Any:
        is_mapped = checkpoints.is_mapped(path, self._settings.mmap_weights)
        return _read_model(
            kind, path, dtype=dtype or self._device.dtype, disable_mmap=not is_mapped
        )


def _read_model(kind: Any, path: Path, **options: Any) -> Any:
    weight_files.check_configs(path.parent, [path.name])
    checkpoints.check(path)
    if issubclass(kind, PreTrainedModel):
        # transformers then returns the mismatched sizes. Otherwise it prints them as a table.
        # diffusers names them in its error.
        options["ignore_mismatched_sizes"] = True
    model, report = kind.from_pretrained(
        path, local_files_only=True, output_loading_info=True, **options
    )
    weight_files.check_loading_info(report, len(model.state_dict()))
    return model.eval()


def _check_width(what: str, model: Any, name: str, needed: int) -> None:
    if model.config[name] != needed:
        raise ValueError(f"its {what}: {model.config[name]} wide, {needed} is needed here")


def _read_image_encoder(path: Path) -> Any:
    from transformers import CLIPVisionModel

    # In fp32, as diffusers' documentation of the pipeline loads it.
    return _read_model(CLIPVisionModel, path / "image_encoder", dtype=torch.float32)


def _read_image_processor(path: Path) -> Any:
    # Imported here, because the import warns that an optional package is missing.
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil.from_pretrained(path / "image_processor", local_files_only=True)


def read_enhancement_prompt(settings: Settings) -> str:
    """The text of `WAN_ENHANCEMENT_PROMPT`."""
    path = settings.wan_enhancement_prompt
    if not path.exists():
        raise ModelLoadError(f"WAN_ENHANCEMENT_PROMPT: there is nothing at {path}")
    with checkpoints.loading("WAN_ENHANCEMENT_PROMPT", path, "a text"):
        return path.read_text(encoding="utf-8").strip()


def load_enhancer(settings: Settings, device: Device, ledger: Ledger) -> Chat | None:
    """The chat model of `WAN_ENHANCER_MODEL`; None where WAN has no chat model of its own."""
    place = settings.wan_enhancer_model
    if settings.wan_uses_chat_model:
        return None
    if place is None and settings.wan_model == "pocket" and chat_loader.POCKET.exists():
        place = "pocket"
    if place is None:
        return None
    return chat_loader.load_enhancer(place, settings, device, ledger)
