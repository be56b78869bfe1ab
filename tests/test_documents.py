"""What the documents name exists: files, links, headings, commands, tests."""

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.__main__ import COMMANDS
from ourvidz_serverless.settings import Settings
from tests.files import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "NOTICE", "CHANGELOG.md")),
    *(ROOT / name for name in ("CONTRIBUTING.md", "AGENTS.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / folder / "README.md" for folder in ("contract", "clients/typescript")),
    *sorted(ROOT.glob("pocket/*/README.md")),
    ROOT / ".runpod/README.md",
]

PACKAGE = ROOT / "ourvidz_serverless"

#: A word with one of these endings is a file of the repository, even if it names no folder.
ENDINGS = (".py", ".ts", ".md", ".lock", ".txt")

VARIABLES = {name.upper() for name in Settings.model_fields}

#: Files of the application, and files that are built.
ELSEWHERE = ("src/", ".cache/", ".venv/", "outputs/")

#: Links to the repository's pages beside its files, as GitHub resolves them.
ON_GITHUB = "../../actions/"

MODULES = r"(?:ourvidz_serverless|builder|benchmarks|tests)"


def each(pattern: str, is_checked: Callable[[Path, str], bool] = lambda *_: True) -> Any:
    """A test for each word that a pattern finds in a document; its name has both."""
    cases = [
        pytest.param(document, word, id=f"{document.relative_to(ROOT)}: {word}")
        for document in DOCUMENTS
        for word in dict.fromkeys(re.findall(pattern, document.read_text(encoding="utf-8"), re.M))
        if is_checked(document, word)
    ]
    assert cases, pattern
    return pytest.mark.parametrize(("document", "word"), cases)


def bases(document: Path) -> Iterator[Path]:
    """The folders that the paths in a document may be relative to."""
    yield from (ROOT, PACKAGE, ROOT / "tests", document.parent)


def looks_like_a_file(document: Path, word: str) -> bool:
    first, slash, _ = word.partition("/")
    is_in_a_folder = slash and first and any((base / first).is_dir() for base in bases(document))
    return not word.startswith(ELSEWHERE) and bool(word.endswith(ENDINGS) or is_in_a_folder)


@each(r"`([\w./{}-]+)`", looks_like_a_file)
def test_a_file_that_a_document_names_exists(document: Path, word: str) -> None:
    pattern = re.sub(r"\{\w+\}", "*", word.rstrip("/"))
    places = [*(base.glob(pattern) for base in bases(document)), PACKAGE.rglob(pattern)]

    assert any(next(place, None) for place in places)


@each(r"\]\((?!\w+:)([^)\s]+)\)", lambda _, word: not word.startswith(ON_GITHUB))
def test_a_link_leads_to_a_file_and_to_a_heading_in_it(document: Path, word: str) -> None:
    path, _, anchor = word.partition("#")
    target = document.parent / path if path else document

    assert target.exists()
    assert not anchor or anchor in anchors(target)


@functools.cache
def anchors(page: Path) -> list[str]:
    """What links into a page may name: its headings as GitHub writes them, and its `<a id>`."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    return slugs + re.findall(r'<a id="([^"]+)">', text)


@each(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]*[A-Z0-9])(?:=[^`]*)?`")
def test_a_variable_or_code_that_a_document_names_is_in_the_code(document: Path, word: str) -> None:
    assert word in VARIABLES or re.search(rf"\b{word}\b", sources())


@functools.cache
def sources() -> str:
    """The code that reads variables: the package, the image, its presets, the clients."""
    files = [ROOT / "Dockerfile", ROOT / ".runpod/hub.json", *PACKAGE.rglob("*.py")]
    files += [*ROOT.glob("clients/typescript/*.ts"), *ROOT.glob("clients/typescript/*/*.ts")]
    return "".join(file.read_text(encoding="utf-8") for file in files)


@each(r"python -m ([a-z_]+(?:\.[a-z_]+)*)")
def test_a_module_that_a_document_runs_exists(document: Path, word: str) -> None:
    assert importlib.util.find_spec(word)


@each(r"python -m ourvidz_serverless (\w+)")
def test_a_command_that_a_document_runs_exists(document: Path, word: str) -> None:
    assert word in COMMANDS


@each(rf"`({MODULES}(?:\.\w+)+)`")
def test_a_module_or_name_that_a_document_gives_in_full_exists(document: Path, word: str) -> None:
    path = ROOT.joinpath(*word.split("."))
    text = next((f.read_text() for f in (path.parent.with_suffix(".py"),) if f.exists()), "")

    is_a_module = path.is_dir() or path.with_suffix(".py").exists()
    assert is_a_module or re.search(rf"^(?:class |def )?{path.name}\b", text, re.M)


@each(r"(?:^ *|`)make ([a-z]+)(?=`| +[A-Z#]|$)")
def test_a_target_of_make_that_a_document_names_exists(document: Path, word: str) -> None:
    assert re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tests_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", document.read_text(encoding="utf-8"))
    tests = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/**/test_*.py"))

    assert [name for name in named if f"def {name}(" not in tests] == []


@each(r'<img src="([^"]+)"')
def test_a_picture_of_a_document_exists(document: Path, word: str) -> None:
    assert (document.parent / word).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_row_of_a_table_has_as_many_cells_as_its_head(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.M)]

    def num_cells(row: str) -> int:
        # A bar splits a row also in backticks, unless it is escaped.
        return len(re.findall(r"(?<!\\)\|", row))

    assert [
        row for head, *rows in tables for row in rows if num_cells(row) != num_cells(head)
    ] == []


def test_the_readme_leads_to_every_page() -> None:
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        new = {page for each in new for page in linked(each)} - found

    assert {page for page in DOCUMENTS if page not in found} == {ROOT / "AGENTS.md"}


def linked(page: Path) -> set[Path]:
    """The documents that a document has links to."""
    links = re.findall(r"\]\(([\w./-]+)", page.read_text())
    return {(page.parent / link).resolve() for link in links} & set(DOCUMENTS)


def test_the_words_of_the_glossary_are_in_order_and_in_use() -> None:
    glossary = ROOT / "docs/glossary.md"
    words = re.findall(r"^\| ([a-z ]+) \| ", glossary.read_text(), re.MULTILINE)[1:]
    others = " ".join(page.read_text().lower() for page in DOCUMENTS if page != glossary)

    assert words == sorted(words)
    assert [word for word in words if not re.search(rf"\b{word}", others)] == []


def test_the_readmes_share_of_time_is_that_of_the_benchmark() -> None:
    table = (
        (ROOT / "docs/benchmarks.md").read_text().split("**Seconds lost a job under a backlog**")[1]
    )
    shares = re.findall(r"\| (worker|baseline handler) \|.*\| ([\d.]+) % \|", table)
    worker, handler = (
        [round(float(share)) for name, share in shares if name == variant]
        for variant in ("worker", "baseline handler")
    )

    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"in use for {min(worker)} to {max(worker)} % of the time" in readme
    assert f"for {min(handler)} to {max(handler)} % with a plain handler" in readme
