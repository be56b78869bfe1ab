"""The settings, and the document that describes them."""

import re
from typing import Any

import pytest

from ourvidz_serverless import settings
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings
from tests.files import ROOT


def test_the_documented_table_has_exactly_the_settings() -> None:
    page = (ROOT / "docs/settings.md").read_text()

    documented = re.findall(r"^\| `([A-Z0-9_]+)` \|", page, re.MULTILINE)

    assert sorted(documented) == sorted(name.upper() for name in Settings.model_fields)


def test_families_are_a_comma_separated_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMILIES", "sdxl, wan")

    assert settings.read().families == ("sdxl", "wan")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_TIMEOUT_S", "")

    assert settings.read().job_timeout_s == 570


def test_an_error_names_every_invalid_variable_and_shows_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONCURRENCY", "a-secret")
    monkeypatch.setenv("DTYPE", "int3")

    with pytest.raises(ModelLoadError) as wrong:
        settings.read()

    assert "CONCURRENCY: " in wrong.value.message
    assert "DTYPE: " in wrong.value.message
    assert "a-secret" not in wrong.value.message


def test_printed_settings_show_no_secret() -> None:
    assert "hush" not in repr(Settings(job_callback_secret="hush", supabase_service_key="hush"))


@pytest.mark.parametrize("blank", [" ", "\n", "\t\r\n"])
def test_a_variable_of_whitespace_counts_as_unset(
    monkeypatch: pytest.MonkeyPatch, blank: str
) -> None:
    monkeypatch.setenv("CALLBACK_URL", blank)

    assert settings.read().callback_url is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SUPABASE_SERVICE_KEY", "key\r"),
        ("JOB_CALLBACK_SECRET", "hush\n"),
        ("UPSTASH_REDIS_REST_TOKEN", " token"),
    ],
)
def test_whitespace_around_a_secret_is_removed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    assert getattr(settings.read(), name.lower()).get_secret_value() == value.strip()


@pytest.mark.parametrize("value", ["civitai.com", "=token", "https://civitai.com=token", "a.b=t k"])
def test_host_tokens_of_another_form_end_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LORA_HOST_TOKENS", value)

    with pytest.raises(ModelLoadError, match=r"^LORA_HOST_TOKENS: Input should be HOST=TOKEN"):
        settings.read()


def test_a_host_is_sent_its_own_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HOST_TOKENS", "Civitai.com = hush==, huggingface.co=two")

    found = settings.read()

    hosts = ["civitai.com", "CIVITAI.COM", "huggingface.co", "cdn.civitai.com"]
    assert [found.token_for(host) for host in hosts] == ["hush==", "hush==", "two", None]
    assert "hush" not in repr(found)


@pytest.mark.parametrize("value", ["ftp://host/x", "https://", "https://host/x#sha256=0"])
def test_a_model_by_an_invalid_url_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SDXL_MODEL", value)

    with pytest.raises(
        ModelLoadError, match=r"^SDXL_MODEL: Input should be a model's name, or URL"
    ):
        settings.read()


@pytest.mark.parametrize("name", ["SUPABASE_SERVICE_KEY", "WORKER_API_KEY", "RUNPOD_API_KEY"])
@pytest.mark.parametrize("value", ["schl\u00fcssel", "two words", "a\r\nX-Injected: b", "\u4f60"])
def test_a_key_that_no_header_can_hold_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ModelLoadError, match=rf"^{name}.*visible ASCII") as wrong:
        settings.read()

    assert value not in wrong.value.message


@pytest.mark.parametrize(
    "name",
    [
        *("CALLBACK_URL", "SUPABASE_URL", "WORKER_URL", "BUCKET_ENDPOINT_URL"),
        *("UPSTASH_REDIS_REST_URL", "RUNPOD_BASE_URL"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        *("minio:9000", "localhost", "//host/path", "ftp://host", "http://", "http://host:port"),
        *("https://a b.example", "http://[::1", "http://a\\@b.example", "http:host"),
    ],
)
def test_an_invalid_url_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ModelLoadError, match=f"^{name}: Input should be a URL"):
        settings.read()


