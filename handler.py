"""The entry point of every image: read the settings, load the models, serve jobs.

python handler.py                                  one job from test_input.json, or RunPod's queue
python handler.py --test_input '{"input": {...}}'  one job from the command line
python handler.py --rp_serve_api                   RunPod's API on localhost:8000
"""

import os
import socket
import sys

from ourvidz_serverless import endpoint, logs, models, settings
from ourvidz_serverless.callback import Callback
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.storage import open_storage
from ourvidz_serverless.worker import Worker


def main() -> None:
    config = settings.read()
    logs.configure(config.log_level)
    worker = Worker(
        config,
        models.load(config),
        assets=open_storage(config),
        callback=Callback.of(config),
        worker_id=os.environ.get("RUNPOD_POD_ID") or socket.gethostname(),
    )
    endpoint.serve(worker, config)


if __name__ == "__main__":
    try:
        main()
    except ModelLoadError as exc:
        sys.exit(f"cannot start: {exc.message}")
