"""`admin_utilities`: what a worker says of itself, and what it can be told about its memory.

{"id": "job_1", "type": "admin_utilities",
 "config": {"operation": "memory_unload", "target_worker": "chat_worker", "force": false}}

Every worker serves it, beside whatever computes. The answer stands in the document's `result`, in
the words of the specification's endpoints: `health` is `GET /health`, `memory_report` is
`GET /memory/report`, and so on. `operation`, `target_worker` and `force` may also stand at the top
level, where the specification's emergency operations have them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import AliasChoices, AliasPath, Field, model_validator

from ourvidz_serverless import __version__
from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import InvalidPrompt, Unauthorized, WorkerUnavailable
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.job import ANONYMOUS, KEY_PATTERN, Flag, Identity, Job
from ourvidz_serverless.job_history import Roster
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.types import LedgerRow, MoveRequest, State
from ourvidz_serverless.output import Output
from ourvidz_serverless.settings import Settings

PACKAGE = Path(__file__).parents[1]

Operation = Literal[
    "health",
    "status",
    "info",
    "memory_status",
    "memory_report",
    "memory_load",
    "memory_unload",
    "force_unload",
    "predictive_load",
    "pressure_check",
    "debug_env",
    "enhancement_info",
    "job_status",
]

#: What changes the worker; with `ADMIN_REQUIRES_KEY` for those who bring a key alone.
CHANGING = ("memory_load", "memory_unload", "force_unload", "predictive_load")

#: What finishes in this time is reported as done, all else as on its way.
PATIENCE_S = 0.4


#: Why a worker takes no jobs: it was told to end, or its device failed.
Fate = Literal["shutting_down", "unhealthy"]


def _either(name: str) -> Any:
    return AliasChoices(AliasPath("config", name), name)


class AdminJob(Job):
    type: Literal["admin_utilities"]
    # An administrator need not be a user of the application.
    user_id: str = Field(ANONYMOUS, pattern=KEY_PATTERN)
    operation: Operation = Field(validation_alias=_either("operation"))
    target_worker: str | None = Field(
        None, max_length=128, validation_alias=_either("target_worker")
    )
    force: Flag = Field(False, validation_alias=_either("force"))
    # Whose job, and which one, `job_status` is about.
    of_job: str | None = Field(
        None, pattern=KEY_PATTERN, validation_alias=AliasPath("config", "job_id")
    )
    of_user: str | None = Field(
        None, pattern=KEY_PATTERN, validation_alias=AliasPath("config", "user_id")
    )

    @model_validator(mode="after")
    def _a_job_to_ask_for(self) -> AdminJob:
        if self.operation == "job_status" and self.of_job is None:
            raise ValueError("config.job_id: Field required for job_status")
        return self

    @property
    def is_counted(self) -> bool:
        return False

    @property
    def target(self) -> str | None:
        """The family or the model that is meant: `chat_worker` and `chat` are the same."""
        return self.target_worker and self.target_worker.removesuffix("_worker")


@dataclass(frozen=True, slots=True)
class Office:
    """What an administrator finds in a worker. It stands where other jobs find their model."""

    settings: Settings
    worker_id: str
    families: tuple[str, ...]
    versions: Callable[[], Mapping[str, str]]
    roster: Roster
    #: What keeps the worker from taking jobs, if anything does.
    fate: Callable[[], Fate | None]
    ledger: Ledger | None
    opened: float = field(default_factory=time.monotonic)
    #: The key of the job that asks.
    asker_key: str | None = field(default=None, repr=False)

    #: Nothing is computed here.
    device = None

    @property
    def holdings(self) -> list[LedgerRow]:
        return self.ledger.report() if self.ledger else []

    @property
    def device_name(self) -> str:
        return self.ledger.memory.name if self.ledger else "none"

    def of(self, job: AdminJob) -> list[LedgerRow]:
        """The models that a job is about, the family's main one first; all, where it names none.

        Raises InvalidPrompt for a name that no worker has, WorkerUnavailable for one that this
        worker has not.
        """
        chosen = [row for row in self.holdings if job.target in (None, row.family, row.name)]
        if job.target is not None and not chosen and job.target not in self.families:
            known = sorted({*FAMILIES, *(row.name for row in self.holdings)})
            if job.target not in FAMILIES:
                raise InvalidPrompt(
                    f"config.target_worker: Input should be one of {', '.join(known)}"
                )
            served = ", ".join(self.families)
            raise WorkerUnavailable(
                f"config.target_worker: {job.target} is not served here; this endpoint serves "
                f"{served}"
            )
        return sorted(chosen, key=lambda row: row.name != FAMILIES[row.family].main_model)


def parse(payload: Mapping[str, Any], settings: Settings) -> AdminJob:
    """The job of a payload; raises pydantic's ValidationError."""
    return AdminJob.model_validate(payload)


