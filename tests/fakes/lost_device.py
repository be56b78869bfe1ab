"""`handler.py` on a device that fails as CUDA does: at jobs of 128x64 pixels and at every chat.

With `FAIL_FROM_START` the device fails at every matrix product, before the first job. The error is
the class that torch raises, at the place where torch raises it: in a network's forward.
"""

import os
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ourvidz_serverless import logs, settings
from ourvidz_serverless.serving import runpod_queue
from ourvidz_serverless.worker import Worker
from tests.fakes import slow_handler

#: torch's own message.
CUDA_MESSAGE = """\
CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com/cuda/ for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below
might be incorrect.
"""

#: The width of the latents of a job of 128x64 pixels.
LATENT_WIDTH = 16


def fail(*args: Any, **kwargs: Any) -> None:
    raise torch.AcceleratorError(CUDA_MESSAGE)


def fail_in_forward(module: Any, inputs: tuple[Any, ...]) -> None:
    match type(module).__name__:
        case "UNet2DConditionModel" if inputs[0].shape[-1] == LATENT_WIDTH:
            fail()
        case "Qwen2Model":
            fail()


def main() -> None:
    slow_handler.install()
    config = settings.read()
    logs.configure(config.log_level)
    worker = Worker.of(config)
    register_module_forward_pre_hook(fail_in_forward)
    if "FAIL_FROM_START" in os.environ:
        torch.matmul = fail
    runpod_queue.serve(worker, config)


if __name__ == "__main__":
    main()
