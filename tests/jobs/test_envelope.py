"""An envelope reads an event once: its type, id, identity and limits."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.context import Bounds
from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import sdxl_payload
from tests.files import SPECIFICATION


def parse(payload: Any, **settings: Any) -> Any:
    return Envelope.of({"id": "rp-1", "input": payload}).job(Settings(**settings))


def refusal(payload: Any) -> str:
    with pytest.raises(InvalidPrompt) as refused:
        parse(payload)
    return refused.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["id", "job_id", "type", "user_id", "api_key", "callback_url", "config"])


@given(JSON | st.dictionaries(FIELDS, JSON), st.dictionaries(FIELDS, JSON, max_size=3))
def test_every_event_has_an_envelope(payload: Any, top: dict[str, Any]) -> None:
    envelope = Envelope.of({**top, "input": payload})

    assert envelope.job_id
    assert envelope.job_or_none(Settings()) is None


def test_a_payload_is_parsed_once() -> None:
    envelope = Envelope.of({"input": sdxl_payload()})

    assert envelope.job(Settings()) is envelope.job(Settings())


def test_the_job_of_a_payload_that_was_not_parsed_yet_is_read() -> None:
    envelope = Envelope.of({"input": sdxl_payload()})

    read = envelope.job_or_none(Settings())

    assert read is not None and read is envelope.job(Settings())


# --- its type and id ---


@pytest.mark.parametrize("payload", [None, [], "text", 7])
def test_an_input_that_is_not_an_object_is_refused(payload: Any) -> None:
    assert refusal(payload) == "input: Input should be an object"


@pytest.mark.parametrize(("name", "meaning"), SPECIFICATION["synonyms"].items())
@pytest.mark.parametrize("field", ["type", "job_type"])
def test_a_legacy_name_of_a_job_type_means_the_same_type(
    name: str, meaning: str, field: str
) -> None:
    payload = {**sdxl_payload(), "type": None, field: name}

    assert parse(payload).type == meaning


def test_type_takes_precedence_over_job_type() -> None:
    assert parse(sdxl_payload(type="video_fast", job_type="wan_video_high")).type == "video_fast"


def test_config_pipeline_does_not_decide_the_type() -> None:
    assert parse(sdxl_payload(config={"pipeline": "video"})).type == "sdxl_image_fast"


def test_a_null_means_that_a_field_is_absent() -> None:
    payload = sdxl_payload(
        negative_prompt=None,
        config={"seed": None, "guidance_scale": None},
        metadata={"start_reference_url": None, "reference_strength": None},
    )

    assert parse(payload).config.guidance_scale == 7.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": "a", "job_id": "b"}, "a"),
        ({"id": None, "job_id": "b"}, "b"),
        ({"id": None}, "rp-1"),
    ],
)
def test_the_id_is_the_callers_or_else_the_platforms(fields: Any, expected: str) -> None:
    assert parse({**sdxl_payload(), **fields}).id == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("api_key", {}),
        ("api_key", 7),
        ("job_type", []),
        ("job_id", 7),
        ("job_id", ""),
        ("job_id", "a b"),
        ("id", ""),
    ],
)
def test_an_invalid_name_or_key_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidPrompt, match=f"^{field}: "):
        Envelope.of({"id": "rp-1", "input": sdxl_payload(**{field: value})}).job(Settings())


def test_a_null_id_is_replaced_by_the_platforms_id() -> None:
    job = Envelope.of({"id": "rp-1", "input": sdxl_payload(id=None)}).job(Settings())

    assert job.id == "rp-1"


# --- the identity ---


def test_the_identity_is_user_key_and_id() -> None:
    identity = Envelope.of({"id": "rp-1", "input": sdxl_payload(api_key="key")}).identity

    assert (identity.user_id, identity.api_key, identity.job_id) == ("user-1", "key", "job-1")


def test_an_anonymous_job_is_identified_by_the_platforms_id() -> None:
    payload = sdxl_payload(user_id="anonymous")
    first, again, other = (
        Envelope.of({"id": name, "input": payload}).identity for name in ("rp-1", "rp-1", "rp-2")
    )

    assert first == again
    assert first != other


def test_anonymous_jobs_without_a_platform_are_never_the_same_job() -> None:
    event = {"input": sdxl_payload(user_id=None)}

    assert Envelope.of(event).identity != Envelope.of(event).identity


def test_no_key_is_in_the_text_of_an_envelope() -> None:
    event = {"input": sdxl_payload(api_key="a-key-of-ours")}

    assert "a-key-of-ours" not in repr(Envelope.of(event))


@pytest.mark.parametrize(
    ("url", "expected"),
    [("https://a.example/x", "https://a.example/x"), (7, None), ("https://" + "a" * 2000, None)],
)
def test_a_callback_url_that_no_job_may_have_is_ignored(url: object, expected: str | None) -> None:
    assert Envelope.of({"input": sdxl_payload(callback_url=url)}).callback_url == expected


# --- the limits ---


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ({"executionTimeout": 1_200_000}, 1170),
        ({"executionTimeout": 60_000}, 54),
        ({"executionTimeout": 5_000}, 4.5),
        ({}, 570),
        (None, 570),
        ({"executionTimeout": "soon"}, 570),
        ({"executionTimeout": 0}, 570),
        ({"executionTimeout": True}, 570),
        ({"executionTimeout": 1e300}, 570),
        ({"executionTimeout": 10**400}, 570),
    ],
)
def test_a_jobs_limit_is_a_margin_below_the_platforms(policy: object, seconds: float) -> None:
    bounds = Envelope.of({"policy": policy}).bounds(Settings())

    assert bounds == Bounds(work_s=seconds, wait_s=300, total_s=seconds)


@pytest.mark.parametrize(
    ("settings", "total_s"),
    [
        (Settings(job_timeout_s=5), 570),
        (Settings(job_timeout_s=1800), 1800),
        (Settings(job_timeout_s=5, serve="http"), math.inf),
    ],
)
def test_wait_and_work_together_are_limited_if_the_platform_has_a_timeout(
    settings: Settings, total_s: float
) -> None:
    assert Envelope.of({}).bounds(settings).total_s == total_s