@pytest.mark.parametrize(
    "value", ["http://minio:9000", "https://a.example/path?x=1", "http://[::1]:80", "HTTP://h"]
)
def test_a_valid_url_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", value)

    assert settings.read().bucket_endpoint_url == value


@pytest.mark.parametrize(
    "value", ["whsec_abc", "whsec_", "whsec_a-b_", "whsec_\u00e9", "whsec_a b="]
)
def test_a_webhook_secret_that_is_not_base64_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("JOB_CALLBACK_SECRET", value)

    with pytest.raises(ModelLoadError, match=r"^JOB_CALLBACK_SECRET: .* base64 after whsec_$"):
        settings.read()


# --- the names of the key ---


@pytest.mark.parametrize("name", ["WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY"])
def test_the_key_is_read_under_each_of_its_names(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "older, newer")

    keys = settings.read().worker_api_key

    assert [key.get_secret_value() for key in keys] == ["older", "newer"]


def test_one_key_may_be_set_under_all_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORKER_API_KEY", "WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY"):
        monkeypatch.setenv(name, "the-key")

    assert [key.get_secret_value() for key in settings.read().worker_api_key] == ["the-key"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("WORKER_API_KEY", "WAN_WORKER_API_KEY"),
        ("WORKER_API_KEY", "CHAT_WORKER_API_KEY"),
        ("WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY"),
    ],
)
def test_two_names_with_different_keys_end_the_start(
    monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    monkeypatch.setenv(one, "this-key")
    monkeypatch.setenv(other, "that-key")

    with pytest.raises(ModelLoadError, match=rf"^{other}: Input should equal .*{one}") as wrong:
        settings.read()

    assert "-key" not in wrong.value.message


@pytest.mark.parametrize("name", ["WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY"])
def test_an_empty_key_ends_the_start_under_each_of_its_names(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("WORKER_API_KEY", "the-key")
    monkeypatch.setenv(name, " , ")

    with pytest.raises(ModelLoadError, match=f"^{name}: Input should hold a key"):
        settings.read()


# --- what a worker cannot do without ---

S3_KEYS = {"BUCKET_ACCESS_KEY_ID": "id", "BUCKET_SECRET_ACCESS_KEY": "secret"}
ON_RUNPOD = ["RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID"]


SERVER = {"CHAT_ENGINE": "openai", "CHAT_SERVER_URL": "http://a"}


def worker_settings(monkeypatch: pytest.MonkeyPatch, **env: str) -> Settings:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return settings.read_for_worker()


@pytest.mark.parametrize("variable", ON_RUNPOD)
@pytest.mark.parametrize(
    ("family", "model"),
    [("sdxl", "SDXL_MODEL"), ("chat", "CHAT_INSTRUCT_MODEL"), ("wan", "WAN_MODEL")],
)
def test_on_runpod_a_family_without_a_named_model_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, variable: str, family: str, model: str
) -> None:
    with pytest.raises(ModelLoadError, match=f"^{model}: Field required on RunPod"):
        worker_settings(monkeypatch, FAMILIES=family, **{variable: "something"})


def test_on_runpod_the_pocket_model_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"RUNPOD_POD_ID": "pod", "SDXL_MODEL": "pocket"}

    assert worker_settings(monkeypatch, **env).sdxl_model == "pocket"


@pytest.mark.parametrize("variable", ON_RUNPOD)
def test_on_runpod_assets_go_into_the_document_by_default(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    env = {"SDXL_MODEL": "pocket", variable: "something"}

    assert worker_settings(monkeypatch, **env).storage_url == "inline:"


def test_on_runpod_a_named_folder_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"RUNPOD_POD_ID": "pod", "SDXL_MODEL": "pocket", "STORAGE_URL": "file:outputs"}

    assert worker_settings(monkeypatch, **env).storage_url == "file:outputs"


