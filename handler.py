"""The entry point of every image: read the settings, load the models, serve jobs.

python handler.py                                  one job from test_input.json, or RunPod's queue
python handler.py --test_input '{"input": {...}}'  one job from the command line
python handler.py --rp_serve_api                   RunPod's API on localhost:8000
SERVE=http python handler.py                       plain HTTP, for a load-balancing endpoint
"""

import signal
import sys

from ourvidz_serverless import logs, settings
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.loading.readahead import ReadAhead


def main() -> None:
    # The kernel keeps from PID 1 a signal that it has no handler for, and loading takes minutes.
    # `endpoint.serve` sets a handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = settings.read_for_worker()
    logs.configure(config.log_level)
    reading = ReadAhead.of(config).start()
    # Only now what takes seconds to import: meanwhile the weights are read.
    if config.serve == "http":
        from ourvidz_serverless.serving.http import app as http

        http.serve(config, reading)
    else:
        from ourvidz_serverless.serving import runpod_sdk

        runpod_sdk.load()
        from ourvidz_serverless.serving import runpod_queue
        from ourvidz_serverless.worker import Worker

        runpod_queue.serve(Worker.of(config, reading), config)


if __name__ == "__main__":
    try:
        main()
    except ModelLoadError as exc:
        sys.exit(f"cannot start: {exc.message}")
