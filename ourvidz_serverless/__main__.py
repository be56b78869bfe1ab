"""The command line: `python -m ourvidz_serverless COMMAND`, with `--help` for each command."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from ourvidz_serverless import logs, settings
from ourvidz_serverless.errors import ModelLoadError


def serve(argv: Sequence[str]) -> int:
    """Load the models and serve jobs: RunPod's queue, or plain HTTP with SERVE=http."""
    parser = argparse.ArgumentParser(
        prog="python -m ourvidz_serverless serve", description=serve.__doc__, allow_abbrev=False
    )
    _, sdk_options = parser.parse_known_args(argv)
    # RunPod's SDK reads its own options from here.
    sys.argv[1:] = sdk_options
    # The kernel drops a signal to PID 1 that has no handler, and loading takes minutes. Both ways
    # of serving replace this handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = settings.read_for_worker()
    logs.configure(config.log_level)
    from ourvidz_serverless.models.loading.readahead import ReadAhead

    reading = ReadAhead.of(config).start()
    # Import only now what takes seconds to import: meanwhile the weights are read from the disk.
    if config.serve == "http":
        from ourvidz_serverless.serving.http import server

        server.serve(config, reading)
    else:
        from ourvidz_serverless.serving import runpod_sdk

        runpod_sdk.load()
        from ourvidz_serverless.serving import runpod_queue
        from ourvidz_serverless.worker import Worker

        runpod_queue.serve(Worker.of(config, reading), config)
    return 0


def replay(argv: Sequence[str]) -> int:
    """Post again the documents that could not be delivered."""
    from ourvidz_serverless.delivery import replay

    return replay.main(argv)


#: Each command reads the rest of the line, and imports only then what it needs.
COMMANDS = {"serve": serve, "replay": replay}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; the process's exit code.

    A setting that does not hold ends the process with one line and code 1.
    """
    parser = argparse.ArgumentParser(prog="python -m ourvidz_serverless")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, add_help=False)
        command.set_defaults(run=run)
    known, rest = parser.parse_known_args(argv)
    try:
        code: int = known.run(rest)
    except ModelLoadError as exc:
        sys.exit(f"cannot start: {exc.message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
