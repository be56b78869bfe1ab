"""The environment, read once at start.

Every variable is a field here and a row in `docs/settings.md`; a test compares the two.
Secrets are `SecretStr`, so that printing the settings prints no secret.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ourvidz_serverless import setting_checks
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES, SAFETY_WEIGHTS, Family, Weights

#: Variables that RunPod sets in its containers: for a queue, for an endpoint, for a pod.
RUNPOD_VARIABLES = ("RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID")

#: Where RunPod mounts a network volume: in an endpoint's workers, and in a pod.
VOLUMES = (Path("/runpod-volume"), Path("/workspace"))

#: The names of `WORKER_API_KEY` in the specification and in the application.
OTHER_KEY_NAMES = ("wan_worker_api_key", "chat_worker_api_key")
KEY_NAMES = ("worker_api_key", *OTHER_KEY_NAMES)

#: What a chat's server may have beside OpenAI's own fields.
SERVER_FIELDS = (
    *("top_k", "min_p", "repetition_penalty", "response_format", "chat_template_kwargs"),
    "cache_salt",
)

#: Whose conversations may share what chat has computed of them: everybody's, or each user's own.
CacheSalt = Literal["none", "user"]

WINDOWS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


def _words(value: object) -> object:
    return (
        tuple(part.strip() for part in value.split(",") if part.strip())
        if isinstance(value, str)
        else value
    )


def _known_families(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or set(value) - set(FAMILIES):
        raise ValueError(f"Input should be a comma-separated choice of {', '.join(FAMILIES)}")
    return value


def _host_names(value: tuple[str, ...]) -> tuple[str, ...]:
    if any(not re.fullmatch(r"\*|[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", name) for name in value):
        raise ValueError("Input should be host names without a port, comma-separated, or *")
    return tuple(name.lower() for name in value)


def _server_fields(value: tuple[str, ...]) -> tuple[str, ...]:
    if set(value) - set(SERVER_FIELDS):
        raise ValueError(f"Input should be a comma-separated choice of {', '.join(SERVER_FIELDS)}")
    return value


def _falling(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value), reverse=True) or any(not 0 < t <= 1000 for t in value):
        raise ValueError("Input should be falling numbers from 1000 to 1, comma-separated")
    return value


def _keys(value: object) -> object:
    if isinstance(value, str) and not _words(value):
        # Without a key the worker would accept everybody.
        raise ValueError("Input should hold a key")
    return _words(value)


@dataclass(frozen=True, slots=True)
class Rate:
    """A number of jobs in a window of seconds; `text` is the setting: `60/minute`."""

    jobs: int
    window_s: int
    text: str

    def __str__(self) -> str:
        return self.text


def _rate(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([1-9]\d{0,8})\s*/\s*(second|minute|hour|day)\s*", value)
    if not match:
        raise ValueError("Input should be JOBS/second, /minute, /hour or /day, such as 60/minute")
    return Rate(int(match[1]), WINDOWS_S[match[2]], f"{match[1]}/{match[2]}")


def _host_tokens(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(setting_checks.host_token(pair) for pair in value.split(",") if pair.strip())


def _named_models(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(setting_checks.named_model(pair) for pair in value.split(",") if pair.strip())


def _safety_rules(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(setting_checks.safety_rule(rule) for rule in value.split(",") if rule.strip())


Url = Annotated[str, AfterValidator(setting_checks.http_url)]
HeaderSecret = Annotated[SecretStr, AfterValidator(setting_checks.header_secret)]

Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Limit = Annotated[Rate | None, NoDecode, BeforeValidator(_rate)]
Keys = Annotated[tuple[HeaderSecret, ...], NoDecode, BeforeValidator(_keys)]
HostTokens = Annotated[
    tuple[setting_checks.HostToken, ...], NoDecode, BeforeValidator(_host_tokens)
]
NamedModels = Annotated[
    tuple[setting_checks.NamedModel, ...], NoDecode, BeforeValidator(_named_models)
]
SafetyRules = Annotated[
    tuple[setting_checks.SafetyRule, ...], NoDecode, BeforeValidator(_safety_rules)
]
Timesteps = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_words), AfterValidator(_falling)]

Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_words)]

#: The folders with weights, in order: in the image, RunPod's cached models, a network volume.
MODEL_DIRS = (
    Path("models"),
    Path("/runpod-volume/huggingface-cache/hub"),
    Path("/runpod-volume/models"),
)


class FixedSettings(BaseSettings):
    """The settings of one process: a field for each variable, with its name in lower case."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    # What is served, and on what.
    families: Annotated[Words, AfterValidator(_known_families)] = ("sdxl",)
    device: Annotated[str, AfterValidator(setting_checks.device)] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    attention_backend: Literal["native", "cudnn", "flash", "efficient", "math"] = "native"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    compile: Literal["off", "regional"] = "off"
    compile_cache_dir: Path | None = None
    concurrency: int | None = Field(None, ge=1, le=256)
    queue_backlog: int | None = Field(None, ge=0, le=256)
    job_timeout_s: float = Field(570.0, gt=0)
    device_wait_s: float = Field(300.0, gt=0)
    shutdown_grace_s: float = Field(20.0, ge=0)
    poison_dir: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    # The HTTP service.
    serve: Literal["queue", "http"] = "queue"
    host: str = "0.0.0.0"
    port: int = Field(8000, ge=0, le=65535)
    port_health: int | None = Field(None, ge=0, le=65535)
    allowed_hosts: Annotated[Words, AfterValidator(_host_names)] = ()
    http_backlog: int = Field(16, ge=0, le=10_000)
    http_reply_timeout_s: float = Field(45.0, gt=0)
    openai_model_names: NamedModels = ()
    register_worker: bool = False
    worker_url: Url | None = None
    page: bool | None = None

    # Memory, and who may change it.
    low_vram: bool = False
    vram_budget_gb: float | None = Field(None, gt=0)
    pressure_medium: float = Field(0.7, gt=0, lt=1)
    pressure_high: float = Field(0.85, gt=0, lt=1)
    pressure_critical: float = Field(0.95, gt=0, lt=1)
    admin_requires_key: bool = False

    # Where weights are.
    model_dirs: Folders = MODEL_DIRS
    fetch_models: bool = False
    hf_token: HeaderSecret | None = None
    mmap_weights: Literal["auto", "always", "never"] = "auto"
    warm_up: Literal["auto", "always", "never"] = "auto"

    # SDXL.
    sdxl_model: Annotated[str, AfterValidator(setting_checks.model_name)] = "pocket"
    sdxl_config: Path | None = None
    sdxl_min_steps: int = Field(10, ge=1, le=10)
    sdxl_distilled_steps: int | None = Field(None, ge=1, le=50)
    sdxl_timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    sdxl_max_batch: int = Field(6, ge=1, le=6)
    sdxl_graphs: Literal["off", "auto"] = "off"
    sdxl_tiny_vae: str | None = None
    sdxl_ip_adapter: Path | None = None
    sdxl_lora_dir: Path | None = None
    lora_hosts: Words = ()
    lora_host_tokens: HostTokens = ()
    lora_cache_gb: float = Field(10.0, gt=0)

    # Chat: by the worker's own engine, or by a server that speaks OpenAI's protocol.
    chat_engine: Literal["builtin", "openai"] = "builtin"
    chat_server_url: Url | None = None
    chat_server_command: Annotated[str, AfterValidator(setting_checks.command)] | None = None
    chat_server_start_s: float = Field(900.0, gt=0)
    chat_server_api_key: HeaderSecret | None = None
    chat_server_model: str | None = None
    chat_server_base_model: str | None = None
    chat_server_fields: Annotated[Words, AfterValidator(_server_fields)] = ()
    chat_instruct_model: str = "pocket"
    chat_base_model: str | None = None
    chat_quantization: Literal["none", "int8", "int4", "fp8"] = "none"
    chat_graphs: Literal["auto", "off"] = "off"
    chat_context: int = Field(8192, ge=256)
    chat_max_batch: int = Field(64, ge=1, le=256)
    chat_kv_tokens: int | None = Field(None, ge=256)
    chat_prefix_tokens: int = Field(16384, ge=0)
    chat_cache_salt: CacheSalt = "none"

    # WAN.
    wan_model: str = "pocket"
    wan_vace_model: str | None = None
    wan_i2v_model: Path | None = None
    wan_flf2v_model: Path | None = None
    wan_flow_shift: float | None = Field(None, ge=1.0, le=20.0)
    wan_distilled_steps: int | None = Field(None, ge=1, le=50)
    wan_distilled_solver: Literal["unipc", "dpm++", "euler"] = "euler"
    wan_distilled_timesteps: Timesteps = ()
    wan_enhancer_model: str | None = None
    wan_enhancement_prompt: Path = Path(__file__).parent / "models" / "wan" / "enhancement.txt"

    # Where assets go.
    storage_url: str = Field(default_factory=lambda: default_storage())
    asset_url_style: Literal["path", "public", "presigned"] = "path"
    presigned_expiry_s: int = Field(3600, ge=60, le=604800)
    bucket_endpoint_url: Url | None = None
    bucket_access_key_id: HeaderSecret | None = None
    bucket_secret_access_key: SecretStr | None = None
    bucket_region: Annotated[str, AfterValidator(setting_checks.region)] = "us-east-1"
    s3_config_hosts: Words = ()
    supabase_url: Url | None = None
    supabase_service_key: HeaderSecret | None = None

    # Content Credentials in assets.
    c2pa_cert: str | None = None
    c2pa_key: SecretStr | None = None
    require_c2pa: bool = False

    # Callbacks.
    callback_url: Url | None = None
    callback_hosts: Words = ()
    callback_processing: bool = False
    job_callback_secret: (
        Annotated[SecretStr, AfterValidator(setting_checks.signing_secret)] | None
    ) = None

    # Traces and metrics, in the names of OpenTelemetry's specification, and the price of a job.
    otel_exporter_otlp_endpoint: Url | None = None
    otel_exporter_otlp_traces_endpoint: Url | None = None
    otel_exporter_otlp_metrics_endpoint: Url | None = None
    otel_exporter_otlp_protocol: Literal["http/protobuf"] = "http/protobuf"
    otel_sdk_disabled: bool = False
    otel_traces_exporter: Literal["otlp", "none"] = "otlp"
    otel_metrics_exporter: Literal["otlp", "none"] = "otlp"
    otel_bsp_schedule_delay: int = Field(5000, gt=0)
    otel_metric_export_interval: int = Field(60_000, gt=0)
    gpu_price_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)

    # Keys, limits and references.
    worker_api_key: Keys = ()
    wan_worker_api_key: Keys = ()
    chat_worker_api_key: Keys = ()
    rate_limit_user: Limit = None
    rate_limit_endpoint: Limit = None
    rate_limit_fail_open: bool = True
    upstash_redis_rest_url: Url | None = None
    upstash_redis_rest_token: HeaderSecret | None = None
    reference_hosts: Words = ()
    reference_buckets: Words = ("user-library",)
    require_reference_consent: bool = True

    # Classifiers that look at pictures.
    safety_model: Words = ()
    safety_rules: SafetyRules = ()
    safety_fail_open: bool = False
    require_safety_model: bool = False

    # The bridge from the application's Redis lists, which runs as its own process.
    redis_url: SecretStr | None = None
    bridge_queues: Words = ("sdxl_queue", "chat_queue", "wan_queue")
    bridge_take_from: Literal["left", "right"] = "left"
    bridge_poll_s: float = Field(2.0, gt=0)
    runpod_api_key: HeaderSecret | None = None
    runpod_base_url: Url | None = None

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Strip whitespace from values, and drop values that are empty then.

        An empty key is not dropped, since without a key the worker would be open.
        """
        tidy = {name: v.strip() if isinstance(v, str) else v for name, v in given.items()}
        tidy = {name: value for name, value in tidy.items() if value != "" or name in KEY_NAMES}
        keys = [tidy[name] for name in KEY_NAMES if name in tidy]
        return {**tidy, "worker_api_key": keys[0]} if keys else tidy

    @property
    def served(self) -> list[Family]:
        """The records of the families that this worker serves."""
        return [FAMILIES[name] for name in self.families]

    @property
    def exclusive_places(self) -> int:
        """How many jobs that need the device alone run at once, from preparation to delivery.

        It is `CONCURRENCY`, or the families' own number; 0 if no such family is served.
        """
        own = [family.concurrency for family in self.served if family.is_exclusive]
        return (self.concurrency or max(own)) if own else 0

    @property
    def shared_places(self) -> int:
        """How many jobs that share the device (chats) run at once; 0 if no family has any."""
        own = [family.concurrency for family in self.served if not family.is_exclusive]
        return (self.concurrency or max(own)) if own else 0

    @property
    def resolved_concurrency(self) -> int:
        """How many jobs of all kinds this worker runs at once."""
        return self.exclusive_places + self.shared_places

    @property
    def resolved_backlog(self) -> int:
        """How many more jobs may wait for the device.

        0 unless the worker serves jobs of both kinds: only then can waiting jobs block others.
        """
        if not (self.exclusive_places and self.shared_places):
            return 0
        own = min(family.backlog for family in self.served if family.is_exclusive)
        return own if self.queue_backlog is None else self.queue_backlog

    @property
    def wanted_weights(self) -> Iterator[Weights]:
        """The weights that this worker reads, or that it names to the chat server it starts."""
        for family in self.served:
            if family.name != "chat" or self.chat_engine == "builtin":
                yield from family.weights
            elif "{model}" in (self.chat_server_command or ""):
                # The server's model; it has no second one.
                yield family.weights[0]
        if self.looks_at_pictures:
            yield SAFETY_WEIGHTS

    @property
    def looks_at_pictures(self) -> bool:
        """Whether this worker makes pictures, and a classifier looks at them."""
        return bool(self.safety_model) and any(each.makes_pictures for each in self.served)

    def places_of(self, weights: Weights) -> tuple[str, ...]:
        """The places that the setting of some weights names."""
        value = self.value_of(weights.setting)
        return value if isinstance(value, tuple) else () if value is None else (str(value),)

    @property
    def chat_models(self) -> dict[str, str | None]:
        """The chat models by name, each with the place of its weights or its name at the server.

        None is a model that is not served.
        """
        if self.chat_engine == "openai":
            instruct = self.chat_server_model or "the server's"
            return {"qwen_instruct": instruct, "qwen_base": self.chat_server_base_model}
        return {"qwen_instruct": self.chat_instruct_model, "qwen_base": self.chat_base_model}

    def value_of(self, variable: str) -> Any:
        """The value of a variable, by its name in the environment."""
        return getattr(self, variable.lower())

    def token_for(self, host: str) -> str | None:
        """The token of `LORA_HOST_TOKENS` for a host."""
        tokens = {each.host: each.token.get_secret_value() for each in self.lora_host_tokens}
        return tokens.get(host.lower())

    @property
    def wan_uses_chat_model(self) -> bool:
        """Whether the chat model of this worker also enhances WAN's prompts."""
        return "chat" in self.families and self.wan_enhancer_model in (
            None,
            self.chat_instruct_model,
        )

    @property
    def resolved_callback_url(self) -> str | None:
        """`CALLBACK_URL`, or the function at `SUPABASE_URL`; None if neither is set."""
        if self.callback_url or not self.supabase_url:
            return self.callback_url
        return f"{self.supabase_url.rstrip('/')}/functions/v1/job-callback"


