"""What many tests share."""

import os

# Before torch is imported. On a shared machine two threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.settings import Settings
from tests.support.bench import Bench
from tests.support.platform import Platform
from tests.support.receivers import CallbackReceiver
from tests.support.s3 import SeaweedServer


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    """Builds a Bench; keyword arguments replace its parts."""
    return lambda **parts: Bench(tmp_path / "assets", **parts)


@pytest.fixture(scope="session")
def s3() -> Iterator[SeaweedServer]:
    with SeaweedServer() as server:
        yield server


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with Platform() as server:
        yield server


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def receiver() -> Iterator[CallbackReceiver]:
    with CallbackReceiver() as server:
        yield server


@pytest.fixture(scope="session")
def sdxl() -> Any:
    """The pocket SDXL, loaded as production loads a checkpoint."""
    from ourvidz_serverless.models import sdxl as models

    return models.load(Settings())
