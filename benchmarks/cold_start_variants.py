"""The variants of a cold start. `benchmarks.cold_start` starts each in its own process:

    python -m benchmarks.cold_start_variants VARIANT FILE

It prints the seconds of each stage as JSON. The module itself imports nothing that takes time.
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
    "prompt": "a red sun",
    "config": {"resolution": "64x64", "num_inference_steps": 1, "guidance_scale": 6.0, "seed": 1},
}

#: Bytes of one read, the same as the worker's.
CHUNK = 8 << 20


class Stages:
    """Seconds of each stage. The first one begins when the parent process starts this one."""

    def __init__(self) -> None:
        self._last = float(os.environ["BENCHMARK_BEGAN"])
        self.seconds: dict[str, float] = {}
        self.end("interpreter")

    def end(self, stage: str) -> None:
        now = time.time()
        self.seconds[stage] = now - self._last
        self._last = now

    def write(self) -> None:
        self.seconds["cpu"] = time.process_time()
        print(json.dumps(self.seconds), flush=True)


def main() -> None:
    stages = Stages()
    # diffusers imports torchao if it is installed. That takes seconds, and nothing here uses it.
    sys.modules["torchao"] = None  # type: ignore[assignment]
    variant, file = sys.argv[1:]
    VARIANTS[variant](file, stages)
    stages.write()


def read(file: str, stages: Stages) -> None:
    """One plain read of the file."""
    buffer = bytearray(CHUNK)
    with open(file, "rb", buffering=0) as weights:
        while weights.readinto(buffer):
            pass
    stages.end("read")


def libraries(file: str, stages: Stages) -> None:
    """The imports that every variant with a model needs, and nothing else."""
    _pipeline()
    stages.end("imports")


def libraries_and_sdk(file: str, stages: Stages) -> None:
    """The same and RunPod's SDK, as a handler imports both."""
    _pipeline_and_sdk()
    stages.end("imports")


def single_file(file: str, stages: Stages) -> None:
    """A baseline: diffusers' `from_single_file`."""
    pipeline = _pipeline_and_sdk()
    stages.end("imports")
    config = file.removesuffix(".safetensors")
    _run_pipeline(pipeline.from_single_file(file, config=config, **_options()), stages)


def pretrained(file: str, stages: Stages) -> None:
    """A baseline: diffusers' `from_pretrained` on the folder beside the file."""
    pipeline = _pipeline_and_sdk()
    stages.end("imports")
    folder = file.removesuffix(".safetensors")
    _run_pipeline(pipeline.from_pretrained(folder, **_options()), stages)


def worker_with_file(file: str, stages: Stages) -> None:
    """The worker with the single file, by the steps of handler.py."""
    _run_worker(file, stages)


def worker_with_folder(file: str, stages: Stages) -> None:
    """The worker with the folder beside the file."""
    _run_worker(file.removesuffix(".safetensors"), stages)


def _pipeline_and_sdk() -> Any:
    """Import RunPod's SDK as a handler does; the pipeline's class."""
    import runpod.serverless  # noqa: F401

    return _pipeline()


def _pipeline() -> Any:
    """The pipeline's class, and the imports that loading it needs."""
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


def _run_pipeline(pipe: Any, stages: Stages) -> None:
    import torch

    if torch.cuda.is_available():
        pipe.to("cuda")
    stages.end("build")
    pipe.set_progress_bar_config(disable=True)
    config = PAYLOAD["config"]
    assert isinstance(config, dict)
    steps, scale = config["num_inference_steps"], config["guidance_scale"]
    pipe("a red sun", width=64, height=64, num_inference_steps=steps, guidance_scale=scale)
    stages.end("first job")


def _run_worker(model: str, stages: Stages) -> None:
    from ourvidz_serverless import settings
    from ourvidz_serverless.models.loading import readahead

    class TimedReadAhead(readahead.ReadAhead):
        """A read-ahead that measures how long the worker waits for it."""

        waited_s = 0.0

        def wait(self) -> None:
            began = time.time()
            super().wait()
            self.waited_s += time.time() - began

    with tempfile.TemporaryDirectory() as assets:
        config = settings.Settings(
            sdxl_model=model, dtype="float16", sdxl_min_steps=1, storage_url=f"file:{assets}"
        )
        reading = TimedReadAhead(readahead.files(config))
        reading.start()
        from ourvidz_serverless.serving import runpod_sdk

        runpod_sdk.load()
        from ourvidz_serverless import models  # noqa: F401
        from ourvidz_serverless.context import Stop
        from ourvidz_serverless.jobs.envelope import Envelope
        from ourvidz_serverless.models.sdxl import loader as sdxl  # noqa: F401
        from ourvidz_serverless.serving import runpod_queue  # noqa: F401
        from ourvidz_serverless.worker import Worker

        stages.end("imports")
        worker = Worker.of(config, reading)
        stages.end("build")
        # The wait for the rest of the file is a part of building.
        stages.seconds["wait"] = reading.waited_s
        stages.seconds["build"] -= reading.waited_s
        document = worker.run(Envelope.of({"input": PAYLOAD}), Stop(), lambda progress: None)
        assert document.status == "completed", document.failure
        stages.end("first job")


VARIANTS = {
    "read": read,
    "libraries": libraries,
    "libraries and SDK": libraries_and_sdk,
    "from_single_file": single_file,
    "from_pretrained": pretrained,
    "worker, file": worker_with_file,
    "worker, folder": worker_with_folder,
}

if __name__ == "__main__":
    main()