def prepare(job: AdminJob, office: Office, context: JobContext) -> None:
    """Raise Unauthorized for a change that wants a key."""
    wants_key = office.settings.admin_requires_key and job.operation in CHANGING
    if wants_key and context.audit.get("key") != "accepted":
        raise Unauthorized(f"config.operation: {job.operation} needs a key of this worker")


def run(
    job: AdminJob, office: Office, references: Mapping[str, Image.Image], context: JobContext
) -> Iterator[Output]:
    """No output: the answer is in `context.reply`."""
    # A target must exist even if the operation does not read it.
    office.of(job)
    answer = ANSWERS[job.operation](job, office)
    context.reply["result"] = {"operation": job.operation, **answer}
    return iter(())


# --- how it is ---


def _health(job: AdminJob, office: Office) -> dict[str, Any]:
    rows = office.of(job)
    lost = [row.name for row in office.holdings if row.state == "absent"]
    status = "degraded" if lost else "healthy"
    answer = {
        "status": office.fate() or status,
        "model_loaded": _is_loaded(rows),
        "device": office.device_name,
        "pressure": office.ledger.pressure if office.ledger else "low",
        "jobs": office.roster.counts(),
        "uptime": round(time.monotonic() - office.opened, 3),
    }
    if "wan" in office.families:
        video = [row for row in rows if row.family == "wan" and row.name != "wan_enhancer"]
        answer["wan_model_loaded"] = _is_loaded(video)
        answer["qwen_model_loaded"] = _is_loaded(row for row in rows if row not in video)
    return answer | ({"models_lost": lost} if lost else {})


def _status(job: AdminJob, office: Office) -> dict[str, Any]:
    families = [FAMILIES[name] for name in _families(job, office)]
    mains = [family.main_model for family in FAMILIES.values()]
    tiers = [tier for family in families for tier in family.quality_tiers]
    return {
        "worker_type": ",".join(family.name for family in families),
        "model": ",".join(row.source for row in office.of(job) if row.name in mains),
        "batch_support": sorted({1}.union(*(family.batch_sizes for family in families))),
        "quality_tiers": list(dict.fromkeys(tiers)),
        "worker_id": office.worker_id,
        "device": office.device_name,
        "jobs": office.roster.counts(),
        "models": [_row(row) for row in office.of(job)],
    }


def _info(job: AdminJob, office: Office) -> dict[str, Any]:
    types = [name for family in office.families for name in FAMILIES[family].job_types]
    return {
        "worker_id": office.worker_id,
        "families": list(office.families),
        "job_types": [*types, "admin_utilities"],
        "operations": list(ANSWERS),
        "concurrency": office.settings.resolved_concurrency,
        "job_timeout": office.settings.job_timeout_s,
        "device": office.device_name,
        "version": __version__,
    }


