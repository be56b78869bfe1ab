"""The page in a real browser, with fake models: what a person sees, types, presses and gets."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route

from ourvidz_serverless import jobs
from tests.fakes.fake_chat import EndlessChat, FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.patience import PATIENCE_S
from tests.servers.http_service import ServedHttp
from tests.servers.javascript import NPM, needed
from tests.servers.switched_proxy import SwitchedProxy
from tests.serving.http.page_worker import page_worker

PHONE = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}


class Served(Protocol):
    """A service, or a proxy to one."""

    @property
    def url(self) -> str: ...


Visit = Callable[..., Page]


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
        # A job that a failed test holds must not hold the service, too.
        local.fake_sdxl.go_on.set()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visit]:
    """Opens a service's page; at the end it has reported no error and called no other host."""
    complaints: list[str] = []
    asked: set[str] = set()
    contexts, urls = [], []

    def open_page(service: Served, **options: Any) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(1000 * PATIENCE_S)
        contexts.append(context)
        urls.append(service.url)
        tab = context.new_page()
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("console", lambda line: complaints.append(line.text))
        tab.on("request", lambda request: asked.add(request.url))
        tab.clock.install()
        tab.goto(service.url)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    # The browser logs failed and refused requests by itself; the page says them in its own words.
    assert not [each for each in complaints if "Failed to load resource" not in each]
    assert not [url for url in asked if not url.startswith((*urls, "data:", "blob:"))]


def choose(tab: Page, kind: str, **fields: str) -> None:
    tab.wait_for_selector("#send:enabled")
    tab.select_option("#type", kind)
    for name, value in fields.items():
        tab.fill(f"[name='{name}'], [name='config.{name}']", value)


def choose_small_picture(tab: Page, **fields: str) -> None:
    choose(tab, "sdxl_image_fast", num_inference_steps="10", **fields)
    tab.select_option("[name='config.resolution']", "256x256")


def run(tab: Page) -> None:
    tab.click("#send")


def wait_for_state(tab: Page, words: str) -> None:
    tab.wait_for_selector(f"#state:has-text('{words}')")


def wait_for_worker(tab: Page, words: str) -> None:
    tab.wait_for_selector(f"#worker:has-text('{words}')")


def request_of(tab: Page) -> Any:
    return json.loads(tab.input_value("#payload"))


def said(tab: Page) -> Any:
    return json.loads(tab.text_content("#document") or "")


def focused(tab: Page) -> str:
    """The id, the name or the class of the element with the focus."""
    words = "({ id, name, className }) => id || name || className"
    return str(tab.evaluate(f"() => ({words})(document.activeElement)"))


#: The middle pixel of the first picture or video, as the browser shows it.
MIDDLE = """() => {
  const seen = document.querySelector("figure img, figure video");
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  canvas.getContext("2d").drawImage(seen, 0, 0, 1, 1);
  return [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data];
}"""


# --- a job from Run to its end ---


