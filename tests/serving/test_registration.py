"""A pod registers at the application's edge functions."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.net.retries import Retry
from ourvidz_serverless.net.supabase import Project
from ourvidz_serverless.serving.registration import Registration
from ourvidz_serverless.settings import Settings
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import HANDLER
from tests.servers.local_server import Answer, LocalServer, Request, free_port, json_answer
from tests.servers.worker_process import WorkerProcess


class Application(LocalServer):
    """The edge functions `register-chat-worker` and `update-worker-url`.

    Both refuse a body without `worker_url`. With `probes` the second requests `/health` at that
    address, and refuses an address that does not answer 2xx.
    """

    def __init__(self) -> None:
        super().__init__()
        self.posts: list[tuple[str, Request, dict[str, Any]]] = []
        self.probes = False

    def answer(self, request: Request) -> Answer:
        name = request.path.removeprefix("/functions/v1/")
        body = json.loads(request.body)
        with self.changed:
            self.posts.append((name, request, body))
            self.changed.notify_all()
        if not body["worker_url"]:
            return json_answer({"success": False, "error": "worker_url is required"}, 400)
        if self.probes and name == "update-worker-url" and not _is_healthy(body["worker_url"]):
            return json_answer({"success": False, "error": "Worker URL is not responding"}, 400)
        return json_answer({"success": True})

    @property
    def urls(self) -> list[str | None]:
        """The addresses that were posted, in order."""
        return [body["worker_url"] for _, _, body in self.posts]


def _is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.RequestException:
        return False


@pytest.fixture
def application() -> Iterator[Application]:
    with Application() as server:
        yield server


URL = "https://pod-8000.proxy.runpod.net"


def registration(application: Application, *families: str, base_s: float = 0.01) -> Registration:
    policy = Retry(tries=4, base_s=base_s, max_s=base_s)
    project = Project(application.url, "key")
    return Registration(
        project, URL, [FAMILIES[name] for name in families], policy, lambda: "2026-11-24T00:00:00"
    )


@pytest.mark.parametrize(
    ("families", "functions"),
    [
        (["chat"], ["register-chat-worker"]),
        (["sdxl"], ["update-worker-url"]),
        (["sdxl", "wan"], ["update-worker-url"]),
        (["sdxl", "chat"], ["update-worker-url", "register-chat-worker"]),
    ],
)
def test_each_family_is_registered_at_its_function(
    application: Application, families: list[str], functions: list[str]
) -> None:
    registration(application, *families).announce()

    assert [name for name, _, _ in application.posts] == functions
    for _, request, body in application.posts:
        assert request.headers["Authorization"] == "Bearer key"
        assert body == {
            "worker_url": URL,
            "auto_registered": True,
            "registration_method": "ourvidz_serverless",
            "timestamp": "2026-11-24T00:00:00",
        }


def test_a_registration_is_tried_again_while_the_application_is_busy(
    application: Application,
) -> None:
    application.script([503, "reset", 429])

    registration(application, "chat").announce()

    assert len(application.posts) == 1


def test_a_registration_is_tried_again_until_the_application_reaches_the_worker(
    application: Application,
) -> None:
    application.script([400, 400])

    registration(application, "sdxl").announce()

    assert len(application.posts) == 1


def test_a_registration_that_is_refused_for_good_is_not_tried_again(
    application: Application,
) -> None:
    application.script([404])

    registration(application, "chat").announce()

    assert application.posts == []


def test_a_worker_that_closes_is_not_registered_any_more(application: Application) -> None:
    application.script([503])
    leaving = registration(application, "chat", base_s=PATIENCE_S)
    announcing = threading.Thread(target=leaving.announce)
    announcing.start()
    application.wait_until(lambda: not application.script_left)

    leaving.close()
    announcing.join(PATIENCE_S / 2)

    assert not announcing.is_alive()
    assert application.posts == []


def test_a_pods_address_is_the_one_of_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_POD_ID", "pod")
    settings = Settings(
        register_worker=True, supabase_url="https://a.example", supabase_service_key="k", port=7861
    )

    made = Registration.of(settings)

    assert made and made.worker_url == "https://pod-7861.proxy.runpod.net"


def test_a_setting_that_registration_lacks_is_named_at_the_start() -> None:
    with pytest.raises(ModelLoadError, match="REGISTER_WORKER: SUPABASE_URL"):
        Registration.of(Settings(register_worker=True))

    assert Registration.of(Settings()) is None


@pytest.mark.slow
def test_a_worker_registers_when_it_is_ready_and_posts_nothing_when_it_ends(
    application: Application, tmp_path: Path
) -> None:
    application.probes = True
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {
        "SERVE": "http",
        "REGISTER_WORKER": "1",
        "SUPABASE_URL": application.url,
        "SUPABASE_SERVICE_KEY": "key",
        "WORKER_URL": url,
        "STORAGE_URL": f"file:{tmp_path}",
        "PORT": str(port),
        "HOST": "127.0.0.1",
    }
    with WorkerProcess(None, str(HANDLER), env=env, cwd=ROOT) as process:
        application.wait_until(lambda: application.posts)
        process.terminate()
        assert process.wait() == 0
        log = process.log

    assert application.urls == [url]
    assert "registration" not in log