def _enhancement_info(job: AdminJob, office: Office) -> dict[str, Any]:
    settings, has_chat = office.settings, "chat" in office.families
    places = {"qwen_instruct": settings.chat_instruct_model, "qwen_base": settings.chat_base_model}
    sources = {name: Path(place).name for name, place in places.items() if place and has_chat}
    enhances = has_chat or any(row.name == "wan_enhancer" for row in office.holdings)
    return {
        "worker_type": "pure_inference_engine",
        "models_available": list(sources),
        "capabilities": {
            "chat_conversation": has_chat,
            "prompt_enhancement": enhances,
            # WAN's enhanced jobs may come without a system prompt, and have one for that case.
            "no_hardcoded_prompts": "wan" not in office.families,
            "pure_inference": True,
        },
        "model_info": {
            "instruct_model": sources.get("qwen_instruct"),
            "base_model": sources.get("qwen_base"),
            "enhancement_method": "Pure inference with edge function prompts",
        },
    }


def _debug_env(job: AdminJob, office: Office) -> dict[str, Any]:
    settings, served = office.settings, office.families
    paths = {
        "sdxl": settings.sdxl_model if "sdxl" in served else None,
        "qwen": settings.chat_instruct_model if "chat" in served else None,
        "qwen_base": settings.chat_base_model if "chat" in served else None,
        "wan": settings.wan_model if "wan" in served else None,
    }
    return {
        "wan_generate_path": str(PACKAGE / "models/wan/pipeline.py") if "wan" in served else None,
        "model_paths": paths,
        "package_path": str(PACKAGE),
        "versions": {"python": platform.python_version(), **office.versions()},
    }


def _job_status(job: AdminJob, office: Office) -> dict[str, Any]:
    identity = Identity.of(job.of_user or job.user_id, office.asker_key, job.of_job or "")
    found = office.roster.find(identity)
    return {"job_id": job.of_job, **(found or {"status": "unknown"})}


# --- its memory ---


def _memory_status(job: AdminJob, office: Office) -> dict[str, Any]:
    rows = office.of(job)
    policies = {name: family.memory_policy for name, family in FAMILIES.items()}
    return {
        "model_loaded": _is_loaded(rows),
        "memory_usage": _gigabytes(sum(map(_on_device, rows))),
        "device": office.device_name,
        # Nothing is compiled ahead of a job.
        "compilation_status": "not compiled",
        "vram_usage": _vram(office),
        "workers": {f"{family}_worker": _word(family, office) for family in FAMILIES},
        "memory_allocation": {
            family: f"{_gigabytes(sum(row.num_bytes for row in mine))} ({policies[family]})"
            for family, mine in _by_family(office).items()
        },
    }


def _memory_report(job: AdminJob, office: Office) -> dict[str, Any]:
    vram, families = _vram(office), _by_family(office)
    return {
        "pressure_level": vram["pressure"],
        "available_vram": vram["free"],
        "worker_status": {
            family: {"loaded": _is_loaded(mine), "memory": sum(map(_on_device, mine)) >> 20}
            for family in FAMILIES
            for mine in [families.get(family, [])]
        },
        "recommendations": _recommendations(office),
        "models": [_row(row) for row in office.of(job)],
    }


def _pressure_check(job: AdminJob, office: Office) -> dict[str, Any]:
    vram = _vram(office)
    return {
        "pressure_level": vram["pressure"],
        "vram_usage": vram,
        "recommendations": _recommendations(office),
    }


def _load(job: AdminJob, office: Office) -> dict[str, Any]:
    # To make room for all of a family may be to drive out the first of it again.
    return _moved(job, office, "device", lambda index: job.force and index == 0)


def _predict(job: AdminJob, office: Office) -> dict[str, Any]:
    assert office.ledger
    if not job.force and office.ledger.pressure in ("high", "critical"):
        return {**_refusal(job), "reason": f"the pressure is {office.ledger.pressure}"}
    return _moved(job, office, "device", lambda index: index == 0)


def _unload(job: AdminJob, office: Office) -> dict[str, Any]:
    return _moved(job, office, "host", lambda index: job.force)


def _force_unload(job: AdminJob, office: Office) -> dict[str, Any]:
    return _moved(job, office, "disk", lambda index: True)


