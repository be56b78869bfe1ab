"""RunPod's REST API v2, as far as a deployment needs it.

Documented at docs.runpod.io/api-reference-v2, with an OpenAPI document; read in August 2026:

- `GET /v2/serverless`, `GET /v2/templates`, `GET /v2/catalog/gpus` list what the key may see, each
  wrapped in an object: `{"endpoints": [...]}`, `{"templates": [...]}`, `{"gpus": [...]}`.
- `POST` makes one and answers 201, `PATCH /v2/serverless/{id}` changes the fields of its body and
  answers 200. Unknown fields are refused. An endpoint takes a template's container at its making
  alone: later changes of the template do not reach it.
- `GET /v2/network-volumes/{id}` has the volume's data center.
- A failure is `application/problem+json` with `title`, `status`, `detail` and sometimes `errors`,
  one text for each invalid field, such as `$.workers.max: ...`. 429 has `Retry-After`.

Not documented: how the API spells paths in `errors` beyond `$`; whether the names of endpoints are
unique; a field for RunPod's cached models (the console's "Model").
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from ourvidz_serverless import __version__

#: The server of the OpenAPI document.
BASE_URL = "https://api.runpod.io"

#: The console's page with keys.
KEYS_PAGE = "https://www.console.runpod.io/user/settings"

#: RunPod's gateway is known to refuse the names of some HTTP libraries.
USER_AGENT = f"ourvidz-serverless/{__version__}"

TIMEOUT_S = 30.0

#: How often a request is sent that RunPod answers with 429, and the longest pause between.
TRIES = 4
LONGEST_PAUSE_S = 60.0


class DeployError(Exception):
    """Why nothing, or no more, is sent. The text is for a person, one line for each reason."""


class Api:
    """A connection to RunPod's API with one key, for use in a `with` statement.

    Every method raises DeployError when RunPod refuses, or does not answer. `secrets` are texts
    that no error shows.
    """

    def __init__(
        self,
        key: str,
        base_url: str = BASE_URL,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.secrets: list[str] = [key]
        self._sleep = sleep
        self._client = httpx2.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}", "User-Agent": USER_AGENT},
            timeout=TIMEOUT_S,
            # The key is sent to no other host.
            follow_redirects=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def endpoints(self) -> list[dict[str, Any]]:
        """All endpoints of the account."""
        return self._list("/v2/serverless", "endpoints")

    def templates(self) -> list[dict[str, Any]]:
        """All templates of the account."""
        return self._list("/v2/templates", "templates")

    def gpus(self) -> list[dict[str, Any]]:
        """RunPod's GPU types, each with its `pool`, `memory` in GB and `price` by the hour."""
        return self._list("/v2/catalog/gpus", "gpus")

    def network_volume(self, id: str) -> dict[str, Any] | None:
        """A network volume, or None if there is none with this id."""
        answer = self._send("GET", f"/v2/network-volumes/{quote(id, safe='')}", None)
        return None if answer.status_code == 404 else self._document(answer)

    def create(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make a `serverless` endpoint or one of the `templates`."""
        return self._document(self._send("POST", f"/v2/{kind}", body))

    def update(self, kind: str, id: str, body: dict[str, Any]) -> dict[str, Any]:
        """Change the given fields of one."""
        return self._document(self._send("PATCH", f"/v2/{kind}/{id}", body))

    def _list(self, path: str, name: str) -> list[dict[str, Any]]:
        found = self._document(self._send("GET", path, None)).get(name)
        if not isinstance(found, list):
            raise DeployError(f"RunPod's answer to GET {path} has no list of {name}")
        return found

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx2.Response:
        """The answer to a request. It is sent again only after a 429, when nothing was done."""
        for left in reversed(range(TRIES)):
            try:
                answer = self._client.request(method, path, json=body)
            except httpx2.HTTPError as exc:
                raise DeployError(
                    f"RunPod did not answer {method} {path} ({type(exc).__name__}). "
                    "Run the command again: it continues from what there is by then."
                ) from None
            if answer.status_code != 429 or not left:
                break
            self._sleep(_pause(answer.headers.get("Retry-After", "")))
        return answer

    def _document(self, answer: httpx2.Response) -> dict[str, Any]:
        try:
            document = answer.json()
        except ValueError:
            document = None
        if answer.is_success and isinstance(document, dict):
            return document
        problem = document if isinstance(document, dict) else {}
        raise DeployError("\n".join(map(self._without_secrets, _lines(answer, problem))))

    def _without_secrets(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def _pause(retry_after: str) -> float:
    """Seconds to wait, by the answer's header."""
    return min(float(retry_after), LONGEST_PAUSE_S) if retry_after.isdigit() else 1.0


def _lines(answer: httpx2.Response, problem: dict[str, Any]) -> Iterable[str]:
    """What an answer's problem document says, one line for each field."""
    status = answer.status_code
    request = f"{answer.request.method} {answer.request.url.path}"
    if status == 401:
        yield f"RUNPOD_API_KEY: RunPod does not accept this key. Make another one: {KEYS_PAGE}"
    elif status == 403 and problem:
        yield f"RUNPOD_API_KEY: this key may not {request}. Give it Read/Write: {KEYS_PAGE}"
    else:
        detail = problem.get("detail") or problem.get("title") or "no reason"
        yield f"RunPod refused {request} ({status}): {detail}"
        yield from map(by_option, map(str, problem.get("errors") or ()))


#: The option that sets a field of the API.
OPTIONS = {
    "name": "--name",
    "image": "--image",
    "disk": "--disk",
    "env": "--env",
    "registry": "--registry",
    "gpu.pools": "--gpu",
    "gpu.excludedTypes": "--exclude-gpu",
    "gpu.count": "--gpu-count",
    "gpu.allowedCudaVersions": "--cuda",
    "gpu.minCudaVersion": "--min-cuda",
    "workers.min": "--min-workers",
    "workers.max": "--max-workers",
    "workers.idleTimeout": "--idle-timeout",
    "scaling": "--queue-delay or --requests-per-worker",
    "timeout": "--execution-timeout",
    "flashboot": "--flashboot",
    "networkVolumes": "--network-volume",
    "dataCenterIds": "--data-center",
}


def by_option(error: str) -> str:
    """An error about a field of the API, as one about the option that sets the field.

    `$.workers.max: must be ...` becomes `--max-workers: must be ...`. An error in another form
    stays as it is.
    """
    path, _, reason = error.partition(":")
    field = re.sub(r"\[\d+\]|\.\d+", "", path).removeprefix("$").strip("./ ").replace("/", ".")
    option = next((name for key, name in OPTIONS.items() if f"{field}.".startswith(f"{key}.")), "")
    return f"{option}:{reason}" if option and reason else error
