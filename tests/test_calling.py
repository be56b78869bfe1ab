"""docs/calling.md: its commands run as they are written, and its answers are those that come.

The example of docs/admin.md is tested here too.

The commands go to the emulated platform, where real workers serve the pocket models. An answer is
compared value by value, except for what differs between two runs: ids, times, versions.
"""

import base64
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from jsonschema import Draft202012Validator as Validator

from ourvidz_serverless.models.chat.loader import POCKET as POCKET_CHAT
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import HANDLER, LOCAL_API, POCKET, served_at, start
from tests.servers.runpod import Platform
from tests.servers.supabase import CallbackReceiver, SupabaseStorage
from tests.servers.worker_process import WorkerProcess

PAGE = (ROOT / "docs/calling.md").read_text()

#: The address of RunPod's API in the commands.
RUNPOD = "https://api.runpod.ai/v2"

#: The sections with examples, and the family whose worker answers.
SECTIONS = {
    "A picture": "sdxl",
    "A chat": "chat",
    "A video": "wan",
    "A question to the worker": "sdxl",
}

#: Values that differ from run to run, or from machine to machine, by name.
VARYING = {
    *("id", "worker_id", "worker", "runpod", "torch", "diffusers", "transformers"),
    *("processing_time", "wait", "fetch", "generate", "deliver", "file_size_bytes", "uptime"),
    *("step", "progress", "remaining_s", "time_to_first_token", "tokens_per_second", "delta"),
    *("processing", "completed", "failed"),
    # The memory of the machine, and what its other programs use.
    *("memory", "available_vram", "pressure", "pressure_level", "recommendations"),
    "working_memory",
}


#: The first progress of a job has no estimate yet.
OPTIONAL = {"remaining_s"}


@dataclass(frozen=True)
class Example:
    """A command of the page, and the answers that the page shows after it."""

    section: str
    command: str
    answers: list[Any]

    @property
    def payload(self) -> Any:
        """What the command submits; None for a command that submits nothing."""
        body = re.search(r"-d '(.*)'", self.command, re.DOTALL)
        return json.loads(body[1])["input"] if body else None


