"""Any input ends in a valid document: the worker raises no exception and returns valid JSON.

The payloads are those of `tests/payloads`, one of each type, with any value at any place.
"""

import asyncio
import copy
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.context import Stop
from ourvidz_serverless.document import Document
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.serving import runpod_queue
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.telemetry import exports
from tests import files
from tests.examples import examples
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.fake_wan import FakeWan
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.files import SPECIFICATION

PAYLOADS = [json.loads(path.read_text()) for path in sorted(files.PAYLOADS.glob("*.json"))]

#: In characters. A refusal names a field and the reason; it does not repeat the payload.
LONGEST_MESSAGE = 600

#: Names that contain the letters "inf".
NAMES_WITH_INF = r"num_inference_steps|'(?:enhancement_)?info'"


def nested(depth: int, kind: type = list) -> Any:
    value: Any = []
    for _ in range(depth):
        value = {"a": value} if kind is dict else [value]
    return value


ODD = st.sampled_from(
    [
        None,
        True,
        float("nan"),
        float("inf"),
        -float("inf"),
        1e308,
        5e-324,
        -0.0,
        10**400,
        -(2**63),
        2**64,
        "",
        " ",
        "\ud800",
        "\udfff\ud800",
        "\x00",
        "\u202e\u0000\ufffe",
        "a" * 5000,
        "١٢x٣",
        "1024x1024\n",
        "../../etc/passwd",
        "http://[",
        "https://a\\@b",
        "{}",
        "[" * 500,
        [],
        {},
        {"": {"": []}},
        nested(60),
        nested(60, dict),
        [None] * 200,
        {str(i): i for i in range(200)},
        {"type": "json_schema", "json_schema": {"schema": nested(60, dict)}},
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "\ud800"}],
    ]
)
JSON = st.recursive(
    ODD | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


def places(payload: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every place in a payload."""
    if path:
        yield path
    if isinstance(payload, dict):
        for name, value in payload.items():
            yield from places(value, (*path, name))
    if isinstance(payload, list):
        for index, value in enumerate(payload):
            yield from places(value, (*path, index))


MORE_FIELDS = """
api_key callback_url user_id id job_id type job_type stop stream seed model response_format
messages truncate loras scheduler output_format image quality sfw_mode compel_weights
"""
FIELDS = sorted(
    {path[-1] for payload in PAYLOADS for path in places(payload) if isinstance(path[-1], str)}
    | set(MORE_FIELDS.split())
)


@st.composite
def payloads(draw: st.DrawFn) -> dict[str, Any]:
    """A payload with other values at a few of its places, and with a few more fields."""
    payload = copy.deepcopy(draw(st.sampled_from(PAYLOADS)))
    for path in draw(st.lists(st.sampled_from(list(places(payload))), max_size=3)):
        _put(payload, path, draw(JSON))
    for field, value in draw(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)).items():
        name = draw(st.sampled_from(["", "config", "metadata"]))
        part = payload if not name else payload.get(name)
        if isinstance(part, dict):
            part[field] = value
    return payload


def _put(payload: Any, path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for name in parents:
        try:
            payload = payload[name]
        except (KeyError, IndexError, TypeError):
            return  # An earlier value has replaced a parent.
    if isinstance(payload, dict) or (isinstance(payload, list) and last in range(len(payload))):
        payload[last] = value


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorker]:
    """A worker for every family, with traces. The only host that it may fetch from does not exist.

    It sends no traces: the exporter draws from `random`, which Hypothesis forbids meanwhile.
    """
    settings = Settings(
        reference_hosts=("nowhere.invalid",),
        otel_exporter_otlp_endpoint="http://127.0.0.1:9",
        otel_bsp_schedule_delay=3_600_000,
        otel_metric_export_interval=3_600_000,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exports, "BATCH", 1_000_000)
        yield _local(tmp_path_factory.mktemp("any"), settings)


def _local(root: Path, settings: Settings) -> LocalWorker:
    return LocalWorker(
        root,
        settings=settings,
        models={
            "sdxl": FakeSdxl(),
            "chat": FakeChat("A reply ", "of words."),
            "wan": FakeWan(FakeChat("More.")),
        },
    )


def run(local: LocalWorker, event: Any) -> Document:
    document = local.worker.run(Envelope.of(event), Stop(), lambda progress: None)
    assert_valid(document)
    return document


def assert_valid(document: Document) -> None:
    body = json.dumps(document.result(), allow_nan=False, ensure_ascii=False).encode()
    json.dumps(document.callback(), allow_nan=False, ensure_ascii=False).encode()
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", document.job_id)
    assert document.status in ("completed", "failed")
    assert (document.failure is None) == (document.status == "completed")
    if document.failure:
        assert document.assets == ()
        assert document.failure.code in SPECIFICATION["error_codes"]
        assert document.failure.code != "INTERNAL_ERROR"
        assert len(document.failure.message) <= LONGEST_MESSAGE
        # The application searches error texts for "inf" and "nan".
        message = re.sub(NAMES_WITH_INF, "", document.failure.message)
        assert not re.search(r"inf|nan|Traceback|/home|\.py", message)
        assert len(body) < 10 * LONGEST_MESSAGE


@examples(250)
@given(payloads())
def test_any_payload_ends_in_a_valid_document(local: LocalWorker, payload: dict[str, Any]) -> None:
    run(local, {"id": "rp-1", "input": payload})


@given(st.dictionaries(st.sampled_from(["id", "input", "s3Config", "webhook"]), JSON))
def test_any_event_ends_in_a_valid_document(local: LocalWorker, event: dict[str, Any]) -> None:
    assert run(local, event).status == "failed"


@examples(150)
@given(
    st.sampled_from(["sdxl", "chat"]),
    st.sampled_from(["", "config", "metadata"]),
    st.sampled_from(FIELDS),
    JSON,
)
def test_any_value_in_any_field_of_a_small_valid_job_ends_in_a_valid_document(
    local: LocalWorker, family: str, part: str, field: str, value: Any
) -> None:
    payload = sdxl_payload() if family == "sdxl" else chat_payload()
    if part:
        payload[part] = {**payload.get(part, {}), field: value}
    else:
        payload[field] = value

    run(local, {"id": "rp-1", "input": payload})


# --- extreme values: raw JSON, as a worker receives it ---

MEGABYTE = "x" * 1_000_000
EXTREME_VALUES = {
    "deep lists": "[" * 900 + "]" * 900,
    "deep objects": '{"a":' * 900 + "1" + "}" * 900,
    "a deep schema": '{"type": "json_schema", "json_schema": {"schema": '
    + '{"not":' * 900
    + "{}"
    + "}" * 902,
    "config in config": '{"config":' * 900 + "{}" + "}" * 900,
    "a schema with a strange key": '{"type": "json_schema", "json_schema": {"schema": '
    r'{"\ud800": {}}}}',
    "a huge number": "1" * 4000,
    "a huge exponent": "1e999",
    "NaN": "NaN",
    "a lone surrogate": r'"\ud83d"',
    "a megabyte of text": json.dumps(MEGABYTE),
    "a megabyte of emoji": json.dumps("\U0001f600" * 250_000),
    "a megabyte of brackets": json.dumps("(" * 1_000_000),
    "a megabyte of marks": json.dumps("e" + "\u0301" * 500_000),
    "a megabyte of spelled letters": json.dumps("a b c " * 170_000),
    "a megabyte of references": json.dumps("&amp;" * 200_000),
    "a hundred thousand items": json.dumps(list(range(100_000))),
    "a hundred thousand keys": json.dumps({str(i): None for i in range(100_000)}),
    "keys of all kinds": r'{"\ud800": 1, "": 2, "constructor": 3, "__proto__": 4}',
}
PLACES = {
    "sdxl": ["input", "id", "type", "user_id", "prompt", "config", "metadata", "api_key"],
    "chat": ["messages", "prompt", "stop", "response_format", "model", "seed", "config"],
}


def with_extreme_value(family: str, place: str, value: str) -> dict[str, Any]:
    payload = sdxl_payload() if family == "sdxl" else chat_payload()
    text = json.dumps({"id": "rp-1", "input": payload | {place: "VALUE"}})
    if place == "input":
        text = '{"id": "rp-1", "input": "VALUE"}'
    event: dict[str, Any] = json.loads(text.replace('"VALUE"', value))
    return event


@pytest.mark.parametrize("name", EXTREME_VALUES)
@pytest.mark.parametrize(("family", "place"), [(f, p) for f, ps in PLACES.items() for p in ps])
def test_an_extreme_value_at_any_place_ends_in_a_valid_document(
    local: LocalWorker, family: str, place: str, name: str
) -> None:
    run(local, with_extreme_value(family, place, EXTREME_VALUES[name]))


@pytest.mark.parametrize("name", EXTREME_VALUES)
def test_the_handler_returns_a_document_for_an_extreme_value(
    local: LocalWorker, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = runpod_queue.make_handler(local.worker, local.settings)

    for place in ("prompt", "config", "input"):
        result = asyncio.run(
            _handled(handler, with_extreme_value("sdxl", place, EXTREME_VALUES[name]))
        )
        document = json.loads(json.dumps(result, allow_nan=False))
        assert (document["status"] == "failed") == ("error" in document)


async def _handled(handler: Any, event: dict[str, Any]) -> Any:
    return await handler(event)


@pytest.mark.parametrize("name", ["a megabyte of text", "a hundred thousand keys", "deep lists"])
@pytest.mark.parametrize("place", ["prompt", "config", "metadata"])
def test_an_extreme_value_takes_no_more_memory_than_a_few_copies_of_it(
    local: LocalWorker, place: str, name: str
) -> None:
    event = with_extreme_value("sdxl", place, EXTREME_VALUES[name])
    run(local, event)  # The first run fills the caches.

    tracemalloc.start()
    run(local, event)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 30_000_000
