"""docs/integrate.md: its snippets equal their files, and the files run in real Deno."""

import json
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from builder.contract import FOLDER
from ourvidz_serverless.serving.http.routes import LONG_REPLY_TOKENS
from ourvidz_serverless.settings import Settings
from tests.clients.test_redis_bridge import accepted, bridged, env_of, rest, wait_for_jobs
from tests.fakes.local_worker import chat_payload, sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.javascript import DENO, EXAMPLES, deno_environment, edge_function, url_of
from tests.servers.local_server import Answer, LocalServer, Request, json_answer
from tests.servers.redis import RedisRestServer, RedisServer
from tests.servers.runpod import Platform

GUIDE = (ROOT / "docs/integrate.md").read_text()


def snippets() -> Iterator[tuple[Path, str]]:
    """Each snippet of TypeScript, with the example file that the text names before it."""
    for block in re.finditer(r"^```ts\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        named = re.findall(r"/examples/([\w-]+\.ts)\)", GUIDE[: block.start()])
        yield EXAMPLES / named[-1], block[1]


SNIPPETS = list(snippets())


@pytest.mark.parametrize(("file", "snippet"), SNIPPETS, ids=[file.stem for file, _ in SNIPPETS])
def test_a_snippet_of_the_guide_equals_its_file(file: Path, snippet: str) -> None:
    lines, wanted = file.read_text().splitlines(), snippet.splitlines()
    windows = (lines[at : at + len(wanted)] for at in range(len(lines)))

    assert any(textwrap.dedent("\n".join(each)) == snippet.rstrip("\n") for each in windows)


def test_every_edge_function_is_in_the_guide() -> None:
    shown = {file.name for file, _ in SNIPPETS}

    assert shown == {"queue-job.ts", "job-callback.ts", "chat.ts", "move-jobs.ts", "worker.ts"}
    assert shown | {"lists.ts"} == {file.name for file in EXAMPLES.glob("*.ts")}


def test_the_guides_variables_of_the_bridge_are_settings() -> None:
    (script,) = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)

    names = set(re.findall(r"\b[A-Z_]{6,}\b", script))
    assert names and names <= {name.upper() for name in Settings.model_fields}
    assert script.splitlines()[-1] == ".venv/bin/python -m ourvidz_serverless bridge"


def test_every_link_in_the_guide_leads_somewhere() -> None:
    for name in ("integrate.md", "http.md"):
        page = (ROOT / "docs" / name).read_text()
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page):
            assert (ROOT / "docs" / link).resolve().exists(), link


# --- callers of the worker ---


class Gateway(LocalServer):
    """RunPod's gateway of a load-balancing endpoint; `passed` has the requests to the worker."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[Request] = []

    def answer(self, request: Request) -> Answer:
        if request.headers.get("Authorization") != "Bearer rpa-key":
            return json_answer({"error": "unauthorized"}, 401)
        self.passed.append(request)
        return json_answer({"status": "healthy"})


@pytest.mark.parametrize("key", ["worker-key", ""])
def test_a_request_as_in_the_guide_passes_the_gateway(key: str) -> None:
    allowed = ["--no-prompt", "--allow-net=127.0.0.1", "--allow-env"]
    with Gateway() as gateway:
        done = subprocess.run(
            [DENO, "run", *allowed, EXAMPLES / "worker.ts", gateway.url],
            capture_output=True,
            text=True,
            env=deno_environment(RUNPOD_API_KEY="rpa-key", WORKER_API_KEY=key),
            timeout=PATIENCE_S,
        )

    assert (done.returncode, json.loads(done.stdout)) == (0, {"status": "healthy"})
    (request,) = gateway.passed
    assert request.headers.get("X-API-Key", "") == key


def test_the_guides_token_counts_are_a_short_and_a_long_reply() -> None:
    ((long, short),) = re.findall(r"max_tokens: long_response \? (\d+) : (\d+)", GUIDE)

    assert int(short) <= LONG_REPLY_TOKENS < int(long)


# --- moving jobs to the endpoints, and back ---


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def rest_server(server: RedisServer) -> Iterator[RedisRestServer]:
    server.call("FLUSHALL")
    with RedisRestServer(server) as running:
        yield running


def listed(rest_server: RedisRestServer, queue: str) -> list[Any]:
    """The payloads in a list, the next one first."""
    return [json.loads(each) for each in rest_server.redis.call("LRANGE", queue, "0", "-1")]


def move(direction: str, rows: list[Any], env: dict[str, str]) -> list[Any]:
    """What `move-jobs.ts` prints for rows of the application's table."""
    allowed = ["--allow-net=127.0.0.1", "--allow-env", f"--allow-read={ROOT}"]
    done = subprocess.run(
        [DENO, "run", "--no-prompt", *allowed, EXAMPLES / "move-jobs.ts", direction],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        env=deno_environment(**env),
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    printed: list[Any] = json.loads(done.stdout)
    return printed


def test_a_job_of_a_family_that_has_not_moved_goes_through_its_list_and_the_bridge(
    scripted: Platform, rest_server: RedisRestServer
) -> None:
    env = env_of(scripted, rest(rest_server), MOVED_FAMILIES="chat")
    with edge_function("queue-job", **env) as function:
        picture = sdxl_payload(id="by-the-list")
        reply = chat_payload(id="moved")
        answers = [
            requests.post(url_of(function), json=job, timeout=PATIENCE_S).json()
            for job in (picture, reply)
        ]
    pushed = listed(rest_server, "sdxl_queue")
    with bridged(scripted, rest(rest_server)):
        wait_for_jobs(scripted, 1)

    # The application's pages read `jobId`.
    assert answers[0] == {"jobId": "by-the-list", "status": "queued"}
    assert (answers[1]["jobId"], answers[1]["runpod"]["endpoint"]) == ("moved", "chats")
    assert pushed == [picture]
    assert (accepted(scripted), accepted(scripted, "chats")) == (["by-the-list"], ["moved"])


def test_jobs_that_an_old_worker_left_behind_are_submitted_from_their_rows(
    scripted: Platform, rest_server: RedisRestServer
) -> None:
    kept = [json.loads(file.read_text())["input"] for file in sorted(FOLDER.glob("kept/*/*.json"))]
    rows = [{"payload": payload} for payload in kept]

    names = move("to-endpoints", rows, env_of(scripted, rest(rest_server)))

    assert [scripted.endpoint_of(name["id"]) for name in names] == [
        name["endpoint"] for name in names
    ]
    submitted = {job["input"]["id"] for name in names for job in scripted.queued(name["endpoint"])}
    assert {each.get("id") or each.get("job_id") for each in kept} - {None} <= submitted


def test_jobs_that_have_not_ended_are_pushed_back_to_the_lists_in_order(
    scripted: Platform, rest_server: RedisRestServer
) -> None:
    payloads = [sdxl_payload(id=f"job-{number}") for number in range(3)]
    names = [scripted.submit(payload, endpoint="pictures") for payload in payloads]
    scripted.cancel(names[1])
    rows = [
        {"payload": payload, "runpod": {"endpoint": "pictures", "id": name}}
        for payload, name in zip(payloads, names, strict=True)
    ]
    rows.append({"payload": sdxl_payload(id="still-in-its-list")})

    returned = move("to-lists", rows, env_of(scripted, rest(rest_server)))

    assert returned == ["job-0", "job-2"]
    assert listed(rest_server, "sdxl_queue") == [payloads[0], payloads[2]]
    assert scripted.queued("pictures") == []
