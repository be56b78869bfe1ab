"""WAN's own call for an enhanced prompt: `{prompt, config: {job_type}}`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from ourvidz_serverless.jobs.enhancement import SAMPLING
from ourvidz_serverless.jobs.wan import Type
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_wan import FakeWan
from tests.fakes.local_worker import LocalWorker
from tests.fakes.tiny_chat import tiny_chat
from tests.guard.test_content_floor import REFUSED
from tests.servers.http_service import ServedHttp

NEUTRAL = Settings().wan_enhancement_prompt.read_text().strip()
CALL = {"prompt": "a red sun", "config": {"job_type": "video_fast"}}
ENHANCED = "a red sun in bright light"


def ask(folder: Path, models: dict[str, Any], call: dict[str, Any]) -> tuple[int, Any]:
    """The status and the body of `POST /enhance` at a worker with these models."""
    settings = Settings(families=tuple(models))
    with ServedHttp(
        settings, LocalWorker(folder, settings=settings, models=models).worker
    ) as service:
        answer = service.post("/enhance", call)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("family", ["wan", "chat"])
def test_a_call_for_an_enhanced_prompt_returns_one(tmp_path: Path, family: str) -> None:
    fake_chat = FakeChat(ENHANCED)
    models = {"wan": FakeWan(fake_chat)} if family == "wan" else {"chat": fake_chat}

    status, body = ask(tmp_path, models, CALL)

    assert (status, body["success"], body["enhanced_prompt"]) == (200, True, ENHANCED)
    assert body["metadata"]["system_prompt_used"] == NEUTRAL
    (call,) = fake_chat.calls
    assert call.messages == (("system", NEUTRAL), ("user", "a red sun"))


def test_a_real_enhancer_returns_the_same_prompt_for_the_same_seed(tmp_path: Path) -> None:
    call = {**CALL, "max_tokens": 8, "seed": 3}

    first, again = (ask(tmp_path, {"wan": FakeWan(tiny_chat())}, call)[1] for _ in range(2))

    assert first["usage"]["completion_tokens"] == 8
    assert first["enhanced_prompt"] == again["enhanced_prompt"] != ""


def test_a_call_is_sampled_like_an_enhanced_job_but_for_its_own_parameters(
    tmp_path: Path,
) -> None:
    fake_chat = FakeChat(ENHANCED)

    ask(tmp_path, {"wan": FakeWan(fake_chat)}, {**CALL, "temperature": 0.2})

    assert fake_chat.calls[0].sampling == replace(SAMPLING, temperature=0.2)


def test_the_enhancer_is_sampled_with_qwens_own_parameters(tmp_path: Path) -> None:
    fake_chat = FakeChat(ENHANCED)

    ask(tmp_path, {"wan": FakeWan(fake_chat)}, CALL)

    assert fake_chat.calls[0].sampling == SamplingParams(
        max_tokens=200, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
    )


@pytest.mark.parametrize("kind", [*get_args(Type), "wan_video_fast", "wan_video_high"])
def test_a_call_may_name_any_type_of_wan_by_each_of_its_names(tmp_path: Path, kind: str) -> None:
    status, _ = ask(
        tmp_path, {"wan": FakeWan(FakeChat("x"))}, {**CALL, "config": {"job_type": kind}}
    )

    assert status == 200


def test_a_system_prompt_of_the_call_replaces_the_neutral_one(tmp_path: Path) -> None:
    fake_chat = FakeChat(ENHANCED)
    config = {**CALL["config"], "system_prompt": "Be brief."}

    ask(tmp_path, {"wan": FakeWan(fake_chat)}, {**CALL, "config": config})

    assert fake_chat.calls[0].messages[0] == ("system", "Be brief.")


def test_the_enhancer_of_wans_jobs_answers_and_not_the_chat_familys_model(tmp_path: Path) -> None:
    models = {"chat": FakeChat("of the chat"), "wan": FakeWan(FakeChat("of WAN"))}

    _, body = ask(tmp_path, models, CALL)

    assert body["enhanced_prompt"] == "of WAN"


def test_a_call_to_a_worker_without_an_enhancer_is_unavailable(tmp_path: Path) -> None:
    status, body = ask(tmp_path, {"wan": FakeWan(None)}, CALL)

    assert (status, body["code"]) == (503, "WORKER_UNAVAILABLE")


@pytest.mark.parametrize("config", [{}, {"job_type": "chat_enhance"}, {"job_type": "sdxl"}])
def test_a_call_without_a_type_of_wan_is_a_job_of_the_chat_family(
    tmp_path: Path, config: dict[str, str]
) -> None:
    fake_chat, call = FakeChat(ENHANCED), {**CALL, "config": config}

    refused, _ = ask(tmp_path, {"wan": FakeWan(FakeChat("of WAN"))}, call)
    ask(tmp_path, {"chat": fake_chat}, call)

    assert refused == 503
    assert fake_chat.calls[0].messages == (("user", "a red sun"),)


def test_the_floor_refuses_a_call_before_the_enhancer_reads_its_prompt(tmp_path: Path) -> None:
    fake_chat = FakeChat(ENHANCED)

    status, _ = ask(tmp_path, {"wan": FakeWan(fake_chat)}, {**CALL, "prompt": REFUSED})

    assert (status, fake_chat.calls) == (403, [])


def test_a_call_for_an_enhanced_prompt_works_on_the_queue(tmp_path: Path) -> None:
    at = LocalWorker(tmp_path, models={"wan": FakeWan(FakeChat(ENHANCED))})

    document = at.run({**CALL, "type": "chat_enhance"})

    assert document.reply["enhanced_prompt"] == ENHANCED


def test_an_unreadable_system_prompt_fails_with_the_name_of_its_setting(tmp_path: Path) -> None:
    settings = Settings(wan_enhancement_prompt=tmp_path / "missing.txt")
    at = LocalWorker(tmp_path / "assets", settings=settings, models={"chat": FakeChat(ENHANCED)})

    document = at.run({**CALL, "type": "chat_enhance"})

    assert document.failure.code == "WORKER_UNAVAILABLE"
    assert document.failure.message == "WAN_ENHANCEMENT_PROMPT: the text cannot be read"
