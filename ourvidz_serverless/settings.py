"""The environment, read once at start.

Every variable is a field here and a row in `docs/settings.md`; a test compares the two.
Secrets are `SecretStr`, so that printing the settings prints no secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ourvidz_serverless.errors import ModelLoadError

FAMILIES = ("sdxl", "chat", "wan")

#: Jobs a worker takes at once. SDXL: one computes while the next prepares and the last one
#: delivers. WAN: a job is minutes long, so nothing is gained by taking a second one early.
CONCURRENCY = {"sdxl": 2, "chat": 64, "wan": 1}


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


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]


class Settings(BaseSettings):
    """What one worker is told by its environment; the names are the variables' in lower case."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    # What is served, and on what.
    families: Annotated[Words, AfterValidator(_known_families)] = ("sdxl",)
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    concurrency: int | None = Field(None, ge=1, le=256)
    job_timeout_s: float = Field(600.0, gt=0)
    shutdown_grace_s: float = Field(20.0, ge=0)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    # SDXL.
    sdxl_model: str = "pocket"
    sdxl_config: Path | None = None
    sdxl_min_steps: int = Field(10, ge=1, le=10)
    sdxl_timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    sdxl_max_batch: int = Field(6, ge=1, le=6)
    sdxl_ip_adapter: Path | None = None
    sdxl_lora_dir: Path | None = None
    lora_hosts: Words = ()

    # Chat.
    chat_instruct_model: str = "pocket"
    chat_base_model: str | None = None
    chat_resident_models: int = Field(2, ge=1, le=2)
    chat_context: int = Field(8192, ge=256)
    chat_max_batch: int = Field(64, ge=1, le=256)
    chat_kv_tokens: int | None = Field(None, ge=256)
    chat_prefix_tokens: int = Field(16384, ge=0)

    # Where assets go.
    storage_url: str = "file:outputs"
    asset_url_style: Literal["path", "public", "presigned"] = "path"
    presigned_expiry_s: int = Field(3600, ge=60, le=604800)
    bucket_endpoint_url: str | None = None
    bucket_access_key_id: SecretStr | None = None
    bucket_secret_access_key: SecretStr | None = None
    bucket_region: str = "us-east-1"
    supabase_url: str | None = None
    supabase_service_key: SecretStr | None = None

    # Whom to tell.
    callback_url: str | None = None
    callback_hosts: Words = ()
    callback_processing: bool = False
    job_callback_secret: SecretStr | None = None

    # What comes in.
    reference_hosts: Words = ()
    reference_buckets: Words = ("user-library",)
    require_reference_consent: bool = True

    @property
    def resolved_concurrency(self) -> int:
        """How many jobs this worker takes at once: `CONCURRENCY`, or the family's own number."""
        return self.concurrency or max(CONCURRENCY[family] for family in self.families)

    @property
    def resolved_callback_url(self) -> str | None:
        """Where callbacks go: `CALLBACK_URL`, or the function beside `SUPABASE_URL`, or nowhere."""
        if self.callback_url or not self.supabase_url:
            return self.callback_url
        return f"{self.supabase_url.rstrip('/')}/functions/v1/job-callback"


def read() -> Settings:
    """The settings of this process.

    Raises ModelLoadError with one line that names each variable that does not hold; values are
    left out, since a secret may stand in the wrong variable.
    """
    try:
        return Settings()
    except ValidationError as exc:
        wrong = "; ".join(_line(error) for error in exc.errors())
        raise ModelLoadError(wrong) from None


def _line(error: Any) -> str:
    name = ".".join(map(str, error["loc"])).upper()
    return f"{name}: {error['msg'].removeprefix('Value error, ')}"
