"""`handler.py` with a slowdown, so that a job is still running when a test acts on it.

It runs as `python -m tests.fakes.slow_handler`. While the file that `SLOWDOWN` names exists, each
forward of a network takes a quarter of a second longer, on a fast machine too. A job of many steps
then outlasts what a test does to it, and still notices a stop at its next step.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.files import ROOT
from tests.servers.handler import POCKET
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

PAUSE_S = 0.25
NETWORKS = ("UNet2DConditionModel", "WanTransformer3DModel", "Qwen2Model")


class Slowdown:
    """Slows one worker process down while its `on()` is entered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def on(self) -> Iterator[None]:
        self.path.touch()
        try:
            yield
        finally:
            self.path.unlink()


def start(platform: Platform, slowdown: Slowdown, **env: str) -> WorkerProcess:
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SLOWDOWN": str(slowdown.path)}
    env = {**own, **POCKET, **env}
    return WorkerProcess(platform, "-m", args=[__name__], env=env, cwd=ROOT)


def install() -> None:
    """Make the networks of this process slow while the file of the slowdown exists."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    slowdown = os.environ["SLOWDOWN"]

    def pause(module: Any, inputs: Any) -> None:
        if type(module).__name__ in NETWORKS and os.path.exists(slowdown):
            time.sleep(PAUSE_S)

    register_module_forward_pre_hook(pause)


def main() -> None:
    from ourvidz_serverless.__main__ import main as run_command

    install()
    sys.exit(run_command(["serve", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