def otlp_url(settings: Settings, signal: Literal["traces", "metrics"]) -> str | None:
    """Where OpenTelemetry's traces or metrics are sent; None if they are not wanted.

    It is the signal's own endpoint as it is, or the common endpoint with `/v1/traces` or
    `/v1/metrics` (https://opentelemetry.io/docs/specs/otel/protocol/exporter/).
    """
    is_off = settings.otel_sdk_disabled or settings.value_of(f"OTEL_{signal}_EXPORTER") == "none"
    if is_off:
        return None
    own: str | None = settings.value_of(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    common = settings.otel_exporter_otlp_endpoint
    return own or (f"{common.rstrip('/')}/v1/{signal}" if common else None)


def _family_fields() -> dict[str, Any]:
    """The fields that the family records name and that `FixedSettings` does not declare."""
    weights = [each.setting.lower() for family in FAMILIES.values() for each in family.weights]
    fields: dict[str, Any] = {name: (str | None, None) for name in weights}
    endpoints = [family.endpoint_setting.lower() for family in FAMILIES.values()]
    fields |= {name: (Words, ()) for name in endpoints}
    return {name: field for name, field in fields.items() if name not in FixedSettings.model_fields}


if TYPE_CHECKING:
    Settings = FixedSettings
else:
    Settings = create_model("Settings", __base__=FixedSettings, **_family_fields())
    Settings.__doc__ = FixedSettings.__doc__


def read() -> Settings:
    """The settings of this process.

    Raises ModelLoadError with one line that names each invalid variable. It shows no value, since
    a secret may be in the wrong variable.
    """
    try:
        settings = Settings()
    except ValidationError as exc:
        raise ModelLoadError("; ".join(map(_line, exc.errors()))) from None
    _refuse(_different_keys(settings))
    return settings


def read_for_worker() -> Settings:
    """The same for a process that serves jobs; it also checks what such a process needs."""
    settings = read()
    problems = (
        _unnamed_models(settings),
        _chat_server_problems(settings),
        storage_problems(settings),
        _half_of_upstash(settings),
        _safety_problems(settings),
    )
    _refuse(itertools.chain(*problems))
    return settings


def storage_problems(settings: Settings) -> Iterator[str]:
    """Why assets cannot be stored at `STORAGE_URL`, one line for each reason."""
    if settings.storage_url == "inline:":
        return
    scheme, bucket, _ = storage_place(settings)
    if scheme == "s3":
        if not setting_checks.is_bucket(bucket):
            yield "STORAGE_URL: Input should name a bucket, s3://BUCKET[/PREFIX]"
        if not (settings.bucket_access_key_id and settings.bucket_secret_access_key):
            yield "STORAGE_URL: needs BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY"
    elif scheme == "supabase" and bucket:
        if not (settings.supabase_url and settings.supabase_service_key):
            yield "STORAGE_URL: needs SUPABASE_URL and SUPABASE_SERVICE_KEY"
    elif scheme != "file" or settings.storage_url in ("file:", "file://"):
        yield "STORAGE_URL: Input should be inline:, file:FOLDER, s3://BUCKET or supabase://BUCKET"


def unreachable_storage(settings: Settings) -> str | None:
    """Why nobody can read what is stored, in one line; None if somebody can."""
    scheme, _, folder = settings.storage_url.partition(":")
    is_elsewhere = scheme != "file" or settings.serve == "http" or not is_on_runpod()
    if is_elsewhere or any(Path(folder.removeprefix("//")).is_relative_to(v) for v in VOLUMES):
        return None
    return (
        "STORAGE_URL: nobody can reach the disk of this container on RunPod: inline: puts assets "
        "into the document, and s3:// or supabase:// stores them in a bucket"
    )


def default_storage() -> str:
    """Where assets go without `STORAGE_URL`: on RunPod into the document, else into a folder.

    Nobody can reach a folder in one of RunPod's containers.
    """
    return "inline:" if is_on_runpod() else "file:outputs"


def storage_place(settings: Settings) -> tuple[str, str, str]:
    """The scheme, the bucket and the prefix in `STORAGE_URL`."""
    scheme, _, rest = settings.storage_url.partition(":")
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    return scheme, bucket, prefix


def is_on_runpod() -> bool:
    """Whether this process runs in one of RunPod's containers, an endpoint's or a pod's."""
    return any(os.environ.get(name) for name in RUNPOD_VARIABLES)


def _unnamed_models(settings: Settings) -> Iterator[str]:
    """On RunPod, one line for each family without a named model, since a worker costs money."""
    if not is_on_runpod():
        return
    wanted = {weights.setting for weights in settings.wanted_weights}
    for family in settings.served:
        variable = family.main_setting
        if variable in wanted and variable.lower() not in settings.model_fields_set:
            yield (
                f"{variable}: Field required on RunPod: a model's name, or pocket for the small "
                "model of this repository"
            )


def _chat_server_problems(settings: Settings) -> Iterator[str]:
    """Why chat cannot be served by a server, or why settings of one have no effect."""
    url, command = settings.chat_server_url, settings.chat_server_command
    if settings.chat_engine == "builtin":
        if url or command:
            variable = "CHAT_SERVER_URL" if url else "CHAT_SERVER_COMMAND"
            yield f"{variable}: needs CHAT_ENGINE=openai"
        return
    if not url and "{port}" not in (command or ""):
        yield "CHAT_ENGINE: openai needs CHAT_SERVER_URL, or CHAT_SERVER_COMMAND with {port} in it"
    if settings.chat_base_model:
        yield "CHAT_BASE_MODEL: Input should be unset where CHAT_SERVER_BASE_MODEL names the model"
    if settings.chat_quantization != "none":
        yield "CHAT_QUANTIZATION: Input should be none with CHAT_ENGINE=openai"


def _safety_problems(settings: Settings) -> Iterator[str]:
    """Why pictures cannot be looked at as the settings ask."""
    makes_pictures = any(family.makes_pictures for family in settings.served)
    if settings.require_safety_model and makes_pictures and not settings.safety_model:
        yield "SAFETY_MODEL: Field required with REQUIRE_SAFETY_MODEL=true"
    if settings.safety_rules and not settings.safety_model:
        yield "SAFETY_RULES: needs SAFETY_MODEL"
    if settings.safety_model and not settings.safety_rules:
        yield "SAFETY_RULES: Field required with SAFETY_MODEL: what its labels mean"


def _half_of_upstash(settings: Settings) -> Iterator[str]:
    if settings.upstash_redis_rest_url and not settings.upstash_redis_rest_token:
        yield "UPSTASH_REDIS_REST_URL: needs UPSTASH_REDIS_REST_TOKEN"


def _different_keys(settings: Settings) -> Iterator[str]:
    """The names of `WORKER_API_KEY` whose value differs from the first one that is set."""
    for name in OTHER_KEY_NAMES:
        if getattr(settings, name) not in ((), settings.worker_api_key):
            names = " and ".join(each.upper() for each in KEY_NAMES if each != name)
            yield f"{name.upper()}: Input should equal {names} where they are set too"


def _refuse(problems: Iterable[str]) -> None:
    if line := "; ".join(problems):
        raise ModelLoadError(line)


def _line(error: Any) -> str:
    name = ".".join(map(str, error["loc"])).upper()
    return f"{name}: {error['msg'].removeprefix('Value error, ')}"
