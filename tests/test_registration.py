"""A pod registers with the application, and takes itself out again."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.registration import Registration
from ourvidz_serverless.retries import Retry
from ourvidz_serverless.settings import Settings
from tests.support.handler import ROOT
from tests.support.patience import PATIENCE_S
from tests.support.web import Answer, LocalServer, Request, json_answer
from tests.support.worker import WorkerProcess


class Application(LocalServer):
    """The edge functions that hear of workers."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.is_asked = threading.Event()

    def answer(self, request: Request) -> Answer:
        """Hears of a worker at once, unless `go_on` is unset, and of its end in any case."""
        name = request.path.removeprefix("/functions/v1/")
        bearer = request.headers.get("Authorization", "")
        body = json.loads(request.body)
        self.is_asked.set()
        if body["worker_url"]:
            self.go_on.wait(PATIENCE_S)
        with self.changed:
            self.told.append((name, bearer, body))
            self.changed.notify_all()
        return json_answer({"success": True})

    @property
    def urls(self) -> list[str | None]:
        """Where workers were said to be, in turn."""
        return [body["worker_url"] for _, _, body in self.told]


@pytest.fixture
def application() -> Iterator[Application]:
    with Application() as server:
        yield server


URL = "https://pod-8000.proxy.runpod.net"


def registration(
    application: Application, *families: str, sleep: Callable[[float], None] = time.sleep
) -> Registration:
    quick = Retry(tries=4, base_s=0.01)
    return Registration(
        application.url, "key", URL, families, quick, lambda: "2026-11-24T00:00:00", sleep
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
def test_each_family_is_announced_where_it_belongs(
    application: Application, families: list[str], functions: list[str]
) -> None:
    registration(application, *families).announce()

    assert [name for name, _, _ in application.told] == functions
    for _, bearer, body in application.told:
        assert bearer == "Bearer key"
        assert body == {
            "worker_url": URL,
            "auto_registered": True,
            "registration_method": "ourvidz_serverless",
            "timestamp": "2026-11-24T00:00:00",
        }


def test_an_application_that_is_busy_is_told_again(application: Application) -> None:
    application.script([503, "reset", 429])

    registration(application, "chat").announce()

    assert len(application.told) == 1


def test_an_application_that_does_not_want_it_is_left_alone(application: Application) -> None:
    application.script([404])

    registration(application, "chat").announce()

    assert application.told == []


def test_a_withdrawal_names_no_url(application: Application) -> None:
    registration(application, "chat").withdraw()

    ((_, _, body),) = application.told
    assert (body["worker_url"], body["status"]) == (None, "inactive")


def test_who_has_left_is_announced_no_more(application: Application) -> None:
    application.script([503])
    leaving = registration(application, "chat", sleep=lambda wait_s: leaving.withdraw())

    leaving.announce()

    assert application.urls == [None]


def test_an_announcement_that_ends_after_the_withdrawal_is_taken_back(
    application: Application,
) -> None:
    application.go_on.clear()
    leaving = registration(application, "sdxl", "chat")
    announcing = threading.Thread(target=leaving.announce)
    announcing.start()
    assert application.is_asked.wait(PATIENCE_S)
    withdrawing = threading.Thread(target=leaving.withdraw)
    withdrawing.start()
    application.wait_until(lambda: application.urls == [None, None])
    application.go_on.set()
    announcing.join()
    withdrawing.join()

    assert application.urls == [None, None, URL, None, None]


def test_a_pods_url_is_its_proxys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_POD_ID", "pod")
    settings = Settings(
        register_worker=True, supabase_url="https://a.example", supabase_service_key="k", port=7861
    )

    made = Registration.of(settings)

    assert made and made._worker_url == "https://pod-7861.proxy.runpod.net"


def test_what_registration_needs_is_asked_for_at_the_start() -> None:
    with pytest.raises(ModelLoadError, match="REGISTER_WORKER: SUPABASE_URL"):
        Registration.of(Settings(register_worker=True))

    assert Registration.of(Settings()) is None


@pytest.mark.slow
def test_a_worker_registers_once_it_is_ready_and_withdraws_at_sigterm(
    application: Application, tmp_path: Path
) -> None:
    env = {
        "REGISTER_WORKER": "1",
        "SUPABASE_URL": application.url,
        "SUPABASE_SERVICE_KEY": "key",
        "WORKER_URL": "https://worker.example",
        "STORAGE_URL": f"file:{tmp_path}",
        "PORT": "0",
        "HOST": "127.0.0.1",
    }
    args = ["ourvidz_serverless.http"]
    with WorkerProcess(None, "-m", env=env, cwd=ROOT, args=args) as process:
        application.wait_until(lambda: len(application.told) == 1)
        process.terminate()
        assert process.wait() == 0

    assert application.urls == ["https://worker.example", None]