def test_outside_of_runpod_assets_go_into_a_folder_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert worker_settings(monkeypatch).storage_url == "file:outputs"


def test_outside_of_runpod_the_pocket_model_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_settings(monkeypatch).sdxl_model == "pocket"


def test_a_process_that_serves_no_jobs_needs_no_named_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RUNPOD_POD_ID", "pod")
    monkeypatch.setenv("STORAGE_URL", "s3://bucket")

    assert settings.read().families == ("sdxl",)


@pytest.mark.parametrize("missing", [*S3_KEYS, None])
def test_an_s3_bucket_needs_both_of_its_keys(
    monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    env = {name: value for name, value in S3_KEYS.items() if missing and name != missing}

    with pytest.raises(ModelLoadError, match=r"^STORAGE_URL: needs BUCKET_ACCESS_KEY_ID and"):
        worker_settings(monkeypatch, STORAGE_URL="s3://bucket", **env)


@pytest.mark.parametrize("url", ["s3://", "s3://two words", "s3://a%20b/prefix", "s3:///prefix"])
def test_an_s3_bucket_needs_a_name_that_s3_accepts(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    with pytest.raises(ModelLoadError, match=r"^STORAGE_URL: Input should name a bucket"):
        worker_settings(monkeypatch, STORAGE_URL=url, **S3_KEYS)


def test_an_upstash_url_without_its_token_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ModelLoadError, match=r"^UPSTASH_REDIS_REST_URL: needs UPSTASH_REDIS_REST_T"
    ):
        worker_settings(monkeypatch, UPSTASH_REDIS_REST_URL="https://u.example")


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"CHAT_SERVER_URL": "http://a"}, "CHAT_SERVER_URL: needs CHAT_ENGINE=openai"),
        ({"CHAT_SERVER_COMMAND": "a {port}"}, "CHAT_SERVER_COMMAND: needs CHAT_ENGINE=openai"),
        (
            {"CHAT_ENGINE": "openai", "CHAT_SERVER_COMMAND": "vllm serve"},
            "CHAT_ENGINE: openai needs CHAT_SERVER_URL, or CHAT_SERVER_COMMAND with {port} in it",
        ),
        (
            {"CHAT_ENGINE": "openai", "CHAT_SERVER_COMMAND": "vllm '"},
            "CHAT_SERVER_COMMAND: Input should be a program and its arguments",
        ),
        (
            {"CHAT_SERVER_FIELDS": "top_k,beams"},
            "CHAT_SERVER_FIELDS: Input should be a comma-separated choice of top_k",
        ),
        (
            {**SERVER, "CHAT_BASE_MODEL": "a"},
            "CHAT_BASE_MODEL: Input should be unset where CHAT_SERVER_BASE_MODEL names the model",
        ),
        (
            {**SERVER, "CHAT_QUANTIZATION": "int8"},
            "CHAT_QUANTIZATION: Input should be none with CHAT_ENGINE=openai",
        ),
    ],
)
def test_settings_of_a_chat_server_that_do_not_fit_together_end_the_start(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], line: str
) -> None:
    with pytest.raises(ModelLoadError, match=f"^{re.escape(line)}"):
        worker_settings(monkeypatch, **env)


def test_on_runpod_chat_by_a_server_needs_the_name_of_a_model_only_for_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {"FAMILIES": "chat", "RUNPOD_ENDPOINT_ID": "e", "STORAGE_URL": "inline:"}

    assert worker_settings(monkeypatch, **env, **SERVER).chat_models["qwen_base"] is None
    with pytest.raises(ModelLoadError, match="CHAT_INSTRUCT_MODEL: Field required"):
        worker_settings(monkeypatch, CHAT_SERVER_COMMAND="vllm serve {model}")


def test_one_line_names_everything_that_a_worker_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError) as wrong:
        worker_settings(monkeypatch, RUNPOD_POD_ID="pod", STORAGE_URL="supabase://assets")

    assert "SDXL_MODEL: " in wrong.value.message
    assert "STORAGE_URL: needs SUPABASE_URL" in wrong.value.message
    assert "\n" not in wrong.value.message


