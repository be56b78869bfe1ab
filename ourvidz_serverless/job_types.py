"""The job types by name, each with its family. Nothing here needs a package: callers import it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def job_type(payload: Mapping[str, Any], served: Sequence[str] = ()) -> str | None:
    """The job type of a payload; None if it names an unknown type.

    A payload that names no type has the one of `type_of_unnamed`.
    """
    named = named_type(payload)
    if named is None:
        return type_of_unnamed(served)
    name = SYNONYMS.get(named, named) if isinstance(named, str) else None
    return name if name in FAMILY_OF else None


def named_type(payload: Mapping[str, Any]) -> object:
    """What a payload names as its type, in the first of three fields; None if it names nothing.

    The specification's chat payloads have their type only in `config`.
    """
    config = payload.get("config")
    in_config = config.get("job_type") if isinstance(config, Mapping) else None
    return payload.get("type") or payload.get("job_type") or in_config or None


def type_of_unnamed(served: Sequence[str]) -> str | None:
    """The type of a job that names none, by the families that serve it; None for several."""
    return families.FAMILIES[served[0]].type_of_unnamed if len(served) == 1 else None
