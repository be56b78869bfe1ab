"""What is at RunPod, what shall be there, and the difference, as texts and as requests.

An endpoint's record and a template's are dicts as the API nests them. Only the fields below are
compared and sent: what somebody has set elsewhere stays as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.deploy import differences
from builder.deploy.api import Api, DeployError
from builder.deploy.differences import Difference
from builder.deploy.options import Options
from builder.presets import CUDA_VERSIONS, Preset

#: The fields that an endpoint and a template share.
CONTAINER = ("image", "disk", "registry", "ports", "env")

#: The fields of an endpoint that are compared, in the order in which they are shown.
ENDPOINT = (
    *("image", "registry", "gpu", "workers", "scaling", "timeout", "flashboot"),
    *("disk", "networkVolumes", "dataCenterIds", "ports", "env"),
)

#: A template's other fields. Its SSH and Jupyter are for pods.
TEMPLATE = {"serverless": True, "startSsh": False, "startJupyter": False}

#: The HTTP port of a load-balancing endpoint, unless PORT names another one.
PORT = "8000"

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A record that will be made, or changed. `was` is None where there is none yet."""

    kind: str
    name: str
    id: str | None
    was: Tree | None
    will_be: Tree

    @property
    def body(self) -> Tree:
        """The request's body: the whole record of a new one, else the groups that differ."""
        if self.was is None:
            return self.will_be
        was = self.was
        return {
            name: value for name, value in self.will_be.items() if value != was.get(name, _ABSENT)
        }

    @property
    def differences(self) -> list[Difference]:
        """The fields that differ, in the order of `ENDPOINT`."""
        return differences.between(self.was or {}, self.will_be, ENDPOINT)


_ABSENT = object()


def find(records: list[Tree], name: str, what: str) -> Tree | None:
    """The record with a name, or None. Raises DeployError for several.

    RunPod's older interfaces write `-fb` behind the name of an endpoint with FlashBoot.
    """
    found = [each for each in records if re.sub(r"\s*-fb$", "", each.get("name", "")) == name]
    if len(found) > 1:
        ids = ", ".join(str(each["id"]) for each in found)
        raise DeployError(f"--name: {len(found)} {what}s are called {name}: {ids}. Rename others.")
    return found[0] if found else None


def endpoint_change(options: Options, there: Tree | None) -> Change:
    """The change of an endpoint: from the preset if there is none yet, else of what is named."""
    if there and not there.get("gpu"):
        raise DeployError(f"--name: {options.name} is an endpoint without GPUs; use another name")
    was = None if there is None else _known(there, ENDPOINT)
    will_be = _fresh(options.preset) if was is None else copy.deepcopy(was)
    env = {**will_be.get("env", {}), **options.env}
    will_be["env"] = {name: value for name, value in env.items() if name not in options.unset}
    _for_its_type(will_be, there)
    _put(will_be, options.fields)
    if "image" in options.fields and "minCudaVersion" not in options.fields.get("gpu", {}):
        _fit_cuda(will_be)
    _check(will_be, options)
    return Change("serverless", options.name, there["id"] if there else None, was, will_be)


def template_change(name: str, endpoint: Tree, there: Tree | None) -> Change:
    """The change of the template: it has the container that its endpoint shall have."""
    will_be = {**{each: endpoint[each] for each in CONTAINER if each in endpoint}, **TEMPLATE}
    was = None if there is None else _known(there, tuple(will_be))
    return Change("templates", name, there["id"] if there else None, was, will_be)


def apply_template(api: Api, change: Change) -> Tree:
    """Make or change the template, and return it as RunPod has it then."""
    if change.id is not None:
        return api.update(change.kind, change.id, change.body)
    return api.create(change.kind, {"name": change.name, **change.body})


def apply_endpoint(api: Api, change: Change, template_id: str) -> Tree:
    """Make the endpoint of the template, or change it, and return it as RunPod has it then."""
    if change.id is not None:
        return api.update(change.kind, change.id, _cleared(change.body, change.was or {}))
    own = {name: value for name, value in change.body.items() if name not in CONTAINER}
    type = kind_of(change.will_be)
    body = {"name": change.name, "type": type, "templateId": template_id, **_without_empty(own)}
    return api.create(change.kind, body)


