"""One start of one arm, in a process of its own: `python -m benchmarks.cold_arms ARM FILE`.

Writes its stages as JSON. At the top there is nothing that takes time to import.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

PAYLOAD = {
    "id": "first",
    "type": "sdxl_image_fast",
    "user_id": "benchmark",
    "prompt": "a red circle",
    "config": {"resolution": "64x64", "num_inference_steps": 1, "guidance_scale": 6.0, "seed": 1},
}

#: Bytes of a plain read at once, as much as the worker's.
CHUNK = 8 << 20


class Stages:
    """Seconds of each stage, from the moment at which the process was asked for."""

    def __init__(self) -> None:
        self._last = float(os.environ["BENCHMARK_BEGAN"])
        self.told: dict[str, float] = {}
        self.end("interpreter")

    def end(self, stage: str) -> None:
        now = time.time()
        self.told[stage] = now - self._last
        self._last = now

    def write(self) -> None:
        self.told["cpu"] = time.process_time()
        print(json.dumps(self.told), flush=True)


def main() -> None:
    stages = Stages()
    # Where it is installed it costs every arm the same seconds, for nothing that is used here.
    sys.modules["torchao"] = None  # type: ignore[assignment]
    arm, file = sys.argv[1:]
    ARMS[arm](file, stages)
    stages.write()


def read(file: str, stages: Stages) -> None:
    """The bytes, front to back."""
    room = bytearray(CHUNK)
    with open(file, "rb", buffering=0) as weights:
        while weights.readinto(room):
            pass
    stages.end("read")


def libraries(file: str, stages: Stages) -> None:
    """The libraries that every arm which paints imports, and nothing else."""
    _pipeline()
    stages.end("imports")


def libraries_and_sdk(file: str, stages: Stages) -> None:
    """The same and RunPod's SDK, as a handler imports both."""
    _peer()
    stages.end("imports")


def single_file(file: str, stages: Stages) -> None:
    """diffusers on the one file."""
    pipeline = _peer()
    stages.end("imports")
    config = file.removesuffix(".safetensors")
    _paint(pipeline.from_single_file(file, config=config, **_options()), stages)


def pretrained(file: str, stages: Stages) -> None:
    """diffusers on the folder."""
    pipeline = _peer()
    stages.end("imports")
    _paint(pipeline.from_pretrained(file.removesuffix(".safetensors"), **_options()), stages)


def worker_on_the_file(file: str, stages: Stages) -> None:
    """The worker on the one file, by handler.py's own steps."""
    _work(file, stages)


def worker_on_the_folder(file: str, stages: Stages) -> None:
    """The same on the folder."""
    _work(file.removesuffix(".safetensors"), stages)


def _peer() -> Any:
    """What a RunPod handler around diffusers' pipeline imports; the pipeline's class."""
    import runpod.serverless  # noqa: F401

    return _pipeline()


def _pipeline() -> Any:
    import torch  # noqa: F401
    from diffusers import (  # noqa: F401
        AutoencoderKL,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: F401

    return StableDiffusionXLPipeline


def _options() -> dict[str, Any]:
    import torch

    return {"torch_dtype": torch.float16, "local_files_only": True, "add_watermarker": False}


def _paint(pipe: Any, stages: Stages) -> None:
    import torch

    if torch.cuda.is_available():
        pipe.to("cuda")
    stages.end("build")
    pipe.set_progress_bar_config(disable=True)
    config = PAYLOAD["config"]
    assert isinstance(config, dict)
    steps, scale = config["num_inference_steps"], config["guidance_scale"]
    pipe("a red circle", width=64, height=64, num_inference_steps=steps, guidance_scale=scale)
    stages.end("first job")


def _work(model: str, stages: Stages) -> None:
    from ourvidz_serverless import settings
    from ourvidz_serverless.models.loading.readahead import ReadAhead

    class Timed(ReadAhead):
        """One that knows for how long it was waited for."""

        waited_s = 0.0

        def wait(self) -> None:
            began = time.time()
            super().wait()
            self.waited_s += time.time() - began

    with tempfile.TemporaryDirectory() as assets:
        config = settings.Settings(
            sdxl_model=model, dtype="float16", sdxl_min_steps=1, storage_url=f"file:{assets}"
        )
        reading = Timed(ReadAhead.of(config)._paths)
        reading.start()
        from ourvidz_serverless.serving import runpod_sdk

        runpod_sdk.load()
        from ourvidz_serverless import models  # noqa: F401
        from ourvidz_serverless.context import Stop
        from ourvidz_serverless.models.sdxl import loader as sdxl  # noqa: F401
        from ourvidz_serverless.serving import runpod_queue  # noqa: F401
        from ourvidz_serverless.worker import Worker

        stages.end("imports")
        worker = Worker.of(config, reading)
        stages.end("build")
        # While it is built the file is still being read, and then it is waited for.
        stages.told["wait"] = reading.waited_s
        stages.told["build"] -= reading.waited_s
        document = worker.run({"input": PAYLOAD}, Stop(), lambda progress: None)
        assert document.status == "completed", document.failure
        stages.end("first job")


ARMS = {
    "read": read,
    "libraries": libraries,
    "libraries and SDK": libraries_and_sdk,
    "from_single_file": single_file,
    "from_pretrained": pretrained,
    "worker, file": worker_on_the_file,
    "worker, folder": worker_on_the_folder,
}

if __name__ == "__main__":
    main()
