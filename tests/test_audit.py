"""The audit trail: one line a job, which says who, what and how it ended, and has no text."""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.guard import content_floor
from ourvidz_serverless.job import CheckedText
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.patience import PATIENCE_S

MakeLocal = Callable[..., LocalWorker]
WHO = ("job_id", "user_id", "type", "adult")
WHAT = ("audit", "content", "content_list", "texts_sha256", "stored_sha256")
HOW = ("status", "code", "seconds", "timings")


@pytest.fixture
def trail(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    caplog.set_level(logging.INFO, "ourvidz.audit")
    return lambda: [
        json.loads(each.message) for each in caplog.records if each.name == "ourvidz.audit"
    ]


Trail = Callable[[], list[dict[str, Any]]]


def test_a_job_writes_one_line_with_who_what_and_how_it_ended(
    local: MakeLocal, trail: Trail
) -> None:
    at = local()

    at.run(sdxl_payload(prompt="a zebra"))

    (line,) = trail()
    assert sorted(line) == sorted([*WHO, *WHAT, *HOW])
    assert [line[fact] for fact in WHO] == ["job-1", "user-1", "sdxl_image_fast", False]
    assert (line["status"], line["code"], line["content"]) == ("completed", None, "passed")
    assert set(line["timings"]) == {"fetch", "wait", "generate", "deliver"}


def test_the_line_has_the_hashes_of_the_texts_and_of_the_stored_files(
    local: MakeLocal, trail: Trail
) -> None:
    at = local()

    at.run(sdxl_payload(prompt="a zebra", config={"num_images": 3}))

    (line,) = trail()
    assert line["texts_sha256"] == content_floor.audit_hash(
        [CheckedText("a zebra", "prompt"), CheckedText("", "compel_weights")]
    )
    assert line["stored_sha256"] == {
        key.removeprefix("user-1/job-1/"): hashlib.sha256((at.root / key).read_bytes()).hexdigest()
        for key in at.stored()
    }


@pytest.mark.parametrize(
    ("payload", "options", "expected"),
    [
        ({"prompt": "nude child"}, {}, {"code": "CONTENT_REFUSED", "content": "minor+sexual"}),
        ({"prompt": None}, {}, {"code": "INVALID_PROMPT", "job_id": "job-1"}),
        ({}, {"worker_api_key": ("k",)}, {"code": "UNAUTHORIZED"}),
        ({"api_key": "k"}, {"worker_api_key": ("k",)}, {"code": None, "key": "accepted"}),
        ({}, {"rate_limit_user": "9/day"}, {"code": None, "rate": "within"}),
        ({"type": "video_fast"}, {}, {"code": "WORKER_UNAVAILABLE", "type": "video_fast"}),
        (
            {"content_type": "nsfw", "metadata": {"reference_image_url": "https://a.example/b"}},
            {},
            {"code": "CONTENT_REFUSED", "consent": "missing", "content": "passed", "adult": True},
        ),
        (
            {
                "content_type": "nsfw",
                "metadata": {
                    "reference_image_url": "data:image/png;base64,AAAA",
                    "reference_consent": True,
                },
            },
            {},
            {"consent": "given", "content": "passed", "adult": True},
        ),
    ],
)
def test_a_job_that_ends_early_writes_one_line(
    local: MakeLocal, trail: Trail, payload: Any, options: Any, expected: dict[str, Any]
) -> None:
    local(settings=Settings(**options)).run(sdxl_payload(**payload))

    (line,) = trail()
    assert expected.items() <= line.items()


def test_a_job_whose_model_fails_writes_one_line(local: MakeLocal, trail: Trail) -> None:
    at = local()
    at.fake_sdxl.fails = [OutOfMemory("does not fit")]

    at.run()

    (line,) = trail()
    assert (line["status"], line["code"], line["stored_sha256"]) == ("failed", "OOM_ERROR", {})


def test_the_line_of_a_refused_reply_has_the_rule(local: MakeLocal, trail: Trail) -> None:
    local(models={"chat": FakeChat("a nude ", "child")}).run(chat_payload())

    (line,) = trail()
    assert (line["code"], line["content"]) == ("CONTENT_REFUSED", "minor+sexual")


@pytest.mark.parametrize(
    "payload",
    [
        sdxl_payload(prompt="a zebra", negative_prompt="zebra", config={"image": "zebra/x.png"}),
        sdxl_payload(prompt="zebra nude child", api_key="zebra"),
        sdxl_payload(prompt="zebra", config={"num_images": 7}),
        chat_payload(messages=[{"role": "user", "content": "a zebra"}]),
        sdxl_payload(type="zebra"),
    ],
)
def test_no_line_has_a_word_of_a_text(
    local: MakeLocal, caplog: pytest.LogCaptureFixture, payload: Any
) -> None:
    caplog.set_level(logging.DEBUG)

    local(models={"sdxl": FakeSdxl(), "chat": FakeChat("zebra")}).run(payload)

    assert "ourvidz.audit" in {each.name for each in caplog.records}
    assert "zebra" not in caplog.text


@pytest.mark.parametrize("breaks", ["\n", "\r", "\x85", "\u2028", "\x1b[2K"])
def test_a_record_with_line_breaks_is_one_line(breaks: str) -> None:
    code = "import sys; from ourvidz_serverless import logs; logs.configure('INFO')\n"
    code += "logs.bug(f'/job/{sys.argv[1]}00:00:00 INFO forged', ValueError())"

    run = subprocess.run(
        [sys.executable, "-c", code, breaks],
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_S,
    )

    (line,) = run.stderr.splitlines()
    assert "forged met a bug: ValueError" in line
    assert line.isprintable()
