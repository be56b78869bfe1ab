"""`make quick` runs the tests that concern the changes of the working tree, the nearest first."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import affected
from tests.files import ROOT
from tests.patience import PATIENCE_S

FILES = {
    "ourvidz_serverless/__init__.py": "",
    "ourvidz_serverless/paint.py": "COLOUR = 'red'\n",
    "ourvidz_serverless/worker.py": "from ourvidz_serverless import paint\n",
    "tests/__init__.py": "",
    "tests/test_paint.py": "from ourvidz_serverless import paint\n\ndef test_near(): ...\n",
    "tests/test_worker.py": "from ourvidz_serverless import worker\n\ndef test_far(): ...\n",
    "tests/test_guide.py": "GUIDE = 'guide.md'\n\ndef test_guide(): ...\n",
    "tests/test_other.py": "def test_other(): ...\n",
    "guide.md": "A guide.\n",
    ".gitignore": ".pytest_cache\n__pycache__\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project under git, without changes."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests" / "affected.py", tmp_path / "tests")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "Start")):
        subprocess.run(["git", *command], cwd=tmp_path, env=git_environment(), check=True)
    return tmp_path


def git_environment() -> dict[str, str]:
    who = {"NAME": "A Person", "EMAIL": "person@example.org"}
    names = {
        f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()
    }
    return {**os.environ, **names}


def run(project: Path, *options: str) -> list[str]:
    """The names of the tests that ran, in their order."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "tests.affected", *options],
        cwd=project,
        # Other plugins take longer to import than all of the rest.
        env={**env, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode in (0, 1, 5), done.stdout + done.stderr
    return re.findall(r"::(\w+)(?: | \[.*)?(?:PASSED|FAILED)", done.stdout)


def chosen(project: Path, seconds: float = 90) -> set[str]:
    return set(run(project, "--affected", str(seconds)))


def test_a_changed_module_is_tested_by_all_that_import_it_directly_or_over_others(
    project: Path,
) -> None:
    (project / "ourvidz_serverless/paint.py").write_text("COLOUR = 'blue'\n")

    assert chosen(project) == {"test_near", "test_far"}


def test_a_changed_test_runs_itself(project: Path) -> None:
    (project / "tests/test_other.py").write_text("def test_changed(): ...\n")

    assert chosen(project) == {"test_changed"}


def test_a_new_file_counts_as_a_change(project: Path) -> None:
    (project / "tests/test_new.py").write_text("def test_new(): ...\n")

    assert chosen(project) == {"test_new"}


def test_a_changed_document_is_tested_by_the_test_that_names_it(project: Path) -> None:
    (project / "guide.md").write_text("A better guide.\n")

    assert chosen(project) == {"test_guide"}


def test_without_changes_the_last_commit_counts(project: Path) -> None:
    (project / "guide.md").write_text("A better guide.\n")
    subprocess.run(["git", "commit", "-qam", "x"], cwd=project, env=git_environment(), check=True)

    assert chosen(project) == {"test_guide"}


def test_a_test_that_failed_last_time_runs_again(project: Path) -> None:
    (project / "guide.md").write_text("A better guide.\n")
    (project / "tests/test_other.py").write_text("def test_other(): assert False\n")
    run(project)
    subprocess.run(["git", "checkout", "-q", "tests"], cwd=project, check=True)

    assert chosen(project) == {"test_guide", "test_other"}


def test_the_nearest_tests_come_first_and_the_time_is_kept(project: Path) -> None:
    run(project)
    cache = project / ".pytest_cache/v" / affected.SECONDS
    seconds = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(seconds, 40)))
    (project / "ourvidz_serverless/paint.py").write_text("COLOUR = 'blue'\n")

    assert chosen(project, 50) == {"test_near"}
    assert chosen(project, 90) == {"test_near", "test_far"}


def test_every_run_records_the_seconds_of_its_tests(project: Path) -> None:
    run(project)

    seconds = json.loads((project / ".pytest_cache/v" / affected.SECONDS).read_text())
    assert set(seconds) >= {"tests/test_paint.py::test_near", "tests/test_other.py::test_other"}


def test_without_a_limit_the_files_that_took_longest_come_first(project: Path) -> None:
    (project / "tests/test_two.py").write_text("def test_one(): ...\n\ndef test_two(): ...\n")
    run(project)
    cache = project / ".pytest_cache/v" / affected.SECONDS
    known = dict.fromkeys(json.loads(cache.read_text()), 1)
    cache.write_text(json.dumps({**known, "tests/test_other.py::test_other": 40}))

    ran = run(project)

    assert ran[:3] == ["test_other", "test_one", "test_two"]
    assert len(ran) == 6


def test_a_slow_test_that_never_ran_comes_first(project: Path) -> None:
    slow = "import pytest\n\n@pytest.mark.slow\ndef test_slow(): ...\n"
    (project / "tests/test_slow.py").write_text(slow)

    assert run(project)[0] == "test_slow"
