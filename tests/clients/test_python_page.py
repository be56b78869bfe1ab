"""docs/python-client.md: its snippets run as they stand, and its tables name what there is."""

import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ourvidz_serverless import client as package
from ourvidz_serverless.signatures import signatures
from tests.clients.python_clients import Server, served
from tests.fakes.tiny_chat import tiny_folder
from tests.files import ROOT

PAGE = (ROOT / "docs/python-client.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {"CHAT_INSTRUCT_MODEL": tiny_folder(tmp_path_factory.mktemp("chat"))}
    with served("RunPod's queue", tmp_path_factory.mktemp("outputs"), env) as running:
        yield running


def adapted(snippet: str, server: Server) -> str:
    """A snippet with the server's endpoints, keys and places, and with small pictures."""
    key = (
        f'api_key="{server.caller_key}", base_url="{server.url}", worker_key="{server.worker_key}"'
    )
    for old, new in {
        '"abc123"': '"local"',
        '"def456"': '"local"',
        'api_key="rpa_..."': key,
        '"https://assets.example/bucket"': f'Path("{server.outputs}")',
        '"config": {': '"config": {"resolution": "64x64", ',
        '"prompt": "green hills"}': '"prompt": "green hills", "config": {"resolution": "64x64"}}',
        '"prompt": "a grey sea"}': '"prompt": "a sea", "config": {"resolution": "64x64"}}',
    }.items():
        snippet = snippet.replace(old, new)
    return snippet


def test_the_snippets_of_the_page_run_one_after_another(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "orange").save("photo.jpg")
    names: dict[str, Any] = {"Path": Path}

    for snippet in SNIPPETS:
        exec(compile(adapted(snippet, server), "docs/python-client.md", "exec"), names)

    seeds = [each["assets"][0]["metadata"]["seed"] for each in names["documents"]]
    assert seeds == [1, 2]
    assert names["document"]["metadata"]["reference_mode"] == "modify"
    assert [path.as_posix() for path in names["paths"]] == ["pictures/0.png"]
    body = b'{"job_id": "job-1", "status": "completed"}'
    headers = {"webhook-id": "1"} | signatures("callback-secret", body, "1", int(time.time()))
    assert names["receive"](headers, body) == 200
    assert names["receive"](headers, body + b" ") == 401
    assert "user-1/" in capsys.readouterr().out


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}


def test_the_page_names_every_operation() -> None:
    operations = public(package.Client) - {"close"} | public(package.SubmittedJob) - {"endpoint"}

    assert {
        name for name in operations if f"{name}(" not in PAGE and f"`{name}`" not in PAGE
    } == set()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (package.Client, package.AsyncClient),
        (package.SubmittedJob, package.AsyncSubmittedJob),
    ],
)
def test_both_clients_have_the_same_methods(one: type, other: type) -> None:
    def parameters(kind: type) -> dict[str, list[str]]:
        methods = {name: getattr(kind, name) for name in public(kind)}
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in methods.items()
            if callable(method)
        }

    assert parameters(one) == parameters(other)
