"""The contract: the schemas are current, examples are valid, old payloads mean the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator as Validator

from builder import contract as artefacts
from ourvidz_serverless import errors, jobs
from ourvidz_serverless.job_types import SYNONYMS
from ourvidz_serverless.jobs.envelope import Envelope
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


# --- the files ---


def test_the_files_of_the_contract_are_current() -> None:
    assert artefacts.check() == []


def test_a_change_of_the_contract_makes_its_files_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "VERSION", "9.9")

    assert "contract/callback.schema.json" in artefacts.check()


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_every_schema_is_valid_json_schema(path: Path) -> None:
    Validator.check_schema(read(path))


def test_every_job_type_has_a_schema_and_an_example() -> None:
    schemas = {path.name.removesuffix(".schema.json") for path in FOLDER.glob("jobs/*")}

    assert schemas == {path.stem for path in EXAMPLES} == set(jobs.FAMILY_OF)


# --- payloads ---


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_payload_is_valid_and_parses(path: Path) -> None:
    payload = read(path)

    check(f"jobs/{payload['type']}", payload)
    check("event", {"input": payload})
    assert Envelope.of({"id": "rp-1", "input": payload}).job(Settings()).type == path.stem


@pytest.mark.parametrize("name", KEPT)
def test_a_payload_of_an_earlier_version_means_the_same(name: str) -> None:
    means = artefacts.meaning(KEPT[name]["input"])

    assert _only(means, KEPT[name]["means"]) == KEPT[name]["means"]


def _only(found: Any, wanted: Any) -> Any:
    """The fields of `found` that `wanted` has too: later versions may add fields."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: _only(found.get(key), value) for key, value in wanted.items()}
    return found


@pytest.mark.parametrize("name", [name for name in KEPT if "type" in KEPT[name]["input"]])
def test_a_payload_of_an_earlier_version_is_valid_today(name: str) -> None:
    payload = KEPT[name]["input"]

    check(f"jobs/{SYNONYMS.get(payload['type'], payload['type'])}", payload)


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"config": {"num_images": 7}}, "config"),
        ({"config": {"guidance_scale": 21}}, "config"),
        ({"config": {"resolution": [512, 512]}}, "config"),
        ({"config": {"num_inference_steps": "many"}}, "config"),
        ({"user_id": "no/slashes"}, "user_id"),
        ({"type": "sdxl_image_best"}, "type"),
    ],
)
def test_a_payload_that_the_worker_refuses_is_invalid_in_the_schema(changes: Any, at: str) -> None:
    payload = sdxl_payload(**changes)

    (refusal,) = validator("jobs/sdxl_image_fast").iter_errors(payload)

    assert refusal.absolute_path[0] == at
    with pytest.raises(errors.InvalidPrompt):
        Envelope.of({"id": "rp-1", "input": payload}).job(Settings())


@pytest.mark.parametrize("field", ["model", "max_tokens", "temperature", "stop", "seed"])
def test_a_field_that_is_accepted_in_two_places_is_in_the_schema_twice(field: str) -> None:
    schema = read(FOLDER / "jobs/chat_conversation.schema.json")

    assert field in schema["properties"]
    assert field in schema["$defs"]["ChatConfig"]["properties"]


# --- documents ---


@pytest.mark.parametrize("path", sorted(FOLDER.glob("examples/*.json")), ids=lambda path: path.stem)
def test_every_example_document_is_valid(path: Path) -> None:
    check(path.name.split(".")[0], read(path))


def large_fields(schema: Any) -> list[str]:
    """The schema's fields that accept more than RunPod does, as JSON."""
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
def test_a_field_longer_than_runpods_limit_states_that_limit(name: str) -> None:
    fields = large_fields(contract.job_schemas()[name])

    assert fields
    assert all("10 MB on /run, 20 on /runsync" in field for field in fields)


def test_the_schemas_list_every_error_code() -> None:
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
        sdxl_payload(config={"num_images": 7}),
        chat_payload(),
        chat_payload(type="chat_enhance", truncate="oldest"),
        chat_payload(type="chat_unrestricted", messages=[]),
        {"type": "video_fast", "user_id": "user-1"},
        {"type": "admin_utilities", "config": {"operation": "memory_report"}},
        [],
    ],
)
def test_every_document_of_the_worker_is_valid_in_the_contract(
    tmp_path: Path, payload: Any
) -> None:
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
