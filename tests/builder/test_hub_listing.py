"""The listing on RunPod's Hub: the form, its presets, and what a deployment with it does."""

import base64
import io
import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image
from pydantic import ValidationError

from builder import hub_listing, presets
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings
from tests.files import ROOT

HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
HUB_TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())
KEYS = {each["key"]: each["input"] for each in HUB["config"]["env"]}
SETTINGS = {name.upper() for name in Settings.model_fields}

#: The form's field for a variable that RunPod reads.
RUNPODS = {"RUNPOD_INIT_TIMEOUT"}

#: Settings that the Hub does not show: the image sets them, they belong to the HTTP service or the
#: bridge, or they are for several families on one GPU.
NOT_ON_THE_HUB = {
    *("CONCURRENCY", "DEVICE", "DTYPE", "MMAP_WEIGHTS"),
    *("CHAT_KV_TOKENS", "CHAT_MAX_BATCH", "CHAT_PREFIX_TOKENS", "CHAT_CACHE_SALT"),
    "MODEL_DIRS",
    *("CHAT_GRAPHS", "SDXL_GRAPHS", "WAN_ENHANCEMENT_PROMPT"),
    *("CHAT_ENGINE", "CHAT_SERVER_URL", "CHAT_SERVER_COMMAND", "CHAT_SERVER_START_S"),
    *("CHAT_SERVER_API_KEY", "CHAT_SERVER_MODEL", "CHAT_SERVER_BASE_MODEL", "CHAT_SERVER_FIELDS"),
    *("PAGE", "REDIS_URL", "BRIDGE_QUEUES", "BRIDGE_TAKE_FROM", "BRIDGE_POLL_S"),
    *("RUNPOD_API_KEY", "RUNPOD_BASE_URL"),
    *("SDXL_ENDPOINT_ID", "CHAT_ENDPOINT_ID", "WAN_ENDPOINT_ID"),
    "OPENAI_MODEL_NAMES",
    *("ALLOWED_HOSTS", "HOST", "HTTP_BACKLOG", "HTTP_REPLY_TIMEOUT_S", "PORT", "PORT_HEALTH"),
    "SERVE",
    *("REGISTER_WORKER", "WORKER_URL"),
    *("PRESSURE_CRITICAL", "PRESSURE_HIGH", "PRESSURE_MEDIUM", "VRAM_BUDGET_GB"),
    *("S3_CONFIG_HOSTS", "ATTENTION_BACKEND", "COMPILE", "COMPILE_CACHE_DIR", "WARM_UP"),
    *("QUEUE_BACKLOG", "DEVICE_WAIT_S"),
    *("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
    *("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER"),
    *("OTEL_BSP_SCHEDULE_DELAY", "OTEL_METRIC_EXPORT_INTERVAL", "OTEL_SDK_DISABLED"),
    *("MEMORY_FORMAT", "WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY"),
}


def settings_with(values: dict[str, Any]) -> Settings:
    """The settings with these environment variables."""
    return Settings.model_validate(
        {name.lower(): value for name, value in values.items() if value != ""}
    )


def test_the_listing_is_what_its_source_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert hub_listing.main(["--check"]) == 0, capsys.readouterr().err


# --- the form ---


def test_every_setting_is_on_the_hub_or_listed_as_not_on_the_hub() -> None:
    assert set(KEYS) - SETTINGS == RUNPODS
    assert SETTINGS - set(KEYS) == NOT_ON_THE_HUB


@pytest.mark.parametrize("key", sorted(set(KEYS) - RUNPODS))
def test_a_default_on_the_hub_is_a_valid_value_of_its_setting(key: str) -> None:
    shown = KEYS[key]
    values = [shown.get("default", ""), *(each["value"] for each in shown.get("options", []))]

    for value in values:
        settings_with({key: value})


@pytest.mark.parametrize("key", [key for key in KEYS if KEYS[key]["type"] == "number"])
def test_a_number_on_the_hub_has_bounds_that_its_setting_accepts(key: str) -> None:
    shown = KEYS[key]

    settings_with({key: shown["min"]})
    settings_with({key: shown["max"]})
    assert shown["min"] <= shown.get("default", shown["min"]) <= shown["max"]


@pytest.mark.parametrize("key", sorted(set(KEYS) - RUNPODS))
def test_a_default_on_the_hub_is_that_of_a_preset_or_of_its_setting(key: str) -> None:
    default = KEYS[key].get("default", "")
    if default == "" or any(key in preset.env for preset in presets.PRESETS.values()):
        return

    assert getattr(settings_with({key: default}), key.lower()) == getattr(Settings(), key.lower())


def test_a_secret_on_the_hub_has_no_default_and_tells_of_runpods_secrets() -> None:
    secrets = [key for key in KEYS if re.search("KEY$|SECRET|TOKENS?$|ACCESS_KEY_ID", key)]
    secrets.remove("ADMIN_REQUIRES_KEY")

    assert len(secrets) > 8
    for key in secrets:
        assert "default" not in KEYS[key]
        assert "RUNPOD_SECRET_" in KEYS[key]["description"]


def test_what_is_required_is_marked_and_has_a_default() -> None:
    required = {key for key, shown in KEYS.items() if shown.get("required")}

    models = {"SDXL_MODEL", "CHAT_INSTRUCT_MODEL", "WAN_MODEL"}
    assert required == {"FAMILIES", "STORAGE_URL", *models}
    assert all(KEYS[key]["default"] for key in required)
    assert not any(KEYS[key]["advanced"] for key in required)


def test_the_description_of_a_field_fits_on_the_form() -> None:
    assert [key for key, shown in KEYS.items() if len(shown["description"]) > 120] == []


def test_the_form_offers_each_choice_of_families_that_has_a_preset() -> None:
    offered = [each["value"] for each in KEYS["FAMILIES"]["options"]]

    assert offered == ["sdxl", "chat", "wan", "sdxl,chat,wan"]


# --- the hardware and the icon ---


def test_the_listing_offers_pools_up_to_the_largest() -> None:
    pools = HUB["config"]["gpuIds"].split(",")

    assert pools[:2] == ["ADA_24", "AMPERE_24"]
    assert set(pools) == {pool.name for pool in presets.POOLS}
    assert {"HOPPER_141", "BLACKWELL_180"} <= set(pools)


def test_the_disk_holds_the_weights_of_every_preset() -> None:
    most = max(preset.weights_gb for preset in presets.PRESETS.values())

    assert HUB["config"]["containerDiskInGb"] >= presets.IMAGE_DISK_GB + most


def test_hosts_have_the_cuda_version_of_the_image_or_a_newer_one() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    ours = re.findall(r"(?:nvidia/cuda:|^ARG CUDA=)(\d+\.\d+)", dockerfile, re.MULTILINE)

    versions = HUB["config"]["allowedCudaVersions"]
    assert versions == HUB_TESTS["config"]["allowedCudaVersions"]
    assert versions[0] in ours
    assert versions == sorted(versions)


def test_the_icon_is_a_small_picture_in_the_listing_itself() -> None:
    url = urlsplit(HUB["iconUrl"])
    kind, _, data = url.path.partition(",")

    icon = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (url.scheme, kind) == ("data", "image/png;base64")
    assert icon.size == (128, 128)
    assert len(data) < 4096


def test_the_hubs_readers_have_a_page_of_their_own() -> None:
    page = (ROOT / ".runpod/README.md").read_text()

    for preset in presets.PRESETS.values():
        assert preset.title in page
    # Its links leave the folder, and the Hub shows it without the repository around it.
    assert not re.search(r"\]\((?!https?://|#)", page)


# --- presets and the trial ---


def test_a_preset_on_the_hub_sets_fields_of_the_form_to_valid_values() -> None:
    for preset in HUB["config"]["presets"]:
        assert set(preset["defaults"]) <= set(KEYS)
        settings_with({k: v for k, v in preset["defaults"].items() if k not in RUNPODS})


def test_the_presets_on_the_hub_are_those_of_the_command() -> None:
    on_the_hub = {
        preset["name"]: {name: as_text(value) for name, value in preset["defaults"].items()}
        for preset in HUB["config"]["presets"]
    }

    assert on_the_hub == {preset.title: preset.env for preset in presets.PRESETS.values()}


def as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_hub_names_the_model_of_each_family_that_it_starts() -> None:
    envs = [preset["defaults"] for preset in HUB["config"]["presets"]]

    for env in (*envs, hub_listing.defaults(), trial()):
        served = settings_with({k: v for k, v in env.items() if k not in RUNPODS}).served
        assert {family.main_setting for family in served} <= env.keys()


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_a_published_model_of_a_preset_has_a_revision(preset: presets.Preset) -> None:
    published = [name for name in preset.models.values() if name != "pocket"]

    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", name) for name in published)


def trial() -> dict[str, str]:
    """The environment of the Hub's own tests."""
    return {each["key"]: each["value"] for each in HUB_TESTS["config"]["env"]}


def test_the_trial_loads_a_published_checkpoint_and_answers_with_the_picture() -> None:
    env = trial()

    assert env["SDXL_MODEL"] == presets.TRIAL_MODEL
    assert env["FETCH_MODELS"] == "true"
    assert env["STORAGE_URL"] == "inline:"


def test_the_hubs_tests_are_jobs_that_the_worker_accepts() -> None:
    settings = settings_with({k: v for k, v in trial().items() if k not in RUNPODS})

    for test in HUB_TESTS["tests"]:
        Envelope.of({"id": "rp", "input": test["input"]}).job(settings)
    assert (
        HUB_TESTS["tests"][0]["input"]
        == json.loads((ROOT / "test_input.json").read_text())["input"]
    )


def test_settings_with_an_invalid_value_are_refused() -> None:
    with pytest.raises(ValidationError):
        settings_with({"SDXL_MAX_BATCH": 7})
