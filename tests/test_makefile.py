"""`make` when a step fails, and with several jobs at once.

The Makefile runs in an empty folder, with a stand-in for Python that makes an environment of
shell scripts: what pip does is not this file's concern.
"""

import os
import shutil
import subprocess
import sys
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

#: Fails while another pip runs, and for an index while the file `unreachable` exists; writes its
#: arguments to the file `installed`.
PIP = """#!/bin/sh
mkdir busy || exit 1
echo "$@" >> installed
sleep 0.2
rmdir busy
case "$*" in *--index-url*) test ! -e unreachable ;; esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the Makefile and stand-ins for Python and pip."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).touch()
    for name, text in (("python", VENV), ("pip", PIP), ("nvidia-smi", "#!/bin/sh\nexit 9\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> int:
    return run_make(folder, *arguments).returncode


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person would, also if make runs the tests."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFL"))
    }
    kept["PATH"] = f"{folder}:{kept['PATH']}"
    command = ["make", "PYTHON=./python", *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)


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


# --- which torch ---


def pips(folder: Path) -> list[str]:
    """The arguments of each pip that `make .venv/run` starts, for a requirement of torch."""
    (folder / "requirements.txt").write_text("torch==2.13.0    # computes\n")
    assert make(folder, ".venv/run") == 0
    return (folder / "installed").read_text().splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="PyPI's torch brings CUDA on Linux alone")
def test_without_a_gpu_torch_for_the_processor_is_installed_first(folder: Path) -> None:
    first, second = pips(folder)

    assert first.endswith("--index-url https://download.pytorch.org/whl/cpu torch==2.13.0")
    assert second.endswith("-r requirements.txt")


def test_with_a_gpu_torch_comes_from_pypi(folder: Path) -> None:
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")

    (only,) = pips(folder)

    assert "--index-url" not in only


def test_torch_comes_from_pypi_if_the_index_for_the_processor_is_unreachable(folder: Path) -> None:
    (folder / "unreachable").touch()

    assert pips(folder)[-1].endswith("-r requirements.txt")


@pytest.mark.parametrize("target", ["chat", "video"])
def test_make_prints_no_line_of_its_own_after_the_answer(folder: Path, target: str) -> None:
    assert "Leaving directory" not in run_make(folder, "-n", target).stdout
