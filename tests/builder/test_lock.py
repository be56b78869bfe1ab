"""The lock files are those of requirements.txt: `python -m builder.lock` makes them anew."""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder.lock import (
    C2PA_LOCK,
    C2PA_REQUIREMENTS,
    ENTRY,
    LOCK,
    LOCKS,
    OF_TORCH,
    OLDER_TORCH,
    OLDER_TORCH_LOCK,
    OVERRIDES,
    REQUIREMENTS,
    TORCH_LOCK,
    compiled,
    older_torch,
)

WANTED = [
    pinned
    for path in (REQUIREMENTS, C2PA_REQUIREMENTS)
    for pinned in re.findall(r"^([\w-]+)==(\S+)", path.read_text(), re.MULTILINE)
]

#: Left out on purpose: the names of the overrides that are true on no system.
UNUSED = {Requirement(each).name for each in OVERRIDES if "never" in each}

#: What an image may run on.
PYTHONS = ("3.11", "3.12")


def locked(python: str, torch_lock: Path = TORCH_LOCK) -> dict[str, str]:
    """The locked versions for an image with this Python, and the torch of a lock."""
    system = {"python_version": python, "python_full_version": f"{python}.0"}
    system |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    paths = (LOCK, C2PA_LOCK, torch_lock)
    entries = [each for path in paths for each in ENTRY.findall(path.read_text())]
    wishes = [Requirement(entry.split("\\")[0]) for entry in entries]
    holding = [wish for wish in wishes if not wish.marker or wish.marker.evaluate(system)]
    versions = {wish.name: str(wish.specifier).removeprefix("==") for wish in holding}
    assert len(versions) == len(holding)  # each package once
    return versions


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("name", "version"), WANTED)
def test_every_requirement_is_locked_at_its_version(name: str, version: str, python: str) -> None:
    assert locked(python)[canonicalize_name(name)] == version


def requires(name: str) -> Iterator[Requirement]:
    """What an installed package requires here, whichever build it is."""
    for wish in map(Requirement, importlib.metadata.requires(name) or ()):
        holds = not wish.marker or wish.marker.evaluate({"extra": ""})
        if holds and wish.name.lower() not in UNUSED:
            yield wish


def lock_of_the_installed_torch() -> Path:
    """CI runs the suite with the torch of each image."""
    version = importlib.metadata.version("torch").partition("+")[0]
    locks = (TORCH_LOCK, OLDER_TORCH_LOCK)
    return next(path for path in locks if f"\ntorch=={version} " in path.read_text())


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_of_a_locked_package_is_locked(python: str) -> None:
    versions = locked(python, lock_of_the_installed_torch())
    here = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    installed = [name for name in map(canonicalize_name, here) if name in versions]

    assert len(installed) > 80
    for name in installed:
        for wish in requires(name):
            assert wish.specifier.contains(Version(versions[canonicalize_name(wish.name)]), True)


PACKAGE = """
[project]
name = "without-hashes"
version = "1.0"
"""


def test_a_requirement_without_hashes_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PACKAGE)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"without-hashes @ {tmp_path.as_uri()}\n")

    with pytest.raises(SystemExit, match=r"cannot lock.*: without-hashes @"):
        compiled([requirements], upgrade=False)


@pytest.mark.parametrize("path", [*LOCKS, OLDER_TORCH_LOCK], ids=lambda path: path.name)
def test_a_lock_has_only_entries_with_hashes(path: Path) -> None:
    rest = ENTRY.sub("", path.read_text())

    assert [line for line in rest.splitlines() if line and not line.startswith("# Made by")] == []


def test_torch_and_the_libraries_of_its_cuda_build_have_a_lock_of_their_own() -> None:
    own = [entry.split("==")[0] for entry in ENTRY.findall(TORCH_LOCK.read_text())]

    assert {"torch", "triton", "nvidia-cudnn-cu13"} <= set(own)
    assert not [entry for entry in ENTRY.findall(LOCK.read_text()) if OF_TORCH.match(entry)]


def test_the_older_torch_has_a_lock_of_its_own_with_its_own_libraries() -> None:
    entries = ENTRY.findall(OLDER_TORCH_LOCK.read_text())

    assert all(OF_TORCH.match(entry) for entry in entries)
    assert OLDER_TORCH in {entry.split()[0] for entry in entries}
    assert {"nvidia-cudnn-cu12", "triton"} <= {entry.split("==")[0] for entry in entries}


def test_an_older_torch_that_needs_another_version_of_a_package_is_an_error_that_names_it() -> None:
    base, older = ["torch==2 \\\n", "numpy==2 ; x \\\n"], ["torch==1 \\\n", "numpy==2 \\\n"]
    assert older_torch(base, older) == older[:1]

    with pytest.raises(SystemExit, match="needs another version: numpy==1"):
        older_torch(base, ["torch==1 \\\n", "numpy==1 \\\n"])


def test_packages_that_no_image_imports_are_in_no_lock() -> None:
    names = {entry.split("==")[0] for path in LOCKS for entry in ENTRY.findall(path.read_text())}

    assert not names & {"fastapi-cli", "fastapi-cloud-cli", "sentry-sdk", "rignore", "typer"}
    assert not names & UNUSED


def test_content_credentials_have_a_lock_of_their_own() -> None:
    names = [entry.split("==")[0] for entry in ENTRY.findall(C2PA_LOCK.read_text())]

    assert "c2pa-python" in names
    assert not set(names) & {entry.split("==")[0] for entry in ENTRY.findall(LOCK.read_text())}


#: Imports every module of the package while the packages of `UNUSED` cannot be imported.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import ourvidz_serverless
for module in pkgutil.walk_packages(ourvidz_serverless.__path__, "ourvidz_serverless."):
    importlib.import_module(module.name)
import handler
from diffusers import StableDiffusionXLPipeline, WanPipeline, WanVACEPipeline
"""

#: The modules of the packages that the locks leave out.
LEFT_OUT = (
    *("InquirerPy", "prettytable", "watchdog", "typer", "fastapi_cli", "fastapi_cloud_cli"),
    *("sentry_sdk", "rignore", "email_validator", "multipart", "httpx", "itsdangerous"),
    *("websockets", "watchfiles", "httptools", "rich"),
)


def test_every_module_imports_without_the_packages_that_the_locks_leave_out() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *LEFT_OUT],
        cwd=REQUIREMENTS.parent,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stderr


def test_the_guide_names_the_c_library_that_the_most_demanding_wheel_needs() -> None:
    # llguidance: others have wheels for older systems beside those for newer ones.
    wheel = importlib.metadata.distribution("llguidance").read_text("WHEEL") or ""
    (needed,) = re.findall(r"manylinux_2_(\d+)", wheel)

    assert f"glibc 2.{needed}" in (REQUIREMENTS.parent / "docs/deploying.md").read_text()
