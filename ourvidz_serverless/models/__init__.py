"""The families' models. torch, diffusers and transformers are imported below this floor only.

See `families` for what a family's module holds. A process imports the modules of the families that
it serves, since each of them imports torch and more.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from ourvidz_serverless.errors import InternalError, JobError, ModelLoadError, OutOfMemory
from ourvidz_serverless.families import FAMILIES, load_module
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import Settings


def open_ledger(settings: Settings) -> Ledger:
    """The ledger of a worker's device, with nothing in it yet."""
    memory = importlib.import_module("ourvidz_serverless.models.memory.device_memory")
    ledger: Ledger = memory.open_ledger(settings)
    return ledger


def load(settings: Settings, ledger: Ledger) -> dict[str, Any]:
    """The models of every family that `FAMILIES` asks for, as many on their device as fit.

    Raises ModelLoadError with one line that names the setting which does not hold.
    """
    if settings.chat_quantization == "none":
        # transformers, diffusers and peft import it wherever they find it, which takes seconds.
        sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    modules = {family.name: load_module(family.models_module) for family in settings.served}
    # Check every family before any of them reads its weights.
    for module in modules.values():
        module.check(settings, ledger)
    loaded = {family: module.load(settings, ledger) for family, module in modules.items()}
    for family, model in loaded.items():
        if settings.warm_up == "always" or (settings.warm_up == "auto" and model.device.is_cuda):
            _warm_up(family, model)
    for module in modules.values():
        if connect := getattr(module, "connect", None):
            connect(loaded, settings)
    return loaded


def _warm_up(family: str, model: Any) -> None:
    """Have a model generate something before the first job; raises ModelLoadError if it cannot."""
    began = time.monotonic()
    try:
        model.warm_up()
    except OutOfMemory as exc:
        # Smaller jobs than that may fit.
        log.warning("%s is not warm: %s", family, exc.message)
    except Exception as exc:
        why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
        name = FAMILIES[family].main_setting or family
        raise ModelLoadError(f"{name}: it loads, and does not generate ({why})") from exc
    else:
        log.info("%s is warm after %.1f s", family, time.monotonic() - began)


def as_job_error(error: Exception) -> JobError:
    """What an error that nobody foresaw is in our words: a lost device, or an internal error."""
    if "torch" not in sys.modules:
        return InternalError("an internal error; the worker's log says where")
    device = importlib.import_module("ourvidz_serverless.models.memory.device")
    named: JobError = device.as_job_error(error)
    return named
