"""The listing on RunPod's Hub: `.runpod/hub.json`, and the settings of `.runpod/tests.json`.

    python -m builder.hub_listing            write both
    python -m builder.hub_listing --check    fail if one differs from what would be written

A row of `INPUTS` is a field of the Hub's form. Its type, bounds, choices and default are those of
the setting; presets and models are those of `builder.presets`. The Hub's format is described at
docs.runpod.io/hub/publishing-guide. It asks for a valid URL of the icon; here that is a `data:`
URL, so that the listing needs no host. Whether the Hub shows such a URL is not documented.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from builder.icon import ICON
from builder.presets import (
    CUDA_VERSIONS,
    INIT_TIMEOUT_S,
    POOLS,
    PRESETS,
    TRIAL_MODEL,
)
from ourvidz_serverless.settings import Settings

FOLDER = Path(__file__).parents[1] / ".runpod"
HUB, TESTS = FOLDER / "hub.json", FOLDER / "tests.json"

#: The preset whose values are the defaults of the form.
FIRST = PRESETS["sdxl"]

#: The pools of the listing, the preferred ones first: 24 GB hold one family, and whoever chooses
#: more has the larger ones to choose from.
PREFERRED = ("ADA_24", "AMPERE_24")

#: The GPU of the Hub's own tests (docs.runpod.io/references/gpu-types).
TEST_GPU = "NVIDIA GeForce RTX 4090"


@dataclass(frozen=True, slots=True)
class Input:
    """A field of the form. A basic one is shown at once, others under "advanced"."""

    key: str
    name: str
    description: str
    is_basic: bool = False
    is_required: bool = False
    #: The label of each choice, by its value; without one, a choice is its own label.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: For a number without bounds in the settings.
    least: float | None = None
    most: float | None = None


SECRET = "Better as a RunPod secret: {{ RUNPOD_SECRET_name }}"

INPUTS = (
    Input(
        "FAMILIES",
        "Serves",
        "What this endpoint serves. One family an endpoint scales best",
        is_basic=True,
        is_required=True,
        labels={
            ",".join(each.families): each.title for each in PRESETS.values() if each.weights_gb
        },
    ),
    Input(
        "SDXL_MODEL",
        "SDXL model",
        "A Hugging Face repository in diffusers' form, with @ and a revision if need be",
        is_basic=True,
        is_required=True,
    ),
    Input(
        "CHAT_INSTRUCT_MODEL",
        "Chat model",
        "A Qwen, Llama, Mistral or another; named like the SDXL model",
        is_basic=True,
        is_required=True,
    ),
    Input(
        "WAN_MODEL",
        "WAN model",
        "WAN 2.1 text-to-video in diffusers' form; named like the SDXL model",
        is_basic=True,
        is_required=True,
    ),
    Input(
        "WAN_VACE_MODEL",
        "VACE model",
        "WAN 2.1 VACE, for videos with references and given frames; empty is none",
        is_basic=True,
    ),
    Input(
        "FETCH_MODELS",
        "Download models",
        "At its start a worker downloads what these settings name, to a network volume if there "
        "is one",
        is_basic=True,
    ),
    Input("HF_TOKEN", "Hugging Face token", f"For gated models. {SECRET}", is_basic=True),
    Input(
        "STORAGE_URL",
        "Storage",
        "inline: puts pictures into the answer; s3://BUCKET or supabase://BUCKET stores them",
        is_basic=True,
        is_required=True,
    ),
    Input("BUCKET_ENDPOINT_URL", "S3 endpoint", "Of an S3-compatible store; empty is Amazon's"),
    Input("BUCKET_ACCESS_KEY_ID", "S3 key", f"For s3://. {SECRET}"),
    Input("BUCKET_SECRET_ACCESS_KEY", "S3 secret", f"For s3://. {SECRET}"),
    Input("BUCKET_REGION", "S3 region", "The bucket's region"),
    Input("SUPABASE_URL", "Supabase URL", "The project's, for supabase:// and for callbacks"),
    Input("SUPABASE_SERVICE_KEY", "Supabase service key", f"For supabase://. {SECRET}"),
    Input(
        "ASSET_URL_STYLE",
        "Asset URLs",
        "How a stored asset is named in the document",
        labels={
            "path": "Path in the bucket",
            "public": "Public URL",
            "presigned": "Presigned URL",
        },
    ),
    Input("PRESIGNED_EXPIRY_S", "Life of presigned URLs", "Seconds for which such a URL is valid"),
    Input(
        "CALLBACK_URL",
        "Callback URL",
        "Where documents are posted, if not to the function beside the Supabase URL",
    ),
    Input("JOB_CALLBACK_SECRET", "Callback secret", f"Signs callbacks. {SECRET}"),
    Input("CALLBACK_HOSTS", "Callback hosts", "Hosts that a job's own callback_url may name"),
    Input("CALLBACK_PROCESSING", "Callback at the start", "Also post when a job begins"),
    Input("WORKER_API_KEY", "Worker's key", f"A job must bring it in its api_key. {SECRET}"),
    Input("ADMIN_REQUIRES_KEY", "Key for administration", "Changes of memory need the key"),
    Input("RATE_LIMIT_USER", "Jobs of one user", "At most, such as 60/minute"),
    Input("RATE_LIMIT_ENDPOINT", "Jobs of all users", "At most, such as 600/minute"),
    Input(
        "RATE_LIMIT_FAIL_OPEN",
        "Run uncounted jobs",
        "Jobs run although they could not be counted",
    ),
    Input("UPSTASH_REDIS_REST_URL", "Upstash URL", "Where the workers of an endpoint count"),
    Input("UPSTASH_REDIS_REST_TOKEN", "Upstash token", f"Its token. {SECRET}"),
    Input("REFERENCE_HOSTS", "Reference hosts", "The only ones; empty is any public host"),
    Input("REFERENCE_BUCKETS", "Reference buckets", "Of Supabase, beside the worker's own"),
    Input(
        "REQUIRE_REFERENCE_CONSENT",
        "Consent for references",
        "In adult mode a reference needs metadata.reference_consent",
    ),
    Input("SAFETY_MODEL", "Classifiers of pictures", "Image classifiers, comma-separated"),
    Input("SAFETY_RULES", "Rules for pictures", "LABEL:ACTION:THRESHOLD, such as nsfw:refuse:0.5"),
    Input("SAFETY_FAIL_OPEN", "Deliver unseen pictures", "If a classifier fails"),
    Input(
        "REQUIRE_SAFETY_MODEL",
        "Require a classifier",
        "Without one the worker does not start",
    ),
    Input(
        "SDXL_CONFIG",
        "SDXL configuration",
        "For a single-file checkpoint: the folder with its configurations",
    ),
    Input("SDXL_DISTILLED_STEPS", "Distilled steps of SDXL", "For Turbo, Lightning and the like"),
    Input("SDXL_MIN_STEPS", "Fewest steps", "Lower it for few-step checkpoints"),
    Input(
        "SDXL_TIMESTEP_SPACING",
        "Timestep spacing",
        "Turbo, Lightning and Hyper checkpoints want trailing",
        labels={"": "The checkpoint's"},
    ),
    Input("SDXL_MAX_BATCH", "Pictures at once", "Lower it on a small GPU; the pixels are the same"),
    Input("SDXL_TINY_VAE", "Tiny VAE", "madebyollin/taesdxl, for jobs with config.speed fast"),
    Input(
        "SDXL_IP_ADAPTER",
        "IP-Adapter",
        "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors, for style references",
    ),
    Input("SDXL_LORA_DIR", "LoRA folder", "For config.loras, such as /runpod-volume/loras"),
    Input("LORA_HOSTS", "LoRA hosts", "Hosts that a LoRA's URL may name, comma-separated"),
    Input("LORA_HOST_TOKENS", "LoRA hosts' tokens", f"HOST=TOKEN, comma-separated. {SECRET}"),
    Input("LORA_CACHE_GB", "LoRA cache", "GiB of downloads that are kept", most=1000),
    Input("CHAT_BASE_MODEL", "Chat base model", "A second model, for qwen_base"),
    Input("CHAT_QUANTIZATION", "Chat quantization", "Of the weights of chat's linear layers"),
    Input("CHAT_CONTEXT", "Context", "Most tokens of a conversation and its reply", most=32768),
    Input("WAN_I2V_MODEL", "Image-to-video model", "A 14B one of WAN 2.1"),
    Input("WAN_FLF2V_MODEL", "First-and-last-frame model", "A 14B one of WAN 2.1"),
    Input("WAN_ENHANCER_MODEL", "Prompt enhancer", "A chat model for enhanced jobs"),
    Input("WAN_FLOW_SHIFT", "Flow shift", "Of jobs that name none: 3 for 480p, 5 for 720p"),
    Input("WAN_DISTILLED_STEPS", "Distilled steps", "For a step-distilled checkpoint"),
    Input("WAN_DISTILLED_SOLVER", "Distilled solver", "The solver of these steps"),
    Input("WAN_DISTILLED_TIMESTEPS", "Distilled timesteps", "FastWan's are 1000,757,522"),
    Input(
        "JOB_TIMEOUT_S",
        "Job timeout",
        "Seconds after which a job ends; less than the endpoint's execution timeout",
        most=86400,
    ),
    Input("SHUTDOWN_GRACE_S", "Shutdown grace", "Seconds for running jobs at a stop", most=600),
    Input("LOW_VRAM", "Small GPU", "Only what a stage needs is on the GPU: slower"),
    Input("POISON_DIR", "Folder for job marks", "On a volume: refuses jobs that killed workers"),
    Input(
        "GPU_PRICE_PER_SECOND",
        "Price of a second",
        "Of the GPU: documents then have metadata.cost",
        least=0.00001,
        most=0.1,
    ),
    Input("OTEL_EXPORTER_OTLP_ENDPOINT", "OpenTelemetry", "Where traces and metrics are sent"),
    Input("LOG_LEVEL", "Log level", "No level logs prompts"),
    Input("C2PA_CERT", "C2PA certificate", "The chain in PEM, for images built with C2PA=1"),
    Input("C2PA_KEY", "C2PA key", f"Its private key. {SECRET}"),
    Input("REQUIRE_C2PA", "C2PA is required", "A job whose asset cannot be signed fails"),
)

#: A variable of RunPod's, and no setting.
INIT_TIMEOUT = {
    "key": "RUNPOD_INIT_TIMEOUT",
    "input": {
        "name": "Start timeout",
        "type": "number",
        "description": "Seconds after which RunPod gives up a worker that has not started",
        "min": 60,
        "max": 7200,
        "default": INIT_TIMEOUT_S,
        "advanced": True,
    },
}


def hub() -> dict[str, Any]:
    """The content of `.runpod/hub.json`."""
    icon = base64.b64encode(ICON.read_bytes()).decode()
    pools = [*PREFERRED, *(pool.name for pool in POOLS if pool.name not in PREFERRED)]
    return {
        "title": "ourvidz_serverless",
        "description": "SDXL pictures, Qwen chat and WAN 2.1 video behind one handler and one "
        "contract. Pictures come in the answer, or go to S3 or Supabase.",
        "type": "serverless",
        "category": "image",
        "iconUrl": f"data:image/png;base64,{icon}",
        "config": {
            "runsOn": "GPU",
            "containerDiskInGb": max(preset.disk_gb for preset in PRESETS.values()),
            "gpuCount": 1,
            "gpuIds": ",".join(pools),
            "allowedCudaVersions": list(CUDA_VERSIONS),
            "presets": [
                {"name": preset.title, "defaults": _typed(preset.env)}
                for preset in PRESETS.values()
            ],
            "env": [*map(_field, INPUTS), INIT_TIMEOUT],
        },
    }


def tests() -> dict[str, Any]:
    """The content of `.runpod/tests.json`: its jobs as they are, and the settings of the trial."""
    written = json.loads(TESTS.read_text())
    env = {**FIRST.env, "SDXL_MODEL": TRIAL_MODEL}
    return {
        "tests": written["tests"],
        "config": {
            "gpuTypeId": TEST_GPU,
            "gpuCount": 1,
            "allowedCudaVersions": list(CUDA_VERSIONS),
            "env": [{"key": name, "value": value} for name, value in env.items()],
        },
    }


def defaults() -> dict[str, str]:
    """The environment of a worker that is deployed from the Hub with the form as it is."""
    fields = [each["input"] | {"key": each["key"]} for each in hub()["config"]["env"]]
    given = {each["key"]: each["default"] for each in fields if each.get("default", "") != ""}
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in given.items()
    }


def _field(row: Input) -> dict[str, Any]:
    """A row as an entry of `config.env`."""
    entry = {"name": row.name, "description": row.description, **_type(row)}
    default = _default(row.key)
    if default not in (None, ""):
        entry["default"] = default
    if row.is_required:
        entry["required"] = True
    return {"key": row.key, "input": {**entry, "advanced": not row.is_basic}}


def _type(row: Input) -> dict[str, Any]:
    """The Hub's type for a setting, with its choices or bounds."""
    kind, bounds = _kind(row.key), _bounds(row.key)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    labels = {**row.labels, **{each: row.labels.get(each, each) for each in choices}}
    if labels:
        options = [{"label": label, "value": value} for value, label in labels.items()]
        return {"type": "string", "options": options}
    if kind is bool:
        return {"type": "boolean", "trueValue": "true", "falseValue": "false"}
    if kind in (int, float):
        return {
            "type": "number",
            "min": row.least or bounds["ge"],
            "max": row.most or bounds["le"],
        }
    return {"type": "string"}


