"""The job types by name, each with its family. Nothing here needs a package: callers import it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ourvidz_serverless import families

#: Stands for the jobs about the worker itself, which no family serves.
ADMIN = "admin"

#: The specification's fourteen job types, with the family of each, or `ADMIN`.
FAMILY_OF = {name: family.name for name, family in families.FAMILY_OF.items()} | {
    "admin_utilities": ADMIN
}

#: Other names of job types, in the application's older payloads.
SYNONYMS = {"wan_video_fast": "video_fast", "wan_video_high": "video_high"}


def job_type(payload: Mapping[str, Any]) -> str | None:
    """The job type of a payload, from any of its fields; None if it has no known type.

    The specification's chat payloads have their type only in `config`.
    """
    config = payload.get("config")
    in_config = config.get("job_type") if isinstance(config, Mapping) else None
    asked = payload.get("type") or payload.get("job_type") or in_config
    name = SYNONYMS.get(asked, asked) if isinstance(asked, str) else None
    return name if name in FAMILY_OF else None
