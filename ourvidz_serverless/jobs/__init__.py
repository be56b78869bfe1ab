"""The job types: how a payload becomes a Job, and how its family's module runs that job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from PIL import Image

from ourvidz_serverless import families
from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import WorkerUnavailable
from ourvidz_serverless.job import Job
from ourvidz_serverless.job_types import ADMIN, FAMILY_OF
from ourvidz_serverless.models import Model
from ourvidz_serverless.output import Output, Text, Video
from ourvidz_serverless.settings import Settings

__all__ = ["ADMIN", "FAMILY_OF", "is_exclusive", "model_of", "module", "parse", "prepare", "run"]


def module(family: str) -> ModuleType:
    """The module with a family's `parse`, `prepare` and `run`; for `ADMIN` with `parse` only."""
    if family == ADMIN:
        return families.load_module("ourvidz_serverless.jobs.admin")
    return families.load_module(families.FAMILIES[family].jobs_module)


def parse(payload: Mapping[str, Any], settings: Settings) -> Job:
    """The job of a payload with a known `type`; raises pydantic's ValidationError."""
    job: Job = module(FAMILY_OF[payload["type"]]).parse(payload, settings)
    return job


def is_exclusive(job_type: str | None) -> bool:
    """Whether a job of this type needs the device alone while it computes; False without a type."""
    family = families.FAMILY_OF.get(job_type) if job_type else None
    return family is not None and family.is_exclusive


def model_of(job: Job, models: Mapping[str, Model]) -> Model:
    """The model that serves a job, from the models by family.

    It is the family's own model, unless the family's module has a `choose_model(job, models)`.
    Raises WorkerUnavailable if there is none.
    """
    family = FAMILY_OF[job.type]
    choose = getattr(module(family), "choose_model", None)
    model: Model | None = choose(job, models) if choose else models.get(family)
    if model is None:
        served = ", ".join(models)
        raise WorkerUnavailable(f"{job.type} is not served here; this endpoint serves {served}")
    return model


def prepare(job: Job, model: Model, context: JobContext) -> None:
    """Do what the job's family does before the job has the device."""
    module(FAMILY_OF[job.type]).prepare(job, model, context)


def run(
    job: Job, model: Model, references: Mapping[str, Image.Image], context: JobContext
) -> Iterator[Output | Text | Video]:
    """The job's outputs, each as soon as it is finished.

    Adds the device's peak memory to `context.metadata`, in MB.
    """
    # A job that shares the device must not reset the peak of another job.
    if is_exclusive(job.type):
        model.device.reset_peak()
    yield from module(FAMILY_OF[job.type]).run(job, model, references, context)
    peak_mb = model.device.peak_mb()
    if peak_mb is not None:
        context.metadata["vram_used"] = peak_mb
