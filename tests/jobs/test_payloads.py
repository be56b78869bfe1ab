"""The fields of a payload, and the errors of invalid ones, which name the field."""

import json
from pathlib import Path
from typing import Any

import pytest
from botocore.handlers import validate_bucket_name
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless import jobs
from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.job import ANONYMOUS
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.jobs.sdxl import SdxlJob
from ourvidz_serverless.models.sdxl import prompt_weighting
from ourvidz_serverless.models.sdxl.prompt_weighting import Fragment, plain
from ourvidz_serverless.settings import Settings
from tests import files
from tests.fakes.local_worker import sdxl_payload
from tests.files import ROOT, SPECIFICATION

PAYLOADS = sorted(files.PAYLOADS.glob("*.json"))
REFERENCE = {"reference_image_url": "https://images.example/a.png"}


def parse(payload: Any, **settings: Any) -> Any:
    chosen = Settings(**settings)
    return Envelope.of({"id": "rp-1", "input": payload}, chosen.families).job(chosen)


def sdxl(**changes: Any) -> SdxlJob:
    job = parse(sdxl_payload(**changes))
    assert isinstance(job, SdxlJob)
    return job


def refusal(payload: Any, **settings: Any) -> str:
    with pytest.raises(InvalidPrompt) as refused:
        parse(payload, **settings)
    return refused.value.message


# --- every type ---


@pytest.mark.parametrize("name", SPECIFICATION["job_types"])
def test_every_job_type_of_the_specification_parses(name: str) -> None:
    assert parse({**sdxl_payload(type=name), "operation": "health"}).type == name


def test_no_other_job_type_is_known() -> None:
    assert sorted(jobs.FAMILY_OF) == sorted(SPECIFICATION["job_types"])


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda path: path.stem)
def test_every_example_payload_parses(path: Path) -> None:
    payload = json.loads(path.read_text())

    assert parse(payload).id == payload["id"]


def test_the_test_input_is_an_example_payload_that_parses() -> None:
    event = json.loads((ROOT / "test_input.json").read_text())

    assert Envelope.of(event).job(Settings()).id == "first-picture"


# --- minimal payloads ---

QUICKSTART = {"prompt": "Hello World"}


@pytest.mark.parametrize(
    ("family", "type"),
    [("sdxl", "sdxl_image_fast"), ("chat", "chat_conversation"), ("wan", "video_fast")],
)
def test_a_prompt_alone_is_a_job_on_a_worker_of_one_family(family: str, type: str) -> None:
    job = parse(QUICKSTART, families=family)

    assert (job.type, job.user_id, job.id, job.prompt) == (type, ANONYMOUS, "rp-1", "Hello World")


@pytest.mark.parametrize("absent", [{}, {"type": None}, {"type": ""}, {"job_type": ""}])
def test_a_null_or_empty_type_is_no_type(absent: dict[str, Any]) -> None:
    assert parse({**QUICKSTART, **absent}).type == "sdxl_image_fast"


def test_a_worker_of_several_families_asks_for_a_type_and_names_those_it_serves() -> None:
    assert refusal(QUICKSTART, families="chat,sdxl") == (
        "type: Field required on a worker of several families: one of sdxl_image_fast, "
        "sdxl_image_high, chat_enhance, chat_conversation, chat_unrestricted, admin_utilities"
    )


