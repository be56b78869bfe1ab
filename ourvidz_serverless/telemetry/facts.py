"""The attributes of a job's span: ids, names that the worker chose, and numbers.

Each is named here, and nothing else of a job leaves: no prompt, URL, key or message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ourvidz_serverless.document import Document
from ourvidz_serverless.families import FAMILY_OF
from ourvidz_serverless.job import Job
from ourvidz_serverless.settings import Settings

Value = str | int | float

#: The attribute of each fact in the metadata of a document's first asset.
OF_ASSET = {
    "width": "ourvidz.width",
    "height": "ourvidz.height",
    "num_inference_steps": "ourvidz.steps",
    "frame_num": "ourvidz.frames",
    "fps": "ourvidz.fps",
    "format": "ourvidz.format",
}

#: The attribute of each fact in a chat's usage.
OF_USAGE = {
    "prompt_tokens": "ourvidz.prompt_tokens",
    "completion_tokens": "ourvidz.completion_tokens",
}


def of_document(document: Document) -> dict[str, Value]:
    """The facts about how a job ended, and about what it made."""
    sizes = [asset.metadata["file_size_bytes"] for asset in document.assets]
    facts: dict[str, Value] = {
        "ourvidz.job.status": document.status,
        "ourvidz.assets": len(sizes),
        "ourvidz.bytes": sum(sizes),
        "ourvidz.warnings": len(document.metadata.get("warnings", ())),
    }
    if document.assets:
        facts |= _chosen(OF_ASSET, document.assets[0].metadata)
    facts |= _chosen(OF_USAGE, document.reply.get("usage", {}))
    if "cost" in document.metadata:
        facts["ourvidz.cost"] = document.metadata["cost"]
    if peak := peak_bytes(document):
        facts["ourvidz.memory.peak"] = peak
    return facts


def of_job(job: Job, document: Document, settings: Settings) -> Iterator[tuple[str, Value]]:
    """The family of a job, and the name of the model that served it."""
    if family := FAMILY_OF.get(job.type):
        yield "ourvidz.family", family.name
        weights = settings.value_of(family.main_setting) if family.main_setting else None
        # Of a chat the name by which the caller chooses; otherwise the last part of the place.
        if name := document.metadata.get("model") or (weights and Path(weights).name):
            yield "ourvidz.model", name


def peak_bytes(document: Document) -> int | None:
    """The peak of the device's memory, which a document has in MiB."""
    peak_mb: int | None = document.metadata.get("vram_used")
    return None if peak_mb is None else peak_mb << 20


def _chosen(names: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Value]:
    return {names[key]: facts[key] for key in names if facts.get(key) is not None}
