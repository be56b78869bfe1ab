"""RunPod's REST API v2 as it is documented, for deployments (docs.runpod.io/api-reference-v2).

It keeps endpoints and templates in memory. Request bodies are validated by the fields, bounds and
rules of RunPod's OpenAPI document; a violation is answered as `application/problem+json`. RunPod
does not document the form of the texts in `errors`; here they are `$.field: reason`.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tests.servers.local_server import Answer, LocalServer, Request

KEY = "rpa_LOCALKEY"

Version = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
NoneOrVersion = Annotated[str, Field(pattern=r"^$|^\d+\.\d+$")]
TypeId = Annotated[str, Field(pattern=r"^\s*[^-\s]")]
Flashboot = Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Container(Body):
    args: str | None = None
    disk: int | None = Field(None, ge=1)
    env: dict[str, str] | None = None
    image: str | None = None
    ports: list[str] | None = None
    registry: str | None = None


class Gpu(Body):
    pools: list[str] = Field(min_length=1)
    excludedTypes: list[TypeId] | None = None
    count: int = Field(1, ge=1)
    allowedCudaVersions: list[Version] | None = None
    minCudaVersion: Version | None = None


class GpuUpdate(Body):
    pools: list[str] | None = Field(None, min_length=1)
    excludedTypes: list[TypeId] | None = None
    count: int | None = Field(None, ge=1)
    allowedCudaVersions: list[Version] | None = None
    minCudaVersion: NoneOrVersion | None = None

    @model_validator(mode="after")
    def _one_selection(self) -> "GpuUpdate":
        if self.excludedTypes is not None and self.pools is None:
            raise ValueError("excludedTypes requires pools")
        return self


class Workers(Body):
    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)
    idleTimeout: int | None = Field(None, ge=1, le=3600)


class QueueDelay(Body):
    type: Literal["QUEUE_DELAY"]
    queueDelay: float = Field(ge=0.5)


class RequestCount(Body):
    type: Literal["REQUEST_COUNT"]
    requestCount: int = Field(ge=1)


Scaling = Annotated[QueueDelay | RequestCount, Field(discriminator="type")]


class CreateEndpoint(Container):
    name: str = Field(min_length=1)
    type: Literal["QUEUE", "LOAD_BALANCER"]
    scaling: Scaling
    gpu: Gpu
    dataCenterIds: list[str] | None = None
    flashboot: Flashboot = "OFF"
    networkVolumes: list[str] | None = None
    templateId: str | None = Field(None, min_length=1)
    timeout: int = 300_000
    workers: Workers | None = None


class UpdateEndpoint(Container):
    name: str | None = Field(None, min_length=1)
    scaling: Scaling | None = None
    gpu: GpuUpdate | None = None
    dataCenterIds: list[str] | None = None
    flashboot: Flashboot | None = None
    networkVolumes: list[str] | None = None
    templateId: str | None = None
    timeout: int | None = None
    workers: Workers | None = None


class CreateTemplate(Container):
    name: str = Field(min_length=1)
    image: str
    allowedCudaVersions: list[Version] | None = None
    category: Literal["CPU", "NVIDIA", "AMD"] = "NVIDIA"
    public: bool = False
    serverless: bool = False
    startJupyter: bool = True
    startSsh: bool = True


class UpdateTemplate(CreateTemplate):
    name: str | None = Field(None, min_length=1)  # type: ignore[assignment]
    image: str | None = None  # type: ignore[assignment]


def gpu(id: str, pool: str | None, memory: int, price: float | None) -> dict[str, Any]:
    """A GPU type of the catalog."""
    listed = {"secure": 0.5, "community": 0.4, **({"serverless": price} if price else {})}
    return {
        "id": id,
        "name": id.removeprefix("NVIDIA ").removeprefix("GeForce "),
        "pool": pool,
        "manufacturer": "NVIDIA",
        "memory": memory,
        "secure": True,
        "community": True,
        "price": listed,
        "maxCount": {"secure": 8, "community": 8},
    }


CATALOG = (
    gpu("NVIDIA GeForce RTX 4090", "ADA_24", 24, 1.1),
    gpu("NVIDIA L4", "AMPERE_24", 24, 0.69),
    gpu("NVIDIA RTX A5000", "AMPERE_24", 24, 0.69),
    gpu("NVIDIA L40S", "ADA_48_PRO", 48, 1.9),
    gpu("NVIDIA RTX A6000", "AMPERE_48", 48, 1.22),
    gpu("NVIDIA H200", "HOPPER_141", 141, 5.58),
    gpu("NVIDIA GeForce RTX 3070", None, 8, None),
)


class RunpodApi(LocalServer):
    """The API of one account, whose key is `KEY`. `requests` holds what changed something."""

    def __init__(self) -> None:
        super().__init__()
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.templates: dict[str, dict[str, Any]] = {}
        self.volumes = {"vol1": {"id": "vol1", "name": "weights", "dataCenter": "EU-RO-1"}}
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: list[str] = []

    def answer(self, request: Request) -> Answer:
        with self.changed:
            self.headers.append(request.headers["Authorization"])
            if request.headers["Authorization"] != f"Bearer {KEY}":
                return problem(401, "Unauthorized", "invalid bearer token")
            try:
                status, document = self._handle(request)
            except Refused as refused:
                return refused.answer
            if request.method != "GET":
                self.requests.append((request.method, request.path, json.loads(request.body)))
            return Answer(
                status, json.dumps(document).encode(), {"Content-Type": "application/json"}
            )

    def _handle(self, request: Request) -> tuple[int, Any]:
        match request.method, request.path.strip("/").split("/")[1:]:
            case "GET", ["catalog", "gpus"]:
                return 200, {"gpus": list(CATALOG)}
            case "GET", ["network-volumes", id]:
                return 200, found(self.volumes, id)
            case "GET", ["serverless"]:
                return 200, {"endpoints": list(self.endpoints.values())}
            case "GET", ["templates"]:
                return 200, {"templates": list(self.templates.values())}
            case "POST", ["serverless"]:
                return 201, self._create_endpoint(valid(CreateEndpoint, request))
            case "PATCH", ["serverless", id]:
                endpoint = found(self.endpoints, id)
                return 200, self._update_endpoint(endpoint, valid(UpdateEndpoint, request))
            case "POST", ["templates"]:
                return 201, self._create_template(valid(CreateTemplate, request))
            case "PATCH", ["templates", id]:
                template = found(self.templates, id)
                template.update(valid(UpdateTemplate, request))
                return 200, template
        raise Refused(404, "Not Found", "no such path")

    def _create_template(self, body: dict[str, Any]) -> dict[str, Any]:
        if any(each["name"] == body["name"] for each in self.templates.values()):
            raise Refused(400, "Bad Request", "template name must be unique")
        shared = {"args": "", "disk": 20, "ports": [], "env": {}, "registry": None, "mounts": {}}
        shared |= {"category": "NVIDIA", "public": False, "serverless": False}
        shared |= {"startSsh": True, "startJupyter": True, "allowedCudaVersions": []}
        id = f"tpl{len(self.templates) + 1}"
        self.templates[id] = {"id": id, **shared, **body}
        return self.templates[id]

    def _create_endpoint(self, body: dict[str, Any]) -> dict[str, Any]:
        container: dict[str, Any] = {"args": "", "ports": [], "env": {}, "registry": None}
        if template_id := body.pop("templateId", None):
            template = found(self.templates, template_id)
            if not template["serverless"]:
                raise Refused(422, "Unprocessable Entity", "not a serverless template")
            names = ("image", "args", "disk", "ports", "env", "registry")
            container |= {name: template[name] for name in names}
        elif "image" not in body:
            raise Refused(422, "Unprocessable Entity", "Request validation failed.", ["$.image"])
        body["env"] = {**container["env"], **body.get("env", {})}
        check_pools(body["gpu"])
        id = f"ep{len(self.endpoints) + 1}"
        endpoint = {
            "id": id,
            "disk": 20,
            "dataCenterIds": [],
            "networkVolumes": [],
            "flashboot": "OFF",
            "timeout": 300_000,
            "createdAt": "2026-06-01T12:00:00Z",
            **container,
            **body,
            "workers": {"min": 0, "max": 3, "idleTimeout": 10, **body.get("workers", {})},
            "gpu": {"count": 1, "allowedCudaVersions": [], "minCudaVersion": None, **body["gpu"]},
            "requestUrls": request_urls(id, body["type"]),
        }
        check_scaling(endpoint, body.get("workers", {}))
        self.endpoints[id] = endpoint
        return endpoint

    def _update_endpoint(self, endpoint: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        gpu = {**endpoint["gpu"], **body.pop("gpu", {})}
        gpu["minCudaVersion"] = gpu["minCudaVersion"] or None
        check_pools(gpu)
        given = body.pop("workers", {})
        workers = {**endpoint["workers"], **given}
        updated = {**endpoint, **body, "gpu": gpu, "workers": workers}
        check_scaling(updated, given)
        endpoint.update(updated)
        return endpoint


def request_urls(id: str, type: str) -> dict[str, str]:
    if type == "LOAD_BALANCER":
        base = f"https://{id}.api.runpod.ai"
        return {"base": base, "health": f"{base}/ping"}
    paths = {"run": "run", "runSync": "runsync", "purgeQueue": "purge-queue", "health": "health"}
    paths |= {name: f"{name}/{{job_id}}" for name in ("status", "stream", "cancel", "retry")}
    return {name: f"https://api.runpod.ai/v2/{id}/{path}" for name, path in paths.items()}


def check_pools(gpu: dict[str, Any]) -> None:
    pools = {each["pool"] for each in CATALOG}
    if set(gpu["pools"]) - pools:
        raise Refused(400, "Bad Request", "unknown GPU pool")
    if gpu.get("allowedCudaVersions") and gpu.get("minCudaVersion"):
        raise Refused(400, "Bad Request", "allowedCudaVersions and minCudaVersion are exclusive")


def check_scaling(endpoint: dict[str, Any], given: dict[str, Any]) -> None:
    """The rules of `EndpointScaling` and of `EndpointWorkers.idleTimeout`."""
    by_requests = endpoint["scaling"]["type"] == "REQUEST_COUNT"
    if endpoint["type"] == "LOAD_BALANCER" and not by_requests:
        raise Refused(422, "Unprocessable Entity", "scaling must be REQUEST_COUNT")
    if endpoint["type"] == "QUEUE" and by_requests:
        if "idleTimeout" in given:
            raise Refused(400, "Bad Request", "idleTimeout does not apply to requestCount")
        endpoint["workers"].pop("idleTimeout", None)


class Refused(Exception):
    def __init__(self, status: int, title: str, detail: str, errors: list[str] | None = None):
        super().__init__(detail)
        self.answer = problem(status, title, detail, errors)


def problem(status: int, title: str, detail: str, errors: list[str] | None = None) -> Answer:
    """A failure in the form of RFC 9457."""
    document: dict[str, Any] = {"title": title, "status": status, "detail": detail}
    if errors:
        document["errors"] = errors
    body = json.dumps(document).encode()
    return Answer(status, body, {"Content-Type": "application/problem+json"})


def found(records: dict[str, dict[str, Any]], id: str) -> dict[str, Any]:
    if id not in records:
        raise Refused(404, "Not Found", "resource not found")
    return records[id]


def valid(kind: type[Body], request: Request) -> dict[str, Any]:
    """A body's given fields. A wrong one is refused with an error for each field."""
    try:
        body = kind.model_validate_json(request.body)
    except ValidationError as exc:
        errors = [f"{_path(each['loc'])}: {each['msg']}" for each in exc.errors()]
        raise Refused(422, "Unprocessable Entity", "Request validation failed.", errors) from None
    return body.model_dump(exclude_unset=True)


def _path(loc: tuple[Any, ...]) -> str:
    # pydantic names the chosen kind of a union, such as QUEUE_DELAY.
    parts = [str(part) for part in loc if not re.fullmatch("[A-Z_]+", str(part))]
    return ".".join(["$", *parts])