@pytest.mark.parametrize("named", ["sdxl_image_best", 7, ["sdxl_image_fast"]])
def test_an_unknown_type_is_refused_with_the_types_that_are_served(named: Any) -> None:
    assert refusal({**QUICKSTART, "type": named}) == (
        "type: Input should be one of sdxl_image_fast, sdxl_image_high, admin_utilities"
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_an_sdxl_job_has_one_to_six_pictures(count: int) -> None:
    assert len(sdxl(config={"num_images": count}).seeds) == count


# --- one meaning, several places ---


def test_steps_default_to_those_of_the_job_type() -> None:
    payload = sdxl_payload(config={"num_inference_steps": None})

    assert parse(payload).steps == 15
    assert parse({**payload, "type": "sdxl_image_high"}).steps == 25


def test_num_inference_steps_takes_precedence_over_steps() -> None:
    assert sdxl(config={"num_inference_steps": 12, "steps": 30}).steps == 12
    assert sdxl(config={"num_inference_steps": None, "steps": 30}).steps == 30


@pytest.mark.parametrize(
    ("top", "config", "metadata", "meant"),
    [
        ("top", "config", "metadata", "top"),
        (None, "config", "metadata", "config"),
        (None, None, "metadata", "metadata"),
        (None, None, None, None),
    ],
)
def test_the_negative_prompt_is_the_first_one_of_three_fields(
    top: str | None, config: str | None, metadata: str | None, meant: str | None
) -> None:
    job = sdxl(
        negative_prompt=top,
        config={"negative_prompt": config},
        metadata={"negative_prompt": metadata},
    )

    assert job.negative == meant


@pytest.mark.parametrize(
    ("config", "metadata", "strength"),
    [
        ({"denoise_strength": 0.3}, {"denoise_strength": 0.6, "reference_strength": 0.9}, 0.3),
        ({}, {"denoise_strength": 0.6, "reference_strength": 0.9}, 0.6),
        ({}, {"reference_strength": 0.9}, 0.1),
        ({}, {}, 0.5),
        ({"denoise_strength": 0.0}, {}, 0.05),
        ({"denoise_strength": 0.9}, {"exact_copy_mode": True}, 0.05),
        ({"denoise_strength": 0.9}, {"reference_mode": "copy"}, 0.05),
        ({}, {"reference_type": "style"}, 0.8),
        ({}, {"reference_type": "composition"}, 0.65),
        ({}, {"reference_type": "character"}, 0.45),
    ],
)
def test_the_strength_comes_from_the_first_of_its_fields_that_is_set(
    config: dict[str, Any], metadata: dict[str, Any], strength: float
) -> None:
    job = sdxl(config=config, metadata={**REFERENCE, **metadata})

    assert job.strength == pytest.approx(strength)


def test_the_reference_is_config_image_or_the_metadatas_url() -> None:
    assert sdxl(config={"image": "a/b.png"}, metadata=REFERENCE).reference == "a/b.png"
    assert sdxl(metadata=REFERENCE).reference == REFERENCE["reference_image_url"]


def test_an_exact_copy_needs_no_prompt() -> None:
    payload = sdxl_payload(prompt="", metadata={**REFERENCE, "exact_copy_mode": True})

    assert parse(payload).is_exact_copy


def test_unknown_keys_are_ignored() -> None:
    payload = sdxl_payload(
        quality="fast", config={"lock_pose": True}, metadata={"motion_intensity": {"x": [1]}}
    )

    assert parse(payload).id == "job-1"


@pytest.mark.parametrize(
    "spelling", ["DPM++ 2M Karras", "dpmpp_2m_karras", "dpm++-2m-karras", " DPMPP 2M KARRAS "]
)
def test_a_scheduler_may_have_any_spelling_of_its_name(spelling: str) -> None:
    assert sdxl(config={"scheduler": spelling}).config.scheduler == "dpmpp_2m_karras"


def test_a_job_that_says_nothing_else_asks_for_one_png_of_1024_pixels_square() -> None:
    config = sdxl(config=dict.fromkeys(sdxl_payload()["config"])).config

    assert config.resolution == (1024, 1024)
    assert (config.num_images, config.guidance_scale) == (1, 7.0)
    assert (config.output_format, config.quality) == ("png", 95)


def test_resolution_is_width_by_height() -> None:
    assert sdxl(config={"resolution": "1024x576"}).config.resolution == (1024, 576)


# --- seeds ---


def test_the_pictures_of_a_batch_have_consecutive_seeds() -> None:
    assert sdxl(config={"num_images": 3, "seed": 41}).seeds == [41, 42, 43]


def test_every_seed_of_a_batch_is_a_valid_seed() -> None:
    assert sdxl(config={"num_images": 3, "seed": 2**31 - 1}).seeds == [2**31 - 1, 0, 1]


@given(st.integers(0, 2**31 - 1))
def test_every_seed_of_the_specification_is_accepted(seed: int) -> None:
    assert sdxl(config={"seed": seed}).seeds == [seed]


def drawn(**changes: Any) -> list[int]:
    """The seeds of a job that names none."""
    return sdxl(**changes, config={"seed": None, "num_images": 6}).seeds


def test_a_missing_seed_is_the_same_at_each_delivery_of_a_job() -> None:
    assert drawn(id="job-1") == drawn(id="job-1")


def test_a_missing_seed_differs_by_job_and_by_user() -> None:
    jobs_of_two = [(f"job-{i}", user) for i in range(100) for user in ("user-1", "user-2")]

    assert len({drawn(id=name, user_id=user)[0] for name, user in jobs_of_two}) == 200


@given(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}", fullmatch=True))
def test_a_missing_seed_becomes_a_valid_seed_above_zero(name: str) -> None:
    assert all(0 < seed < 2**31 for seed in drawn(id=name))


# --- weights ---


def test_without_compel_brackets_in_a_prompt_are_text() -> None:
    assert sdxl(prompt="(sharp:1.3)").weighted_prompt == plain("(sharp:1.3)")


def test_compel_weights_follow_the_prompt() -> None:
    job = sdxl(prompt="a cat", compel_enabled=True, compel_weights="(sharp:1.3)")

    assert job.weighted_prompt == (Fragment("a cat, "), Fragment("sharp", 1.3))


def test_an_open_parenthesis_of_the_prompt_does_not_reach_compel_weights() -> None:
    job = sdxl(prompt="a (cat", compel_enabled=True, compel_weights="(sharp:1.3)")

    weighted = (Fragment("a "), Fragment("cat", 1.1), Fragment(", "), Fragment("sharp", 1.3))
    assert job.weighted_prompt == weighted


def test_a_jobs_texts_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    weights_parse = prompt_weighting.parse

    def noted(text: str) -> prompt_weighting.Prompt:
        parsed.append(text)
        return weights_parse(text)

    monkeypatch.setattr(prompt_weighting, "parse", noted)

    job = sdxl(prompt="(a)", negative_prompt="(b)", compel_enabled=True)
    for _ in range(2):
        _ = job.texts, job.weighted_prompt, job.weighted_negative

    assert parsed == ["(a)", "(b)"]


def test_compel_weights_need_compel_enabled() -> None:
    assert sdxl(prompt="a cat", compel_weights="(sharp:1.3)").weighted_prompt == plain("a cat")


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": {"num_images": 7}},
            "config.num_images: Input should be less than or equal to 6",
        ),
        ({"config": {"num_images": 0}}, "config.num_images: Input should be greater than or equal"),
        ({"config": {"num_images": "3"}}, "config.num_images: Input should be a number"),
        (
            {"config": {"num_inference_steps": 9}},
            "config.num_inference_steps: Input should be greater than or equal to 10",
        ),
        (
            {"config": {"num_inference_steps": None, "steps": 51}},
            "config.steps: Input should be less than or equal to 50",
        ),
        (
            {"config": {"guidance_scale": 0.5}},
            "config.guidance_scale: Input should be greater than or equal to 1",
        ),
        (
            {"config": {"guidance_scale": 21}},
            "config.guidance_scale: Input should be less than or equal to 20",
        ),
        (
            {"config": {"guidance_scale": float("nan")}},
            "config.guidance_scale: Input should be a finite number",
        ),
        (
            {"config": {"loras": [{"name": "ink", "scale": 2.1}]}},
            "config.loras.0.scale: Input should be less than or equal to 2",
        ),
        (
            {"config": {"loras": [{"name": "ink", "scale": -2.1}]}},
            "config.loras.0.scale: Input should be greater than or equal to -2",
        ),
        ({"config": {"seed": -1}}, "config.seed: Input should be greater than or equal to 0"),
        ({"config": {"seed": 2**31}}, "config.seed: Input should be less than 2147483648"),
        ({"config": {"denoise_strength": 1.5}}, "config.denoise_strength: Input should be less"),
        ({"metadata": {"reference_strength": -1}}, "metadata.reference_strength: Input should be"),
        ({"metadata": {"reference_type": "mood"}}, "metadata.reference_type: Input should be"),
        ({"config": {"scheduler": "magic"}}, "config.scheduler: Input should be 'euler'"),
        ({"prompt": None}, "prompt: Field required where no reference image is given"),
        ({"prompt": 7}, "prompt: Input should be a valid string"),
        ({"prompt": "x" * 20_001}, "prompt: String should have at most 20000 characters"),
        ({"prompt": "\ud800"}, "prompt: Input should be a valid string"),
        ({"prompt": "(a:9)", "compel_enabled": True}, "prompt: Weights should be less than"),
        (
            {"compel_weights": f"(a:{'9' * 400})", "compel_enabled": True},
            "compel_weights: Weights should be less than or equal to 3",
        ),
        (
            {"negative_prompt": "a" + "+" * 8000, "compel_enabled": True},
            "negative_prompt: Weights should be less than or equal to 3",
        ),
        (
            {"config": {"negative_prompt": "a-- , " * 257}, "compel_enabled": True},
            "config.negative_prompt: Weighted parts should be at most 256",
        ),
        ({"user_id": "../other"}, "user_id: String should match pattern"),
        ({"id": "a/b"}, "id: String should match pattern"),
        ({"config": []}, "config: Input should be"),
        ({"metadata": "x"}, "metadata: Input should be"),
        (
            {"metadata": {"exact_copy_mode": True}},
            "metadata.reference_image_url: Field required for an exact copy",
        ),
    ],
)
def test_a_refusal_names_the_invalid_field(changes: dict[str, Any], message: str) -> None:
    payload = sdxl_payload()
    for part in ("config", "metadata"):
        if isinstance(changes.get(part), dict):
            changes = {**changes, part: {**payload[part], **changes[part]}}

    assert refusal({**payload, **changes}).startswith(message)


