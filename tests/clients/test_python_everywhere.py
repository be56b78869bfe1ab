"""Both Python clients against each kind of server, with a real worker."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ourvidz_serverless import errors
from ourvidz_serverless.client import AsyncClient, Client, NotSupported, RequestFailed
from tests.clients.python_clients import WORKER_KEY, Awaited, Server, served
from tests.fakes.local_worker import chat_payload, sdxl_payload
from tests.fakes.tiny_chat import tiny_folder

QUEUE, SDK, HTTP = "RunPod's queue", "the SDK's test server", "the HTTP service"


def servers(*kinds: str) -> pytest.MarkDecorator:
    """Runs a test with these servers only."""
    return pytest.mark.parametrize("server", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module", params=[QUEUE, SDK, HTTP])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    env = {"CHAT_INSTRUCT_MODEL": tiny_folder(tmp_path_factory.mktemp("chat"))}
    with served(request.param, tmp_path_factory.mktemp("outputs"), env) as running:
        yield running


@pytest.fixture(params=["synchronous", "asynchronous"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Clients:
    """Makes clients of one server, and closes them."""

    def __init__(self, server: Server, way: str, loop: asyncio.AbstractEventLoop) -> None:
        self._server, self._way, self._loop = server, way, loop
        self._made: list[Any] = []

    def __call__(self, **changes: Any) -> Any:
        kind = Client if self._way == "synchronous" else AsyncClient
        made = self._server.made(kind, **changes)
        self._made.append(made if kind is Client else Awaited(made, self._loop))
        return self._made[-1]

    def close(self) -> None:
        for each in self._made:
            each.close()


@pytest.fixture
def made(server: Server, way: str, loop: asyncio.AbstractEventLoop) -> Iterator[Clients]:
    clients = Clients(server, way, loop)
    yield clients
    clients.close()


@pytest.fixture
def client(made: Clients) -> Any:
    return made()


def test_a_picture_is_made_and_downloaded(client: Any, server: Server, tmp_path: Path) -> None:
    document = client.run(sdxl_payload(id="run"))

    (path,) = client.download(document, tmp_path / "pictures")

    assert path == tmp_path / "pictures/0.png"
    assert path.read_bytes() == (server.outputs / document["assets"][0]["url"]).read_bytes()


def test_a_submitted_job_is_completed_at_its_end(client: Any) -> None:
    job = client.submit(sdxl_payload(id="submitted"))

    document = job.result()

    outcome = job.status()
    assert document["assets"][0]["metadata"]["seed"] == 7
    assert (outcome.status, outcome.document) == ("completed", document)


def test_a_reply_comes_in_one_request(client: Any) -> None:
    document = client.runsync(chat_payload(id="at-once"))

    assert document["usage"]["completion_tokens"] > 0


@servers(QUEUE, HTTP)
def test_progress_rises_to_the_last_step(client: Any) -> None:
    config = {"num_inference_steps": 12, "resolution": "256x256"}

    job = client.submit(sdxl_payload(id="progress", config=config))
    steps = [progress["step"] for progress in job.progress()]

    assert steps == sorted(steps) and 0 < steps[-1] <= 12
    assert job.result()["status"] == "completed"


def test_the_pieces_of_a_stream_are_the_reply(client: Any) -> None:
    job = client.submit(chat_payload(id="stream", stream=True, max_tokens=60, temperature=0))

    pieces = list(job.stream())

    assert pieces and "".join(pieces) == job.result()["response"]


def test_a_payload_is_streamed_in_one_call(client: Any) -> None:
    assert "".join(client.stream(chat_payload(id="stream-in-one", temperature=0)))


@servers(QUEUE, HTTP)
def test_a_running_job_is_cancelled(client: Any, way: str) -> None:
    config = {"num_inference_steps": 50, "resolution": "512x512"}
    job = client.submit(sdxl_payload(id=f"cancelled-{way}", config=config))
    next(job.progress())

    job.cancel()

    with pytest.raises(errors.Cancelled):
        job.result()


@servers(SDK)
def test_what_the_sdks_test_server_lacks_is_said(client: Any) -> None:
    for call in (client.health, client.submit(chat_payload()).cancel):
        with pytest.raises(NotSupported, match="the SDK's test server"):
            call()


def test_a_job_that_fails_raises_the_workers_error(client: Any) -> None:
    with pytest.raises(errors.InvalidPrompt, match=r"config\.num_images: Input should be less"):
        client.run(sdxl_payload(id="refused", config={"num_images": 7}))


def test_a_picture_from_a_file_is_the_reference(client: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "orange").save(tmp_path / "sunset.png")
    config = {"image": tmp_path / "sunset.png", "denoise_strength": 0.3}

    document = client.run(sdxl_payload(id="reference", config=config))

    assert document["metadata"]["reference_mode"] == "modify"


def test_a_job_is_found_by_its_name(made: Clients) -> None:
    job = made().submit(sdxl_payload(id="found"))

    found = made().job(job.endpoint, job.id, job.user_id)

    assert found.result()["assets"]


def test_a_wrong_key_is_unauthorized_and_shown_in_no_error(made: Clients) -> None:
    with pytest.raises(errors.Unauthorized) as refused:
        made(worker_key="wrong-key-of-mine").run(sdxl_payload(id="unauthorized"))

    assert "wrong-key-of-mine" not in repr(refused.value) + str(refused.value)


def test_a_server_that_is_gone_is_named_and_no_key(
    server: Server, way: str, loop: asyncio.AbstractEventLoop
) -> None:
    gone = Server(server.kind, "http://user:pass@127.0.0.1:1", server.outputs, "caller-key")
    clients = Clients(gone, way, loop)

    with pytest.raises(RequestFailed, match=r"POST http://127\.0\.0\.1:1/\S+: no whole") as failed:
        clients().submit(sdxl_payload())

    clients.close()
    assert failed.value.status is None and failed.value.is_transient
    for secret in (WORKER_KEY, "caller-key", "pass"):
        assert secret not in str(failed.value) + repr(failed.value)


@servers(QUEUE, HTTP)
def test_health_says_what_the_worker_does(client: Any) -> None:
    (health,) = client.health("sdxl").values()

    assert "workers" in health or health["status"] == "healthy"
