"""Full-size networks with random weights, drawn on the device, for the worker and for its peer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.dry_run import sdxl, wan
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.settings import Settings

SEED = 0


def choose_device(name: str, on_gpu: torch.dtype) -> tuple[Device, Ledger]:
    """The worker's device of this name, and a ledger for its memory."""
    settings = Settings(device=name)
    ledger = open_ledger(settings)
    return Device.choose(settings, on_gpu=on_gpu, memory=ledger.memory), ledger


def shared_copy(network: Any) -> Any:
    """A network of its own on the same tensors: what changes in its modules changes it alone."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(each): each for each in tensors})


def sdxl_pair(device: Device, ledger: Ledger) -> tuple[SdxlModel, Any]:
    """The worker's SDXL, and diffusers' pipeline of the same weights.

    diffusers has its VAE in fp16 and widens it in each job, so this network is a copy.
    """
    torch.manual_seed(SEED)
    pipe = sdxl.made(str(device.name), device.dtype)
    parts = {
        name: shared_copy(each) if isinstance(each, torch.nn.Module) else each
        for name, each in pipe.components.items()
    }
    parts["vae"] = copy.deepcopy(pipe.vae).to(device.dtype)
    peer = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    peer.set_progress_bar_config(disable=True)
    sdxl.prepare(pipe, device)
    model = sdxl.model_of(pipe, device, ledger)
    model.parts.to_device()
    return model, peer


def wan_pair(job: wan.Job, device: Device, ledger: Ledger) -> tuple[WanModel, wan.Modules, Any]:
    """The worker's WAN with its modules, and diffusers' pipeline of the same weights."""
    torch.manual_seed(SEED)
    modules = wan.made(str(device.name), device.dtype, job.route)
    theirs = wan.Modules(
        *(shared_copy(each) for each in (modules.text, modules.vae, modules.transformer))
    )
    wan.prepare(modules, device)
    model = wan.model_of(job, device, ledger, modules)
    for each in wan.movables(model):
        each.to_device()
    peer = wan.pipe_of(job.route, theirs)
    peer.set_progress_bar_config(disable=True)
    return model, modules, (peer, theirs)
