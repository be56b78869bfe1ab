"""Fixtures and settings that many tests share."""

import gc
import os
import sys

# This must precede the import of torch. On a shared machine two threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# As in a worker whose chat models are not quantised: transformers, diffusers and peft import
# torchao if it is installed, which takes seconds. A test that needs it starts a process.
sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
# jsonschema imports it to check IRIs, which no schema has. It takes a second to build its grammar.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
# Imports leave no garbage worth a search. `pytest_collection_finish` begins to search again.
gc.disable()

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ourvidz_serverless.models.memory import garbage
from ourvidz_serverless.serving import runpod_sdk
from ourvidz_serverless.settings import Settings
from tests import examples
from tests.files import ROOT
from tests.servers import warm_python, warm_worker
from tests.servers.certificates import write_authority
from tests.servers.runpod import Platform
from tests.servers.s3 import SeaweedServer
from tests.servers.supabase import CallbackReceiver

if TYPE_CHECKING:
    from tests.fakes.local_worker import LocalWorker

# Remove RunPod's variables, so that the tests run the same on a RunPod machine.
for name in [name for name in os.environ if name.startswith("RUNPOD_")]:
    del os.environ[name]

examples.load_profile()


def pytest_configure(config: pytest.Config) -> None:
    """With several processes, all are forked from one server. The first process runs no test.

    So the first one imports neither torch nor the SDK: the others start seconds earlier.
    """
    if config.getoption("numprocesses", None):
        warm_python.share()
    else:
        # Without a Python that finds the processor's name, which takes a second.
        runpod_sdk.load()


def pytest_collection_finish() -> None:
    """Keep what the imports and the collection made out of each later search for garbage.

    A model searches whenever it leaves its device, and would look at all of these each time.
    """
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    if Path.cwd() == ROOT:
        program = f"{sys.executable} -m {warm_worker.__name__}"
        specs[:] = [type(spec)(f"{spec}//python={program}") for spec in specs]


@pytest.fixture
def local(tmp_path: Path) -> "Callable[..., LocalWorker]":
    """A function that builds a LocalWorker. Keyword arguments replace its parts."""
    from tests.fakes.local_worker import LocalWorker

    return lambda **parts: LocalWorker(tmp_path / "assets", **parts)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_authority(tmp_path_factory.mktemp("authority"))


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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real browser. Without one the test is skipped, and on CI it fails."""
    from playwright.sync_api import sync_playwright

    from builder import browser as builder

    found = builder.find()
    if found is None and "CI" not in os.environ:
        pytest.skip("no browser: neither `python -m builder.browser` nor a Chromium on PATH")
    assert found, "a browser is needed on CI"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found.program, args=list(found.arguments), env=found.env
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def sdxl() -> Any:
    """The pocket SDXL, loaded as production loads a checkpoint."""
    from ourvidz_serverless.models.sdxl import loader as models

    model = models.load(Settings())
    garbage.leave_out_what_lives()
    return model


@pytest.fixture(scope="session")
def wan_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The settings for a WAN model of random weights."""
    from tests.fakes.tiny_wan import write_wan

    return write_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def wan(wan_settings: Settings) -> Any:
    """The WAN model of `wan_settings`, loaded as in production. It has no enhancer."""
    from ourvidz_serverless.models.wan import loader as models

    model = models.load(wan_settings)
    garbage.leave_out_what_lives()
    return model
