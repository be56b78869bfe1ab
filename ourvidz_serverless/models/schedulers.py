"""Schedulers by the names the field calls them.

The table follows diffusers' own of A1111 and k-diffusion names
(documentation, "Schedulers": https://huggingface.co/docs/diffusers/api/schedulers/overview).
"""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_sde": (DPMSolverSinglestepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


def make_scheduler(config: Any, name: str | None) -> Any:
    """A scheduler of this job's own, made from the checkpoint's configuration.

    `name` None is the checkpoint's own kind. Schedulers keep the state of one run, so a shared
    one would let two jobs meet.
    """
    if name is None:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    kind, overrides = SCHEDULERS[name]
    return kind.from_config(config, **overrides)