def _moved(
    job: AdminJob, office: Office, to: State, may_force: Callable[[int], bool]
) -> dict[str, Any]:
    """Ask the ledger to move the models that are meant, and say how far that came."""
    ledger, rows = office.ledger, office.of(job)
    if ledger is None or not rows:
        return {**_refusal(job), "reason": "there is nothing to move"}
    wishes: dict[str, MoveRequest] = {}
    for index, row in enumerate(rows):
        wishes[row.name] = ledger.request_move(row.name, to, force=may_force(index))
    until = time.monotonic() + PATIENCE_S
    for wish in wishes.values():
        wish.is_done.wait(max(until - time.monotonic(), 0))
    refused = {name: wish.error for name, wish in wishes.items() if wish.error}
    return {
        "target_worker": job.target_worker,
        "force": job.force,
        "success": not refused,
        "models": {row.name: row.state for row in office.of(job)},
        "pending": [name for name, wish in wishes.items() if not wish.is_done.is_set()],
        **({"refused": refused} if refused else {}),
    }


def _refusal(job: AdminJob) -> dict[str, Any]:
    return {"target_worker": job.target_worker, "force": job.force, "success": False}


def _recommendations(office: Office) -> list[str]:
    """What would help: which family to unload for which, and whether to watch the pressure."""
    if office.ledger is None:
        return []
    families, free = _by_family(office), office.ledger.free_bytes()
    sizes = {family: sum(map(_on_device, mine)) for family, mine in families.items()}
    wanted = {
        family: min(row.num_bytes + row.reserved_bytes for row in mine)
        for family, mine in families.items()
        if not _is_loaded(mine)
    }
    swaps = [
        f"unload_{other}_for_{family}"
        for family, size in wanted.items()
        for other, freed in sizes.items()
        if size > free and freed and size <= free + freed
    ]
    return swaps + (["monitor_pressure"] if office.ledger.pressure != "low" else [])


def _vram(office: Office) -> dict[str, Any]:
    """In MiB, as the device itself tells."""
    if office.ledger is None:
        return {"total": 0, "used": 0, "free": 0, "pressure": "low"}
    total, free = office.ledger.memory.total_bytes, office.ledger.memory.free_bytes()
    return {
        "total": total >> 20,
        "used": (total - free) >> 20,
        "free": free >> 20,
        "pressure": office.ledger.pressure,
    }


def _families(job: AdminJob, office: Office) -> list[str]:
    named = {row.family for row in office.of(job)} if job.target else set(office.families)
    return [family for family in office.families if family in named]


def _by_family(office: Office) -> dict[str, list[LedgerRow]]:
    rows = office.holdings
    return {
        family: [row for row in rows if row.family == family]
        for family in FAMILIES
        if any(row.family == family for row in rows)
    }


def _word(family: str, office: Office) -> str:
    if family not in office.families:
        return "not_served"
    return "loaded" if _is_loaded(_by_family(office).get(family, [])) else "unloaded"


def _is_loaded(rows: Iterable[LedgerRow]) -> bool:
    return any(row.state == "device" for row in rows)


def _on_device(row: LedgerRow) -> int:
    return row.num_bytes if row.state == "device" else 0


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.3g}GB"


def _row(row: LedgerRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "family": row.family,
        "weights": row.source,
        "state": row.state,
        "memory": row.num_bytes >> 20,
        "reserved": row.reserved_bytes >> 20,
        "users": row.num_users,
        "pinned": row.is_pinned,
        "loads": row.num_loads,
        "evictions": row.num_evictions,
        "moved_to_host": row.num_parked,
        "dropped": row.num_drops,
        "read_again": row.num_reads,
        "working_memory": {shape: size >> 20 for shape, size in row.working_bytes.items()},
    }


ANSWERS: dict[str, Callable[[AdminJob, Office], dict[str, Any]]] = {
    "health": _health,
    "status": _status,
    "info": _info,
    "memory_status": _memory_status,
    "memory_report": _memory_report,
    "memory_load": _load,
    "memory_unload": _unload,
    "force_unload": _force_unload,
    "predictive_load": _predict,
    "pressure_check": _pressure_check,
    "debug_env": _debug_env,
    "enhancement_info": _enhancement_info,
    "job_status": _job_status,
}
