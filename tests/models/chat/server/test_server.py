"""A worker whose chat is answered by a server: its start, its end, and what it logs and refuses."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import Cancelled, DeviceLost, JobError, ModelLoadError
from ourvidz_serverless.models.chat.server import loader
from ourvidz_serverless.models.chat.server import model as server_model
from ourvidz_serverless.models.chat.server.model import ServerChat
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import LocalWorker, chat_payload
from tests.fakes.tiny_chat import CancelCheck, ask
from tests.files import ROOT
from tests.patience import PATIENCE_S, start, wait_until
from tests.servers.chat_server import DIE, DIE_SLOWLY, ENVIRONMENT, FAIL, HANG, ChatServer
from tests.servers.http_service import ServedHttp
from tests.servers.local_server import free_port

HELLO = ("user", "Hello")


def settings_for(url: str | None = None, **changes: Any) -> Settings:
    return Settings(
        families=("chat",), chat_engine="openai", chat_server_url=url, chat_server_start_s=60
    ).model_copy(update=changes)


def load(server: ChatServer, **changes: Any) -> ServerChat:
    return loader.load(settings_for(server.url, **changes))


def failure_of(settings: Settings) -> str:
    with pytest.raises(ModelLoadError) as failed:
        loader.load(settings)
    return failed.value.message


# --- what the server gets ---


def test_a_url_may_end_with_v1_as_clients_have_it() -> None:
    with ChatServer() as server:
        chat = loader.load(settings_for(f"{server.url}/v1/"))

        assert "".join(ask(chat, HELLO, max_tokens=5))


def test_the_key_is_sent_to_the_server() -> None:
    with ChatServer(key="hush-hush") as server:
        keyed = settings_for(server.url).model_copy(
            update={
                "chat_server_api_key": Settings(chat_server_api_key="hush-hush").chat_server_api_key
            }
        )

        assert "".join(ask(loader.load(keyed), HELLO, max_tokens=5))
        assert failure_of(settings_for(server.url)) == "CHAT_SERVER_API_KEY: the server refuses it"


def test_a_server_that_counts_no_tokens_drops_messages_by_its_refusals() -> None:
    messages = [("user", "x" * 100)] * 9
    with ChatServer(counts_tokens=False, context=512) as server:
        reply = ask(load(server), *messages, truncate="oldest", max_tokens=5)

        assert "".join(reply)
        assert reply.stats.num_dropped == 5
        assert len(server.bodies[-1]["messages"]) == 4
        assert server.wait_until(lambda: not server.num_writing)


def test_a_short_conversation_is_not_counted_before_it_is_sent() -> None:
    with ChatServer(context=4096) as server:
        chat = load(server)
        counted: list[Any] = []
        chat._client.count_tokens = counted.append  # type: ignore[assignment, method-assign]

        assert "".join(ask(chat, HELLO, max_tokens=5))
        assert counted == []


def test_fields_of_a_server_that_is_not_known_are_those_that_the_setting_lists() -> None:
    with ChatServer(owner="somebody") as server:
        chat = load(server, chat_server_fields=("top_k",))
        assert "".join(ask(chat, HELLO, max_tokens=5, top_k=7))
        with pytest.raises(JobError, match="repetition_penalty: not supported by this worker"):
            ask(chat, HELLO, max_tokens=5, repetition_penalty=1.1)

        assert server.bodies[-1]["top_k"] == 7


def test_a_salt_that_a_server_may_not_know_ends_the_start() -> None:
    with ChatServer(owner="somebody") as server:
        salted = settings_for(server.url, chat_cache_salt="user")

        assert failure_of(salted) == "CHAT_CACHE_SALT: the server is not known to have cache_salt"


# --- streams ---


def test_the_server_notices_that_a_reply_is_cancelled_before_its_first_token() -> None:
    with ChatServer(pace_s=PATIENCE_S) as server:
        chat = ServerChat(*parts_of(server))
        check = CancelCheck()
        reply = start("".join, ask(chat, HELLO, max_tokens=5, check=check))
        server.wait_until(lambda: server.num_writing)

        check.is_cancelled = True

        with pytest.raises(Cancelled):
            reply.result(PATIENCE_S)


def parts_of(server: ChatServer) -> Any:
    from ourvidz_serverless.models.chat.server.client import ServerClient
    from ourvidz_serverless.models.chat.server.translation import Served

    return ServerClient(server.url), {"qwen_instruct": Served("tiny", frozenset())}


def test_the_server_notices_that_a_reply_is_cancelled_while_it_grows() -> None:
    with ChatServer(pace_s=0.01) as server:
        pieces = iter(ask(load(server), HELLO, max_tokens=200))
        next(pieces)
        before = server.num_abandoned

        pieces.close()  # type: ignore[attr-defined]

        assert server.wait_until(lambda: server.num_abandoned > before)


def test_a_reply_that_the_content_floor_refuses_ends_at_the_server(
    local: Callable[..., LocalWorker],
) -> None:
    says = "A child, and more. " + "Rain falls. " * 9 + "nude " + "Rain falls. " * 300
    with ChatServer(says=says, pace_s=0.001, context=4096) as server:
        at = local(models={"chat": load(server)}, settings=settings_for(server.url))

        document = at.run(chat_payload(stream=True, max_tokens=2048))

        assert document.failure and document.failure.code == "CONTENT_REFUSED"
        assert server.wait_until(lambda: server.num_abandoned)


def test_a_refused_conversation_is_not_sent(local: Callable[..., LocalWorker]) -> None:
    with ChatServer() as server:
        at = local(models={"chat": load(server)}, settings=settings_for(server.url))
        before = len(server.bodies)

        messages = [{"role": "user", "content": "nude child"}]
        document = at.run(chat_payload(messages=messages))

        assert document.failure and document.failure.code == "CONTENT_REFUSED"
        assert len(server.bodies) == before


@pytest.mark.parametrize(
    ("step", "code"), [("reset", "WORKER_UNAVAILABLE"), (500, "INTERNAL_ERROR")]
)
def test_a_server_of_ones_own_that_fails_does_not_end_the_worker(
    local: Callable[..., LocalWorker], step: Any, code: str
) -> None:
    with ChatServer(context=4096) as server:
        at = local(models={"chat": load(server)}, settings=settings_for(server.url))
        server.script([step])

        failed, next_one = at.run(chat_payload()), at.run(chat_payload(id="next"))

    assert failed.failure and (failed.failure.code, failed.failure.retryable) == (code, True)
    assert next_one.status == "completed"
    assert not at.worker.is_lost


# --- the models of a server ---


def test_the_only_model_of_a_server_needs_no_name() -> None:
    with ChatServer(models=("only",)) as server:
        chat = load(server)
        list(ask(chat, HELLO, max_tokens=1))

        assert server.bodies[-1]["model"] == "only"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "CHAT_SERVER_MODEL: Field required, since the server has a, b"),
        ({"chat_server_model": "c"}, "CHAT_SERVER_MODEL: the server has no c, but a, b"),
        (
            {"chat_server_model": "a", "chat_server_base_model": "c"},
            "CHAT_SERVER_BASE_MODEL: the server has no c, but a, b",
        ),
    ],
)
def test_a_name_that_leaves_open_which_model_is_meant_ends_the_start(
    changes: dict[str, Any], line: str
) -> None:
    with ChatServer(models=("a", "b")) as server:
        assert failure_of(settings_for(server.url, **changes)) == line


def test_a_server_that_does_not_generate_ends_the_start() -> None:
    with ChatServer(models=("a",)) as server:
        server.script([200, 200, 500])

        assert failure_of(settings_for(server.url)) == (
            "CHAT_SERVER_MODEL: the server lists it, and the model failed"
        )


def test_a_server_that_does_not_count_the_tokens_of_a_stream_ends_the_start() -> None:
    with ChatServer(counts_usage=False) as server:
        assert failure_of(settings_for(server.url)).startswith(
            "CHAT_SERVER_MODEL: the server does not count the tokens of a stream"
        )


def test_a_server_that_does_not_answer_ends_the_start() -> None:
    url = f"http://127.0.0.1:{free_port()}"

    assert failure_of(settings_for(url, chat_server_start_s=0.2)) == (
        "CHAT_SERVER_URL: the server does not answer within 0.2 seconds"
    )


# --- a server that the worker starts ---

SERVER = f"{shlex.quote(sys.executable)} -m tests.servers.chat_server --port {{port}}"


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's module is found from here."""
    monkeypatch.chdir(ROOT)


