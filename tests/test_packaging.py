"""`pip install .`: the Python client with its few packages, and the worker with all."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.files import ROOT
from tests.patience import PATIENCE_S

#: Runs the program in argv[3] where no package can be imported but the standard library's, the
#: wheel in argv[1] and the packages in argv[2].
CALLER = """
import sys
wheel, allowed, program = sys.argv[1], set(sys.argv[2].split(",")), sys.argv[3]
class Refused:
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
sys.meta_path.insert(0, Refused)
sys.path.insert(0, wheel)
exec(program)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix in (".toml", ".txt", ".md", "") and path.name[0] != ".":
            shutil.copy(path, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ourvidz_serverless", source / "ourvidz_serverless", ignore=ignored)
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built)]
    done = subprocess.run(
        [sys.executable, *command, str(source)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith("/METADATA")]
        return Parser().parsestr(files.read(name).decode()).get_all("Requires-Dist") or []


def of_the_client(requirements: list[str]) -> list[str]:
    return [line for line in requirements if "extra ==" not in line]


def test_the_package_has_every_file_of_its_folder(wheel: Path) -> None:
    folder = ROOT / "ourvidz_serverless"
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]

    with zipfile.ZipFile(wheel) as packed:
        missing = {str(path.relative_to(ROOT)) for path in files} - set(packed.namelist())

    assert missing == set()


def test_the_client_needs_one_package(requirements: list[str]) -> None:
    assert [re.split(r"\W", line)[0] for line in of_the_client(requirements)] == ["httpx2"]


def test_the_worker_needs_what_the_images_install(requirements: list[str]) -> None:
    lines = re.findall(r"^[^#\s]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)

    extra = [line.partition(";")[0].strip() for line in requirements if '"worker"' in line]

    assert extra == lines


def test_the_image_has_a_version_that_the_client_accepts(requirements: list[str]) -> None:
    (needed,) = map(Requirement, of_the_client(requirements))
    pinned = re.search(rf"^{needed.name}==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)

    assert pinned and pinned[1] in needed.specifier


def installed_with(requirement: str) -> set[str]:
    """The names of a package and of those that it requires here, as modules."""
    needed = Requirement(requirement)
    if needed.marker and not needed.marker.evaluate({"extra": ""}):
        return set()
    theirs = map(installed_with, requires(needed.name) or [])
    return {needed.name.replace("-", "_")}.union(*theirs)


def call(wheel: Path, requirements: list[str], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a caller that has installed the client alone."""
    found = set().union(*map(installed_with, of_the_client(requirements)))
    names = {*found, "ourvidz_serverless"}
    return subprocess.run(
        [sys.executable, "-c", CALLER, str(wheel), ",".join(sorted(names)), program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=wheel.parent,
    )


def test_a_caller_without_torch_uses_the_client(wheel: Path, requirements: list[str]) -> None:
    program = (
        "from ourvidz_serverless.client import AsyncClient, Client, RequestFailed, Retry\n"
        "client = Client({'sdxl': 'a'}, 'key', base_url='http://127.0.0.1:1', policy=Retry(1))\n"
        "try: client.submit({'type': 'sdxl_image_fast'})\n"
        "except RequestFailed as failed: print(failed)\n"
        "print(*sorted({'torch', 'pydantic', 'runpod', 'requests'} & set(sys.modules)))"
    )

    done = call(wheel, requirements, program)

    assert done.stdout.splitlines() == [
        "POST http://127.0.0.1:1/a/run: no whole answer (ConnectError)",
        "",
    ], done.stderr


def test_the_command_says_how_to_install_the_worker(wheel: Path, requirements: list[str]) -> None:
    done = call(wheel, requirements, "from ourvidz_serverless.__main__ import main")

    assert done.returncode == 1
    assert done.stderr == (
        "the worker's packages are needed: pip install 'ourvidz-serverless[worker]'\n"
    )
