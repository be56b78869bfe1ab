"""One platform, one edge function and one real worker for both clients."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import tiny_folder
from tests.servers.handler import start
from tests.servers.javascript import SECRET, edge_function, url_of
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    with Platform() as server:
        yield server


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def receiver() -> Iterator[WorkerProcess]:
    """The edge function that takes callbacks."""
    with edge_function("job-callback", JOB_CALLBACK_SECRET=SECRET) as function:
        yield function


@pytest.fixture(scope="session")
def worker(
    platform: Platform,
    receiver: WorkerProcess,
    outputs: Path,
    wan_settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[WorkerProcess]:
    """One worker for all families, on models of a few weights."""
    env = {
        "FAMILIES": "sdxl,chat,wan",
        "WAN_MODEL": wan_settings.wan_model,
        "WAN_VACE_MODEL": str(wan_settings.wan_vace_model),
        "CHAT_INSTRUCT_MODEL": tiny_folder(tmp_path_factory.mktemp("chat")),
        "STORAGE_URL": f"file:{outputs}",
        "WORKER_API_KEY": "worker-key",
        "CALLBACK_URL": f"{url_of(receiver)}/functions/v1/job-callback",
        "JOB_CALLBACK_SECRET": SECRET,
    }
    with start(platform, **env) as process:
        yield process


@pytest.fixture
def scripted() -> Iterator[Platform]:
    """A platform whose answers to `/run` can be scripted."""
    with Platform() as server:
        server.script_path = "/run"
        yield server
