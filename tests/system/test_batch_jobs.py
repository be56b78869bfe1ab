"""RunPod's batch jobs: each request of a batch is a job of the real worker, in the SDK's loop."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fakes.local_worker import sdxl_payload
from tests.patience import PATIENCE_S, wait_until
from tests.servers.batches import BatchPlatform
from tests.servers.handler import failure
from tests.servers.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """A request to an endpoint with a worker, below `/batch`; its answer."""
    env = {"FAMILIES": "sdxl", "HOLD": str(tmp_path / "hold"), "STORAGE_URL": f"file:{tmp_path}"}
    module = ["tests.fakes.fake_handler"]
    with BatchPlatform() as platform, WorkerProcess(platform, "-m", env=env, args=module):

        def send(method: str, path: str = "", body: Any = None) -> dict[str, Any]:
            url = f"{platform.caller_url}/local/batch{path}"
            key = {"Authorization": f"Bearer {platform.caller_key}"}
            answer = requests.request(method, url, json=body, headers=key, timeout=PATIENCE_S)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

        yield send


def test_a_batch_ends_with_a_document_or_a_failure_for_each_of_its_requests(
    ask: Ask, tmp_path: Path
) -> None:
    batch = ask("POST", body=[{"input": {"prompt": "green hills"}}])["id"]
    more = [sdxl_payload(id="second"), sdxl_payload(id="third", config={"num_images": 7})]
    ask("POST", f"/{batch}/requests", {"requests": [{"input": each} for each in more]})
    ask("POST", f"/{batch}/finalize")

    def counts() -> tuple[int, int]:
        summary = ask("GET", f"/{batch}")
        return summary["requestCompleted"], summary["requestFailed"]

    wait_until(lambda: sum(counts()) == 3)

    assert counts() == (2, 1)
    pages = [ask("GET", f"/{batch}/requests?offset={i}&limit=2") for i in (0, 2)]
    first, second, third = [each for page in pages for each in page["requests"]]
    (picture,) = first["output"]["assets"]
    assert (tmp_path / picture["url"]).is_file()
    assert second["output"]["job_id"] == "second"
    assert failure(third)["message"].startswith("config.num_images: ")
