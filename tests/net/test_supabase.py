"""The service key goes to its own project alone, in the headers that the gateway takes."""

from collections.abc import Callable, Iterator

import pytest

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.net.supabase import Project
from ourvidz_serverless.serving.registration import Registration
from ourvidz_serverless.settings import Settings
from tests.servers.local_server import Answer, LocalServer, Request, json_answer

DONE = Document("job-1", "worker-1", "completed")


class Anywhere(LocalServer):
    """A server that takes every request, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        return json_answer({})

    def keys(self) -> dict[str, str]:
        """The headers of the last request that carry a key."""
        headers = self.requests[-1].headers
        return {name: headers[name] for name in ("apikey", "Authorization") if name in headers}


@pytest.fixture
def project() -> Iterator[Anywhere]:
    with Anywhere() as server:
        yield server


@pytest.fixture
def elsewhere() -> Iterator[Anywhere]:
    with Anywhere() as server:
        yield server


def settings_of(project: Anywhere, key: str = "jwt", **changes: object) -> Settings:
    given = {"supabase_url": project.url, "supabase_service_key": key, **changes}
    return Settings(**given)  # type: ignore[arg-type]


def store(settings: Settings) -> None:
    SupabaseStorage.of(settings, "workspace-temp", "").put("user/job/0.png", b"", "image/png")


def call_back(settings: Settings) -> None:
    Callback.of(settings).post(DONE)


def register(settings: Settings) -> None:
    update = {"register_worker": True, "worker_url": "https://worker.example"}
    made = Registration.of(settings.model_copy(update=update))
    assert made
    made.announce()


@pytest.mark.parametrize("send", [store, call_back, register])
@pytest.mark.parametrize(
    ("key", "headers"),
    [
        ("jwt", {"apikey": "jwt", "Authorization": "Bearer jwt"}),
        ("sb_secret_abc", {"apikey": "sb_secret_abc"}),
    ],
)
def test_a_key_travels_in_the_headers_of_its_kind(
    project: Anywhere, send: Callable[[Settings], None], key: str, headers: dict[str, str]
) -> None:
    send(settings_of(project, key))

    assert project.keys() == headers


def test_a_callback_url_of_another_origin_gets_no_key(
    project: Anywhere, elsewhere: Anywhere
) -> None:
    call_back(settings_of(project, callback_url=f"{elsewhere.url}/functions/v1/job-callback"))

    assert elsewhere.keys() == {}


@pytest.mark.parametrize("path", ["/functions/v1/other", "/functions/v1/job-callback"])
def test_a_payloads_own_url_gets_no_key(project: Anywhere, elsewhere: Anywhere, path: str) -> None:
    callback = Callback.of(settings_of(project, callback_hosts="127.0.0.1"))

    callback.post(DONE, f"{elsewhere.url}{path}")

    assert elsewhere.keys() == {}


def test_a_payloads_own_url_gets_no_key_of_the_project_either(project: Anywhere) -> None:
    callback = Callback.of(settings_of(project, callback_hosts="127.0.0.1"))

    callback.post(DONE, f"{project.url}/functions/v1/other")

    assert project.requests[-1].path == "/functions/v1/other"
    assert project.keys() == {}


@pytest.mark.parametrize("send", [store, call_back, register])
def test_a_key_is_not_sent_in_the_clear(send: Callable[[Settings], None]) -> None:
    settings = Settings(supabase_url="http://project.example", supabase_service_key="a-secret")

    with pytest.raises(ModelLoadError, match="SUPABASE_URL: Input should begin with https://"):
        send(settings)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:54321", "http://localhost:54321", "http://[::1]"]
)
def test_a_project_on_this_machine_may_be_plain_http(url: str) -> None:
    project = Project.of(Settings(supabase_url=url, supabase_service_key="key"))

    assert project and project.url == url


@pytest.mark.parametrize(
    ("url", "is_own"),
    [
        ("https://project.example/functions/v1/job-callback", True),
        ("https://PROJECT.example:443/", True),
        ("http://project.example/", False),
        ("https://project.example:8443/", False),
        ("https://project.example.evil.example/", False),
        ("https://project.example@evil.example/", False),
    ],
)
def test_a_projects_own_url_has_its_scheme_host_and_port(url: str, is_own: bool) -> None:
    assert Project("https://project.example", "key").has(url) is is_own


def test_a_key_is_not_printed() -> None:
    assert "a-secret" not in repr(Project("https://project.example", "a-secret"))
