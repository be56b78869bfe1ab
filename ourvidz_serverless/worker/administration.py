"""The answers to `admin_utilities`: the state of a worker and of its memory.

An answer is the document's `result`, with the keys of the specification's endpoints:
`health` is `GET /health`, `memory_report` is `GET /memory/report`, and so on.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ourvidz_serverless import __version__
from ourvidz_serverless.context import JobContext
from ourvidz_serverless.document import versions
from ourvidz_serverless.errors import InvalidPrompt, Unauthorized, WorkerUnavailable
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.job import Identity
from ourvidz_serverless.jobs.admin import CHANGING, OPERATIONS, AdminJob
from ourvidz_serverless.models.loading import names
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.memory.types import LedgerRow, MoveRequest, State
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker.job_table import JobTable
from ourvidz_serverless.worker.state import WorkerState

PACKAGE = Path(__file__).parents[1]

#: Moves that end within this time are reported as done, the others as pending. In seconds.
WAIT_S = 0.4


class Administration:
    """Answers an administrator's questions about one worker, and moves its models."""

    def __init__(
        self,
        settings: Settings,
        worker_id: str,
        families: Sequence[str],
        jobs: JobTable,
        state: WorkerState,
        ledger: Ledger | None,
    ) -> None:
        self._settings, self._worker_id, self._families = settings, worker_id, families
        self._jobs, self._state, self._ledger = jobs, state, ledger
        self._started = time.monotonic()

    def answer(self, job: AdminJob, api_key: str | None, context: JobContext) -> dict[str, Any]:
        """The answer to a job that brings this key.

        Raises Unauthorized for a change that needs a key, InvalidPrompt for a target that no worker
        has, and WorkerUnavailable for a target that this worker does not serve.
        """
        needs_key = self._settings.admin_requires_key and job.operation in CHANGING
        if needs_key and context.audit.get("key") != "accepted":
            raise Unauthorized(f"config.operation: {job.operation} needs a key of this worker")
        # A target must exist even if the operation does not read it.
        self._chosen(job)
        if job.operation == "job_status":
            return {"operation": job.operation, **self._job_status(job, api_key)}
        return {"operation": job.operation, **self._answers()[job.operation](job)}

    def health(self) -> dict[str, Any]:
        """The answer to `health`; it needs no key."""
        return self._health(AdminJob(id="health", type="admin_utilities", operation="health"))

    def _answers(self) -> dict[str, Callable[[AdminJob], dict[str, Any]]]:
        return {
            "health": self._health,
            "status": self._status,
            "info": self._info,
            "memory_status": self._memory_status,
            "memory_report": self._memory_report,
            "memory_load": self._load,
            "memory_unload": self._unload,
            "force_unload": self._force_unload,
            "predictive_load": self._predict,
            "pressure_check": self._pressure_check,
            "debug_env": self._debug_env,
            "enhancement_info": self._enhancement_info,
        }

    @property
    def _rows(self) -> list[LedgerRow]:
        return self._ledger.report() if self._ledger else []

    @property
    def _device_name(self) -> str:
        return self._ledger.memory.name if self._ledger else "none"

    def _chosen(self, job: AdminJob) -> list[LedgerRow]:
        """The models of a job's target, the family's main model first; all models without a target.

        Raises InvalidPrompt for a target that no worker has, and WorkerUnavailable for one that
        this worker does not serve.
        """
        chosen = [row for row in self._rows if job.target in (None, row.family, row.name)]
        if job.target is not None and not chosen and job.target not in self._families:
            known = sorted({*FAMILIES, *(row.name for row in self._rows)})
            if job.target not in FAMILIES:
                raise InvalidPrompt(
                    f"config.target_worker: Input should be one of {', '.join(known)}"
                )
            served = ", ".join(self._families)
            raise WorkerUnavailable(
                f"config.target_worker: {job.target} is not served here; this endpoint serves "
                f"{served}"
            )
        mains = [family.main_model for family in FAMILIES.values()]
        return sorted(chosen, key=lambda row: row.name not in mains)

    def _health(self, job: AdminJob) -> dict[str, Any]:
        # Without the classifiers, which alone serve nobody.
        rows = [row for row in self._chosen(job) if row.family in FAMILIES]
        lost = [row.name for row in self._rows if row.state == "absent"]
        status = "degraded" if lost else "healthy"
        answer = {
            "status": self._state.unavailable_reason or status,
            "model_loaded": _is_loaded(rows) or self._has_chat_server(job),
            "device": self._device_name,
            "pressure": self._ledger.pressure if self._ledger else "low",
            "jobs": self._jobs.counts(),
            "uptime": round(time.monotonic() - self._started, 3),
        }
        if "wan" in self._families:
            video = [row for row in rows if row.family == "wan" and row.name != "wan_enhancer"]
            answer["wan_model_loaded"] = _is_loaded(video)
            answer["qwen_model_loaded"] = _is_loaded(row for row in rows if row not in video)
        return answer | ({"models_lost": lost} if lost else {})

    def _has_chat_server(self, job: AdminJob) -> bool:
        """Whether a server answers for chat, and is meant; its model is in no ledger."""
        is_served = "chat" in self._families and self._settings.chat_engine == "openai"
        return is_served and job.target in (None, "chat") and not self._state.is_lost

    def _status(self, job: AdminJob) -> dict[str, Any]:
        families = [FAMILIES[name] for name in self._families_of(job)]
        mains = [family.main_model for family in FAMILIES.values()]
        tiers = [tier for family in families for tier in family.quality_tiers]
        return {
            "worker_type": ",".join(family.name for family in families),
            "model": ",".join(row.source for row in self._chosen(job) if row.name in mains),
            "batch_support": sorted({1}.union(*(family.batch_sizes for family in families))),
            "quality_tiers": list(dict.fromkeys(tiers)),
            "worker_id": self._worker_id,
            "device": self._device_name,
            "jobs": self._jobs.counts(),
            "models": [_row(row) for row in self._chosen(job)],
        }

    def _info(self, job: AdminJob) -> dict[str, Any]:
        types = [name for family in self._families for name in FAMILIES[family].job_types]
        return {
            "worker_id": self._worker_id,
            "families": list(self._families),
            "models": self._main_models(),
            "job_types": [*types, "admin_utilities"],
            "operations": list(OPERATIONS),
            "concurrency": self._settings.resolved_concurrency,
            "job_timeout": self._settings.job_timeout_s,
            "device": self._device_name,
            "version": __version__,
        }

    def _main_models(self) -> dict[str, str]:
        """The name of each family's main weights: `pocket`, or the last part of their place."""
        settings = {name: FAMILIES[name].main_setting for name in self._families}
        places = {
            name: setting and self._settings.value_of(setting) for name, setting in settings.items()
        }
        if "chat" in places:
            places["chat"] = self._settings.chat_models["qwen_instruct"]
        return {name: names.short(place) for name, place in places.items() if place}

    def _enhancement_info(self, job: AdminJob) -> dict[str, Any]:
        settings, has_chat = self._settings, "chat" in self._families
        places = settings.chat_models if has_chat else {}
        sources = {name: names.short(place) for name, place in places.items() if place}
        enhances = has_chat or any(row.name == "wan_enhancer" for row in self._rows)
        return {
            "worker_type": "pure_inference_engine",
            "models_available": list(sources),
            "capabilities": {
                "chat_conversation": has_chat,
                "prompt_enhancement": enhances,
                # WAN has a system prompt, for enhanced jobs that bring none.
                "no_hardcoded_prompts": "wan" not in self._families,
                "pure_inference": True,
            },
            "model_info": {
                "instruct_model": sources.get("qwen_instruct"),
                "base_model": sources.get("qwen_base"),
                "enhancement_method": "Pure inference with edge function prompts",
            },
        }

    def _debug_env(self, job: AdminJob) -> dict[str, Any]:
        settings, served = self._settings, self._families
        wan = PACKAGE / "models/wan/pipeline.py"
        paths = {
            "sdxl": names.public(settings.sdxl_model) if "sdxl" in served else None,
            "qwen": settings.chat_models["qwen_instruct"] if "chat" in served else None,
            "qwen_base": settings.chat_models["qwen_base"] if "chat" in served else None,
            "wan": settings.wan_model if "wan" in served else None,
        }
        return {
            "wan_generate_path": str(wan) if "wan" in served else None,
            "model_paths": paths,
            "package_path": str(PACKAGE),
            "versions": {"python": platform.python_version(), **versions()},
        }

    def _job_status(self, job: AdminJob, api_key: str | None) -> dict[str, Any]:
        identity = Identity.of(job.of_user or job.user_id, api_key, job.of_job or "")
        found = self._jobs.find(identity)
        return {"job_id": job.of_job, **(found or {"status": "unknown"})}

    def _memory_status(self, job: AdminJob) -> dict[str, Any]:
        rows = self._chosen(job)
        policies = {name: family.memory_policy for name, family in FAMILIES.items()}
        return {
            "model_loaded": _is_loaded(row for row in rows if row.family in FAMILIES),
            "memory_usage": _gigabytes(sum(map(_on_device, rows))),
            "device": self._device_name,
            # Nothing is compiled before a job needs it.
            "compilation_status": "not compiled",
            "vram_usage": self._vram(),
            "workers": {f"{family}_worker": self._state_of(family) for family in FAMILIES},
            "memory_allocation": {
                family: f"{_gigabytes(sum(row.num_bytes for row in mine))} ({policies[family]})"
                for family, mine in self._by_family().items()
            },
        }

    def _memory_report(self, job: AdminJob) -> dict[str, Any]:
        vram, families = self._vram(), self._by_family()
        return {
            "pressure_level": vram["pressure"],
            "available_vram": vram["free"],
            "worker_status": {
                family: {"loaded": _is_loaded(mine), "memory": sum(map(_on_device, mine)) >> 20}
                for family in FAMILIES
                for mine in [families.get(family, [])]
            },
            "recommendations": self._recommendations(),
            "models": [_row(row) for row in self._chosen(job)],
        }

    def _pressure_check(self, job: AdminJob) -> dict[str, Any]:
        vram = self._vram()
        return {
            "pressure_level": vram["pressure"],
            "vram_usage": vram,
            "recommendations": self._recommendations(),
        }

    def _load(self, job: AdminJob) -> dict[str, Any]:
        # Force only the first: to make room for the next could evict it again.
        return self._move(job, "device", lambda index: job.force and index == 0)

    def _predict(self, job: AdminJob) -> dict[str, Any]:
        assert self._ledger
        if not job.force and self._ledger.pressure in ("high", "critical"):
            return {**_refusal(job), "reason": f"the pressure is {self._ledger.pressure}"}
        return self._move(job, "device", lambda index: index == 0)

    def _unload(self, job: AdminJob) -> dict[str, Any]:
        return self._move(job, "host", lambda index: job.force)

    def _force_unload(self, job: AdminJob) -> dict[str, Any]:
        return self._move(job, "disk", lambda index: True)

    def _move(self, job: AdminJob, to: State, may_force: Callable[[int], bool]) -> dict[str, Any]:
        """Request moves of the chosen models, and report which ended within `WAIT_S`."""
        ledger, rows = self._ledger, self._chosen(job)
        if ledger is None or not rows:
            return {**_refusal(job), "reason": "there is nothing to move"}
        requests: dict[str, MoveRequest] = {}
        for index, row in enumerate(rows):
            requests[row.name] = ledger.request_move(row.name, to, force=may_force(index))
        ends_at = time.monotonic() + WAIT_S
        for request in requests.values():
            request.is_done.wait(ends_at - time.monotonic())
        refused = {name: request.error for name, request in requests.items() if request.error}
        return {
            "target_worker": job.target_worker,
            "force": job.force,
            "success": not refused,
            "models": {row.name: row.state for row in self._chosen(job)},
            "pending": [name for name, request in requests.items() if not request.is_done.is_set()],
            **({"refused": refused} if refused else {}),
        }

    def _recommendations(self) -> list[str]:
        """Which family to unload so that another one fits, and whether to watch the pressure."""
        if self._ledger is None:
            return []
        families, free = self._by_family(), self._ledger.free_bytes()
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
        return swaps + (["monitor_pressure"] if self._ledger.pressure != "low" else [])

    def _vram(self) -> dict[str, Any]:
        """The device's own numbers, in MiB."""
        if self._ledger is None:
            return {"total": 0, "used": 0, "free": 0, "pressure": "low"}
        total, free = self._ledger.memory.total_bytes, self._ledger.memory.free_bytes()
        return {
            "total": total >> 20,
            "used": (total - free) >> 20,
            "free": free >> 20,
            "pressure": self._ledger.pressure,
        }

    def _families_of(self, job: AdminJob) -> list[str]:
        named = {row.family for row in self._chosen(job)} if job.target else set(self._families)
        return [family for family in self._families if family in named]

    def _by_family(self) -> dict[str, list[LedgerRow]]:
        rows = self._rows
        return {
            family: [row for row in rows if row.family == family]
            for family in FAMILIES
            if any(row.family == family for row in rows)
        }

    def _state_of(self, family: str) -> str:
        if family not in self._families:
            return "not_served"
        return "loaded" if _is_loaded(self._by_family().get(family, [])) else "unloaded"


def _refusal(job: AdminJob) -> dict[str, Any]:
    return {"target_worker": job.target_worker, "force": job.force, "success": False}


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