@contextmanager
def started(command: str = SERVER, **changes: Any) -> Iterator[ServerChat]:
    chat = loader.load(settings_for(chat_server_command=command, **changes))
    try:
        yield chat
    finally:
        assert chat._process
        chat._process.close()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_server_gets_its_model_and_its_port_and_no_setting_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "a-value")
    command = f"{SERVER} --model {{model}} --key hush-hush"
    key = Settings(chat_server_api_key="hush-hush").chat_server_api_key
    place = str(tmp_path)

    with started(command, chat_instruct_model=place, chat_server_api_key=key) as chat:
        assert "".join(ask(chat, HELLO, max_tokens=5))

    assert f"chat server: loading {place} ***" in caplog.text
    assert "chat server: ['HF_TOKEN', 'VLLM_LOGGING_LEVEL']" in caplog.text
    assert "hush-hush" not in caplog.text


def test_no_prompt_in_the_servers_output_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with started() as chat:
        "".join(ask(chat, ("user", "an unmistakable zebra"), max_tokens=5))
        wait_until(lambda: "chat server: ValueError" in caplog.text)

    assert "zebra" not in caplog.text


def test_a_server_that_dies_loses_the_device_of_its_jobs(local: Callable[..., LocalWorker]) -> None:
    with started() as chat:
        at = local(models={"chat": chat}, settings=settings_for("http://127.0.0.1:1"))
        messages = [{"role": "user", "content": DIE}]

        document = at.run(chat_payload(messages=messages))
        later = at.run(chat_payload(id="later"))

        with ServedHttp(at.settings, at.worker) as service:
            ping = service.get("/ping")

    assert document.result()["refresh_worker"] is True
    assert document.failure and document.failure.retryable
    assert later.failure and later.failure.code == "WORKER_UNAVAILABLE"
    assert ping.status_code == 503


