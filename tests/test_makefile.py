"""`make` when a step fails, and with several jobs at once.

The Makefile runs in an empty folder, with a stand-in for Python that makes an environment of
shell scripts: what pip does is not this file's concern.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.files import ROOT

#: Makes `.venv/bin/python` and then pip, as `python -m venv` does; fails between the two while
#: the file `broken` exists.
VENV = """#!/bin/sh
test "$1" = -c && exit 0
mkdir -p .venv/bin
printf '#!/bin/sh\\n' > .venv/bin/python
test -e broken && exit 1
cp pip .venv/bin/pip
chmod +x .venv/bin/*
"""

#: Fails while another pip runs; writes its arguments to the file `installed`.
PIP = """#!/bin/sh
mkdir busy || exit 1
echo "$@" >> installed
sleep 0.2
rmdir busy
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the Makefile and stand-ins for Python and pip."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).touch()
    for name, text in (("python", VENV), ("pip", PIP)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "PYTHON=./python", *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True).returncode


def test_an_incomplete_environment_is_made_again(folder: Path) -> None:
    (folder / "broken").touch()
    assert make(folder, ".venv/run") != 0
    (folder / "broken").unlink()

    assert make(folder, ".venv/run") == 0
    assert (folder / ".venv/bin/pip").exists()


def test_an_environment_is_made_once(folder: Path) -> None:
    make(folder, ".venv/run")
    make(folder, ".venv/run")

    assert len((folder / "installed").read_text().splitlines()) == 1


def test_two_jobs_of_make_never_run_two_pips_at_once(folder: Path) -> None:
    assert make(folder, "-j2", ".venv/dev", ".cache/pocket_chat/config.json") == 0

    assert len((folder / "installed").read_text().splitlines()) == 3
