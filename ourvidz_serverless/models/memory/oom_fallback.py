"""How a job is computed in the memory that there is: the usual way, or a smaller one.

Each step down costs time and no pixel. `LOW_VRAM` begins at the lowest. A plan that brought a job
to its end is remembered for the next job of that shape, which then does not fail first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.models.memory.device import Device, is_out_of_memory
from ourvidz_serverless.models.memory.ledger import Home

log = logging.getLogger("ourvidz")

#: Shapes of jobs that are remembered.
MAX_SHAPES = 64

Stage = Literal["condition", "denoise", "decode"]
Made = TypeVar("Made")

#: Hears how a job is computed, where that is not the usual way.
Planned = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """SDXL's: the most pictures in one forward; whether the VAE decodes in strips; whether only the
    part of the model that computes is on the device, while the others wait in the host's memory.
    In a `lean` way nothing is kept to be faster: no prompt's keys.
    """

    max_batch: int
    tiled_decode: bool = False
    offload: bool = False
    lean: bool = False

    @property
    def too_large(self) -> str:
        return "one picture of this size does not fit the device's memory"

    def size(self, pictures: int) -> int:
        """How many pictures go into one forward, so that all forwards are alike."""
        return -(-pictures // -(-pictures // self.max_batch))

    def smaller(self, stage: Stage, pictures: int = 1) -> Plan | None:
        """The next smaller way to compute a stage that did not fit; None where there is none."""
        if stage == "denoise" and not self.lean:
            return replace(self, lean=True)
        if stage == "denoise" and self.size(pictures) > 1:
            return replace(self, max_batch=self.size(pictures) // 2)
        if stage == "decode" and not self.tiled_decode:
            return replace(self, tiled_decode=True)
        return None if self.offload else replace(self, offload=True, lean=True)


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """WAN's: whether the text encoder comes to the device block by block.

    There is no smaller one: WAN's networks come one at a time anyway, its VAE decodes frame by
    frame, and a row is a forward. `lean` is always true, since WAN keeps nothing to be faster; the
    document has the field.
    """

    offload: bool = False
    lean: bool = True

    @property
    def too_large(self) -> str:
        return "a video of this size and length does not fit the device's memory"

    def smaller(self, stage: Stage, pictures: int = 1) -> VideoPlan | None:
        return None


AnyPlan = TypeVar("AnyPlan", Plan, VideoPlan)


class Plans(Generic[AnyPlan]):
    """What worked, by shape; `usual` for a shape that has never failed.

    A plan that is `told` is reported even where it is the usual one.
    """

    def __init__(self, usual: AnyPlan, told: bool = False) -> None:
        self.usual: AnyPlan = usual
        self.told = told
        self._worked: OrderedDict[Hashable, AnyPlan] = OrderedDict()

    def best(self, shape: Hashable) -> AnyPlan:
        """The plan to begin with."""
        return self._worked.get(shape, self.usual)

    def worked(self, shape: Hashable, plan: AnyPlan) -> None:
        """Remember a plan by which a job came to its end."""
        if plan != self.usual:
            self._worked[shape] = plan
            self._worked.move_to_end(shape)
            if len(self._worked) > MAX_SHAPES:
                self._worked.popitem(last=False)


class Way(Generic[AnyPlan]):
    """One job's plan, which gets smaller whenever a stage does not fit."""

    def __init__(
        self, plans: Plans[AnyPlan], shape: Hashable, device: Device, told: Planned
    ) -> None:
        self.plan: AnyPlan = plans.best(shape)
        self.retries, self.is_alone = 0, False
        self._plans: Plans[AnyPlan] = plans
        self._shape = shape
        self._device, self._told = device, told
        if plans.told or self.plan != plans.usual:
            self._tell()

    def fits(
        self, home: Home, stage: Stage, compute: Callable[[AnyPlan], Made], pictures: int = 1
    ) -> Made:
        """What `compute` gives by the plan, or by the first smaller one that fits.

        `home` is the model's that computes. Raises OutOfMemory when none does, and whatever else
        `compute` raises.
        """
        while True:
            made = self._if_it_fits(compute)
            # Not inside the `except`: there the traceback still pins the tensors that did not fit.
            if made is not None:
                return made
            self._make_do(home, stage, pictures)

    def worked(self) -> None:
        """Say that the job came to its end."""
        self._plans.worked(self._shape, self.plan)

    def _if_it_fits(self, compute: Callable[[AnyPlan], Made]) -> Made | None:
        try:
            with self._device.computing():
                return compute(self.plan)
        except (RuntimeError, OutOfMemory) as exc:
            if not is_out_of_memory(exc):
                raise
            return None

    def _make_do(self, home: Home, stage: Stage, pictures: int) -> None:
        """Take idle models off the device; where there was none, go on in a smaller way."""
        self.retries += 1
        self._device.free_memory()
        if home.shed():
            self.is_alone = True
        else:
            smaller = self.plan.smaller(stage, pictures)
            if smaller is None:
                raise OutOfMemory(self.plan.too_large)
            self.plan = smaller
        log.warning("out of memory to %s: on with %s", stage, self.plan)
        self._tell()

    def _tell(self) -> None:
        self._told({**asdict(self.plan), "alone": self.is_alone, "retries": self.retries})
