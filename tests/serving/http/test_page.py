"""The page at `/`: who gets it, which files it sends, and its logic without a browser."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless import jobs
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving.http import page, routes
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp
from tests.servers.javascript import DENO, deno_environment
from tests.serving.http.page_worker import page_worker

KEY = {"Authorization": "Bearer a-key"}


@pytest.fixture
def fake_chat() -> FakeChat:
    return FakeChat("Water ", "that ", "falls.")


@pytest.fixture
def local(tmp_path: Path, fake_chat: FakeChat) -> LocalWorker:
    return page_worker(tmp_path, fake_chat)


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
    assert not re.findall(r"https?://|\burl\(|//[a-z]+\.[a-z]", "".join(files.values()))
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

    assert not set(paths) & {"/", "/page/{name}", "/assets/{path}"}
    assert set(paths) >= {route.path for route in routes.router.routes}  # type: ignore[attr-defined]


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
    locked = page_worker(tmp_path, FakeChat(), worker_api_key="a-key")
    key = locked.run(sdxl_payload(api_key="a-key")).assets[0].url
    with ServedHttp(locked.settings, locked.worker) as service:
        without, wrong, right = (
            service.get(f"/assets/{key}", headers=headers).status_code
            for headers in ({}, {"Authorization": "Bearer wrong"}, KEY)
        )
        page_itself = service.get("/").status_code

    assert (without, wrong, right, page_itself) == (401, 401, 200, 200)


def test_the_page_reads_a_picture_in_the_document_by_itself() -> None:
    urls = ["data:image/webp;base64,cGl4ZWxz", "data:text/plain,words", "user-1/job-1/0.png"]

    assert logic("files", urls=urls) == [["image/webp", "pixels"], None, None]


def test_a_download_has_the_name_of_its_job_or_of_its_place_in_the_document() -> None:
    facts = {"asset_index": 2, "format": "webp"}
    urls = ["user-1/job-1/2.webp", "data:image/webp;base64,cGl4ZWxz"]

    names = logic("names", assets=[{"url": url, "metadata": facts} for url in urls])

    assert names == ["job-1-2.webp", "2.webp"]


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


TYPES = [*jobs.FAMILY_OF]
POCKET = dict.fromkeys(("sdxl", "chat", "wan"), "pocket")
PIXEL = "data:image/png;base64,AAAA"


def logic(action: str, **given: Any) -> Any:
    """The result of an action of `pagejob.js`."""
    script = ROOT / "tests/serving/http/pagejob.js"
    done = subprocess.run(
        [DENO, "run", "--no-prompt", f"--allow-read={ROOT}", script, action],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=deno_environment(),
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_knows_the_family_of_every_job_type() -> None:
    assert logic("families", types=TYPES) == jobs.FAMILY_OF


def filled(field: dict[str, Any]) -> Any:
    """A value that a person might enter."""
    if "choices" in field:
        return field["choices"][-1]["value"]
    if "number" in field:
        return {"temperature": 0.5, "config.denoise_strength": 0.25}.get(field["at"], 12)
    return PIXEL if "picture" in field else True if "check" in field else "sdxl"


def parsed(payload: dict[str, Any]) -> dict[str, Any]:
    job = Envelope.of({"id": "rp-1", "input": payload}).job(Settings())
    return dict(json.loads(job.model_dump_json(exclude={"s3_config"}, fallback=str)))


def test_every_field_of_every_form_is_a_field_of_the_job() -> None:
    forms, whole = [], []
    for name, fields in logic("fields", types=TYPES).items():
        values = {field["at"]: filled(field) for field in fields}
        # Without these fields a job is refused, which proves that it reads them.
        for without in set(values) - {"words", "config.operation"}:
            gone = [each["at"] for each in fields if without in each.get("needs", ())]
            left = values | dict.fromkeys([without, *gone], "")
            forms.append({"type": name, "values": left})
        whole.append({"type": name, "values": values})
    complete = {each["type"]: each for each in logic("payloads", forms=whole)}

    for payload in logic("payloads", forms=forms):
        assert parsed(payload) != parsed(complete[payload["type"]]), payload


@pytest.mark.parametrize("models", [{}, POCKET], ids=["full models", "pocket models"])
def test_the_worker_accepts_every_form_as_it_opens(models: dict[str, str]) -> None:
    forms = [
        {"type": name, "values": logic("defaults", type=name, models=models)}
        for name in ("sdxl_image_high", "image_fast", "video_fast", "chat_enhance")
    ]

    for payload in logic("payloads", forms=forms):
        parsed(payload)


def test_the_sizes_of_a_form_follow_the_model_that_is_served() -> None:
    places = ("config.resolution", "config.width config.height", "config.frames", "config.fps")

    def shown(kind: str, model: str) -> list[Any]:
        values = logic("defaults", type=kind, models={"sdxl": model, "wan": model})
        return [values[place] for place in places if place in values]

    assert shown("sdxl_image_fast", "pocket") == ["512x512"]
    assert shown("sdxl_image_fast", "RealVisXL") == ["1024x1024"]
    assert shown("video_fast", "pocket") == ["128x128", 17, 8]
    assert shown("video_fast", "Wan2.1") == ["832x480", 81, 16]


def test_a_form_shows_the_steps_and_guidance_that_the_worker_would_take() -> None:
    from ourvidz_serverless.jobs import sdxl, wan

    for name, (steps, guidance) in {
        **{kind: (count, 7) for kind, count in sdxl.STEPS.items()},
        "video_fast": (wan.STEPS["fast"], wan.GUIDANCE_SCALE),
        "image7b_high_enhanced": (wan.STEPS["high"], wan.GUIDANCE_SCALE),
    }.items():
        values = logic("defaults", type=name)
        assert values["config.num_inference_steps"] == steps
        assert values["config.guidance_scale"] == guidance


def test_an_empty_form_is_a_payload_with_the_workers_defaults() -> None:
    form = {"type": "sdxl_image_fast", "values": {"prompt": "", "config.seed": ""}}

    (payload,) = logic("payloads", forms=[form])

    assert payload == {"type": "sdxl_image_fast", "user_id": "page"}


def test_a_size_is_sent_as_width_and_height_and_read_from_them() -> None:
    place = "config.width config.height"

    (payload,) = logic("payloads", forms=[{"type": "video_fast", "values": {place: "192x128"}}])

    assert payload["config"] == {"width": 192, "height": 128}
    assert logic("valuesIn", payload=payload, places=[place, "prompt"]) == ["192x128", None]


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


def test_the_name_of_a_picture_is_sent_as_the_picture() -> None:
    text = json.dumps({"prompt": "<a.png>!", "config": {"image": "<a.png>", "seed": 1}})

    payload = logic("read", text=text, pictures={"<a.png>": PIXEL})

    assert payload == {"prompt": "<a.png>!", "config": {"image": PIXEL, "seed": 1}}


def test_a_repeated_request_makes_the_one_picture_of_a_seed_as_a_new_job() -> None:
    sent = sdxl_payload(config={"num_images": 6})

    again = logic("repeated", payload=sent, seed=9)

    expected = sdxl_payload(config={"seed": 9})
    del expected["id"]
    assert again == expected


def test_the_command_for_curl_names_the_keys_variable_and_holds_no_key() -> None:
    given = {"payload": sdxl_payload(api_key="a-secret"), "url": "http://localhost/jobs"}

    command = logic("curl", **given, needsKey=False)

    assert "$WORKER_API_KEY" in command
    assert "a-secret" not in command


def test_the_command_for_curl_runs_the_job(
    service: ServedHttp, local: LocalWorker, tmp_path: Path
) -> None:
    picture = f"data:image/png;base64,{'A' * 200_000}"
    payload = sdxl_payload(prompt="it's $HOME\n`here`", config={"image": picture})
    url = f"{service.url}/jobs?wait={PATIENCE_S}"
    command = logic("curl", payload=payload, url=url, needsKey=False)

    done = subprocess.run(
        ["bash"], input=command, capture_output=True, text=True, timeout=PATIENCE_S
    )

    assert json.loads(done.stdout)["status"] == "completed", done.stdout
    (fragment,) = local.fake_sdxl.requests[0].prompt
    assert fragment.text == payload["prompt"]


def test_events_are_read_wherever_the_network_splits_them() -> None:
    text = ': still here\n\nevent: progress\ndata: {"step": 1}\n\ndata: {"delta": "Wätér 💧"}\n\n'

    read = logic("events", text=text)

    whole = [
        {"event": "progress", "data": {"step": 1}},
        {"event": "message", "data": {"delta": "Wätér 💧"}},
    ]
    assert len(read) == len(text.encode()) + 1
    assert all(each == whole for each in read)


def test_a_lost_connection_ends_the_events() -> None:
    text = 'event: status\ndata: {"status": "queued"}\n\nevent: progress\ndata: {"st'

    assert logic("cut", text=text) == [{"event": "status", "data": {"status": "queued"}}]


def test_progress_is_shown_in_words() -> None:
    progress = [
        {"stage": "wait", "step": 0, "steps": 2},
        {"stage": "wait", "step": 1, "steps": 2},
        {"stage": "generate", "step": 3, "steps": 12},
        {"stage": "generate", "step": 6, "steps": 12, "remaining_s": 7.2},
        {"stage": "generate", "step": 6, "steps": 12, "remaining_s": 400},
        {"stage": "generate", "step": 12, "steps": 12, "remaining_s": 0},
    ]

    assert logic("tell", progress=progress) == [
        {"state": "Waiting", "words": "behind 2 other jobs"},
        {"state": "Waiting", "words": "behind 1 other job"},
        {"state": "Processing", "words": "step 3 of 12", "share": 0.25},
        {"state": "Processing", "words": "step 6 of 12, 8 s left", "share": 0.5},
        {"state": "Processing", "words": "step 6 of 12, 7 min left", "share": 0.5},
        {"state": "Processing", "words": "all 12 steps done, finishing", "share": 1},
    ]


def test_the_end_of_a_job_is_shown_in_words() -> None:
    failed = {"status": "failed", "error": "no room", "code": "OOM_ERROR"}
    documents = [
        {"status": "completed", "metadata": {"processing_time": 3.26}},
        {"status": "completed", "metadata": {"processing_time": 0.023}},
        {**failed, "retryable": True},
        {**failed, "code": "INVALID_PROMPT"},
        {**failed, "code": "CANCELLED"},
    ]

    assert logic("ending", documents=documents) == [
        "Completed in 3.3 s.",
        "Completed in 0.02 s.",
        "Failed: no room (OOM_ERROR) You can try again.",
        "Failed: no room (INVALID_PROMPT)",
        "Stopped.",
    ]


def test_the_page_says_which_families_are_served_and_with_which_models() -> None:
    all_three = {"families": ["sdxl", "chat", "wan"], "device": "cpu"}
    workers = [
        {**all_three, "models": POCKET},
        {**all_three, "models": {**POCKET, "wan": "Wan2.1"}},
        {"families": ["sdxl"], "models": {"sdxl": "pocket"}, "device": "cpu"},
        {"families": ["sdxl"], "models": {"sdxl": "RealVisXL"}, "device": "NVIDIA L4"},
    ]

    assert logic("served", workers=workers) == [
        "Serves SDXL, chat and WAN with pocket models (cpu).",
        "Serves SDXL, chat and WAN (cpu). SDXL and chat: pocket models.",
        "Serves SDXL with a pocket model (cpu).",
        "Serves SDXL (NVIDIA L4).",
    ]


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
