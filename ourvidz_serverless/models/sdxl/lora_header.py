"""Checks the header of a LoRA's file, in which diffusers stores PEFT's settings.

diffusers passes these settings to PEFT unchanged. Some of them make PEFT import a module by its
name, change the checkpoint's own weights, or match a regular expression against each layer's name.
A job's file must not control that, so its header is checked before it is loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from safetensors import safe_open

MAX_RANK = 4096

#: A layer's or a tensor's name. PEFT reads it as a regular expression; these characters keep it a
#: plain one.
NAME = re.compile(r"\^?[\w.-]{1,256}", re.ASCII)

#: Settings without effect here: they describe the file, or its training.
UNUSED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


def check(path: Path) -> None:
    """Raise ValueError, with the reason, if a file's header is not a plain LoRA's."""
    with safe_open(path, "pt") as file:
        names, raw = list(file.keys()), (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if not all(map(_is_name, names)):
        raise ValueError("has a tensor with characters in its name that no layer's name has")
    settings = json.loads(raw) if raw else {}
    if not isinstance(settings, dict):
        raise ValueError("has adapter metadata that is not a table")
    defaults = LoraConfig().to_dict()
    for key, value in settings.items():
        # The name of a setting follows the name of its network: `unet.r`.
        name = key.partition(".")[2]
        if name not in defaults:
            raise ValueError("has adapter metadata that this version of PEFT does not know")
        if name not in UNUSED and not _is_supported(name, value, defaults[name]):
            raise ValueError(f"has a value of {name} in its adapter metadata that is not supported")


def _is_supported(name: str, value: Any, default: Any) -> bool:
    if name in SUPPORTED:
        return SUPPORTED[name](value)
    return value == default or not value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(map(_is_name, value))
    return value is None or value == "all-linear" or is_list


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_RANK


def _each(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The check of a table whose keys are names of layers."""

    def are_right(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _is_name(name) and is_right(each) for name, each in value.items()
        )

    return are_right


#: The settings that a file may have, and the check of each value.
SUPPORTED: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "rank_pattern": _each(_is_rank),
    "lora_alpha": _is_number,
    "alpha_pattern": _each(_is_number),
    "lora_dropout": _is_number,
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "use_rslora": _is_flag,
    "use_dora": _is_flag,
    "lora_bias": _is_flag,
    "fan_in_fan_out": _is_flag,
    # Other initialisations change the checkpoint's own weights.
    "init_lora_weights": lambda value: value in (True, False, "gaussian"),
}
