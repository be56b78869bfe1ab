"""The page at `/`: who gets it, which files it sends, its logic, and a real browser."""

import json
import re
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, Route

from ourvidz_serverless import jobs
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.wan.request import VideoRequest
from ourvidz_serverless.serving.http import page, routes
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import EndlessChat, FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.fake_wan import FakeWan
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp
from tests.servers.javascript import DENO, deno_environment

KEY = {"Authorization": "Bearer a-key"}


class GreyFrames(FakeWan):
    """A `FakeWan` of nine grey frames."""

    def generate(self, request: VideoRequest, progress: Progress) -> Generator[np.ndarray]:
        width, height = request.size
        yield np.full((9, height, width, 3), 128, dtype=np.uint8)


@pytest.fixture
def fake_chat() -> FakeChat:
    return FakeChat("Water ", "that ", "falls.")


@pytest.fixture
def local(tmp_path: Path, fake_chat: FakeChat) -> LocalWorker:
    return make_bench(tmp_path, fake_chat)


def make_bench(folder: Path, chat: Any, **settings: Any) -> LocalWorker:
    """A worker for all families, whose storage the page can read."""
    config = Settings(
        families=("sdxl", "chat", "wan"),
        host="127.0.0.1",
        storage_url=f"file:{folder / 'stored'}",
        **settings,
    )
    fake_sdxl = FakeSdxl()
    models = {"sdxl": fake_sdxl, "chat": chat, "wan": GreyFrames(FakeChat("More."))}
    return LocalWorker(folder / "stored", settings=config, fake_sdxl=fake_sdxl, models=models)


@pytest.fixture
def service(local: LocalWorker) -> Iterator[ServedHttp]:
    with ServedHttp(local.settings, local.worker) as served:
        yield served


# --- access ---


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"host": "worker.internal"}, False),
        ({"host": "127.0.0.1"}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0", "page": True}, True),
        ({"host": "127.0.0.1", "page": False}, False),
    ],
)
def test_the_page_is_on_at_a_loopback_address_or_if_page_says_so(
    settings: dict[str, Any], wanted: bool
) -> None:
    assert page.is_wanted(Settings(**settings)) is wanted


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/assets/user-1/job-1/0.png"])
def test_without_the_page_none_of_its_routes_exist(local: LocalWorker, path: str) -> None:
    local.run()
    hidden = local.settings.model_copy(update={"page": False})
    with ServedHttp(hidden, local.worker) as service:
        assert service.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in page.PARTS)])
def test_the_pages_policy_forbids_requests_to_other_hosts(service: ServedHttp, path: str) -> None:
    answer = service.get(path)

    assert answer.status_code == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*|unsafe", policy)


def test_the_page_names_no_host_and_has_all_its_parts() -> None:
    files = {path.name: path.read_text() for path in page.FOLDER.iterdir()}

    assert set(files) == {"index.html", *page.PARTS}
    assert not re.findall(r"https?://|url\(|//[a-z]+\.[a-z]", "".join(files.values()))
    assert set(re.findall(r'(?:src|href)="page/([^"]+)"', files["index.html"])) <= set(page.PARTS)


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 403)],
)
def test_a_foreign_name_that_resolves_to_this_machine_does_not_get_the_page(
    service: ServedHttp, local: LocalWorker, host: str, status: int
) -> None:
    url = local.run().assets[0].url

    for path in ("/", f"/assets/{url}"):
        assert service.get(path, headers={"Host": host}).status_code == status


def test_the_page_is_no_part_of_the_api(service: ServedHttp) -> None:
    paths = service.get("/openapi.json").json()["paths"]

    assert set(paths) == {route.path for route in routes.router.routes}  # type: ignore[attr-defined]


# --- assets ---


def ask(service: ServedHttp, path: str) -> requests.Response:
    """A request whose path is sent unchanged."""
    request = requests.Request("GET", service.url).prepare()
    request.url = service.url + path
    with requests.Session() as session:
        return session.send(request, timeout=PATIENCE_S)


