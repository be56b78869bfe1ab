"""The schedulers in the loops of SDXL and WAN: the same latents as diffusers', and no waits."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from ourvidz_serverless.models.schedulers import (
    SCHEDULERS,
    SOLVERS,
    make_dmd_scheduler,
    make_flow_scheduler,
    make_scheduler,
    set_steps,
    take_step,
    timestep_pairs,
)
from ourvidz_serverless.models.unipc import HostUniPC
from ourvidz_serverless.models.wan.pipeline import WARM_UP_STEPS
from tests.examples import PROFILE

SHAPE = (2, 4, 3, 5, 6)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

# --- UniPC ---


def unipc_latents(kind: Any, steps: int, dtype: torch.dtype, **config: Any) -> torch.Tensor:
    """The latents after each step of a UniPC scheduler, for a network of one layer."""
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(steps)
    latents = torch.randn(SHAPE, generator=generator).to(dtype)
    weights = torch.randn(SHAPE[1], SHAPE[1], generator=generator).to(dtype) / 2
    made = []
    for timestep in scheduler.timesteps:
        predicted = torch.einsum("ij,bjtxy->bitxy", weights, latents).tanh()
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        made.append(latents)
    return torch.stack(made)


#: Every number of steps up to 50 in the deep profile.
STEPS = range(1, 51) if PROFILE == "deep" else (*range(1, 13), 15, 25, 50)


# The mark is that of the deep profile's run.
@pytest.mark.hypothesis
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("config", [FLOW, {}], ids=["flow", "epsilon"])
def test_our_unipc_equals_diffusers_bit_for_bit_for_1_to_50_steps(
    config: dict[str, Any], order: int
) -> None:
    for steps in STEPS:
        ours, theirs = (
            unipc_latents(kind, steps, torch.float32, solver_order=order, **config)
            for kind in (HostUniPC, UniPCMultistepScheduler)
        )
        assert torch.equal(ours, theirs), f"{steps} steps"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {"predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"prediction_type": "v_prediction", "use_karras_sigmas": True},
        {"disable_corrector": [0, 1]},
    ],
    ids=str,
)
def test_our_unipc_equals_diffusers_in_16_bits_and_for_every_configuration(
    config: dict[str, Any], dtype: torch.dtype
) -> None:
    ours, theirs = (
        unipc_latents(kind, 7, dtype, solver_order=3, **config)
        for kind in (HostUniPC, UniPCMultistepScheduler)
    )

    assert torch.equal(ours, theirs)


class RecordedUniPC(HostUniPC):
    """Records the order of each step's predictor and corrector."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        corrected = self.this_order if self.last_sample is not None else 0
        made = super().step(*args, **kwargs)
        self.orders = [*getattr(self, "orders", []), (self.this_order, corrected)]
        return made


def test_wans_warm_up_takes_a_unipc_step_of_each_order() -> None:
    scheduler = RecordedUniPC(**FLOW)
    scheduler.set_timesteps(WARM_UP_STEPS)

    for timestep in scheduler.timesteps:
        scheduler.step(torch.zeros(SHAPE), timestep, torch.zeros(SHAPE))

    assert {order for order, _ in scheduler.orders} == {1, 2}
    assert {order for _, order in scheduler.orders} == {0, 1, 2}


# --- waits for the device ---

#: A device whose values the host cannot read: torch raises an error where a GPU would make it wait.
UNREADABLE = torch.device("meta")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: blocking copies, and linear algebra's checks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_to_copy" and made.device != args[0].device:
            self.count += not kwargs.get("non_blocking")
        elif "linalg" in name:
            self.count += args[0].device == UNREADABLE
        return made


def waits(scheduler: Any, **options: Any) -> int:
    """How often the host waits for the device in the scheduler's loop.

    Raises RuntimeError or NotImplementedError where the host reads from the device.
    """
    latents = torch.empty(SHAPE[:2] + SHAPE[3:], device=UNREADABLE)
    with Waits() as counted:
        for timestep, sent in timestep_pairs(scheduler, UNREADABLE):
            assert sent.device == UNREADABLE
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(latents, timestep)
            latents = take_step(scheduler, torch.empty_like(latents), timestep, latents, **options)
    return counted.count


def options_of(scheduler: Any) -> dict[str, Any]:
    """The generators of two pictures, for a scheduler that takes them."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)]}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_scheduler_of_sdxl_makes_the_host_wait(name: str) -> None:
    config = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).config
    scheduler = make_scheduler({**config, "_class_name": "EulerDiscreteScheduler"}, name)
    set_steps(scheduler, 6)

    assert waits(scheduler, **options_of(scheduler)) == 0


@pytest.mark.parametrize(
    "kind", ["TCDScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler"]
)
def test_no_scheduler_of_a_checkpoint_makes_the_host_wait(kind: str) -> None:
    scheduler = make_scheduler({"_class_name": kind}, None)
    set_steps(scheduler, 6)

    assert waits(scheduler, **options_of(scheduler)) == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_of_wan_makes_the_host_wait(solver: str) -> None:
    scheduler = make_flow_scheduler({"num_train_timesteps": 1000}, solver, 3.0)
    set_steps(scheduler, 6)

    assert waits(scheduler) == 0


def test_a_distilled_step_does_not_wait_for_its_noise() -> None:
    scheduler = make_dmd_scheduler((1000, 757, 522))

    assert waits(scheduler, generator=torch.Generator().manual_seed(0)) == 0


def test_a_unipc_of_the_checkpoint_is_ours() -> None:
    scheduler = make_scheduler({"_class_name": "UniPCMultistepScheduler"}, None)

    assert isinstance(scheduler, HostUniPC)
