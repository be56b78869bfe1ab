"""The classifiers of `SAFETY_MODEL`, from folders or from a cache of the Hub's layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.loading import checkpoints, names, weight_files
from ourvidz_serverless.models.loading.names import HubName
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.safety.classifier import ImageClassifier
from ourvidz_serverless.setting_checks import SafetyRule
from ourvidz_serverless.settings import Settings

POCKET = Path(__file__).parents[3] / "pocket" / "classifier"

VARIABLE, WHAT = "SAFETY_MODEL", "an image classifier"

#: How many digits of a revision, or of a hash of the weights, the audit trail has.
DIGITS = 12


def load(settings: Settings, ledger: Ledger) -> tuple[ImageClassifier, ...]:
    """The classifiers of the settings, each tried on one picture.

    Raises ModelLoadError with one line if one of them does not load or does not work, if it has no
    rule, or if a rule names a label that no classifier has.
    """
    device = Device.choose(settings, on_gpu=torch.float16, memory=ledger.memory)
    loaded = tuple(_load(place, settings, device, ledger) for place in settings.safety_model)
    _check_rules(settings.safety_rules, loaded)
    for classifier in loaded:
        log.info("%s looks at pictures", classifier.name)
    return loaded


def _load(place: str, settings: Settings, device: Device, ledger: Ledger) -> ImageClassifier:
    path = POCKET
    if place != "pocket":
        path = checkpoints.find(VARIABLE, place, settings.model_dirs)

    def read() -> list[Any]:
        with checkpoints.loading(VARIABLE, path, WHAT):
            return [_read_model(path, device.dtype)]

    (model,) = modules = read()
    with checkpoints.loading(VARIABLE, path, WHAT):
        # By PIL: transformers' other backend needs torchvision.
        processor = AutoImageProcessor.from_pretrained(path, local_files_only=True, backend="pil")
        # Beside the family, and like SDXL among the last to leave the device: every job needs it.
        handle = ledger.register(
            MovableTensors(modules, device, read),
            f"safety_{names.short(place)}",
            "safety",
            source=names.short(place),
            is_pinned=True,
        )
        classifier = ImageClassifier(_name(place, path), model, processor, device, handle)
        classifier.warm_up()
    return classifier


def _read_model(path: Path, dtype: torch.dtype) -> Any:
    weight_files.check_configs(path.parent, [path.name])
    checkpoints.check(path)
    model, report = AutoModelForImageClassification.from_pretrained(
        path,
        local_files_only=True,
        dtype=dtype,
        # transformers then returns the mismatched sizes. Otherwise it prints them as a table.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    weight_files.check_loading_info(report, len(model.state_dict()))
    return model.eval()


def _name(place: str, path: Path) -> str:
    """The model and its revision: the commit in a cache of the Hub, else a hash of its weights."""
    parsed = names.parse(place)
    name = parsed.repository if isinstance(parsed, HubName) else names.short(place)
    if path.parent.name == "snapshots":
        return f"{name}@{path.name[:DIGITS]}"
    digest = hashlib.sha256()
    for file in checkpoints.files_of(path):
        with file.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return f"{name}@{digest.hexdigest()[:DIGITS]}"


def _check_rules(rules: Sequence[SafetyRule], classifiers: Iterable[ImageClassifier]) -> None:
    named = {label for rule in rules for label in rule.labels}
    known: dict[str, None] = {}
    for classifier in classifiers:
        labels = [label.lower() for label in classifier.labels]
        known |= dict.fromkeys(labels)
        if not named.intersection(labels):
            shown = ", ".join(labels[:20])
            raise ModelLoadError(f"SAFETY_RULES: no rule for {classifier.name}; it has {shown}")
    if unknown := sorted(named.difference(known)):
        shown = ", ".join(list(known)[:20])
        raise ModelLoadError(
            f"SAFETY_RULES: no classifier has the label {unknown[0]}; there is {shown}"
        )