def ask_for(at: LocalWorker, text: str, **changes: Any) -> Document:
    return at.run(chat_payload(messages=[{"role": "user", "content": text}], **changes))


def test_a_server_that_ends_long_after_its_connections_broke_loses_the_device(
    local: Callable[..., LocalWorker],
) -> None:
    with started() as chat:
        at = local(models={"chat": chat}, settings=settings_for("http://127.0.0.1:1"))

        document = ask_for(at, DIE_SLOWLY)

    assert document.result()["refresh_worker"] is True


def test_a_server_that_answers_no_more_and_does_not_end_loses_the_device(
    local: Callable[..., LocalWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_model, "DYING_S", 1.0)
    with started() as chat:
        at = local(models={"chat": chat}, settings=settings_for("http://127.0.0.1:1"))

        document = ask_for(at, HANG)

    assert document.result()["refresh_worker"] is True


def test_a_job_that_waits_for_a_servers_end_can_be_cancelled(
    local: Callable[..., LocalWorker], caplog: pytest.LogCaptureFixture
) -> None:
    with started() as chat:
        at = local(models={"chat": chat}, settings=settings_for("http://127.0.0.1:1"))
        job = start(ask_for, at, HANG)
        wait_until(lambda: "the chat server: no answer" in caplog.text)

        at.stop.set()

        document = job.result(PATIENCE_S)
    assert document.failure and document.failure.code == "CANCELLED"
    assert not at.worker.is_lost


def test_a_server_that_fails_one_request_and_lives_keeps_the_device(
    local: Callable[..., LocalWorker],
) -> None:
    with started() as chat:
        at = local(models={"chat": chat}, settings=settings_for("http://127.0.0.1:1"))

        failed, next_one = ask_for(at, FAIL), ask_for(at, "Hello", id="next")

    assert failed.failure and failed.failure.code == "INTERNAL_ERROR"
    assert next_one.status == "completed"
    assert not at.worker.is_lost


def test_a_server_that_dies_between_two_jobs_makes_the_worker_unhealthy(
    tmp_path: Path, local: Callable[..., LocalWorker]
) -> None:
    pids = tmp_path / "pids"
    with started(f"{SERVER} --children {pids}") as chat:
        at = local(models={"chat": chat}, settings=settings_for("http://127.0.0.1:1"))

        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)

        wait_until(lambda: at.worker.is_lost)
        with pytest.raises(DeviceLost):
            list(ask(chat, HELLO, max_tokens=5))


