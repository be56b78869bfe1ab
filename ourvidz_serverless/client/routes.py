"""Which service gets a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import quote

from ourvidz_serverless.client.services import Connection, Queue, Service
from ourvidz_serverless.client.steps import RequestFailed, Steps
from ourvidz_serverless.job_types import ADMIN, FAMILY_OF, job_type, named_type

Payload = Mapping[str, Any]


class Routes(Protocol):
    """The services of a client. Each method raises ValueError if there is none."""

    def candidates(self, payload: Payload) -> Sequence[Service]:
        """The services that run a job."""
        ...

    def of_family(self, family: str | None) -> Sequence[Service]:
        """The services of a family, or all."""
        ...

    def named(self, name: str) -> Service:
        """The service with this name, which `SubmittedJob.endpoint` has."""
        ...


@dataclass(frozen=True, slots=True)
class OneService:
    """One server for all jobs."""

    service: Service

    def candidates(self, payload: Payload) -> Sequence[Service]:
        return (self.service,)

    def of_family(self, family: str | None) -> Sequence[Service]:
        return (self.service,)

    def named(self, name: str) -> Service:
        return self.service


class Endpoints:
    """RunPod's endpoints, by the family that each serves."""

    def __init__(self, endpoints: Mapping[str, str | Sequence[str]], to: Connection) -> None:
        self._ids = {
            family: (ids,) if isinstance(ids, str) else tuple(ids)
            for family, ids in endpoints.items()
            if ids
        }
        self._to = to

    def candidates(self, payload: Payload) -> Sequence[Service]:
        return self.of_family(self.family_of(payload))

    def of_family(self, family: str | None) -> Sequence[Service]:
        named = self._ids if family is None else [family]
        found = [id for name in named for id in self._ids.get(name, ())]
        if not found:
            raise ValueError(f"no endpoint serves {family or 'any family'}")
        return [self.named(id) for id in dict.fromkeys(found)]

    def named(self, name: str) -> Service:
        return Queue(name, replace(self._to, url=f"{self._to.url}/{quote(name, '')}"))

    def family_of(self, payload: Payload) -> str:
        """The family whose endpoint gets a job; raises ValueError for an unknown type.

        A job that names no type goes to the endpoint of the only family, if it is one.
        """
        family = family_of(payload, [name for name in self._ids if name != ADMIN])
        if family != ADMIN or ADMIN in self._ids:
            return family
        # Every worker runs admin jobs: the target's family gets the job, or else the first family.
        config = payload.get("config")
        in_config = config.get("target_worker") if isinstance(config, Mapping) else None
        target = str(in_config or payload.get("target_worker")).removesuffix("_worker")
        return target if target in self._ids else next(iter(self._ids), family)


def family_of(payload: Payload, served: Sequence[str]) -> str:
    """The family of a job; raises ValueError for an unknown type, or none for several families."""
    name = job_type(payload, served)
    if name is None:
        asked = named_type(payload)
        raise ValueError(
            "type: needed by a client of several families"
            if asked is None
            else f"{asked} is no job type"
        )
    return FAMILY_OF[name]


def least_loaded(services: Sequence[Service]) -> Steps[Service]:
    """The service with the fewest jobs for each of its workers. A single one is not asked."""
    if len(services) == 1:
        return services[0]
    loads = []
    for each in services:
        loads.append((yield from _load(each)))
    return services[loads.index(min(loads))]


def _load(service: Service) -> Steps[float]:
    """A service's jobs for each of its workers; infinite if unknown."""
    try:
        health = yield from service.health()
    except RequestFailed:
        return float("inf")
    jobs, workers = health["jobs"], health["workers"]
    waiting: float = jobs["inQueue"] + jobs["inProgress"]
    return waiting / max(int(workers.get("running", 0) + workers.get("idle", 0)), 1)