@pytest.mark.parametrize("name", ["cudaa", "cuda:", "cuda:x", "gpu", "0"])
def test_an_invalid_device_name_ends_the_start(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"^DEVICE: Input should be auto, cpu, cuda"):
        worker_settings(monkeypatch, DEVICE=name)


@pytest.mark.parametrize("name", ["us east", "-us", "7", "a" * 64])
def test_a_region_that_fits_no_host_name_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(ModelLoadError, match=r"^BUCKET_REGION: Input should be a region"):
        worker_settings(monkeypatch, BUCKET_REGION=name)


# --- numbers ---


@pytest.mark.parametrize(
    ("families", "exclusive", "shared", "backlog"),
    [
        (("sdxl",), 2, 0, 0),
        (("wan",), 1, 0, 0),
        (("chat",), 0, 64, 0),
        (("sdxl", "wan"), 2, 0, 0),
        (("sdxl", "chat"), 2, 64, 16),
        (("chat", "wan"), 1, 64, 1),
        (("sdxl", "chat", "wan"), 2, 64, 1),
    ],
)
def test_concurrency_and_backlog_follow_from_the_families(
    families: tuple[str, ...], exclusive: int, shared: int, backlog: int
) -> None:
    settings = Settings(families=families)

    assert (settings.exclusive_places, settings.shared_places) == (exclusive, shared)
    assert settings.resolved_concurrency == exclusive + shared
    assert settings.resolved_backlog == backlog


@pytest.mark.parametrize(
    ("families", "exclusive", "shared", "backlog"),
    [(("sdxl",), 5, 0, 0), (("chat",), 0, 5, 0), (("sdxl", "chat"), 5, 5, 7)],
)
def test_settings_override_concurrency_and_backlog(
    families: tuple[str, ...], exclusive: int, shared: int, backlog: int
) -> None:
    settings = Settings(families=families, concurrency=5, queue_backlog=7)

    assert (settings.exclusive_places, settings.shared_places) == (exclusive, shared)
    assert settings.resolved_backlog == backlog


# --- where telemetry is sent ---

COLLECTOR, OTHER = "http://collector:4318", "https://metrics.example/otlp?key=k"


@pytest.mark.parametrize(
    ("values", "traces", "metrics"),
    [
        ({}, None, None),
        (
            {"otel_exporter_otlp_endpoint": COLLECTOR},
            f"{COLLECTOR}/v1/traces",
            f"{COLLECTOR}/v1/metrics",
        ),
        (
            {"otel_exporter_otlp_endpoint": f"{COLLECTOR}/"},
            f"{COLLECTOR}/v1/traces",
            f"{COLLECTOR}/v1/metrics",
        ),
        (
            {
                "otel_exporter_otlp_endpoint": COLLECTOR,
                "otel_exporter_otlp_metrics_endpoint": OTHER,
            },
            f"{COLLECTOR}/v1/traces",
            OTHER,
        ),
        ({"otel_exporter_otlp_traces_endpoint": OTHER}, OTHER, None),
        (
            {"otel_exporter_otlp_endpoint": COLLECTOR, "otel_traces_exporter": "none"},
            None,
            f"{COLLECTOR}/v1/metrics",
        ),
        ({"otel_exporter_otlp_endpoint": COLLECTOR, "otel_sdk_disabled": True}, None, None),
    ],
)
def test_each_signal_has_its_own_endpoint_or_a_path_at_the_common_one(
    values: dict[str, Any], traces: str | None, metrics: str | None
) -> None:
    config = Settings(**values)

    assert settings.otlp_url(config, "traces") == traces
    assert settings.otlp_url(config, "metrics") == metrics


def test_a_protocol_that_telemetry_does_not_speak_ends_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")

    with pytest.raises(ModelLoadError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL: .*http/protobuf"):
        settings.read()