def _kind(key: str) -> Any:
    """The type of a setting, without None."""
    annotation = Settings.model_fields[key.lower()].annotation
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = [each for each in get_args(annotation) if each is not type(None)]
    return annotation


def _bounds(key: str) -> dict[str, Any]:
    """The lowest and the highest value of a setting; 1, if it must be more than 0."""
    bounds = {}
    for rule in Settings.model_fields[key.lower()].metadata:
        for name in ("ge", "le"):
            if hasattr(rule, name):
                bounds[name] = getattr(rule, name)
        if hasattr(rule, "gt"):
            bounds["ge"] = 1
    return bounds


def _default(key: str) -> Any:
    """The form's default: of the first presets that name the setting, else the setting's own."""
    for preset in (FIRST, *PRESETS.values()):
        if key in preset.env:
            return _typed(preset.env)[key]
    value = Settings.model_fields[key.lower()].default
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return ",".join(value) if isinstance(value, tuple) else value


def _typed(env: Mapping[str, str]) -> dict[str, Any]:
    """An environment with booleans and numbers as the Hub writes them."""
    plain = {"true": True, "false": False}
    return {
        name: plain.get(value, int(value) if value.isdecimal() else value)
        for name, value in env.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    stale = []
    for path, content in ((HUB, hub()), (TESTS, tests())):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        if args.check and path.read_text() != text:
            stale.append(f"{path.name} is stale: run python -m builder.hub_listing")
        elif not args.check:
            path.write_text(text)
    print("\n".join(stale), end="\n" if stale else "", file=sys.stderr)
    return len(stale) > 0


if __name__ == "__main__":
    sys.exit(main())