def test_an_asset_is_sent_with_its_media_type(service: ServedHttp, local: LocalWorker) -> None:
    document = local.run()

    answer = service.get(f"/assets/{document.assets[0].url}")

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
    assert answer.content == (local.root / document.assets[0].url).read_bytes()
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/assets/user-1/job-1/0.png"])
def test_head_answers_as_get_does_without_a_body(
    service: ServedHttp, local: LocalWorker, path: str
) -> None:
    local.run()

    whole, head = service.get(path), service.head(path)

    assert (head.status_code, head.content) == (200, b"")
    kept = ("Content-Length", "Content-Type", "Content-Security-Policy")
    assert [head.headers[name] for name in kept] == [whole.headers[name] for name in kept]


ELSEWHERE = [
    "/assets/../secret.png",
    "/assets/%2e%2e/secret.png",
    "/assets/user-1/..%2f..%2f..%2fsecret.png",
    "/assets//etc/passwd",
    "/assets/%2fetc%2fpasswd.png",
    "/assets/link.png",
    "/assets/folder/secret.png",
    "/assets/user-1",
    "/assets/",
    "/assets/nothing.png",
    "/assets/%00.png",
    f"/assets/{'x' * 5000}.png",
    "/assets/user-1/job-1/callback.completed.json",
    "/page/..%2fenhancement.txt",
    "/page/index.html",
]


def test_no_other_file_of_the_machine_is_sent(service: ServedHttp, local: LocalWorker) -> None:
    local.run()
    (local.root.parent / "secret.png").write_text("secret")
    (local.root / "link.png").symlink_to(local.root.parent / "secret.png")
    (local.root / "folder").symlink_to(local.root.parent)
    (local.root / "user-1/job-1/callback.completed.json").write_text("secret")

    answers = {path: ask(service, path) for path in ELSEWHERE}

    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(
        ELSEWHERE, 404
    )
    assert not [path for path, answer in answers.items() if "secret" in answer.text]


@given(st.text() | st.lists(st.sampled_from(["..", ".", "", "a", "stored"])).map("/".join))
def test_no_asset_key_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    root = tmp_path_factory.getbasetemp() / "outer" / "stored"
    (root / "a").mkdir(parents=True, exist_ok=True)
    (root.parent / "a").write_text("outside")

    found = DirectoryStorage(root).find(key)

    assert found is None


