"""Loads the models of the served families. Only the modules in this folder import torch.

`families` says what a family's module holds. A process imports only the modules of the families
that it serves: each of them imports torch, and diffusers or transformers.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol

from ourvidz_serverless.errors import InternalError, JobError, ModelLoadError, OutOfMemory
from ourvidz_serverless.families import FAMILIES, load_module
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.no_memory import NoMemory
from ourvidz_serverless.models.safety import PictureClassifier
from ourvidz_serverless.settings import Settings

#: The names by which torch's allocator is configured, the newest first.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

#: Loads the classifiers that look at pictures. It imports torch.
SAFETY_MODULE = "ourvidz_serverless.models.safety.loader"

# torch reads this once, before its first allocation, and this package is imported before torch.
# Jobs of many sizes, and models that leave and return, cut ordinary segments into pieces that no
# large tensor fits any more. Expandable segments grow and shrink page by page
# (https://docs.pytorch.org/docs/stable/notes/cuda.html). What the deployer sets stays as it is.
if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
    os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


class ModelDevice(Protocol):
    """A model's device, as far as every job uses it."""

    @property
    def is_cuda(self) -> bool: ...

    def check(self) -> None:
        """Compute something; raises RuntimeError if that fails or the result is wrong."""

    def reset_peak(self) -> None:
        """Start to measure the peak of a job's memory."""

    def peak_mb(self) -> int | None:
        """The peak since `reset_peak`, in MiB; None if the device cannot measure it."""


class Model(Protocol):
    """What each family's model has. The family's own module in `jobs` knows the rest."""

    @property
    def device(self) -> ModelDevice: ...

    def warm_up(self) -> None:
        """Generate something small, so that the first job is as fast as the others."""


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of a worker's device, without models yet."""
    if settings.families == ("chat",) and settings.chat_engine == "openai":
        return Ledger(NoMemory())
    from ourvidz_serverless.models.memory import device_memory  # imports torch

    return device_memory.open_ledger(settings)


def load(settings: Settings, ledger: Ledger) -> dict[str, Model]:
    """The models of the served families by name, as many of them on the device as fit.

    Raises ModelLoadError with one line that names the setting which is invalid.
    """
    _leave_out_torchao(settings)
    modules = {family.name: load_module(family.models_module) for family in settings.served}
    # Check every family before any of them reads its weights.
    for module in modules.values():
        module.check(settings, ledger)
    loaded: dict[str, Model] = {
        family: module.load(settings, ledger) for family, module in modules.items()
    }
    for family, model in loaded.items():
        if settings.warm_up == "always" or (settings.warm_up == "auto" and model.device.is_cuda):
            _warm_up(family, model)
    for module in modules.values():
        if connect := getattr(module, "connect", None):
            connect(loaded, settings)
    return loaded


def load_classifiers(settings: Settings, ledger: Ledger) -> tuple[PictureClassifier, ...]:
    """The classifiers that look at pictures; none if nobody asks for them.

    Load them before the families, some of which take all the memory that is left. Raises
    ModelLoadError as `load`.
    """
    if not settings.looks_at_pictures:
        return ()
    _leave_out_torchao(settings)
    loaded: tuple[PictureClassifier, ...] = load_module(SAFETY_MODULE).load(settings, ledger)
    return loaded


def _leave_out_torchao(settings: Settings) -> None:
    """transformers, diffusers and peft import torchao if it is installed, which takes seconds."""
    if settings.chat_quantization == "none":
        sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]


def _warm_up(family: str, model: Model) -> None:
    """Make a model generate once before the first job; raises ModelLoadError if it fails."""
    started = time.monotonic()
    try:
        model.warm_up()
    except OutOfMemory as exc:
        # Smaller jobs may still fit.
        log.warning("%s is not warm: %s", family, exc.message)
    except Exception as exc:
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
        name = FAMILIES[family].main_setting or family
        raise ModelLoadError(f"{name}: it loads, and does not generate ({why})") from exc
    else:
        log.info("%s is warm after %.1f s", family, time.monotonic() - started)


def as_job_error(error: Exception) -> JobError:
    """The JobError for an unforeseen error: DeviceLost if the device failed, else InternalError."""
    if "torch" not in sys.modules:
        return InternalError("an internal error; the worker's log says where")
    from ourvidz_serverless.models.memory import device  # imports torch

    return device.as_job_error(error)
