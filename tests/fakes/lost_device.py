"""`handler.py` on a device that fails as CUDA does, at jobs of 128x64 pixels and at any chat.

With `DEAD_FROM_THE_START` it fails at whatever is multiplied, before the first job. What it raises
is the class that torch raises, where torch raises it: in a network's forward.
"""

import os
from typing import Any

import torch

from ourvidz_serverless import logs, settings
from ourvidz_serverless.serving import runpod_queue
from ourvidz_serverless.worker import Worker
from tests.fakes import slow_handler

#: In torch's words.
WORDS = """\
CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below
might be incorrect.
"""

#: Of latents, where a job has 128x64 pixels.
COLUMNS = 16


def fail_at_a_size(module: Any, given: tuple[Any, ...]) -> None:
    if given[0].shape[-1] == COLUMNS:
        fail()


def fail(*given: Any, **named: Any) -> None:
    raise torch.AcceleratorError(WORDS)


def main() -> None:
    slow_handler.install()
    config = settings.read()
    logs.configure(config.log_level)
    worker = Worker.of(config)
    if "sdxl" in config.families:
        worker._models["sdxl"].networks.unet.register_forward_pre_hook(fail_at_a_size)
    if "chat" in config.families:
        for model in worker._models["chat"].models.values():
            model.engine.decoder.register_forward_pre_hook(fail, with_kwargs=True)
    if "DEAD_FROM_THE_START" in os.environ:
        torch.matmul = fail
    runpod_queue.serve(worker, config)


if __name__ == "__main__":
    main()
