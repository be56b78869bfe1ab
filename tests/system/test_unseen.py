"""No text reaches a model that the content floor has not seen.

A text that the floor refuses is put into every place of every kept payload, and into every field
that any of them has. Either the job is refused, or its models never hear of that text.
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

#: What a model is told and the floor leaves alone: what to keep away from, and what to end with.
#: A schema bounds the reply, and the reply is read whatever it was bounded by.
EXEMPT = ("negative", "negative_prompt", "stop", "schema")


class Brush(FakeSdxl):
    """Stands where an SDXL stands, and paints nothing."""

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        self.requests.append(request)
        raise OutOfMemory("what was told is remembered")


class Studio:
    """A worker whose models remember what they were told."""

    def __init__(self, root: Path) -> None:
        fake_wan = FakeWan(FakeChat("More is said of ", "a red circle."))
        self.models = {"sdxl": Brush(), "chat": FakeChat("A reply."), "wan": fake_wan}
        self._heard_by = [*self.models.values(), fake_wan.enhancer]
        # References point nowhere; nobody is asked for one.
        settings = Settings(reference_hosts=("nowhere.invalid",), require_reference_consent=False)
        self.local = LocalWorker(root, settings=settings, models=self.models)

    def heard(self, payload: Any) -> list[str]:
        """Every text that the models are told for a payload."""
        for model in self._heard_by:
            calls_of(model).clear()
        self.local.worker.run(
            Envelope.of({"id": "rp-1", "input": payload}), Stop(), lambda progress: None
        )
        told = [call for model in self._heard_by for call in calls_of(model)]
        return [
            text
            for call in told
            for name, value in fields_of(call)
            if name not in EXEMPT
            for text in texts(value)
        ]


def calls_of(model: Any) -> list[Any]:
    """The requests that a fake model had."""
    calls: list[Any] = model.requests if hasattr(model, "requests") else model.calls
    return calls


def fields_of(call: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a call: its keywords, or the fields of a request and of its records."""
    if isinstance(call, dict):
        yield from call.items()
        return
    for field in fields(call):
        value = getattr(call, field.name)
        if is_dataclass(value):
            yield from fields_of(value)
        else:
            yield field.name, value


def texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case [Fragment(), *_]:
            yield "".join(fragment.text for fragment in value)
        case dict():
            for part in value.values():
                yield from texts(part)
        case list() | tuple():
            for part in value:
                yield from texts(part)


def with_pictures(value: Any) -> Any:
    """The same payload with a small picture for every URL, so that no host is asked."""
    if isinstance(value, dict):
        return {name: with_pictures(part) for name, part in value.items()}
    return data_uri() if isinstance(value, str) and value.startswith("https://") else value


def data_uri() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("unseen"))


def served(payload: dict[str, Any]) -> bool:
    return (payload.get("type") or payload.get("job_type", "")) in families.FAMILY_OF


SERVED = [with_pictures(payload) for payload in PAYLOADS if served(payload)]
ONE_EACH = {jobs.FAMILY_OF[payload["type"]]: payload for payload in SERVED}.values()


def test_the_floor_refuses_what_is_put_everywhere() -> None:
    assert content_floor.check(FORBIDDEN).refused


def test_every_family_has_a_model_here_that_remembers(studio: Studio) -> None:
    assert set(families.FAMILIES) <= set(studio.models)


@pytest.mark.parametrize("payload", SERVED, ids=lambda payload: payload["id"])
def test_what_a_model_hears_is_heard_here(studio: Studio, payload: dict[str, Any]) -> None:
    assert studio.heard(payload)


@pytest.mark.parametrize("payload", SERVED, ids=lambda payload: payload["id"])
def test_a_refused_text_reaches_no_model_from_any_place(
    studio: Studio, payload: dict[str, Any]
) -> None:
    for place in places(payload):
        changed = copy.deepcopy(payload)
        home: Any = changed
        for name in place[:-1]:
            home = home[name]
        home[place[-1]] = FORBIDDEN
        assert not any(FORBIDDEN in text for text in studio.heard(changed)), place


@pytest.mark.parametrize("payload", ONE_EACH, ids=lambda payload: payload["type"])
@pytest.mark.parametrize("home", ["", "config", "metadata"])
def test_a_refused_text_reaches_no_model_from_any_field(
    studio: Studio, payload: dict[str, Any], home: str
) -> None:
    for field in FIELDS:
        changed = copy.deepcopy(payload)
        (changed.setdefault(home, {}) if home else changed)[field] = FORBIDDEN
        assert not any(FORBIDDEN in text for text in studio.heard(changed)), field


def test_a_refused_text_in_two_halves_reaches_no_model(studio: Studio) -> None:
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
        heard = json.dumps(studio.heard(halves))
        assert not ("nude" in heard and "child" in heard)


@pytest.mark.parametrize("parted", ["te()()en", "te(())(en:1.2)"])
def test_a_word_that_compel_puts_together_is_read_as_a_word(studio: Studio, parted: str) -> None:
    adult = {"compel_enabled": True, "content_type": "nsfw"}

    assert studio.heard(sdxl_payload(prompt=parted, **adult)) == []
    assert "a river" in studio.heard(sdxl_payload(prompt="a ri()()ver", **adult))


def test_words_that_weights_join_are_read_as_words(studio: Studio) -> None:
    adult = {"compel_enabled": True, "content_type": "nsfw"}
    joined, harmless = "(little)1.1(girl)1.2(dressed)1.1", "(little)1.1(river)1.2(frozen)1.1"

    assert studio.heard(sdxl_payload(prompt=joined, **adult)) == []
    assert studio.heard(sdxl_payload(prompt=harmless, **adult))


@pytest.mark.parametrize(
    "written",
    ["ｔｅｅｎ".encode().decode("cp1252"), "te\x1b[0men"],
    ids=["misencoded", "escapes"],
)
def test_a_word_that_wan_mends_is_read_as_it_is_mended(studio: Studio, written: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert prompt_clean(written) == "teen"
    assert studio.heard(wan_payload(prompt=written, content_type="nsfw")) == []
    assert studio.heard(wan_payload(prompt="a river", content_type="nsfw"))