@pytest.mark.parametrize(
    "resolution", ["1024", "1024x", "100x100", "32x512", "512x4096", "512 x 512", 512, [512, 512]]
)
def test_a_resolution_has_sides_that_are_multiples_of_eight_within_bounds(resolution: Any) -> None:
    assert refusal(sdxl_payload(config={"resolution": resolution})) == (
        "config.resolution: Input should be WIDTHxHEIGHT, each a multiple of 8 from 64 to 2048"
    )


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"bucketName": "assets", "accessId": "k"}, "s3Config.accessSecret"),
        ({"endpointUrl": "file:///etc"}, "s3Config.bucketName"),
        (
            {"bucketName": "abc", "accessId": "k", "accessSecret": "s", "endpointUrl": "file:/x"},
            "s3Config.endpointUrl",
        ),
        ("text", "s3Config"),
    ],
)
def test_an_incomplete_s3_config_is_refused_by_its_field(config: Any, field: str) -> None:
    with pytest.raises(InvalidPrompt) as refused:
        Envelope.of({"id": "rp-1", "input": sdxl_payload(), "s3Config": config}).job(Settings())

    assert refused.value.message.startswith(f"{field}: ")


S3_CONFIG = {"bucketName": "assets", "accessId": "key", "accessSecret": "secret"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bucketName", "two words"),
        ("bucketName", "bucket/folder"),
        ("bucketName", "bucket\n"),
        ("bucketName", "b\u00fccher"),
        ("bucketName", "b" * 256),
        ("bucketName", "arn:aws:s3:us-east-1:123456789012:accesspoint/assets"),
        ("accessId", ""),
        ("accessId", "key\n"),
        ("accessId", "k\u20acy"),
        ("accessSecret", ""),
    ],
)
def test_an_s3_config_that_no_storage_accepts_is_refused_by_its_field(
    field: str, value: str
) -> None:
    with pytest.raises(InvalidPrompt, match=f"^s3Config.{field}: ") as refused:
        Envelope.of(
            {"id": "rp-1", "input": sdxl_payload(), "s3Config": {**S3_CONFIG, field: value}}
        ).job(Settings())

    assert "secret" not in refused.value.message


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("ab0.-_/: \n"), max_size=300))
def test_every_accepted_bucket_name_is_valid_for_botocore(name: str) -> None:
    try:
        Envelope.of(
            {"id": "rp-1", "input": sdxl_payload(), "s3Config": {**S3_CONFIG, "bucketName": name}}
        ).job(Settings())
    except InvalidPrompt:
        return

    validate_bucket_name({"Bucket": name})