def test_all_processes_of_the_server_end_with_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with started(f"{SERVER} --children {pids}"):
        running = [int(pid) for pid in pids.read_text().split()]
        assert all(map(is_running, running))

    wait_until(lambda: not any(map(is_running, running)))


def test_the_server_ends_when_its_worker_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import sys; from ourvidz_serverless.models.chat.server.process import ServerProcess;"
        "ServerProcess(sys.argv[1:]); sys.stdin.read()"
    )
    command = [*shlex.split(SERVER.replace("{port}", str(free_port()))), "--children", str(pids)]
    worker = subprocess.Popen([sys.executable, "-c", code, *command], stdin=subprocess.PIPE)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    running = [int(pid) for pid in pids.read_text().split()]

    worker.kill()

    worker.communicate(timeout=PATIENCE_S)
    wait_until(lambda: not any(map(is_running, running)))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("no-such-program {port}", "CHAT_SERVER_COMMAND: there is no program no-such-program"),
        (
            f"{shlex.quote(sys.executable)} -c 'raise SystemExit(3)' {{port}}",
            "CHAT_SERVER_COMMAND: the server ended with code 3; the log has its last lines",
        ),
    ],
    ids=["no program", "a program that ends"],
)
def test_a_server_that_does_not_start_ends_the_start(command: str, line: str) -> None:
    assert failure_of(settings_for(chat_server_command=command)) == line


def test_a_start_that_is_given_up_ends_the_server(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    changes = {"chat_server_model": "another"}
    command = f"{SERVER} --children {pids}"

    assert "the server has no another, but tiny" in failure_of(
        settings_for(chat_server_command=command, **changes)
    )

    running = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(map(is_running, running)))


def test_a_worker_that_only_asks_a_server_imports_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "from ourvidz_serverless.settings import read_for_worker\n"
        "from ourvidz_serverless.models.loading import fetch\n"
        "from ourvidz_serverless.models.loading.readahead import ReadAhead\n"
        "from ourvidz_serverless.worker import Worker\n"
        "from ourvidz_serverless.jobs.envelope import Envelope\n"
        "from ourvidz_serverless.context import Stop\n"
        "settings = read_for_worker()\n"
        "assert not fetch.missing(settings)\n"
        "worker = Worker.of(settings, ReadAhead.of(settings).start())\n"
        "payload = {'type': 'chat_conversation', 'prompt': 'Hello', 'max_tokens': 5}\n"
        "document = worker.run(Envelope.of({'id': 'a', 'input': payload}), Stop(), print)\n"
        "worker.check_device()\n"
        "import handler, ourvidz_serverless.serving.runpod_queue\n"
        "print(document.status, worker.health())\n"
    )
    with ChatServer() as server:
        env = {
            **os.environ,
            "FAMILIES": "chat",
            "CHAT_ENGINE": "openai",
            "CHAT_SERVER_URL": server.url,
            "STORAGE_URL": "inline:",
        }
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    assert run.returncode == 0, run.stderr
    assert "completed {'status': 'healthy', 'model_loaded': True, 'device': 'chat server'" in (
        run.stdout
    )
