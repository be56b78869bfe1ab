"""The families: one record for each, with everything that the rest of the package knows of it.

Nothing here imports torch: every worker knows every family, so that a job on the wrong endpoint is
refused as WORKER_UNAVAILABLE. To add a family, write two modules and one row in `ROWS`:

- `jobs/NAME.py` with `parse(payload, settings) -> Job`, `prepare(job, model, context)` and
  `run(job, model, references, context) -> outputs`. It imports no torch.
- `models/NAME.py` with `check(settings, ledger)` and `load(settings, ledger) -> model`; the model
  has a `device` and `warm_up()`. `check` raises ModelLoadError for settings that the device does
  not support, before any family reads its weights. `load` registers the weights with the ledger,
  which moves them from then on.

A jobs module may have `choose_model(job, models)`, for jobs that another family's model serves, and
a models module `connect(models, settings)`, called once all families are loaded.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Weights:
    """A setting that names weights.

    `what` is the name of the weights in an error. `folders` are the parts of a checkpoint that
    hold weights; without any, the setting names a file. `FETCH_MODELS` brings of a repository the
    configurations and the weights in `folders` and, beside a file, in `beside`, and the files that
    `others` matches.
    """

    setting: str
    what: str
    folders: tuple[str, ...] = ()
    #: Patterns of further files that the loader reads. One without a wildcard has to be there.
    others: tuple[str, ...] = ()
    #: Folders beside a file.
    beside: tuple[str, ...] = ()
    #: Whether the loader reads the variant `fp16`, which is half as large.
    has_variants: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What one family of models serves, loads and needs."""

    name: str
    job_types: tuple[str, ...]
    #: The names of its modules. The second one imports torch.
    jobs_module: str
    models_module: str
    #: The type of a job that names none, on a worker of this family alone; see `type_of_unnamed`.
    default_type: str | None = None
    #: The first one is the family's main model.
    weights: tuple[Weights, ...] = ()
    #: The main model's name in the ledger, and the specification's words for how long its weights
    #: stay loaded.
    main_model: str = ""
    memory_policy: str = "load on demand"
    #: Whether its jobs make pictures or videos, at which the classifiers of `SAFETY_MODEL` look.
    makes_pictures: bool = True
    #: Whether a job needs the device alone while it computes. Chat computes its jobs in one batch.
    is_exclusive: bool = True
    #: Jobs that a worker runs at once.
    concurrency: int = 1
    #: Jobs that may wait for the device, in a worker that also serves a family that shares it.
    backlog: int = 1
    #: What `status` reports: the numbers of pictures in a job, and the qualities of its types.
    batch_sizes: tuple[int, ...] = (1,)
    quality_tiers: tuple[str, ...] = ()
    #: The application's function that receives the address of the family's worker.
    registers_at: str = "update-worker-url"

    @property
    def type_of_unnamed(self) -> str:
        """The type of a job that names none: `default_type`, or the first of the job types."""
        return self.default_type or self.job_types[0]

    @property
    def main_setting(self) -> str | None:
        """The variable that names the main weights; None for a family without weights."""
        return self.weights[0].setting if self.weights else None

    @property
    def endpoint_setting(self) -> str:
        """The variable that names the family's endpoints, for the bridge."""
        return f"{self.name.upper()}_ENDPOINT_ID"


WAN_TYPES = (
    "image_fast",
    "image_high",
    "video_fast",
    "video_high",
    "image7b_fast_enhanced",
    "image7b_high_enhanced",
    "video7b_fast_enhanced",
    "video7b_high_enhanced",
)

#: A tokenizer's files that are not JSON: merges, SentencePiece's model, a template of messages.
TOKENIZER = ("*.txt", "*.model", "*.jinja")

ROWS = (
    # One job computes while another prepares or delivers.
    Family(
        name="sdxl",
        job_types=("sdxl_image_fast", "sdxl_image_high"),
        jobs_module="ourvidz_serverless.jobs.sdxl",
        models_module="ourvidz_serverless.models.sdxl.loader",
        weights=(
            Weights(
                "SDXL_MODEL",
                "SDXL",
                ("text_encoder", "text_encoder_2", "unet", "vae"),
                others=("model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*"),
                has_variants=True,
            ),
            Weights("SDXL_TINY_VAE", "a tiny VAE", (".",)),
            Weights("SDXL_IP_ADAPTER", "an IP-Adapter", beside=("image_encoder",)),
        ),
        main_model="sdxl",
        memory_policy="always loaded",
        concurrency=2,
        backlog=16,
        batch_sizes=(1, 2, 3, 4, 5, 6),
        quality_tiers=("fast", "high"),
    ),
    Family(
        name="chat",
        job_types=("chat_enhance", "chat_conversation", "chat_unrestricted"),
        jobs_module="ourvidz_serverless.jobs.chat",
        models_module="ourvidz_serverless.models.chat.engines",
        # Who sends a prompt to a chat model expects a reply, as from any chat model, and not the
        # prompt in other words.
        default_type="chat_conversation",
        weights=(
            Weights("CHAT_INSTRUCT_MODEL", "chat", (".",), others=TOKENIZER),
            Weights("CHAT_BASE_MODEL", "chat", (".",), others=TOKENIZER),
        ),
        main_model="qwen_instruct",
        memory_policy="load when possible",
        makes_pictures=False,
        is_exclusive=False,
        concurrency=64,
        registers_at="register-chat-worker",
    ),
    # A job takes minutes, so an early start of a second one gains nothing.
    Family(
        name="wan",
        job_types=WAN_TYPES,
        jobs_module="ourvidz_serverless.jobs.wan",
        models_module="ourvidz_serverless.models.wan.loader",
        # WAN is a video model; a frame alone is the exception.
        default_type="video_fast",
        weights=(
            Weights(
                "WAN_MODEL",
                "WAN 2.1",
                ("text_encoder", "vae", "transformer"),
                others=("model_index.json", "scheduler/*", "tokenizer/*"),
            ),
            Weights("WAN_VACE_MODEL", "VACE", ("transformer",)),
            Weights(
                "WAN_I2V_MODEL",
                "WAN 2.1 image-to-video",
                ("transformer", "image_encoder"),
                others=("image_processor/*",),
            ),
            Weights(
                "WAN_FLF2V_MODEL",
                "WAN 2.1 image-to-video",
                ("transformer", "image_encoder"),
                others=("image_processor/*",),
            ),
            Weights("WAN_ENHANCER_MODEL", "chat", (".",), others=TOKENIZER),
        ),
        main_model="wan_t2v",
        quality_tiers=("fast", "high"),
    ),
)

#: The families by name.
FAMILIES: dict[str, Family] = {family.name: family for family in ROWS}

#: The families by job type.
FAMILY_OF: dict[str, Family] = {name: each for each in ROWS for name in each.job_types}

#: The classifiers that look at pictures. They are of no family.
SAFETY_WEIGHTS = Weights("SAFETY_MODEL", "an image classifier", (".",))


def load_module(name: str) -> ModuleType:
    """A family's module, imported at its first use."""
    return importlib.import_module(name)