def test_the_settings_may_lower_the_minimum_of_steps() -> None:
    payload = sdxl_payload(config={"num_inference_steps": 4})

    assert parse(payload, sdxl_min_steps=4).steps == 4
    assert refusal(payload, sdxl_min_steps=6).startswith(
        "config.num_inference_steps: Input should be greater than or equal to 6: "
    )


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_job_with_a_distilled_lora_may_have_one_step_and_more(steps: int) -> None:
    config = {"num_inference_steps": steps, "loras": [{"name": "lightning", "distilled": True}]}

    assert sdxl(config=config).steps == steps


def test_a_refusal_of_few_steps_says_what_allows_them() -> None:
    payload = sdxl_payload(config={"num_inference_steps": 4, "loras": [{"name": "ink"}]})

    assert refusal(payload) == (
        "config.num_inference_steps: Input should be greater than or equal to 10: fewer need a "
        'distilled checkpoint (SDXL_DISTILLED_STEPS), or a LoRA with "distilled": true'
    )


def test_on_a_distilled_checkpoint_a_prompt_alone_takes_its_steps_and_no_guidance() -> None:
    job = parse(QUICKSTART, sdxl_distilled_steps=4)

    assert (job.steps, job.config.guidance_scale) == (4, 1.0)


def test_on_a_distilled_checkpoint_a_job_may_name_its_steps_and_its_guidance() -> None:
    payload = sdxl_payload(config={"num_inference_steps": 1, "guidance_scale": 2})

    job = parse(payload, sdxl_distilled_steps=4)

    assert (job.steps, job.config.guidance_scale) == (1, 2.0)


def test_a_job_with_a_distilled_lora_has_no_guidance_unless_it_names_one() -> None:
    loras = [{"name": "lightning", "distilled": True}]

    assert sdxl(config={"loras": loras}).config.guidance_scale == 1.0
    assert sdxl(config={"loras": loras, "guidance_scale": 1.5}).config.guidance_scale == 1.5


def test_no_job_has_less_than_one_step() -> None:
    config = {"num_inference_steps": 0, "loras": [{"name": "lightning", "distilled": True}]}

    assert refusal(sdxl_payload(config=config)) == (
        "config.num_inference_steps: Input should be greater than or equal to 1"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["id", "type", "user_id", "prompt", "negative_prompt", "config", "metadata", "compel_enabled"]
)


@given(st.dictionaries(FIELDS, JSON), st.dictionaries(st.text(max_size=9), JSON))
def test_any_payload_parses_or_is_refused_by_its_field(fields: Any, others: Any) -> None:
    try:
        parse({**sdxl_payload(), **others, **fields})
    except InvalidPrompt as refused:
        field = refused.message.split(":")[0].split(".")[0]
        assert field in {*fields, *others, "type", "prompt", "metadata", "user_id", "id"}
        assert "inf" not in refused.message
        assert "nan" not in refused.message
