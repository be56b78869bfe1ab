"""The lock files are those of requirements.txt: `python -m builder.lock` makes them anew."""

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from builder.lock import ENTRY, LOCK, OF_TORCH, REQUIREMENTS, TORCH_LOCK

LOCKS = (LOCK, TORCH_LOCK)
WANTED = re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)

#: What an image may run on.
PYTHONS = ("3.11", "3.12")


def locked(python: str) -> dict[str, str]:
    """The versions that both files have for an image with this Python."""
    system = {"python_version": python, "python_full_version": f"{python}.0"}
    system |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    entries = [each for path in LOCKS for each in ENTRY.findall(path.read_text())]
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
        if not wish.marker or wish.marker.evaluate({"extra": ""}):
            yield wish


@pytest.mark.parametrize("python", PYTHONS)
def test_what_a_locked_package_requires_is_locked_too(python: str) -> None:
    versions = locked(python)
    here = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    installed = [name for name in map(canonicalize_name, here) if name in versions]

    assert len(installed) > 100
    for name in installed:
        for wish in requires(name):
            assert wish.specifier.contains(Version(versions[canonicalize_name(wish.name)]), True)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_holds_nothing_but_entries_with_hashes(path: Path) -> None:
    rest = ENTRY.sub("", path.read_text())

    assert [line for line in rest.splitlines() if line and not line.startswith("# Made by")] == []


def test_torch_and_what_only_its_build_for_cuda_needs_stand_apart() -> None:
    own = [entry.split("==")[0] for entry in ENTRY.findall(TORCH_LOCK.read_text())]

    assert {"torch", "triton", "nvidia-cudnn-cu13"} <= set(own)
    assert not [entry for entry in ENTRY.findall(LOCK.read_text()) if OF_TORCH.match(entry)]
