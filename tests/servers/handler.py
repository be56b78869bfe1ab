"""`handler.py` in a process of its own: against a platform, or without one."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers import warm_python
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

HANDLER = ROOT / "handler.py"

#: On RunPod the pocket models must be named.
POCKET = {"SDXL_MODEL": "pocket", "CHAT_INSTRUCT_MODEL": "pocket", "WAN_MODEL": "pocket"}

#: The SDK's own API, at a port that the system picks.
LOCAL_API = ("--rp_serve_api", "--rp_api_port", "0")


def start(platform: Platform | None, *args: str, cwd: Path = ROOT, **env: str) -> WorkerProcess:
    return WorkerProcess(platform, str(HANDLER), env={**POCKET, **env}, cwd=cwd, args=list(args))


def served_at(process: WorkerProcess) -> str:
    """The URL of a handler that was started with `LOCAL_API`, when it listens."""
    log = process.wait_for_log("(Press CTRL+C to quit)")
    return log.split("Uvicorn running on ", 1)[1].split()[0]


def run_handler(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RUNPOD")}
    return warm_python.run(
        [str(HANDLER), *args],
        env={**clean, **warm_python.ENVIRONMENT, **env},
        cwd=cwd,
        timeout=PATIENCE_S,
    )


def failure(status: dict[str, Any]) -> dict[str, Any]:
    return json.loads(status["error"])
