"""docs/architecture.md: its map is the tree, its recipes work; imports form no cycle."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import ourvidz_serverless
from tests.files import ROOT
from tests.patience import PATIENCE_S

PACKAGE = ROOT / "ourvidz_serverless"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys() - {name_of(path)}


def test_the_map_lists_what_lies_in_the_package() -> None:
    block = ARCHITECTURE[ARCHITECTURE.index("    ourvidz_serverless/\n") :].split("\n\n")[0]
    listed = re.findall(r"^ {6}(\S+?)/? ", block, re.MULTILINE)

    there = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert sorted(listed) == sorted(there)


def test_the_map_lists_folders_that_exist() -> None:
    block = ARCHITECTURE[ARCHITECTURE.index("    handler.py") :].split("\n\n")[0]
    folders = re.findall(r"^ {4}(\S+)/ ", block, re.MULTILINE)

    assert folders
    assert [name for name in folders if not (ROOT / name).is_dir()] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package's own name is left out: `from package import module` imports the module.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: imported(path) - packages for name, path in MODULES.items()}

    assert list(TopologicalSorter(graph).static_order())


def test_importlib_is_used_once_for_the_table_of_families() -> None:
    users = [
        name
        for name, path in MODULES.items()
        if re.search(r"importlib\.import_module|__import__\(", path.read_text())
    ]

    assert users == [f"{ourvidz_serverless.__name__}.families"]


# --- the recipes of docs/architecture.md, applied to a copy ---


def applied(folder: Path, title: str) -> Path:
    """A copy of the project with the diff of a recipe."""
    section = ARCHITECTURE.split(f"## {title}\n")[1].split("\n## ")[0]
    (diff,) = re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
    shutil.copytree(PACKAGE, folder / "ourvidz_serverless")
    subprocess.run(
        ["git", "apply", "--unsafe-paths", "-"], cwd=folder, input=diff, text=True, check=True
    )
    return folder


def printed(folder: Path, code: str, **env: str) -> str:
    """What a piece of code prints in a copy of the project."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_storage_by_the_recipe_is_opened_by_its_scheme(tmp_path: Path) -> None:
    code = """
from ourvidz_serverless.delivery.storage.base import upload
from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.settings import Settings
storage = open_storage(Settings())
upload(storage, "user-1/job-1/0.png", b"pixels", "image/png")
print(list(storage.keys()), storage.get("user-1/job-1/0.png"))
"""
    project = applied(tmp_path, "Add a storage")

    assert printed(project, code, STORAGE_URL="memory:") == "['user-1/job-1/0.png'] b'pixels'"


def test_a_scheduler_by_the_recipe_is_one_that_a_job_may_name(tmp_path: Path) -> None:
    code = """
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.schedulers import make_scheduler
from ourvidz_serverless.settings import Settings
config = {"scheduler": "Heun"}
payload = {"type": "sdxl_image_fast", "user_id": "u", "prompt": "p", "config": config}
job = Envelope.of({"id": "1", "input": payload}).job(Settings())
print(job.config.scheduler, type(make_scheduler({}, job.config.scheduler)).__name__)
"""
    project = applied(tmp_path, "Add a scheduler")

    assert printed(project, code) == "heun HeunDiscreteScheduler"


def test_a_field_by_the_recipe_is_in_the_contract_and_acts(tmp_path: Path) -> None:
    code = """
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving.schema import family_schema
from ourvidz_serverless.settings import Settings
payload = {"type": "sdxl_image_fast", "user_id": "u", "prompt": "p", "config": {"label": "cover"}}
job = Envelope.of({"id": "1", "input": payload}).job(Settings())
print(job.config.label, "label" in family_schema("sdxl")["$defs"]["SdxlConfig"]["properties"])
"""
    project = applied(tmp_path, "Add a field")

    assert printed(project, code) == "cover True"