def test_assets_need_the_key_of_the_worker(tmp_path: Path) -> None:
    locked = make_bench(tmp_path, FakeChat(), worker_api_key="a-key")
    key = locked.run(sdxl_payload(api_key="a-key")).assets[0].url
    with ServedHttp(locked.settings, locked.worker) as service:
        without, wrong, right = (
            service.get(f"/assets/{key}", headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer wrong"}, KEY)
        )
        page_itself = service.get("/").status_code

    assert (without, wrong, right, page_itself) == (401, 401, 200, 200)


def test_assets_in_a_bucket_are_not_sent(local: LocalWorker) -> None:
    local.run()
    elsewhere = local.settings.model_copy(
        update={
            "storage_url": "supabase://workspace-temp",
            "supabase_url": "http://127.0.0.1:1",
            "supabase_service_key": Settings(supabase_service_key="key").supabase_service_key,
        }
    )
    with ServedHttp(elsewhere, local.worker) as service:
        assert service.get("/assets/user-1/job-1/0.png").status_code == 404


# --- its logic, without a browser ---


def logic(action: str, **given: Any) -> Any:
    """The result of an action of `pagejob.js`."""
    script = ROOT / "tests/serving/http/pagejob.js"
    done = subprocess.run(
        [DENO, "run", "--no-prompt", f"--allow-read={ROOT}", script, action, json.dumps(given)],
        capture_output=True,
        text=True,
        env=deno_environment(),
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_knows_the_family_of_every_job_type() -> None:
    assert logic("families", types=list(jobs.FAMILY_OF)) == jobs.FAMILY_OF
    assert set(logic("fields")) == set(jobs.FAMILY_OF.values())


def filled(field: dict[str, Any]) -> Any:
    """A value that a person might enter."""
    if "choices" in field:
        return field["choices"][-1]
    if field.get("number"):
        return {"temperature": 0.5, "config.width": 64, "config.height": 64}.get(field["at"], 12)
    return True if field.get("check") else "sdxl"


def parsed(payload: dict[str, Any]) -> dict[str, Any]:
    job = Envelope.of({"id": "rp-1", "input": payload}).job(Settings())
    return dict(json.loads(job.model_dump_json(exclude={"s3_config"}, fallback=str)))


def test_every_field_of_every_form_is_a_field_of_the_job() -> None:
    fields = logic("fields")
    forms, whole = [], []
    for name, family in jobs.FAMILY_OF.items():
        values = {field["at"]: filled(field) for field in fields[family]}
        # Without these fields a job is refused, which proves that it reads them.
        needed = {"prompt", "words", "config.width", "config.height", "config.operation"}
        for without in set(values) - needed:
            forms.append({"type": name, "values": {**values, without: ""}})
        whole.append({"type": name, "values": values})
    complete = {each["type"]: each for each in logic("payloads", forms=whole)}

    for payload in logic("payloads", forms=forms):
        assert parsed(payload) != parsed(complete[payload["type"]]), payload


def test_an_empty_form_is_a_payload_with_the_workers_defaults() -> None:
    form = {"type": "sdxl_image_fast", "values": {"prompt": "", "config.seed": ""}}

    (payload,) = logic("payloads", forms=[form])

    assert payload == {"type": "sdxl_image_fast", "user_id": "page"}


def test_a_conversation_is_sent_with_its_earlier_messages() -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    form = {
        "type": "chat_conversation",
        "values": {"system": "Be brief.", "words": "And now?"},
        "earlier": said,
    }

    (payload,) = logic("payloads", forms=[form])

    system, words = {"role": "system", "content": "Be brief."}, {"role": "user"}
    assert payload["messages"] == [system, *said, {**words, "content": "And now?"}]


def test_events_are_read_wherever_the_network_splits_them() -> None:
    text = ': still here\n\nevent: progress\ndata: {"step": 1}\n\ndata: {"delta": "Wätér 💧"}\n\n'

    read = logic("events", text=text)

    whole = [
        {"event": "progress", "data": {"step": 1}},
        {"event": "message", "data": {"delta": "Wätér 💧"}},
    ]
    assert len(read) == len(text.encode()) + 1
    assert all(each == whole for each in read)


def test_progress_and_end_are_shown_in_words() -> None:
    progress = [
        {"stage": "generate", "step": 3, "steps": 12},
        {"stage": "generate", "step": 6, "steps": 12, "remaining_s": 7.2},
    ]
    documents = [
        {"status": "completed", "metadata": {"processing_time": 3.26}},
        {"status": "failed", "code": "OOM_ERROR", "error": "no room"},
    ]

    assert logic("tell", progress=progress) == [
        {"words": "generate 3 of 12", "share": 0.25},
        {"words": "generate 6 of 12, 8 s left", "share": 0.5},
    ]
    assert logic("ending", documents=documents) == ["completed in 3.3 s", "OOM_ERROR: no room"]


def test_only_assets_that_the_worker_stores_itself_are_requested() -> None:
    assets = [
        {"type": "image", "url": "user 1/job#1/0.png"},
        {"type": "image", "url": "https://bucket.example/0.png"},
        {"type": "text", "url": "data:text/plain,Rain"},
    ]

    assert logic("addresses", assets=assets) == ["assets/user%201/job%231/0.png", None, None]


def test_long_data_in_a_document_is_shown_by_its_length() -> None:
    text = logic("pretty", document={"url": "data:text/plain," + "x" * 1000, "response": "y" * 500})

    assert "… (1016 characters)" in text
    assert "y" * 500 in text


@pytest.mark.parametrize("check", [["fmt", "--check"], ["lint", "--rules-exclude=no-window"]])
def test_the_page_is_formatted_and_linted(check: list[str]) -> None:
    options = ["--line-width=100"] if check[0] == "fmt" else []
    files = [page.FOLDER / name for name in page.PARTS if name.endswith(".js")]
    done = subprocess.run([DENO, *check, *options, *files], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


# --- a real browser ---


Visit = Callable[[ServedHttp], Page]


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visit]:
    """Opens a service's page; at the end it has reported no error and called no other host."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(1000 * PATIENCE_S)
    complaints: list[str] = []
    asked: set[str] = set()
    services: list[str] = []

    def open_page(service: ServedHttp) -> Page:
        tab = context.new_page()
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("console", lambda line: complaints.append(line.text))
        tab.on("request", lambda request: asked.add(request.url))
        services.append(service.url)
        tab.goto(service.url)
        return tab

    yield open_page
    context.close()
    # The browser logs refused requests by itself; the page shows them in its own words.
    assert not [each for each in complaints if "Failed to load resource" not in each]
    local = (*services, "data:", "blob:")
    assert not [url for url in asked if not url.startswith(local)]


def choose(tab: Page, kind: str, **fields: str) -> None:
    tab.wait_for_selector("#send:enabled")
    tab.select_option("#type", kind)
    for name, value in fields.items():
        tab.fill(f"[name='{name}'], [name='config.{name}']", value)


def run(tab: Page) -> None:
    tab.click("#send")


def wait_for_state(tab: Page, words: str) -> None:
    tab.wait_for_selector(f"#state:has-text('{words}')")


def said(tab: Page) -> Any:
    return json.loads(tab.inner_text("#document"))


#: The middle pixel of the first picture or video, as the browser shows it.
MIDDLE = """() => {
  const seen = document.querySelector("figure img, figure video");
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  canvas.getContext("2d").drawImage(seen, 0, 0, 1, 1);
  return [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data];
}"""


def test_a_picture_is_submitted_with_progress_and_shown(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    tab = visit(service)
    choose(tab, "sdxl_image_fast", prompt="a grey square", seed="77", num_inference_steps="10")
    tab.select_option("[name='config.resolution']", "512x512")
    tab.select_option("[name='config.num_images']", "3")
    run(tab)
    wait_for_state(tab, "generate 0 of 10")
    local.fake_sdxl.go_on.set()
    wait_for_state(tab, "completed in")
    tab.wait_for_selector("figure:nth-of-type(3) img")

    assert tab.evaluate(MIDDLE) == [77, 77, 77, 255]
    assert tab.inner_text("figure:nth-of-type(1) figcaption") == "512 × 512 · seed 77 · 10 steps"
    document = said(tab)
    assert document["status"] == "completed"
    assert [asset["metadata"]["seed"] for asset in document["assets"]] == [77, 78, 79]
    (fragment,) = local.fake_sdxl.requests[0].prompt
    assert fragment.text == "a grey square"


def test_a_video_plays(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    choose(tab, "video_fast", width="64", height="64", frames="9", fps="8")
    run(tab)
    tab.wait_for_selector("figure video")
    tab.wait_for_function("() => document.querySelector('video').currentTime > 0")

    assert tab.evaluate(MIDDLE)[:3] == pytest.approx([128] * 3, abs=3)
    assert "9 frames at 8 a second" in tab.inner_text("figcaption")


def test_a_reply_is_streamed_and_the_conversation_goes_on(
    visit: Visit, service: ServedHttp, fake_chat: FakeChat
) -> None:
    tab = visit(service)
    choose(tab, "chat_conversation", words="What is rain?")
    run(tab)
    wait_for_state(tab, "completed in")
    first, left = tab.inner_text(".talk"), tab.input_value("[name='words']")
    fake_chat.pieces = ["Frozen."]
    tab.fill("[name='words']", "And snow?")
    run(tab)
    tab.wait_for_selector(".talk:has-text('Frozen.')")

    assert (first.split("\n\n"), left) == (["What is rain?", "Water that falls."], "")
    assert said(tab)["response"] == "Frozen."
    assert fake_chat.calls[1].messages == (
        ("user", "What is rain?"),
        ("assistant", "Water that falls."),
        ("user", "And snow?"),
    )


def test_a_running_job_is_stopped_on_the_page(visit: Visit, tmp_path: Path) -> None:
    endless = EndlessChat()
    chatty = make_bench(tmp_path, endless)
    with ServedHttp(chatty.settings, chatty.worker) as service:
        tab = visit(service)
        choose(tab, "chat_conversation")
        run(tab)
        tab.wait_for_selector(".growing:has-text('word word')")
        tab.click("#stop")
        wait_for_state(tab, "CANCELLED")

        assert endless.stopped.wait(PATIENCE_S)
        tab.wait_for_selector("#send:enabled")


def test_a_job_cannot_be_stopped_before_it_is_accepted(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    shown: list[bool] = []

    def look(route: Route) -> None:
        shown.append(tab.is_visible("#stop"))
        route.continue_()

    tab.route("**/jobs", look)
    choose(tab, "chat_conversation")
    run(tab)
    wait_for_state(tab, "completed in")

    assert shown == [False]


def test_text_typed_during_a_reply_is_kept(
    visit: Visit, service: ServedHttp, fake_chat: FakeChat
) -> None:
    tab, go_on = visit(service), threading.Event()

    def pieces() -> Iterator[str]:
        yield "Water "
        assert go_on.wait(PATIENCE_S)
        yield "falls."

    fake_chat.pieces = pieces()
    choose(tab, "chat_conversation", words="What is rain?")
    run(tab)
    tab.wait_for_selector(".growing:has-text('Water')")
    tab.fill("[name='words']", "And snow?")
    go_on.set()
    wait_for_state(tab, "completed in")

    assert tab.input_value("[name='words']") == "And snow?"
    said_by = [turn["role"] for turn in json.loads(tab.input_value("#payload"))["messages"]]
    assert said_by == ["user", "assistant", "user"]


def test_a_payload_written_by_hand_is_sent(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    tab.wait_for_selector("#send:enabled")
    tab.click("summary")
    tab.fill("#payload", json.dumps(sdxl_payload(id="by-hand", config={"seed": 9})))
    run(tab)
    wait_for_state(tab, "completed in")

    assert said(tab)["job_id"] == "by-hand"
    assert local.fake_sdxl.requests[0].seeds == (9,)


REFUSED = chat_payload(
    type="chat_unrestricted", messages=[{"role": "user", "content": "explicit story, she is 15"}]
)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ("{", "The payload is not JSON"),
        (json.dumps(sdxl_payload(config={"num_images": 2})), "config.num_images: Input should be"),
        (json.dumps(REFUSED), "content policy"),
    ],
)
def test_a_refusal_is_shown_in_the_workers_words(
    visit: Visit, service: ServedHttp, payload: str, says: str
) -> None:
    tab = visit(service)
    tab.wait_for_selector("#send:enabled")
    tab.click("summary")
    tab.fill("#payload", payload)
    run(tab)

    tab.wait_for_selector(f"#refused:has-text('{says}'), #state.wrong:has-text('{says}')")
    tab.wait_for_selector("#send:enabled")


def test_the_key_is_asked_for_kept_in_memory_and_sent_with_every_request(
    visit: Visit, tmp_path: Path
) -> None:
    locked = make_bench(tmp_path, FakeChat("Rain."), worker_api_key="a-key")
    with ServedHttp(locked.settings, locked.worker) as service:
        tab = visit(service)
        tab.wait_for_selector("#key-form:visible")
        for key in ("wrong", "a-key"):
            tab.fill("#key", key)
            tab.click("#key-form button")
            words = "does not know this key" if key == "wrong" else "serves"
            tab.wait_for_selector(f"#worker:has-text('{words}')")
        choose(tab, "sdxl_image_fast", seed="7")
        tab.select_option("[name='config.resolution']", "512x512")
        run(tab)
        tab.wait_for_selector("figure img")
        kept = tab.evaluate("() => [{...localStorage}, {...sessionStorage}, document.cookie]")
        tab.reload()
        tab.wait_for_selector("#key-form:visible")

    assert kept == [{}, {}, ""]
    assert "a-key" not in tab.url


def test_a_visitor_during_loading_can_use_the_page_when_the_models_are_loaded(
    visit: Visit, local: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ServedHttp(local.settings) as service:
        tab = visit(service)
        tab.wait_for_selector("#worker:has-text('being loaded')")
        service.service.open(local.worker)
        tab.wait_for_selector("#worker:has-text('serves sdxl, chat, wan')")

        assert tab.locator("#type option").count() == len(jobs.FAMILY_OF)


def test_on_a_narrow_screen_nothing_is_cut_off(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    tab.set_viewport_size({"width": 360, "height": 700})
    choose(tab, "sdxl_image_fast")

    assert tab.evaluate("() => document.documentElement.scrollWidth") <= 360