def blocks(text: str) -> list[tuple[str, str]]:
    """The commands and the answers of a text, each with `sh` or `json`."""
    return re.findall(r"^```(sh|json)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def examples(section: str) -> list[Example]:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found: list[Example] = []
    for language, block in blocks(text):
        if language == "sh":
            found.append(Example(section, block, []))
        else:
            found[-1].answers.append(json.loads(block))
    return found


def assert_like(shown: Any, real: Any, name: str = "") -> None:
    """Both have the same keys, and the same values unless these vary."""
    if name in VARYING:
        assert isinstance(real, (int, float)) == isinstance(shown, (int, float)), name
    elif isinstance(shown, dict) and isinstance(real, dict):
        assert shown.keys() - OPTIONAL == real.keys() - OPTIONAL, name
        for key in shown.keys() & real.keys():
            assert_like(shown[key], real[key], key)
    elif isinstance(shown, list) and isinstance(real, list):
        assert len(shown) == len(real), name
        for one, other in zip(shown, real, strict=True):
            assert_like(one, other, name)
    elif name in ("url", "thumbnail_url") and shown.startswith("https://"):
        assert urlsplit(real).path == urlsplit(shown).path
    elif name == "url" and shown.endswith("..."):
        assert real.startswith(shown.removesuffix("..."))
    else:
        assert real == shown, name


@dataclass
class Caller:
    """A caller who copies the page's commands, with an endpoint for each family."""

    platform: Platform
    supabase: SupabaseStorage
    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, example: Example) -> str:
        """Run a command and return what it prints."""
        env = {
            **os.environ,
            "RUNPOD_API_KEY": self.platform.caller_key,
            "SUPABASE_URL": self.supabase.url,
            "SUPABASE_SERVICE_KEY": self.supabase.service_key,
            **{f"{family.upper()}_ENDPOINT_ID": family for family in ("sdxl", "chat", "wan")},
            **self.env,
        }
        command = example.command.replace(RUNPOD, self.platform.caller_url)
        done = subprocess.run(
            ["bash", "-euc", command],
            env=env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fetched(self, example: Example) -> bytes:
        """The file that a command writes."""
        self.run(example)
        return (self.folder / example.command.split("--output ")[1].strip()).read_bytes()

    def stored(self) -> list[bytes]:
        return [body for body, _ in self.supabase.objects.values()]

    def answers(self, example: Example) -> list[Any]:
        """The answers to a command that submits, polls, streams or cancels, in their order."""
        if "/stream/" in example.command:
            return self._stream(example)
        if "/cancel/" in example.command:
            self.answers(examples(example.section)[0])  # a job that has not ended
        progress = self._progress() if "/status/" in example.command else []
        answer = json.loads(self.run(example))
        self._remember(answer)
        return [*progress, answer]

    def _progress(self) -> list[Any]:
        """What `/status` showed last before the job's end."""
        job = self.env["JOB"]
        self.platform.result(job)
        shown = [update.document for update in self.platform.updates(job) if not update.terminal]
        return [{"id": job, **shown[-1]}] if shown else []

    def _stream(self, example: Example) -> list[Any]:
        """The first answer with text. The deltas of all answers are the reply."""
        found: list[Any] = []
        deadline = time.monotonic() + PATIENCE_S
        while not found or found[-1]["status"] == "IN_PROGRESS" or found[-1]["stream"]:
            assert time.monotonic() < deadline, found
            found.append(json.loads(self.run(example)))
        *pieces, end = (each["output"] for answer in found for each in answer["stream"])
        assert "".join(piece["delta"] for piece in pieces) == end["response"]
        return [next(answer for answer in found if answer["stream"])]

    def _remember(self, answer: Any) -> None:
        """What the next commands need: the job, and the link of its asset."""
        self.env["JOB"] = answer["id"]
        output = answer.get("output")
        if isinstance(output, dict) and output.get("assets"):
            self.env["URL"] = output["assets"][0]["url"]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    with Platform() as platform, SupabaseStorage() as supabase:
        yield Caller(platform, supabase, tmp_path_factory.mktemp("caller"))


@pytest.fixture(scope="module")
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as server:
        yield server


def settings_of(
    family: str, supabase: SupabaseStorage, receiver: CallbackReceiver
) -> dict[str, str]:
    """The settings that the page names, of a worker of this family."""
    return {
        **POCKET,
        "FAMILIES": family,
        "STORAGE_URL": "supabase://workspace-temp",
        "SUPABASE_URL": supabase.url,
        "SUPABASE_SERVICE_KEY": supabase.service_key,
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
        "ASSET_URL_STYLE": "presigned" if family == "wan" else "path",
    }


@pytest.fixture(scope="module")
def worker_of(
    caller: Caller, receiver: CallbackReceiver
) -> Iterator[Callable[[str], WorkerProcess]]:
    """Starts the worker of a family's endpoint, once."""
    running: dict[str, WorkerProcess] = {}
    with ExitStack() as stack:

        def worker(family: str) -> WorkerProcess:
            if family not in running:
                env = settings_of(family, caller.supabase, receiver)
                names = {"worker_id": f"{family}-1", "endpoint": family}
                process = WorkerProcess(caller.platform, HANDLER, env=env, cwd=ROOT, **names)
                running[family] = stack.enter_context(process)
            return running[family]

        yield worker


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of_the_page_give_the_answers_that_it_shows(
    section: str, caller: Caller, worker_of: Callable[[str], WorkerProcess]
) -> None:
    if section == "A chat" and not POCKET_CHAT.exists():
        pytest.skip("`make chat` builds the pocket model")
    worker_of(SECTIONS[section])
    shown = examples(section)

    for example in shown:
        if "--output" in example.command:
            assert caller.fetched(example) in caller.stored()
        else:
            assert_like(example.answers, caller.answers(example))

    assert shown


def test_without_a_storage_the_command_of_the_page_finds_the_picture_in_the_document(
    caller: Caller,
) -> None:
    (example,) = examples("A picture without a bucket")
    caller.env["SDXL_ENDPOINT_ID"] = "inline"
    names = {"worker_id": "sdxl-2", "endpoint": "inline"}
    with WorkerProcess(caller.platform, HANDLER, env=POCKET, cwd=ROOT, **names) as process:
        caller.run(example)
    del caller.env["SDXL_ENDPOINT_ID"]

    answer = json.loads((caller.folder / "answer.json").read_text())
    picture = (caller.folder / "0.png").read_bytes()
    (asset,) = answer["output"]["assets"]
    assert base64.b64decode(asset["url"].partition(",")[2]) == picture
    assert len(picture) == asset["metadata"]["file_size_bytes"]
    assert "base64" not in process.log
    assert_like(example.answers, [answer])


def test_the_result_on_the_page_of_administration_is_what_comes(
    caller: Caller, worker_of: Callable[[str], WorkerProcess]
) -> None:
    page = (ROOT / "docs/admin.md").read_text()
    payload, result = (json.loads(block) for _, block in blocks(page))
    worker_of("sdxl")

    document = caller.platform.result(caller.platform.submit(payload, endpoint="sdxl"))["output"]

    assert_like(result, document["result"])


def test_the_callbacks_of_these_jobs_have_the_headers_of_the_page(
    caller: Caller,
    receiver: CallbackReceiver,
    worker_of: Callable[[str], WorkerProcess],
) -> None:
    shown = re.search(r"^```http\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert shown
    request, *headers = shown[1].splitlines()
    worker_of("sdxl")

    caller.platform.result(caller.platform.submit({"type": "poem"}, endpoint="sdxl"))

    (callback, *_) = receiver.wait()
    assert request == f"POST {urlsplit(receiver.callback_url).path}"
    for name, value in (header.split(": ") for header in headers):
        kind = value.partition("=")[0] if "=" in value else re.split(r"[,_\d]", value)[0]
        assert callback.headers[name].startswith(kind), name
    assert callback.signature_ok and callback.webhook_ok


PAYLOADS = [
    example.payload
    for name in SECTIONS
    for example in examples(name)
    if example.payload is not None
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload["id"])
def test_a_payload_of_the_page_is_valid_unless_its_answer_is_a_failure(
    payload: dict[str, Any],
) -> None:
    schema = json.loads((ROOT / f"contract/jobs/{payload['type']}.schema.json").read_text())
    answers = [
        answer
        for name in SECTIONS
        for example in examples(name)
        for answer in example.answers
        if example.payload == payload
    ]

    assert Validator(schema).is_valid(payload) == (answers[0]["status"] != "FAILED")


def documents() -> Iterator[Any]:
    """The documents that the page shows."""
    for name in SECTIONS:
        for example in examples(name):
            for output in (answer.get("output") for answer in example.answers):
                found = output if isinstance(output, list) else [output]
                yield from (each for each in found if each and "job_id" in each)


@pytest.mark.parametrize("document", documents(), ids=lambda document: document["job_id"])
def test_a_document_of_the_page_is_valid_by_the_contract(document: Any) -> None:
    Validator(json.loads((ROOT / "contract/result.schema.json").read_text())).validate(document)


@pytest.mark.parametrize("family", ["sdxl", "chat"])
def test_the_sdks_local_api_shows_a_failure_as_the_page_says(family: str, tmp_path: Path) -> None:
    if family == "chat" and not POCKET_CHAT.exists():
        pytest.skip("`make chat` builds the pocket model")
    (failing,) = (
        example
        for example in examples("A picture" if family == "sdxl" else "A chat")
        if example.answers and example.answers[0]["status"] == "FAILED"
    )
    with start(None, *LOCAL_API, FAMILIES=family, STORAGE_URL=f"file:{tmp_path}") as worker:
        body = {"input": failing.payload}
        answer = requests.post(f"{served_at(worker)}/runsync", json=body, timeout=PATIENCE_S).json()

    error = failing.answers[0]["error"]
    if family == "sdxl":
        assert (answer["status"], answer["error"], "output" in answer) == ("FAILED", error, False)
    else:
        document, last = answer["output"]
        assert (answer["status"], last, document["failure"]) == (
            "COMPLETED",
            {"error": error},
            json.loads(error),
        )


def test_the_example_of_the_readme_is_that_of_the_page() -> None:
    readme = (ROOT / "README.md").read_text().split("## On RunPod")[1].split("\n## ")[0]
    ((_, command), (_, answer)) = blocks(readme)
    run, status, *_ = examples("A picture")

    assert command == run.command.replace("/run ", "/runsync ")
    assert json.loads(answer) == status.answers[-1]
