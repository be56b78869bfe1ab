"""RunPod's quickstart request, `{"input": {"prompt": "Hello World"}}`, on each kind of endpoint.

The request is the one that RunPod's documentation sends to a new endpoint
(https://docs.runpod.io/serverless/quickstart). The SDK's loop and the worker are real.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.servers.handler import failure
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

pytestmark = pytest.mark.slow

QUICKSTART = {"prompt": "Hello World"}

Answer = Callable[[str], dict[str, Any]]


@pytest.fixture
def answer(platform: Platform, tmp_path: Path) -> Answer:
    """What `/status` shows of the quickstart's job at the end, on a worker of these families."""

    def ask(families: str) -> dict[str, Any]:
        env = {"FAMILIES": families, "HOLD": str(tmp_path / "hold")}
        with WorkerProcess(
            platform,
            "-m",
            env={**env, "STORAGE_URL": f"file:{tmp_path}"},
            args=["tests.fakes.fake_handler"],
        ):
            job = platform.submit(QUICKSTART)
            platform.result(job)
        return platform.status(job)

    return ask


@pytest.mark.parametrize(("family", "suffix"), [("sdxl", "0.png"), ("wan", "0.mp4")])
def test_the_quickstart_on_an_endpoint_of_a_family_makes_its_picture_or_video(
    answer: Answer, tmp_path: Path, family: str, suffix: str
) -> None:
    status = answer(family)

    assert status["status"] == "COMPLETED"
    (asset,) = status["output"]["assets"]
    assert asset["url"] == f"anonymous/{status['id']}/{suffix}"
    assert (tmp_path / asset["url"]).stat().st_size > 0


def test_the_quickstart_on_a_chat_endpoint_gets_a_reply(answer: Answer) -> None:
    status = answer("chat")

    assert (status["status"], status["output"][-1]["response"]) == ("COMPLETED", "Water.")


def test_the_quickstart_on_an_endpoint_of_several_families_is_asked_for_a_type(
    answer: Answer,
) -> None:
    status = answer("sdxl,chat")

    assert failure(status)["code"] == "INVALID_PROMPT"
    assert failure(status)["message"].startswith("type: Field required on a worker of several")
