"""Schedulers by their usual names.

The table follows diffusers' table of A1111 and k-diffusion names
(documentation, "Schedulers": https://huggingface.co/docs/diffusers/api/schedulers/overview).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.models.memory.device import AsyncTransfers, to_device_async
from ourvidz_serverless.models.unipc import HostUniPC

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, {}),
    "unipc": (HostUniPC, {}),
    # By default it clips latents as if they were pixels.
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "lcm": (LCMScheduler, {}),
}

#: Our own schedulers, in place of those that a checkpoint names.
OWN = {"UniPCMultistepScheduler": HostUniPC}

#: More than two, since consistency models' schedulers treat two steps in a special way.
TRIED_STEPS = 4


def make_scheduler(config: Any, name: str | None, is_distilled: bool = False) -> Any:
    """A new scheduler for one job, made from the checkpoint's configuration.

    `name` None is the checkpoint's own kind. A scheduler keeps the state of its run, so two jobs
    must not share one. With `is_distilled` its first timestep is the noisiest one: distilled LoRAs
    were trained from there, as the cards of SDXL-Lightning and Hyper-SD say ("trailing").
    """
    kind, overrides = (_own_kind(config), {}) if name is None else SCHEDULERS[name]
    spacing = {"timestep_spacing": "trailing"} if is_distilled else {}
    return kind.from_config(config, **overrides, **spacing)


def _own_kind(config: Any) -> Any:
    name = config["_class_name"]
    return OWN.get(name) or getattr(diffusers, name)


def set_steps(scheduler: Any, steps: int) -> None:
    """Set the number of a scheduler's steps. Its schedule stays on the host.

    Raises InvalidPrompt if the scheduler cannot take so many. Schedulers of distilled checkpoints
    have a limit.
    """
    try:
        scheduler.set_timesteps(steps)
    except ValueError as exc:
        raise InvalidPrompt(
            f"config.num_inference_steps: the scheduler of this checkpoint takes no {steps} steps"
        ) from exc


def timestep_pairs(
    scheduler: Any, device: torch.device, skipped: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each timestep after the `skipped` ones, twice: on the host and on the device.

    The scheduler takes the first, the network the second. A scheduler compares its timesteps, so
    the host would wait for one on the device. It also begins at the first of these timesteps.
    """
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise it searches for the first timestep.
        scheduler.set_begin_index(skipped)
    timesteps = scheduler.timesteps[skipped:]
    return list(zip(timesteps, to_device_async(timesteps, device), strict=True))


def take_step(
    scheduler: Any,
    predicted: torch.Tensor,
    timestep: torch.Tensor,
    latents: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The latents after one step of a scheduler, without a wait for the device.

    `timestep` is on the host. New noise is drawn on the host too, by the generators of `options`.
    """
    with AsyncTransfers():
        stepped: torch.Tensor = scheduler.step(
            predicted, timestep, latents, **options, return_dict=False
        )[0]
    return stepped


def add_noise(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Latents with the noise of a timestep, which is on the host, without a wait for the device.

    A scheduler that has begun adds the noise of its next step.
    """
    with AsyncTransfers():
        noisy: torch.Tensor = scheduler.add_noise(latents, noise, timestep.expand(len(noise)))
    return noisy


def try_one_step(config: Any) -> None:
    """Take one step with a checkpoint's own scheduler, on zero latents.

    A scheduler that cannot run SDXL's loop raises its own error here. One for flow matching, for
    example, has no `init_noise_sigma`.
    """
    scheduler = make_scheduler(config, None)
    most = config.get("original_inference_steps") or TRIED_STEPS
    scheduler.set_timesteps(min(TRIED_STEPS, most))
    timestep = scheduler.timesteps[0]
    latents = torch.zeros(1, 4, 8, 8) * scheduler.init_noise_sigma
    predicted = scheduler.scale_model_input(latents, timestep)
    scheduler.step(predicted, timestep, latents, return_dict=False)


#: WAN's solvers, for the straight paths of flow matching (arXiv:2210.02747).
SOLVERS: dict[str, Any] = {
    "unipc": HostUniPC,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
}


def default_solver(config: Any) -> str:
    """The solver that a WAN checkpoint's configuration names."""
    names = {kind.__name__: name for name, kind in SOLVERS.items()}
    return names.get(config["_class_name"], "unipc")


def default_flow_shift(config: Any) -> float:
    """The flow shift of a WAN checkpoint's configuration; 3 is diffusers' default for WAN."""
    return float(config.get("flow_shift") or config.get("shift") or 3.0)


def make_flow_scheduler(config: Any, solver: str, flow_shift: float) -> Any:
    """A new flow-matching scheduler for one job, from a WAN checkpoint's configuration."""
    kind = SOLVERS[solver]
    if kind is FlowMatchEulerDiscreteScheduler:
        return kind(num_train_timesteps=config["num_train_timesteps"], shift=flow_shift)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return kind.from_config(config, **flow, flow_shift=flow_shift)


def make_dmd_scheduler(timesteps: Sequence[int]) -> Any:
    """A scheduler that is set to a DMD checkpoint's own timesteps (arXiv:2405.14867).

    Each step predicts the clean video, and adds new noise for the next timestep.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    train = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(sigmas=[each / train for each in timesteps])
    return scheduler
