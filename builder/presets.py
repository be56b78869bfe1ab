"""What can be deployed: presets with their models and GPU pools. One place for two readers.

`builder.deploy` makes endpoints of these presets, and `builder.hub_listing` writes them into
`.runpod/hub.json`. The models' names and revisions are those of `builder/models.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MANIFEST = json.loads(Path(__file__).with_name("models.json").read_text())

#: Gigabytes of container disk for the unpacked packages of an image, without weights.
IMAGE_DISK_GB = 30

#: The CUDA versions whose drivers run an image for CUDA 13.0: that one and newer ones. RunPod
#: compares them exactly, so a list names each (docs.runpod.io, "CUDA version selection"). Its own
#: listings go up to 13.3 (github.com/runpod-workers/worker-comfyui/pull/231).
CUDA_VERSIONS = ("13.0", "13.1", "13.2", "13.3")

#: Seconds that a worker may take to start before RunPod counts it as unhealthy. RunPod's own limit
#: is 420; the first start on a host or a volume also downloads weights
#: (docs.runpod.io/serverless/development/optimization).
INIT_TIMEOUT_S = 1800


#: The checkpoint of the Hub's own tests: SDXL with a UNet of 0.74 billion parameters, 3.3 GB in
#: fp16, Apache-2.0 (huggingface.co/segmind/Segmind-Vega, arxiv.org/abs/2401.02677).
TRIAL_MODEL = "segmind/Segmind-Vega@7714c4363e5856ff974a4f4b068e8691f26d0b40"


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs that RunPod offers to serverless workers under one name, and the memory of each."""

    name: str
    gpus: str
    memory_gb: int


#: RunPod's pools with 24 GB and more, by list price as far as there is one. From
#: docs.runpod.io/references/gpu-types and docs.runpod.io/flash/configuration/gpu-types.
POOLS = (
    Pool("AMPERE_24", "L4, A5000, 3090", 24),
    Pool("ADA_24", "4090", 24),
    Pool("ADA_32_PRO", "5090", 32),
    Pool("AMPERE_48", "A6000, A40", 48),
    Pool("ADA_48_PRO", "L40, L40S, 6000 Ada", 48),
    Pool("AMPERE_80", "A100", 80),
    Pool("BLACKWELL_96", "RTX PRO 6000", 96),
    Pool("ADA_80_PRO", "H100", 80),
    Pool("HOPPER_141", "H200", 141),
    Pool("BLACKWELL_180", "B200", 180),
)


@dataclass(frozen=True, slots=True)
class Preset:
    """A deployment that starts as it is. `name` is for the command, `title` for the Hub."""

    name: str
    title: str
    families: tuple[str, ...]
    #: The settings that name its models.
    models: dict[str, str]
    #: Gigabytes of weights that its first start downloads (docs/deploying.md, "Layers of an
    #: image"), 0 if they are in the image.
    weights_gb: float
    #: Gigabytes of them that stay on the GPU (docs/deploying.md, "GPUs").
    gpu_gb: float
    #: The pools to try, the first one first.
    pools: tuple[str, ...]

    @property
    def env(self) -> dict[str, str]:
        """The environment of its workers."""
        fetches = {"FETCH_MODELS": "true", "RUNPOD_INIT_TIMEOUT": str(INIT_TIMEOUT_S)}
        return {
            "FAMILIES": ",".join(self.families),
            **self.models,
            "STORAGE_URL": "inline:",
            **(fetches if self.weights_gb else {}),
        }

    @property
    def disk_gb(self) -> int:
        """Gigabytes of container disk: the image and the weights, in tens."""
        return IMAGE_DISK_GB + math.ceil(self.weights_gb / 10) * 10


def pinned(repository: str) -> str:
    """A repository of the hub at the revision of `builder/models.json`."""
    return f"{repository}@{MANIFEST[repository]['revision']}"


SDXL = {"SDXL_MODEL": pinned("stabilityai/stable-diffusion-xl-base-1.0")}
CHAT = {"CHAT_INSTRUCT_MODEL": pinned("Qwen/Qwen2.5-7B-Instruct")}
WAN = {
    "WAN_MODEL": pinned("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "WAN_VACE_MODEL": pinned("Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("sdxl", "SDXL images", ("sdxl",), SDXL, 6.9, 7.1, ("ADA_24", "AMPERE_24")),
        Preset("chat", "Qwen chat", ("chat",), CHAT, 15.2, 15.2, ("ADA_24", "AMPERE_24")),
        Preset(
            "wan", "WAN video with VACE", ("wan",), WAN, 36.0, 19.0, ("ADA_48_PRO", "AMPERE_48")
        ),
        Preset(
            "everything",
            "Everything on one GPU",
            ("sdxl", "chat", "wan"),
            {**SDXL, **CHAT, **WAN},
            58.1,
            41.3,
            ("ADA_80_PRO", "AMPERE_80"),
        ),
        Preset(
            "trial",
            "Trial: the small model of the repository",
            ("sdxl",),
            {"SDXL_MODEL": "pocket"},
            0.0,
            0.1,
            ("ADA_24", "AMPERE_24"),
        ),
    )
}


def of_families(families: Iterable[str]) -> Preset | None:
    """The preset that serves exactly these families with published models."""
    wanted = set(families)
    return next((each for each in PRESETS.values() if set(each.families) == wanted), None)
