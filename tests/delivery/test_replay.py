"""A document that could not be delivered is stored, and a second process delivers it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.delivery.callback import Callback, webhook_id
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from tests.fakes.local_worker import QUICK, LocalWorker, sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.supabase import CallbackReceiver
from tests.servers.supabase import SupabaseStorage as SupabaseServer

MakeLocal = Callable[..., LocalWorker]


def replay(
    place: object, receiver: CallbackReceiver, **env: str
) -> subprocess.CompletedProcess[str]:
    settings = {
        "CALLBACK_URL": receiver.callback_url,
        "JOB_CALLBACK_SECRET": receiver.secret,
        **env,
    }
    return subprocess.run(
        [sys.executable, "-m", "ourvidz_serverless", "replay", str(place)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **settings, **env},
        timeout=PATIENCE_S,
    )


def undelivered(local: MakeLocal, receiver: CallbackReceiver, **parts: Any) -> LocalWorker:
    """A worker; the receiver refuses the document of its next job."""
    receiver.script([500, 500, 500])
    return local(callback=Callback(receiver.callback_url, receiver.secret, policy=QUICK), **parts)


def test_a_kept_document_is_delivered_by_a_second_process(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = undelivered(local, receiver)
    document = at.run()

    run = replay(at.root, receiver)

    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "user-1/job-1/callback.completed.json: delivered",
        "1 delivered, 0 left",
    ]
    last = receiver.received[-1]
    assert (last.status, last.signature_ok, last.webhook_ok) == (200, True, True)
    assert last.document["assets"] == document.callback()["assets"]


def test_a_replayed_document_keeps_its_webhook_id(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = undelivered(local, receiver)
    at.run()

    replay(at.root, receiver)

    assert [each.headers["webhook-id"] for each in receiver.received] == [
        webhook_id("job-1", "completed")
    ] * 4


def test_replay_removes_the_delivered_document_and_leaves_the_assets(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = undelivered(local, receiver)
    at.run()

    replay(at.root, receiver)

    assert at.stored() == ["user-1/job-1/0.png", "user-1/job-1/0.thumb.webp"]


def test_a_document_that_is_refused_again_stays_and_replay_exits_with_1(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = undelivered(local, receiver)
    at.run()
    receiver.script([403])

    run = replay(at.root, receiver)

    assert run.returncode == 1
    assert run.stdout.splitlines() == [
        "user-1/job-1/callback.completed.json: left, HTTP 403",
        "0 delivered, 1 left",
    ]
    assert "user-1/job-1/callback.completed.json" in at.stored()


def test_replay_posts_the_failure_of_a_job_before_its_completion(
    local: MakeLocal, receiver: CallbackReceiver
) -> None:
    at = undelivered(local, receiver)
    at.run()
    receiver.script([500, 500, 500])
    at.fake_sdxl.fails = [RuntimeError()]
    at.run()

    replay(at.root, receiver)

    assert [each.document["status"] for each in receiver.received[-2:]] == ["failed", "completed"]


def test_replay_posts_to_the_jobs_own_url(local: MakeLocal) -> None:
    with CallbackReceiver() as general, CallbackReceiver() as its_own:
        its_own.script([500, 500, 500])
        callback = Callback(general.callback_url, its_own.secret, None, ("127.0.0.1",), QUICK)
        at = local(callback=callback)
        at.run(sdxl_payload(callback_url=its_own.callback_url))

        run = replay(at.root, general, CALLBACK_HOSTS="127.0.0.1")

        assert run.returncode == 0
        assert general.received == []
        assert "callback_url" not in its_own.received[-1].document


def test_replay_reads_a_bucket(local: MakeLocal, receiver: CallbackReceiver) -> None:
    with SupabaseServer() as supabase:
        store = SupabaseStorage(supabase.url, supabase.service_key, "workspace-temp", "assets")
        undelivered(local, receiver, storage=store).run()
        env = {"SUPABASE_URL": supabase.url, "SUPABASE_SERVICE_KEY": supabase.service_key}

        run = replay("supabase://workspace-temp/assets", receiver, **env)

        assert run.returncode == 0, run.stdout + run.stderr
        assert receiver.received[-1].status == 200
        assert not [key for _, key in supabase.objects if "callback" in key]


def test_replay_leaves_a_file_that_holds_no_document(
    tmp_path: Path, receiver: CallbackReceiver
) -> None:
    for i, text in enumerate(["", "[]", "{}", "\udcff", json.dumps({"job_id": 1})]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "callback.failed.json").write_text(text, errors="surrogateescape")

    run = replay(tmp_path, receiver)

    assert run.stdout.splitlines()[-1] == "0 delivered, 5 left"
    assert receiver.received == []


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ourvidz_serverless", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("args", [[], ["replay"], ["replay", "a", "b"], ["resend", "a"]])
def test_a_wrong_command_line_shows_the_usage(args: list[str]) -> None:
    run = command(*args)

    assert run.returncode == 2
    assert run.stderr.startswith("usage: python -m ourvidz_serverless")


def test_replay_explains_itself() -> None:
    run = command("replay", "--help")

    assert run.returncode == 0
    assert run.stdout.startswith("usage: python -m ourvidz_serverless replay [-h] place")


def test_replay_needs_a_callback_url(tmp_path: Path, receiver: CallbackReceiver) -> None:
    run = replay(tmp_path, receiver, CALLBACK_URL="")

    assert run.returncode == 1
    assert run.stderr == "cannot replay: CALLBACK_URL: Field required\n"
