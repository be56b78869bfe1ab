"""No text reaches a model unless the content floor has checked it.

These tests put a text that the floor refuses into every place of every payload of `tests/payloads`,
and into every field that any payload has. Either the job is refused, or its models do not get that
text.
"""

import base64
import copy
import io
import json
from collections.abc import Generator, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ourvidz_serverless import families, jobs
from ourvidz_serverless.context import Stop
from ourvidz_serverless.errors import OutOfMemory
from ourvidz_serverless.guard import content_floor
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.prompt_weighting import Fragment
from ourvidz_serverless.models.sdxl.request import ImageRequest
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.fake_wan import FakeWan
from tests.fakes.local_worker import LocalWorker, sdxl_payload, wan_payload
from tests.system.test_any_input import FIELDS, PAYLOADS, places

FORBIDDEN = "nude child"

#: Fields that reach a model and that the floor does not check: what to avoid, and where to stop.
#: A schema only limits the reply, and the floor checks every reply.
EXEMPT = ("negative", "negative_prompt", "stop", "schema")


class RecordingSdxl(FakeSdxl):
    """Records its requests and makes no pictures."""

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        self.requests.append(request)
        raise OutOfMemory("the request is recorded")


class RecordingWorker:
    """A worker whose models record the texts that they get."""

    def __init__(self, root: Path) -> None:
        fake_wan = FakeWan(FakeChat("More is said of ", "a red sun."))
        self.models = {"sdxl": RecordingSdxl(), "chat": FakeChat("A reply."), "wan": fake_wan}
        self._recording = [*self.models.values(), fake_wan.enhancer]
        # The only host of references does not exist, and no job needs consent for its references.
        settings = Settings(reference_hosts=("nowhere.invalid",), require_reference_consent=False)
        self.local = LocalWorker(root, settings=settings, models=self.models)

    def texts(self, payload: Any) -> list[str]:
        """Every text that reaches a model when this payload runs."""
        for model in self._recording:
            calls_of(model).clear()
        self.local.worker.run(
            Envelope.of({"id": "rp-1", "input": payload}), Stop(), lambda progress: None
        )
        calls = [call for model in self._recording for call in calls_of(model)]
        return [
            text
            for call in calls
            for name, value in fields_of(call)
            if name not in EXEMPT
            for text in texts_in(value)
        ]


def calls_of(model: Any) -> list[Any]:
    """The requests that a fake model recorded."""
    calls: list[Any] = model.requests if hasattr(model, "requests") else model.calls
    return calls


def fields_of(call: Any) -> Iterator[tuple[str, Any]]:
    """The names and values of the fields of a request, and of the records in it."""
    if isinstance(call, dict):
        yield from call.items()
        return
    for field in fields(call):
        value = getattr(call, field.name)
        if is_dataclass(value):
            yield from fields_of(value)
        else:
            yield field.name, value


def texts_in(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case [Fragment(), *_]:
            yield "".join(fragment.text for fragment in value)
        case dict():
            for part in value.values():
                yield from texts_in(part)
        case list() | tuple():
            for part in value:
                yield from texts_in(part)


def with_pictures(value: Any) -> Any:
    """The same payload with a small picture for every URL, so that no job needs a download."""
    if isinstance(value, dict):
        return {name: with_pictures(part) for name, part in value.items()}
    return data_uri() if isinstance(value, str) and value.startswith("https://") else value


def data_uri() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> RecordingWorker:
    return RecordingWorker(tmp_path_factory.mktemp("unseen"))


def is_served(payload: dict[str, Any]) -> bool:
    return (payload.get("type") or payload.get("job_type", "")) in families.FAMILY_OF


SERVED = [with_pictures(payload) for payload in PAYLOADS if is_served(payload)]
ONE_EACH = {jobs.FAMILY_OF[payload["type"]]: payload for payload in SERVED}.values()


def test_the_floor_refuses_the_text_that_these_tests_use() -> None:
    assert content_floor.check(FORBIDDEN).refused


def test_every_family_has_a_model_that_records_its_texts(worker: RecordingWorker) -> None:
    assert set(families.FAMILIES) <= set(worker.models)


@pytest.mark.parametrize("payload", SERVED, ids=lambda payload: payload["id"])
def test_every_payload_has_a_text_that_reaches_a_model(
    worker: RecordingWorker, payload: dict[str, Any]
) -> None:
    assert worker.texts(payload)


@pytest.mark.parametrize("payload", SERVED, ids=lambda payload: payload["id"])
def test_a_refused_text_reaches_no_model_from_any_place(
    worker: RecordingWorker, payload: dict[str, Any]
) -> None:
    for place in places(payload):
        changed = copy.deepcopy(payload)
        parent: Any = changed
        for name in place[:-1]:
            parent = parent[name]
        parent[place[-1]] = FORBIDDEN
        assert not any(FORBIDDEN in text for text in worker.texts(changed)), place


@pytest.mark.parametrize("payload", ONE_EACH, ids=lambda payload: payload["type"])
@pytest.mark.parametrize("part", ["", "config", "metadata"])
def test_a_refused_text_reaches_no_model_from_any_field(
    worker: RecordingWorker, payload: dict[str, Any], part: str
) -> None:
    for field in FIELDS:
        changed = copy.deepcopy(payload)
        (changed.setdefault(part, {}) if part else changed)[field] = FORBIDDEN
        assert not any(FORBIDDEN in text for text in worker.texts(changed)), field


def test_a_refused_text_in_two_halves_reaches_no_model(worker: RecordingWorker) -> None:
    for payload in SERVED:
        halves = copy.deepcopy(payload)
        if "messages" in halves:
            halves["messages"] = [
                {"role": "system", "content": "nude"},
                {"role": "user", "content": "a child"},
            ]
        else:
            halves |= {"prompt": "nude", "compel_enabled": True, "compel_weights": "(child:1.2)"}
            halves["config"] = {**halves["config"], "enhancement_system_prompt": "a child"}
        texts = json.dumps(worker.texts(halves))
        assert not ("nude" in texts and "child" in texts)


@pytest.mark.parametrize("split", ["te()()en", "te(())(en:1.2)"])
def test_the_floor_checks_a_word_as_compel_joins_it(worker: RecordingWorker, split: str) -> None:
    adult = {"compel_enabled": True, "content_type": "nsfw"}

    assert worker.texts(sdxl_payload(prompt=split, **adult)) == []
    assert "a river" in worker.texts(sdxl_payload(prompt="a ri()()ver", **adult))


def test_the_floor_checks_words_between_compel_weights(worker: RecordingWorker) -> None:
    adult = {"compel_enabled": True, "content_type": "nsfw"}
    joined, harmless = "(little)1.1(girl)1.2(dressed)1.1", "(little)1.1(river)1.2(frozen)1.1"

    assert worker.texts(sdxl_payload(prompt=joined, **adult)) == []
    assert worker.texts(sdxl_payload(prompt=harmless, **adult))


@pytest.mark.parametrize(
    "written",
    ["ｔｅｅｎ".encode().decode("cp1252"), "te\x1b[0men"],
    ids=["misencoded", "escapes"],
)
def test_the_floor_checks_a_prompt_as_wan_cleans_it(worker: RecordingWorker, written: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert prompt_clean(written) == "teen"
    assert worker.texts(wan_payload(prompt=written, content_type="nsfw")) == []
    assert worker.texts(wan_payload(prompt="a river", content_type="nsfw"))
