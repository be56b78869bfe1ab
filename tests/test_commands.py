"""The commands in the documents: they are found in a fresh clone, and run as they are written.

A command is a line of an indented block, or of a fenced block without a language or with `sh`.
docs/calling.md has a test of its own (`test_calling.py`).
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers import handler
from tests.servers.local_server import free_port

DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md", "NOTICE")
    ),
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / folder / "README.md" for folder in ("contract", "clients/typescript", ".runpod")),
]

#: What a command may begin with: it is there in a fresh clone, or on the machine that it is for.
#: pip is the caller's own.
PROGRAMS = ("make", ".venv/bin/python", "curl", "docker", "export", "mkdir", "pip")

#: Where the tests run. Without it nothing can be run as it is written.
PYTHON = ROOT / ".venv/bin/python"
needs_environment = pytest.mark.skipif(not PYTHON.exists(), reason="`make .venv/dev` makes .venv")


@dataclass(frozen=True)
class Command:
    """A line of a document, joined with the lines that continue it."""

    document: Path
    line: str

    @property
    def words(self) -> list[str]:
        """The command and its arguments, without the variables before it."""
        words = shlex.split(self.line, comments=True)
        while words and re.match(r"[A-Z_0-9]+=", words[0]):
            words.pop(0)
        return words

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.line.split('  ')[0][:60]}"


def blocks(text: str) -> Iterator[str]:
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language in ("", "sh"):
            yield block
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        yield re.sub("^    ", "", block, flags=re.MULTILINE)


def commands() -> Iterator[Command]:
    for document in DOCUMENTS:
        for block in blocks(document.read_text()):
            if re.match(
                r"(?:[A-Z_0-9]+=\S* )*(?:[\w./]*python|make|mkdir|curl|docker|export|pip)\b", block
            ):
                lines = block.replace("\\\n", " ") if "-d '" not in block else ""
                yield from (Command(document, line) for line in lines.splitlines() if line.strip())


COMMANDS = list(commands())
IN_TEXT = [
    Command(document, line)
    for document in DOCUMENTS
    for line in re.findall(r"`((?:\.venv/bin/)?python -m [^`]+)`", document.read_text())
]


def those(program: str, among: list[Command]) -> list[Command]:
    return [command for command in among if command.words and command.words[0] == program]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_begins_with_a_program_that_is_there(command: Command) -> None:
    assert command.words[0] in PROGRAMS


@pytest.mark.parametrize("command", IN_TEXT, ids=str)
def test_a_command_in_a_sentence_names_the_projects_own_python(command: Command) -> None:
    # The benchmarks write the headings of their tables.
    is_a_heading = command.words[2].startswith("benchmarks.") and command.words[0] == "python"

    assert is_a_heading or command.words[0] == ".venv/bin/python"


@pytest.mark.parametrize("command", those(".venv/bin/python", COMMANDS + IN_TEXT), ids=str)
def test_the_options_of_a_command_are_in_its_source(command: Command) -> None:
    options = [word for word in command.words[1:] if word.startswith("--")]
    module = command.words[2] if command.words[1] == "-m" else ""
    spec = find_spec(module) if options else None
    folder = Path(spec.origin).parent if spec and spec.origin else ROOT
    # Benchmarks have their common options from `benchmarks.report`.
    files = [*folder.glob("*.py"), ROOT / "benchmarks/report.py"] if options else []

    source = "".join(file.read_text() for file in files)
    assert [option for option in options if f'"{option}"' not in source] == []


@pytest.mark.parametrize("command", those("make", COMMANDS), ids=str)
def test_make_knows_the_command(command: Command) -> None:
    done = subprocess.run(
        ["bash", "-c", command.line.replace("make", "make --dry-run", 1)],
        cwd=ROOT,
        env=clean(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0, done.stderr


def clean(**more: str) -> dict[str, str]:
    """The environment of somebody who has activated nothing."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return {**inherited, "PATH": "/usr/local/bin:/usr/bin:/bin", **more}


@needs_environment
def test_make_run_paints_a_picture(tmp_path: Path) -> None:
    # The environment is there: without `-o` make would compare its age, and perhaps ask an index.
    done = subprocess.run(
        ["make", "-o", ".venv/run", "run"],
        cwd=ROOT,
        env=clean(STORAGE_URL=f"file:{tmp_path}"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.rglob("0.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_environment
@pytest.mark.parametrize(
    "line",
    [
        ".venv/bin/python -m ourvidz_serverless settings",
        ".venv/bin/python -m builder.contract --check",
    ],
)
def test_a_command_that_changes_nothing_runs(line: str) -> None:
    assert line in {command.line.split("  ")[0] for command in COMMANDS + IN_TEXT}

    done = subprocess.run(
        shlex.split(line), cwd=ROOT, env=clean(), capture_output=True, timeout=PATIENCE_S
    )

    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_page_about_http_get_replies() -> None:
    if not (ROOT / ".cache/pocket_chat/config.json").exists():
        pytest.skip("`make chat` builds the pocket model")
    serve, plain, streamed, *others = (
        each.line for each in COMMANDS if each.document.stem == "http"
    )
    openai = next(line for line in others if "/v1/chat/completions" in line)
    variables = dict(re.findall(r"([A-Z_]+)=(\S+)", serve))
    port = str(free_port())

    with handler.start(None, HOST="127.0.0.1", PORT=port, **variables) as worker:
        worker.wait_for_log("ready")
        replies = [
            subprocess.check_output(
                ["bash", "-c", line.replace("localhost:8000", f"localhost:{port}")],
                text=True,
                timeout=PATIENCE_S,
            )
            for line in (plain, streamed, openai)
        ]
        printed = run_python(chat_block().replace(":8000", f":{port}"))

    assert "Paris" in json.loads(replies[0])["response"]
    assert replies[1].startswith("data: ") and "event: done" in replies[1]
    assert "Paris" in json.loads(replies[2])["choices"][0]["message"]["content"]
    assert f"    {printed}" in (ROOT / "docs/chat.md").read_text()


def chat_block() -> str:
    """The lines of Python with which the page about chat begins."""
    return (ROOT / "docs/chat.md").read_text().split("```python\n")[1].split("```")[0]


def run_python(code: str) -> str:
    return subprocess.check_output([PYTHON, "-c", code], text=True, timeout=PATIENCE_S)
