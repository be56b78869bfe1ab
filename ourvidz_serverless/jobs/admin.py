"""`admin_utilities`: questions to a worker about itself, and changes of its memory.

{"id": "job_1", "type": "admin_utilities",
 "config": {"operation": "memory_unload", "target_worker": "chat_worker", "force": false}}

Every worker serves it, whatever its families are; `administration` answers. `operation`,
`target_worker` and `force` may also be at the top level, where the specification's emergency
operations have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import AliasChoices, AliasPath, Field, model_validator

from ourvidz_serverless.job import KEY_PATTERN, Flag, Job
from ourvidz_serverless.settings import Settings

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

OPERATIONS: tuple[Operation, ...] = get_args(Operation)

#: The operations that change the worker. With `ADMIN_REQUIRES_KEY` they need a key.
CHANGING = ("memory_load", "memory_unload", "force_unload", "predictive_load")


def _either(name: str) -> Any:
    return AliasChoices(AliasPath("config", name), name)


class AdminJob(Job):
    type: Literal["admin_utilities"]
    operation: Operation = Field(validation_alias=_either("operation"))
    target_worker: str | None = Field(
        None, max_length=128, validation_alias=_either("target_worker")
    )
    force: Flag = Field(False, validation_alias=_either("force"))
    # The job that `job_status` is about, and its user.
    of_job: str | None = Field(
        None, pattern=KEY_PATTERN, validation_alias=AliasPath("config", "job_id")
    )
    of_user: str | None = Field(
        None, pattern=KEY_PATTERN, validation_alias=AliasPath("config", "user_id")
    )

    @model_validator(mode="after")
    def _check_of_job(self) -> AdminJob:
        if self.operation == "job_status" and self.of_job is None:
            raise ValueError("config.job_id: Field required for job_status")
        return self

    @property
    def is_counted(self) -> bool:
        return False

    @property
    def target(self) -> str | None:
        """The name of a family or a model: `chat_worker` and `chat` are the same."""
        return self.target_worker and self.target_worker.removesuffix("_worker")


def parse(payload: Mapping[str, Any], settings: Settings) -> AdminJob:
    """The job of a payload; raises pydantic's ValidationError."""
    return AdminJob.model_validate(payload)
