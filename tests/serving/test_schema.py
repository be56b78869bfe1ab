"""The contract: schemas are current, examples hold, old payloads still mean the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator as Validator

from builder import contract as artefacts
from ourvidz_serverless import errors, jobs
from ourvidz_serverless.serving import schema as contract
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload

FOLDER = artefacts.FOLDER
EXAMPLES = sorted((FOLDER / "examples/jobs").glob("*.json"))
KEPT = dict(artefacts.kept())
SCHEMAS = sorted(FOLDER.glob("**/*.schema.json"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def validator(name: str) -> Validator:
    return Validator(read(FOLDER / f"{name}.schema.json"))


def check(name: str, document: Any) -> None:
    validator(name).validate(document)


# --- the artefacts ---


def test_the_artefacts_are_what_the_code_says() -> None:
    assert artefacts.check() == []


def test_a_changed_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "VERSION", "9.9")

    assert "contract/callback.schema.json" in artefacts.check()


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_every_schema_is_a_schema(path: Path) -> None:
    Validator.check_schema(read(path))


def test_every_job_type_has_a_schema_and_an_example() -> None:
    schemas = {path.name.removesuffix(".schema.json") for path in FOLDER.glob("jobs/*")}

    assert schemas == {path.stem for path in EXAMPLES} == set(jobs.FAMILY_OF)


# --- payloads ---


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_holds_and_parses(path: Path) -> None:
    payload = read(path)

    check(f"jobs/{payload['type']}", payload)
    check("event", {"input": payload})
    assert jobs.parse({"id": "rp-1", "input": payload}, Settings()).type == path.stem


@pytest.mark.parametrize("name", KEPT)
def test_what_an_earlier_version_sent_still_means_the_same(name: str) -> None:
    means = artefacts.meaning(KEPT[name]["input"])

    assert _only(means, KEPT[name]["means"]) == KEPT[name]["means"]


def _only(found: Any, wanted: Any) -> Any:
    """Of what is found, what the wanted has too: what came later is no harm."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: _only(found.get(key), value) for key, value in wanted.items()}
    return found


@pytest.mark.parametrize("name", [name for name in KEPT if "type" in KEPT[name]["input"]])
def test_what_an_earlier_version_sent_fits_todays_schema(name: str) -> None:
    payload = KEPT[name]["input"]

    check(f"jobs/{jobs.SYNONYMS.get(payload['type'], payload['type'])}", payload)


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"config": {"num_images": 2}}, "config"),
        ({"config": {"guidance_scale": 21}}, "config"),
        ({"config": {"resolution": [512, 512]}}, "config"),
        ({"config": {"num_inference_steps": "many"}}, "config"),
        ({"user_id": "no/slashes"}, "user_id"),
        ({"type": "sdxl_image_best"}, "type"),
    ],
)
def test_what_the_worker_refuses_the_schema_refuses(changes: Any, at: str) -> None:
    payload = sdxl_payload(**changes)

    (refusal,) = validator("jobs/sdxl_image_fast").iter_errors(payload)

    assert refusal.absolute_path[0] == at
    with pytest.raises(errors.InvalidPrompt):
        jobs.parse({"id": "rp-1", "input": payload}, Settings())


@pytest.mark.parametrize("field", ["model", "max_tokens", "temperature", "stop", "seed"])
def test_a_field_that_answers_in_two_places_stands_in_both(field: str) -> None:
    schema = read(FOLDER / "jobs/chat_conversation.schema.json")

    assert field in schema["properties"]
    assert field in schema["$defs"]["ChatConfig"]["properties"]


# --- documents ---


@pytest.mark.parametrize("path", sorted(FOLDER.glob("examples/*.json")), ids=lambda path: path.stem)
def test_every_documents_example_holds(path: Path) -> None:
    check(path.name.split(".")[0], read(path))


def large_fields(schema: Any) -> list[str]:
    """The schema's fields that take more than RunPod does, as JSON."""
    if isinstance(schema, list):
        return [found for part in schema for found in large_fields(part)]
    if not isinstance(schema, dict):
        return []
    options = [schema, *schema.get("anyOf", [])]
    if any(
        option.get("maxLength", 0) > 10_000_000 for option in options if isinstance(option, dict)
    ):
        return [json.dumps(schema)]
    return [found for part in schema.values() for found in large_fields(part)]


@pytest.mark.parametrize("name", ["sdxl_image_fast", "video_fast", "image_high"])
def test_a_field_that_takes_more_than_the_queue_says_what_the_queue_takes(name: str) -> None:
    fields = large_fields(contract.job_schemas()[name])

    assert fields
    assert all("10 MB on /run, 20 on /runsync" in field for field in fields)


def test_the_schemas_know_every_error_code() -> None:
    codes = sorted(error.code for error in errors.JobError.__subclasses__())

    assert (
        read(FOLDER / "callback.schema.json")["$defs"]["Failure"]["properties"]["code"]["enum"]
        == codes
    )


@pytest.mark.parametrize(
    "payload",
    [
        sdxl_payload(),
        sdxl_payload(config={"num_images": 6}),
        sdxl_payload(config={"num_images": 2}),
        chat_payload(),
        chat_payload(type="chat_enhance", truncate="oldest"),
        chat_payload(type="chat_unrestricted", messages=[]),
        {"type": "video_fast", "user_id": "user-1"},
        {"type": "admin_utilities", "config": {"operation": "memory_report"}},
        [],
    ],
)
def test_what_the_worker_says_is_in_the_contract(tmp_path: Path, payload: Any) -> None:
    local = LocalWorker(tmp_path, models={"chat": FakeChat("Rain.")})
    local.models["sdxl"] = local.fake_sdxl

    document = local.run(payload)

    result = document.result()
    result.pop("error", None)  # the SDK's, which shows it beside the output
    for name, body in (("callback", document.callback()), ("result", result)):
        schema = read(FOLDER / f"{name}.schema.json")
        check(name, body)
        assert set(body) <= set(schema["properties"])
        for asset in body["assets"]:
            assert set(asset["metadata"]) <= set(schema["$defs"]["AssetMetadata"]["properties"])
