"""What happens after an out-of-memory error: the job goes on with a smaller memory plan.

Each smaller plan costs time and changes no pixel. `LOW_VRAM` begins with the smallest. A plan with
which a job succeeded is remembered: the next job of that shape begins with it instead of failing
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.memory.device import Device, is_out_of_memory
from ourvidz_serverless.models.memory.ledger import ModelHandle

#: For how many shapes of jobs a plan is remembered.
MAX_SHAPES = 64

Stage = Literal["condition", "denoise", "decode"]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class SdxlMemoryPlan:
    """How SDXL saves memory.

    `max_batch`: the most images in one forward.
    `tiled_decode`: the VAE decodes in tiles.
    `offload`: only the part of the model that computes is on the device; the others wait in the
    host's memory.
    `lean`: nothing is cached to be faster, so a prompt's keys and values are computed every step.
    """

    max_batch: int
    tiled_decode: bool = False
    offload: bool = False
    lean: bool = False

    @property
    def too_large(self) -> str:
        return "one picture of this size does not fit the device's memory"

    def size(self, num_images: int) -> int:
        """How many images go into one forward, so that all forwards have about the same size."""
        return -(-num_images // -(-num_images // self.max_batch))

    def smaller(self, stage: Stage, num_images: int = 1) -> SdxlMemoryPlan | None:
        """The next smaller plan for a stage that did not fit; None if there is none."""
        if stage == "denoise" and not self.lean:
            return replace(self, lean=True)
        if stage == "denoise" and self.size(num_images) > 1:
            return replace(self, max_batch=self.size(num_images) // 2)
        if stage == "decode" and not self.tiled_decode:
            return replace(self, tiled_decode=True)
        return None if self.offload else replace(self, offload=True, lean=True)


@dataclass(frozen=True, slots=True)
class WanMemoryPlan:
    """How WAN saves memory.

    `offload`: the text encoder comes to the device block by block.
    `tiled_decode`: the VAE decodes in tiles.
    `lean` is always true, since WAN caches nothing to be faster; the job's document has the field.

    No plan makes denoising smaller: WAN's networks come one at a time anyway, and each half of
    guidance is a forward.
    """

    offload: bool = False
    lean: bool = True
    tiled_decode: bool = False

    @property
    def too_large(self) -> str:
        return "a video of this size and length does not fit the device's memory"

    def smaller(self, stage: Stage, num_images: int = 1) -> WanMemoryPlan | None:
        if stage == "decode" and not self.tiled_decode:
            return replace(self, tiled_decode=True)
        return None


MemoryPlan = TypeVar("MemoryPlan", SdxlMemoryPlan, WanMemoryPlan)


class MemoryPlans(Generic[MemoryPlan]):
    """The plan to begin with, by the shape of a job: `default` unless another one was needed.

    `always_report`: report the plan even if it is the default.
    """

    def __init__(self, default: MemoryPlan, always_report: bool = False) -> None:
        self.default: MemoryPlan = default
        self.always_report = always_report
        self._by_shape: OrderedDict[Hashable, MemoryPlan] = OrderedDict()

    def get(self, shape: Hashable) -> MemoryPlan:
        """The plan to begin a job with."""
        return self._by_shape.get(shape, self.default)

    def remember(self, shape: Hashable, plan: MemoryPlan) -> None:
        """Begin later jobs of this shape with a plan that succeeded."""
        if plan != self.default:
            self._by_shape[shape] = plan
            self._by_shape.move_to_end(shape)
            if len(self._by_shape) > MAX_SHAPES:
                self._by_shape.popitem(last=False)


class OomFallback(Generic[MemoryPlan]):
    """One job's memory plan, which becomes smaller whenever a stage does not fit.

    `report` is called with each plan that is not the default.
    """

    def __init__(
        self,
        plans: MemoryPlans[MemoryPlan],
        shape: Hashable,
        device: Device,
        report: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.plan: MemoryPlan = plans.get(shape)
        self.retries, self.is_alone = 0, False
        self._plans: MemoryPlans[MemoryPlan] = plans
        self._shape, self._device, self._report = shape, device, report
        if plans.always_report or self.plan != plans.default:
            self._report_plan()

    def run(
        self,
        handle: ModelHandle,
        stage: Stage,
        compute: Callable[[MemoryPlan], Result],
        num_images: int = 1,
    ) -> Result:
        """Return `compute(plan)`, for the current plan or the first smaller one that fits.

        `handle` is that of the model which computes. Raises OutOfMemory if no plan fits, and
        whatever else `compute` raises.
        """
        while True:
            result = self._try(compute)
            # Not inside the `except`: there the traceback still pins the tensors that did not fit.
            if result is not None:
                return result
            self._fall_back(handle, stage, num_images)

    def shrink(self, stage: Stage) -> None:
        """Choose the smaller plan before a stage that cannot fit, if there is one."""
        smaller = self.plan.smaller(stage)
        if smaller is not None:
            self.plan = smaller
            self._report_plan()

    def succeeded(self) -> None:
        """Remember the plan, at the end of the job."""
        self._plans.remember(self._shape, self.plan)

    def _try(self, compute: Callable[[MemoryPlan], Result]) -> Result | None:
        try:
            with self._device.computing():
                return compute(self.plan)
        except (RuntimeError, OutOfMemory) as exc:
            if not is_out_of_memory(exc):
                raise
            return None

    def _fall_back(self, handle: ModelHandle, stage: Stage, num_images: int) -> None:
        """Evict idle models; if there was none, choose a smaller plan."""
        self.retries += 1
        self._device.free_memory()
        if handle.evict_idle():
            self.is_alone = True
        else:
            smaller = self.plan.smaller(stage, num_images)
            if smaller is None:
                raise OutOfMemory(self.plan.too_large)
            self.plan = smaller
        log.warning("out of memory to %s: on with %s", stage, self.plan)
        self._report_plan()

    def _report_plan(self) -> None:
        self._report({**asdict(self.plan), "alone": self.is_alone, "retries": self.retries})