def test_a_picture_is_submitted_with_progress_and_shown(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    tab = visit(service)
    choose_small_picture(tab, prompt="a grey sea", seed="77")
    tab.select_option("[name='config.num_images']", "3")
    run(tab)
    tab.wait_for_selector("#step:has-text('step 0 of 10')")
    bar = tab.get_attribute("[role=progressbar]", "aria-valuenow")
    local.fake_sdxl.go_on.set()
    wait_for_state(tab, "Completed in")
    tab.wait_for_selector("figure:nth-of-type(3) img")

    assert bar == "0"
    assert tab.evaluate(MIDDLE) == [77, 77, 77, 255]
    assert tab.inner_text("figure:nth-of-type(1) figcaption") == "256 × 256 · seed 77 · 10 steps"
    assert tab.get_attribute("figure:nth-of-type(2) img", "alt") == "a grey sea (2 of 3)"
    document = said(tab)
    assert document["status"] == "completed"
    assert [asset["metadata"]["seed"] for asset in document["assets"]] == [77, 78, 79]
    (fragment,) = local.fake_sdxl.requests[0].prompt
    assert fragment.text == "a grey sea"


def test_a_picture_and_a_video_inside_the_document_are_shown(visit: Visit, tmp_path: Path) -> None:
    at = page_worker(tmp_path, FakeChat(), storage_url="inline:")
    with ServedHttp(at.settings, at.worker) as service:
        tab = visit(service)
        choose_small_picture(tab, seed="77")
        run(tab)
        tab.wait_for_selector("figure img")
        picture, named = tab.evaluate(MIDDLE), tab.get_attribute("figure a", "download")
        choose(tab, "video_fast")
        run(tab)
        tab.wait_for_selector("figure video")
        tab.wait_for_function("() => document.querySelector('video').currentTime > 0")

    assert (picture, named) == ([77, 77, 77, 255], "0.png")
    assert at.stored() == []


def test_the_video_that_the_form_shows_at_first_is_made_and_plays(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    choose(tab, "video_fast")
    run(tab)
    tab.wait_for_selector("figure video")
    tab.wait_for_function("() => document.querySelector('video').currentTime > 0")
    # A browser without time to show a frame draws transparent black.
    tab.wait_for_function(f"() => ({MIDDLE})()[3] > 0")

    assert tab.evaluate(MIDDLE)[:3] == pytest.approx([128] * 3, abs=3)
    assert "128 × 128 · 17 frames at 8 a second" in tab.inner_text("figcaption")


def test_a_job_that_computes_is_processing_before_its_first_step(
    visit: Visit, service: ServedHttp, fake_chat: FakeChat
) -> None:
    tab, go_on = visit(service), threading.Event()

    def pieces() -> Iterator[str]:
        assert go_on.wait(PATIENCE_S)
        yield "Rain."

    fake_chat.pieces = pieces()  # type: ignore[assignment]
    choose(tab, "chat_conversation")
    run(tab)
    wait_for_state(tab, "Processing")
    go_on.set()

    wait_for_state(tab, "Completed in")


def test_a_reply_is_streamed_and_the_conversation_goes_on(
    visit: Visit, service: ServedHttp, fake_chat: FakeChat
) -> None:
    tab = visit(service)
    choose(tab, "chat_conversation", words="What is rain?")
    run(tab)
    wait_for_state(tab, "Completed in")
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
    tab.click("text=New conversation")
    assert len(request_of(tab)["messages"]) == 1


def test_text_typed_during_a_reply_is_kept(
    visit: Visit, service: ServedHttp, fake_chat: FakeChat
) -> None:
    tab, go_on = visit(service), threading.Event()

    def pieces() -> Iterator[str]:
        yield "Water "
        assert go_on.wait(PATIENCE_S)
        yield "falls."

    fake_chat.pieces = pieces()  # type: ignore[assignment]
    choose(tab, "chat_conversation", words="What is rain?")
    run(tab)
    tab.wait_for_selector(".growing:has-text('Water')")
    tab.fill("[name='words']", "And snow?")
    go_on.set()
    wait_for_state(tab, "Completed in")

    assert tab.input_value("[name='words']") == "And snow?"
    said_by = [turn["role"] for turn in request_of(tab)["messages"]]
    assert said_by == ["user", "assistant", "user"]


def test_a_running_job_is_stopped_on_the_page(visit: Visit, tmp_path: Path) -> None:
    endless = EndlessChat()
    chatty = page_worker(tmp_path, endless)
    with ServedHttp(chatty.settings, chatty.worker) as service:
        tab = visit(service)
        choose(tab, "chat_conversation")
        run(tab)
        tab.wait_for_selector(".growing:has-text('word word')")
        tab.click("#stop")
        wait_for_state(tab, "Stopped.")

        assert endless.stopped.wait(PATIENCE_S)
        tab.wait_for_selector("#send:enabled")


def test_a_stop_before_the_worker_has_taken_the_job_stops_it(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    local.fake_sdxl.hold()

    def press_stop(route: Route) -> None:
        tab.click("#stop")
        route.continue_()

    tab.route("**/jobs", press_stop)
    choose_small_picture(tab)
    run(tab)

    wait_for_state(tab, "Stopped.")


def test_a_payload_written_by_hand_is_sent_and_its_warnings_are_shown(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    tab.wait_for_selector("#send:enabled")
    tab.click("#raw summary")
    config = {"seed": 9, "image": "data:image/png;base64,AAAA"}
    tab.fill("#payload", json.dumps(sdxl_payload(id="by-hand", config=config)))
    run(tab)
    wait_for_state(tab, "Completed in")

    assert said(tab)["job_id"] == "by-hand"
    assert local.fake_sdxl.requests[0].seeds == (9,)
    assert "reference" in tab.inner_text("#warnings li")
    assert not tab.is_visible("#document")


REFUSED = chat_payload(
    type="chat_unrestricted", messages=[{"role": "user", "content": "explicit story, she is 15"}]
)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ("{", "The request is not valid JSON"),
        (json.dumps(sdxl_payload(config={"num_images": 7})), "config.num_images: Input should be"),
        (json.dumps(REFUSED), "content policy"),
    ],
)
def test_a_refusal_is_shown_in_the_workers_words(
    visit: Visit, service: ServedHttp, payload: str, says: str
) -> None:
    tab = visit(service)
    tab.wait_for_selector("#send:enabled")
    tab.click("#raw summary")
    tab.fill("#payload", payload)
    run(tab)

    tab.wait_for_selector(f"#refused:has-text('{says}'), #state.wrong:has-text('{says}')")
    tab.wait_for_selector("#send:enabled")


def test_an_administrators_answer_is_shown_at_once(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    choose(tab, "admin_utilities")
    run(tab)

    tab.wait_for_selector("#document:visible")
    assert said(tab)["result"]["status"] == "healthy"


# --- pictures that a person gives ---


def picture_file(color: str = "orange", size: tuple[int, int] = (30, 20)) -> dict[str, Any]:
    """A small file as Playwright takes it."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": file.getvalue()}


#: Drops a file on an element, or pastes it there.
GIVE = """([how, selector, data, name]) => {
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  const options = { bubbles: true, cancelable: true };
  const event = how === "paste"
    ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
    : new DragEvent("drop", { ...options, dataTransfer: transfer });
  document.querySelector(selector).dispatchEvent(event);
}"""


def give(tab: Page, how: str, target: str, file: dict[str, Any]) -> None:
    """Choose, drop or paste a file for a field, and wait until it is there."""
    if how == "choose":
        tab.set_input_files(f"{target} input", file)
    else:
        data = base64.b64encode(file["buffer"]).decode()
        tab.evaluate(GIVE, [how, target, data, file["name"]])
    tab.wait_for_selector(f".picture:has-text('{file['name']}') img:visible")


@pytest.mark.parametrize("how", ["choose", "drop", "paste"])
def test_a_picture_is_chosen_dropped_or_pasted_and_sent(
    visit: Visit, service: ServedHttp, local: LocalWorker, how: str
) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    give(tab, how, ".picture", picture_file())
    tab.fill("[name='config.denoise_strength']", "0.25")
    shown = request_of(tab)["config"]["image"]
    run(tab)
    wait_for_state(tab, "Completed in")

    start = local.fake_sdxl.requests[0].start
    assert start and start.image.getpixel((9, 9)) == (255, 165, 0)
    assert start.strength == 0.25
    assert shown == "<orange.png, 30 × 20, 1 kB>"


def test_a_removed_picture_is_not_sent_and_neither_is_its_use(
    visit: Visit, service: ServedHttp
) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    give(tab, "choose", ".picture", picture_file())
    tab.select_option("[name='metadata.reference_type']", "style")
    given = request_of(tab)
    tab.click("text=Remove")

    assert given["metadata"] == {"reference_type": "style"}
    assert {"metadata", "image"}.isdisjoint({**request_of(tab), **request_of(tab)["config"]})
    assert not tab.is_visible("[name='metadata.reference_type']")


def test_a_mask_is_offered_once_there_is_a_picture_to_repaint(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    before = tab.locator(".picture:visible").count()
    give(tab, "choose", ".picture", picture_file("orange", (64, 64)))
    give(tab, "choose", ".picture:nth-of-type(2)", picture_file("white", (64, 64)))
    run(tab)
    wait_for_state(tab, "Completed in")

    (request,) = local.fake_sdxl.requests
    assert before == 1
    assert request.mask and request.mask.getextrema() == (255, 255)


CONSENT = "[name='metadata.reference_consent']"


def test_consent_is_sent_with_the_picture_for_which_it_was_given(
    visit: Visit, service: ServedHttp
) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    give(tab, "choose", ".picture", picture_file("orange"))
    unasked = request_of(tab)
    tab.check(CONSENT)
    given = request_of(tab)
    tab.click("text=Remove")
    give(tab, "choose", ".picture", picture_file("navy"))

    assert given["metadata"] == {"reference_consent": True}
    assert "metadata" not in unasked
    assert not tab.is_checked(CONSENT)
    assert "metadata" not in request_of(tab)


def test_a_video_asks_for_consent_once_it_has_a_frame(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    choose(tab, "video_fast")
    before = tab.is_visible(CONSENT)
    # The second of the two fields.
    give(tab, "choose", ".picture:nth-of-type(2)", picture_file())
    tab.check(CONSENT)

    assert not before
    assert request_of(tab)["metadata"] == {"reference_consent": True}


def test_a_start_and_an_end_frame_are_sent_and_survive_a_change_of_type(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    choose(tab, "video_fast")
    # Of two files that are dropped beside the fields, each takes the next empty field.
    give(tab, "drop", "body", picture_file("orange"))
    give(tab, "paste", "body", picture_file("navy"))
    choose(tab, "chat_conversation")
    choose(tab, "video_high")
    run(tab)
    wait_for_state(tab, "Completed in")

    (request,) = local.models["wan"].calls
    first, last = request.references.first, request.references.last
    assert (first.getpixel((9, 9)), last.getpixel((9, 9))) == ((255, 165, 0), (0, 0, 128))


def test_a_large_picture_is_made_smaller_before_it_is_sent(
    visit: Visit, service: ServedHttp, tmp_path: Path
) -> None:
    file = tmp_path / "large.png"
    Image.new("RGB", (2200, 500), "orange").save(file, compress_level=0)
    tab = visit(service)
    choose_small_picture(tab)
    with tab.expect_request("**/jobs") as sent:
        tab.set_input_files(".picture input", file)
        tab.wait_for_selector(".picture img:visible")
        run(tab)

    image = json.loads(sent.value.post_data or "")["input"]["config"]["image"]
    kind, data = image.split(",")
    assert file.stat().st_size > 3_000_000 > len(data)
    with Image.open(io.BytesIO(base64.b64decode(data))) as smaller:
        assert (kind, smaller.size) == ("data:image/jpeg;base64", (2048, 465))
    wait_for_state(tab, "Completed in")


def test_a_file_that_is_no_picture_is_refused_with_its_name(
    visit: Visit, service: ServedHttp
) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    tab.set_input_files(".picture input", file)

    tab.wait_for_selector(".picture [role=alert]:has-text('cannot read notes.txt')")
    assert "image" not in request_of(tab)["config"]


# --- what can be done with a picture ---


@pytest.fixture
def painted(visit: Visit, service: ServedHttp) -> Page:
    """The page with six pictures, of the seeds 70 to 75."""
    tab = visit(service, permissions=["clipboard-read", "clipboard-write"])
    choose_small_picture(tab, prompt="a grey sea", seed="70")
    tab.select_option("[name='config.num_images']", "6")
    run(tab)
    tab.wait_for_selector("figure:nth-of-type(6) img")
    wait_for_state(tab, "Completed in")
    return tab


def test_six_pictures_use_the_width_of_a_large_screen(painted: Page) -> None:
    painted.set_viewport_size({"width": 1800, "height": 1000})

    boxes = [each.bounding_box() or {} for each in painted.locator("figure img").all()]

    stage = painted.locator("#seen").bounding_box() or {}
    assert len({box["y"] for box in boxes}) == 2
    assert sum(box["width"] for box in boxes[:3]) > 0.95 * stage["width"]


def test_a_picture_is_enlarged_and_the_focus_comes_back_to_it(painted: Page) -> None:
    painted.click("figure:nth-of-type(2) .open")
    alt = painted.get_attribute("dialog img", "alt")
    painted.keyboard.press("Escape")

    assert alt == "a grey sea (2 of 6)"
    assert not painted.is_visible("dialog")
    assert painted.evaluate("() => document.activeElement.firstElementChild.alt") == alt


def test_a_picture_is_downloaded(painted: Page, local: LocalWorker) -> None:
    with painted.expect_download() as download:
        painted.click("figure:nth-of-type(2) >> text=Download")

    url = said(painted)["assets"][1]["url"]
    assert download.value.suggested_filename == "-".join(url.split("/")[-2:])
    assert Path(download.value.path()).read_bytes() == (local.root / url).read_bytes()


def test_a_picture_is_repeated_with_its_seed(painted: Page, local: LocalWorker) -> None:
    painted.click("figure:nth-of-type(3) >> text=Repeat")
    painted.wait_for_selector("figure:only-of-type img")

    assert [request.seeds for request in local.fake_sdxl.requests][1:] == [(72,)]
    assert painted.input_value("[name='config.seed']") == "72"
    assert painted.input_value("[name='config.num_images']") == "1"


def test_a_pictures_request_is_copied_as_a_command_for_curl(painted: Page) -> None:
    painted.click("figure:nth-of-type(3) >> text=Copy curl")
    painted.wait_for_selector("text=Copied")

    command = painted.evaluate("() => navigator.clipboard.readText()")
    assert command.startswith(f'curl -s "{painted.url}jobs?wait=300" --json')
    assert '"seed": 72' in command


# --- typing, the keyboard, the key ---


def test_what_was_typed_survives_a_change_of_type_and_a_reload(
    visit: Visit, service: ServedHttp
) -> None:
    tab = visit(service)
    choose(tab, "video_fast", frames="9")
    choose(tab, "sdxl_image_fast", prompt="my words", num_inference_steps="12")
    choose(tab, "chat_conversation", words="Hello?")
    choose(tab, "sdxl_image_high")
    before = request_of(tab)
    tab.reload()
    tab.wait_for_selector("#send:enabled")
    after = request_of(tab)
    choose(tab, "video_fast")

    assert (before["prompt"], before["config"]["num_inference_steps"]) == ("my words", 12)
    assert after == before
    assert request_of(tab)["config"]["frames"] == 9


def test_a_payload_written_by_hand_survives_a_reload_unless_it_has_a_key(
    visit: Visit, service: ServedHttp
) -> None:
    tab = visit(service)
    left = []
    for text in ('{"type": "by hand"}', '{"api_key": "a-key"}'):
        tab.wait_for_selector("#send:enabled")
        if not tab.is_visible("#payload"):
            tab.click("#raw summary")
        tab.fill("#payload", text)
        tab.reload()
        tab.wait_for_selector("#send:enabled")
        left.append(request_of(tab)["type"])

    assert left == ["by hand", "sdxl_image_fast"]


def test_run_is_disabled_until_the_script_is_there(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    tab.route("**/page/form.js", lambda route: route.abort())
    tab.reload()
    disabled = tab.is_disabled("#send")
    tab.unroute("**/page/form.js")
    tab.reload()
    tab.wait_for_selector("#send:enabled")

    assert disabled


def test_the_page_is_used_by_the_keyboard_alone(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    tab.evaluate("() => document.activeElement.blur()")

    def press_until(key: str, name: str) -> None:
        for _ in range(25):
            tab.keyboard.press(key)
            if focused(tab) == name:
                return
        raise AssertionError(f"{key} does not lead to {name}")

    press_until("Tab", "send")
    local.fake_sdxl.hold()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#step:has-text('step 0')")
    during = focused(tab)
    local.fake_sdxl.go_on.set()
    tab.wait_for_selector("figure img")
    tab.wait_for_selector("#stop", state="hidden")
    after = focused(tab)
    press_until("Tab", "open")
    tab.keyboard.press("Enter")
    is_open = tab.is_visible("dialog")
    tab.keyboard.press("Escape")

    assert (during, after, is_open) == ("stop", "send", True)
    assert (focused(tab), tab.is_visible("dialog")) == ("open", False)


def test_control_and_enter_run_the_job_and_leave_the_focus_in_the_text(
    visit: Visit, service: ServedHttp
) -> None:
    tab = visit(service)
    choose_small_picture(tab, prompt="a grey sea")
    tab.focus("[name='prompt']")
    tab.keyboard.press("Control+Enter")
    wait_for_state(tab, "Completed in")
    tab.wait_for_selector("#send:enabled")

    assert focused(tab) == "prompt"


def test_the_key_is_asked_for_kept_in_memory_and_sent_with_every_request(
    visit: Visit, tmp_path: Path
) -> None:
    locked = page_worker(tmp_path, FakeChat("Rain."), worker_api_key="a-key")
    with ServedHttp(locked.settings, locked.worker) as service:
        tab = visit(service)
        tab.wait_for_selector("#key-form:visible")
        for key in ("wrong", "a-key"):
            tab.fill("#key", key)
            tab.click("#key-form button")
            wait_for_worker(tab, "does not know this key" if key == "wrong" else "Serves")
        choose_small_picture(tab, seed="7")
        run(tab)
        tab.wait_for_selector("figure img")
        kept = tab.evaluate("() => [{...localStorage}, {...sessionStorage}, document.cookie]")
        tab.reload()
        tab.wait_for_selector("#key-form:visible")

    local_storage, session_storage, cookies = kept
    assert (local_storage, cookies) == ({}, "")
    assert "a-key" not in json.dumps(session_storage) + tab.url


# --- a worker that is not there, and a network that is bad ---


def test_a_visitor_during_loading_can_use_the_page_when_the_models_are_loaded(
    visit: Visit, local: LocalWorker
) -> None:
    with ServedHttp(local.settings) as service:
        tab = visit(service)
        wait_for_worker(tab, "being loaded")
        service.service.open(local.worker)
        tab.clock.fast_forward(3000)
        wait_for_worker(tab, "Serves SDXL, chat and WAN with pocket models")

        assert tab.locator("#type option").count() == len(jobs.FAMILY_OF)


def test_the_death_of_the_worker_is_told_and_its_return_too(
    visit: Visit, service: ServedHttp
) -> None:
    with SwitchedProxy(service.url) as proxy:
        tab = visit(proxy)
        choose_small_picture(tab, prompt="my words")
        proxy.stop()
        tab.clock.fast_forward(6000)
        wait_for_worker(tab, "The worker does not answer.")
        run(tab)
        wait_for_state(tab, "The job was not sent.")
        proxy.start()
        tab.clock.fast_forward(3000)
        wait_for_worker(tab, "The worker is back. Serves SDXL")
        kept = tab.input_value("[name='prompt']")
        run(tab)
        wait_for_state(tab, "Completed in")

    assert kept == "my words"


#: The next body of an answer to this path is cut while it is read.
CUT_NEXT_BODY = """([path, read]) => {
  const whole = Response.prototype[read];
  Response.prototype[read] = async function () {
    if (!this.url.includes(path)) return whole.call(this);
    Response.prototype[read] = whole;
    throw new TypeError("Failed to fetch");
  };
}"""


def test_a_picture_whose_download_is_cut_is_told(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service)
    choose_small_picture(tab)
    tab.evaluate(CUT_NEXT_BODY, ["/assets/", "blob"])

    run(tab)

    tab.wait_for_selector("figcaption:has-text('could not be fetched from the worker')")


def test_the_worker_is_asked_again_after_an_answer_that_was_cut(
    visit: Visit, service: ServedHttp
) -> None:
    with SwitchedProxy(service.url) as proxy:
        tab = visit(proxy)
        wait_for_worker(tab, "Serves SDXL")
        proxy.stop()
        tab.clock.fast_forward(6000)
        wait_for_worker(tab, "The worker does not answer.")
        tab.evaluate(CUT_NEXT_BODY, ["/worker/info", "json"])
        proxy.start()
        for _ in range(3):
            tab.clock.run_for(3000)

        wait_for_worker(tab, "The worker is back. Serves SDXL")


def test_a_job_whose_stream_was_cut_can_be_looked_at_again(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    with SwitchedProxy(service.url) as proxy:
        tab = visit(proxy)
        choose_small_picture(tab)
        run(tab)
        tab.wait_for_selector("#step:has-text('step 0')")
        proxy.cut()
        wait_for_state(tab, "The connection was cut. The job may still run.")
        local.fake_sdxl.go_on.set()
        tab.click("#again")
        tab.wait_for_selector("figure img")
        wait_for_state(tab, "Completed in")

    assert len(local.fake_sdxl.requests) == 1


def test_a_job_that_runs_during_a_reload_can_be_looked_at_again(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    tab = visit(service)
    choose_small_picture(tab)
    run(tab)
    tab.wait_for_selector("#step:has-text('step 0')")
    tab.reload()
    wait_for_state(tab, "The page was left while a job ran.")
    local.fake_sdxl.go_on.set()
    tab.click("#again")

    tab.wait_for_selector("figure img")


def test_a_job_that_ended_with_its_worker_is_told(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    with ServedHttp(local.settings, local.worker) as other, SwitchedProxy(service.url) as proxy:
        tab = visit(proxy)
        choose_small_picture(tab)
        run(tab)
        tab.wait_for_selector("#step:has-text('step 0')")
        proxy.stop()
        wait_for_state(tab, "The connection was cut.")
        tab.click("#again")
        wait_for_state(tab, "The worker does not answer.")
        proxy.upstream = other.url
        proxy.start()
        tab.click("#again")
        wait_for_state(tab, "The worker does not know this job any more.")
        local.fake_sdxl.go_on.set()

    assert not tab.is_visible("#again")


def test_a_stream_that_stays_open_without_a_worker_is_cut_by_the_page(
    visit: Visit, service: ServedHttp, local: LocalWorker
) -> None:
    local.fake_sdxl.hold()
    tab = visit(service)
    choose_small_picture(tab)
    run(tab)
    tab.wait_for_selector("#step:has-text('step 0')")
    tab.route("**/health", lambda route: route.abort())
    tab.clock.fast_forward(6000)

    wait_for_state(tab, "The connection was cut. The job may still run.")


def test_a_job_over_a_slow_network_is_shown_to_its_end(visit: Visit, service: ServedHttp) -> None:
    with SwitchedProxy(service.url, is_slow=True) as proxy:
        tab = visit(proxy)
        choose_small_picture(tab)
        run(tab)
        wait_for_state(tab, "Completed in")
        tab.wait_for_selector("figure img")


# --- screens ---


def test_on_a_phone_nothing_is_cut_off_small_or_zoomed(visit: Visit, service: ServedHttp) -> None:
    tab = visit(service, **PHONE)
    choose_small_picture(tab)
    give(tab, "choose", ".picture", picture_file())
    tab.tap("#send")
    tab.wait_for_selector("figure img")
    wait_for_state(tab, "Completed in")
    tab.tap("#raw summary")

    assert tab.evaluate("() => document.documentElement.scrollWidth") <= 360
    sizes = """(names) => [...document.querySelectorAll(names)]
      .filter((each) => each.checkVisibility())
      .map((each) => [parseFloat(getComputedStyle(each).fontSize), each.offsetHeight])"""
    assert min(font for font, _ in tab.evaluate(sizes, "input, select, textarea")) >= 16
    assert min(height for _, height in tab.evaluate(sizes, "button, .pick, .actions a")) >= 44


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong_with_the_page(
    visit: Visit, service: ServedHttp, scheme: str
) -> None:
    needed(
        (NPM / "axe-core/axe.min.js").exists(),
        "axe is not in .cache/npm; `make test` puts it there",
    )
    tab = visit(service, color_scheme=scheme)
    choose_small_picture(tab)
    give(tab, "choose", ".picture", picture_file())
    run(tab)
    tab.wait_for_selector("figure img")
    tab.click("#raw summary")
    tab.click("#told summary")
    tab.evaluate((NPM / "axe-core/axe.min.js").read_text())
    violations = tab.evaluate("async () => (await axe.run()).violations")
    tab.fill("#payload", "{")
    run(tab)
    violations += tab.evaluate("async () => (await axe.run()).violations")

    found = [(each["id"], node["html"]) for each in violations for node in each["nodes"]]
    assert not found