def _fresh(preset: Preset) -> Tree:
    """A new endpoint of a preset, before anything is named. Workers and timeouts are RunPod's
    defaults, except that a job may take as long as the worker's JOB_TIMEOUT_S lets it.
    """
    return {
        "disk": preset.disk_gb,
        "env": preset.env,
        "gpu": {
            "pools": list(preset.pools),
            "count": 1,
            "allowedCudaVersions": [],
            "minCudaVersion": CUDA_VERSIONS[0],
        },
        "workers": {"min": 0, "max": 3, "idleTimeout": 10},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        "timeout": 600_000,
        "flashboot": "FLASHBOOT",
    }


def kind_of(endpoint: Tree) -> str:
    """The type of an endpoint whose worker has this environment."""
    return "LOAD_BALANCER" if endpoint["env"].get("SERVE") == "http" else "QUEUE"


def _for_its_type(endpoint: Tree, there: Tree | None) -> None:
    """What a load-balancing endpoint needs. Raises DeployError if the type would change."""
    kind = kind_of(endpoint)
    if there and there.get("type", kind) != kind:
        raise DeployError("--env SERVE: an endpoint's type cannot change; use another --name")
    if kind == "LOAD_BALANCER":
        port = endpoint["env"].setdefault("PORT", PORT)
        endpoint["ports"] = [f"{port}/http"]
        if there is None:
            endpoint["scaling"] = {"type": "REQUEST_COUNT", "requestCount": 4}


def _put(into: Tree, fields: Mapping[str, Any]) -> None:
    """Set fields, and those of nested groups; a scaling is replaced as a whole."""
    for name, value in fields.items():
        if isinstance(value, dict) and name != "scaling" and name in into:
            _put(into[name], value)
        else:
            into[name] = value
    if "pools" in fields and "excludedTypes" not in fields:
        into.pop("excludedTypes", None)


def _fit_cuda(endpoint: Tree) -> None:
    """Ask for hosts that run the image, unless somebody has listed their versions.

    The tag of an image for another CUDA version than the usual one ends with `-cuda12.8` or so
    (docker-bake.hcl).
    """
    named = re.search(r"-cuda(\d+\.\d+)$", endpoint["image"].partition("@")[0])
    if not endpoint["gpu"].get("allowedCudaVersions"):
        endpoint["gpu"]["minCudaVersion"] = named[1] if named else CUDA_VERSIONS[0]


def _check(endpoint: Tree, options: Options) -> None:
    """Raise DeployError if the fields do not fit together."""
    if not endpoint.get("image"):
        raise DeployError(f"--image: needed, since there is no endpoint {options.name} yet")
    _check_scaling(endpoint, options)
    job_timeout = endpoint["env"].get("JOB_TIMEOUT_S", "570")
    is_number = re.fullmatch(r"\d+(\.\d+)?", job_timeout)
    if is_number and endpoint["timeout"] <= float(job_timeout) * 1000:
        raise DeployError(
            f"--execution-timeout: {endpoint['timeout'] / 1000:g} is not more than JOB_TIMEOUT_S, "
            f"{job_timeout}, so RunPod would end jobs before the worker can report them"
        )


def _check_scaling(endpoint: Tree, options: Options) -> None:
    workers, by_requests = endpoint["workers"], endpoint["scaling"]["type"] == "REQUEST_COUNT"
    if workers["min"] > workers["max"]:
        raise DeployError(
            f"--min-workers: {workers['min']} is more than --max-workers, {workers['max']}"
        )
    if kind_of(endpoint) == "LOAD_BALANCER" and not by_requests:
        raise DeployError("--queue-delay: a load-balancing endpoint has no queue")
    if by_requests and kind_of(endpoint) == "QUEUE":
        if "idleTimeout" in options.fields.get("workers", {}):
            raise DeployError("--idle-timeout: RunPod has none with --requests-per-worker")
        workers.pop("idleTimeout", None)


def _known(there: Tree, fields: tuple[str, ...]) -> Tree:
    """The fields of a record, without nulls. `""` is the API's word for no lowest CUDA version."""
    known = {name: copy.deepcopy(there[name]) for name in fields if there.get(name) is not None}
    if "gpu" in known:
        known["gpu"]["minCudaVersion"] = known["gpu"].get("minCudaVersion") or ""
    return known


def _without_empty(body: Tree) -> Tree:
    """The body of a new endpoint: there an empty lowest CUDA version is none."""
    body = copy.deepcopy(body)
    if body.get("gpu", {}).get("minCudaVersion") == "":
        del body["gpu"]["minCudaVersion"]
    return body


def _cleared(body: Tree, was: Tree) -> Tree:
    """The body of a change. A lowest CUDA version is cleared only where there was one."""
    before = was.get("gpu", {}).get("minCudaVersion")
    return body if before else _without_empty(body)
