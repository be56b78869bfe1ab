"""A worker with keys accepts only jobs that have one, and shows no key in answers or logs."""

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from ourvidz_serverless import settings
from ourvidz_serverless.errors import ModelLoadError, Unauthorized
from ourvidz_serverless.guard import access
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.patience import PATIENCE_S
from tests.servers.handler import run_handler

MakeLocal = Callable[..., LocalWorker]
KEY = "a-key-of-ours-5f0e"
KEYS = (SecretStr("the-older-key"), SecretStr(KEY))


def with_keys(local: MakeLocal, **parts: Any) -> LocalWorker:
    return local(settings=Settings(worker_api_key=KEYS), **parts)


# --- the check itself ---


@pytest.mark.parametrize("given", ["the-older-key", KEY])
def test_each_of_the_keys_is_accepted(given: str) -> None:
    access.check(given, KEYS)


@pytest.mark.parametrize("given", [None, "", KEY[:-1], KEY + "x", KEY.upper(), f" {KEY}", "\ud800"])
def test_anything_but_a_key_of_the_worker_is_refused(given: str | None) -> None:
    with pytest.raises(Unauthorized, match=r"^api_key: Input should be a key of this worker$"):
        access.check(given, KEYS)


@pytest.mark.parametrize("given", [None, "anything"])
def test_a_worker_without_keys_accepts_every_key_and_none(given: str | None) -> None:
    access.check(given, ())


# --- the setting ---


def test_commas_separate_several_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_API_KEY", f"the-older-key, {KEY}")

    assert settings.read().worker_api_key == KEYS


@pytest.mark.parametrize("value", [",", " , ", " "])
def test_a_setting_without_any_key_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WORKER_API_KEY", value)

    with pytest.raises(ModelLoadError, match="WORKER_API_KEY: Input should hold a key"):
        settings.read()


def test_printed_settings_show_no_key() -> None:
    assert KEY not in repr(Settings(worker_api_key=KEYS))


# --- a job ---


def test_a_job_with_a_key_completes(local: MakeLocal) -> None:
    assert with_keys(local).run(sdxl_payload(api_key=KEY)).status == "completed"


@pytest.mark.parametrize("key", [None, "wrong", 7, [KEY], {"key": KEY}, True])
def test_a_job_without_a_key_is_refused_before_its_payload_is_parsed(
    local: MakeLocal, key: Any
) -> None:
    at = with_keys(local)

    document = at.run(sdxl_payload(api_key=key, prompt=None))

    assert document.failure is not None
    assert (document.failure.code, document.failure.retryable) == ("UNAUTHORIZED", False)
    assert (at.fake_sdxl.requests, at.stored()) == ([], [])


def test_a_caller_without_the_key_does_not_join_a_job_by_its_id(local: MakeLocal) -> None:
    at = with_keys(local)
    at.fake_sdxl.hold()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(at.run, sdxl_payload(api_key=KEY))
        assert at.fake_sdxl.at_step.wait(PATIENCE_S)

        stranger = at.run(sdxl_payload(api_key="wrong"))
        at.fake_sdxl.go_on.set()

        assert first.result(PATIENCE_S).status == "completed"
    assert stranger.failure is not None
    assert stranger.failure.code == "UNAUTHORIZED"
    assert stranger.assets == ()


@pytest.mark.parametrize("payload", [sdxl_payload(api_key=KEY), {"api_key": KEY, "config": KEY}])
def test_a_key_is_in_no_log_and_in_no_answer(
    local: MakeLocal, caplog: pytest.LogCaptureFixture, payload: Any
) -> None:
    caplog.set_level(logging.DEBUG)

    document = with_keys(local).run(payload)

    assert KEY not in json.dumps(document.result()) + caplog.text


def test_the_handler_refuses_a_wrong_key_and_shows_no_key(tmp_path: Path) -> None:
    payload = json.dumps({"input": sdxl_payload(api_key="brought-along")})

    run = run_handler(
        "--test_input",
        payload,
        STORAGE_URL=f"file:{tmp_path}",
        WORKER_API_KEY=KEY,
        LOG_LEVEL="DEBUG",
    )

    assert "UNAUTHORIZED" in run.stderr
    assert KEY not in run.stdout + run.stderr
    assert "brought-along" not in run.stdout + run.stderr
