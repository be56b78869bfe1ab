"""The families' models. torch, diffusers and transformers are imported below this floor only.

A family is one module here with `load(settings) -> model`, and one row in `FAMILIES`. The
table holds names, not modules: importing one imports torch, and no process should import what
it does not serve.
"""

from __future__ import annotations

import importlib
from typing import Any

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings

FAMILIES = {
    "sdxl": "ourvidz_serverless.models.sdxl",
    "chat": "ourvidz_serverless.models.qwen",
}


def load(settings: Settings) -> dict[str, Any]:
    """The models of every family that `FAMILIES` asks for, on their device.

    Raises ModelLoadError with one line that names the setting which does not hold.
    """
    missing = [family for family in settings.families if family not in FAMILIES]
    if missing:
        raise ModelLoadError(f"FAMILIES: {', '.join(missing)} is not built yet")
    return {
        family: importlib.import_module(FAMILIES[family]).load(settings)
        for family in settings.families
    }
