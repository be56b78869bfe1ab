"""docs/troubleshooting.md: each line with which a start ends, and each code of a failed job.

The lines are collected from the source: the messages of `ModelLoadError` outside of jobs, the lines
that settings yield, and the reasons of a setting or a checkpoint. In the page a line is an example
in backticks, in the first column of a table. In the source it may have values that are inserted.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from ourvidz_serverless.errors import Code
from tests.files import ROOT
from tests.test_architecture import MODULES, imported

PACKAGE = ROOT / "ourvidz_serverless"
#: A bar in a table is escaped.
PAGE = (ROOT / "docs/troubleshooting.md").read_text().replace("\\|", "|")

#: How the messages of a ModelLoadError begin that ends a job and not a start.
OF_A_JOB = re.escape("config.loras")

SETTINGS = "ourvidz_serverless.settings"

#: The files whose ValueError is the reason why a checkpoint does not load.
CHECKPOINTS = [
    PACKAGE / "models" / name
    for name in (
        *("loading/checkpoints.py", "loading/weight_files.py", "chat/loader.py", "wan/loader.py"),
        *("chat/tokenizer.py", "sdxl/networks.py", "sdxl/ip_adapter.py", "sdxl/single_file.py"),
        *("chat/architecture.py", "sdxl/vae.py"),
    )
]

#: The files whose FetchError is the reason why weights do not arrive.
FETCHING = [PACKAGE / "net/hub.py", PACKAGE / "models/loading/fetch.py"]

#: A line of pydantic's, and the line of a check whose message is in a variable.
FOREIGN = {".+: Input should be 'off' or 'regional'", ".+: Input should be a URL that begins .+"}


def text_of(node: ast.expr | None) -> str | None:
    """A message as a pattern, in which anything may be inserted; None if it is no literal."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".replace"):
        return text_of(node.func.value)  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value.replace("`", "'"))
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or ".+" for part in node.values)
    return None


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def raised(error: str, files: Iterable[Path]) -> Iterator[str]:
    """The messages with which an error is raised."""
    for node in (node for file in files for node in nodes(file) if isinstance(node, ast.Raise)):
        call = node.exc if isinstance(node.exc, ast.Call) else None
        message = call.args[0] if call and ast.unparse(call.func) == error and call.args else None
        if text := text_of(message):
            yield text


def reasons(error: str, files: Iterable[Path]) -> set[str]:
    """The messages with which an error is made, to be raised here or elsewhere."""
    calls = [node for file in files for node in nodes(file) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func).rpartition(".")[2] == error]
    return {text for call in made if call.args and (text := text_of(call.args[0]))}


def yielded(file: Path) -> Iterator[str]:
    for node in nodes(file):
        if isinstance(node, ast.Yield) and (text := text_of(node.value)):
            yield text


def with_imports(name: str) -> set[str]:
    """The modules that a module imports, directly or over others."""
    found = {each for each in imported(MODULES[name]) if MODULES[each].name != "__init__.py"}
    return found.union(*map(with_imports, found))


def starts() -> set[str]:
    """The lines with which a start ends, without `cannot start: `."""
    checks = (MODULES[name] for name in {SETTINGS} | with_imports(SETTINGS))
    of_settings = (f".+: {text}" for text in raised("ValueError", checks))
    of_models = raised("ModelLoadError", PACKAGE.rglob("*.py"))
    texts = {*of_models, *yielded(MODULES[SETTINGS]), *of_settings}
    return {text for text in texts if not text.startswith(OF_A_JOB)}


def first_columns(heading: str) -> set[str]:
    """What is in backticks in the first columns of the tables below a heading."""
    section = PAGE.split(f"\n{heading}\n")[1]
    section = re.split(rf"^#{{1,{heading.count('#')}}} ", section, maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    cells = re.findall(r"^\| (`.*?`) \| ", section, re.MULTILINE)
    return {line for cell in cells for line in re.findall(r"`([^`]+)`", cell)} - {"cannot start:"}


def unmatched(texts: set[str], lines: set[str]) -> list[str]:
    return sorted(text for text in texts if not any(re.fullmatch(text, line) for line in lines))


@pytest.mark.parametrize("text", sorted(starts()))
def test_a_line_with_which_a_start_ends_is_on_the_page(text: str) -> None:
    assert unmatched({text}, set(re.findall(r"`([^`]+)`", PAGE))) == []


@pytest.mark.parametrize("text", sorted({*raised("ValueError", CHECKPOINTS)}))
def test_a_reason_why_weights_do_not_load_is_on_the_page(text: str) -> None:
    assert unmatched({text}, first_columns("### Why weights do not load")) == []


@pytest.mark.parametrize("text", sorted(reasons("FetchError", FETCHING)))
def test_a_reason_why_weights_do_not_arrive_is_on_the_page(text: str) -> None:
    assert unmatched({text}, first_columns("### Why weights do not arrive")) == []


def test_each_line_of_the_page_is_one_that_the_source_has() -> None:
    texts = starts() | {*raised("ValueError", CHECKPOINTS)} | FOREIGN
    texts |= reasons("FetchError", FETCHING)

    lines = first_columns("## The worker does not start")
    assert lines
    assert sorted(line for line in lines if not any(re.fullmatch(t, line) for t in texts)) == []


def test_every_code_of_a_failed_job_has_a_cause_and_a_remedy() -> None:
    assert first_columns("## A job fails") == set(get_args(Code))


def test_every_code_of_a_failed_job_is_on_the_page_about_calling() -> None:
    page = (ROOT / "docs/calling.md").read_text()
    listed = re.findall(r"^\| `([A-Z_]+)` \| (?:yes|no) \|", page, re.MULTILINE)

    assert sorted(listed) == sorted(get_args(Code))
