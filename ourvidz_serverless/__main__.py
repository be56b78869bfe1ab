"""The command line: `python -m ourvidz_serverless COMMAND`, with `--help` for each command."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

try:
    from pydantic import SecretStr
except ModuleNotFoundError:
    sys.exit("the worker's packages are needed: pip install 'ourvidz-serverless[worker]'")

from ourvidz_serverless import logs
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings, read, read_for_worker

if TYPE_CHECKING:
    from ourvidz_serverless.models.loading.readahead import ReadAhead


def serve(argv: Sequence[str]) -> int:
    """Load the models and serve jobs: RunPod's queue, or plain HTTP with SERVE=http."""
    parser = argparse.ArgumentParser(
        prog="python -m ourvidz_serverless serve",
        usage="%(prog)s [-h] [OPTIONS OF RUNPOD'S SDK]",
        description=serve.__doc__,
        epilog="Options of RunPod's SDK are --test_input JSON for one job from the command line, "
        "and --rp_serve_api for RunPod's API on localhost:8000.",
        allow_abbrev=False,
    )
    _, sdk_options = parser.parse_known_args(argv)
    # RunPod's SDK reads its own options from here.
    sys.argv[1:] = sdk_options
    # The kernel drops a signal to PID 1 that has no handler, and loading takes minutes. Both ways
    # of serving replace this handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = read_for_worker()
    from ourvidz_serverless.serving import terminal

    if config.serve == "queue" and terminal.is_for_a_person(sdk_options):
        # The result is enough, with what goes wrong. A LOG_LEVEL that is set still counts.
        is_asked = "log_level" in config.model_fields_set
        logs.configure(config.log_level if is_asked else "WARNING", audits=is_asked)
    else:
        logs.configure(config.log_level)
    reader = _reader(config)
    # Import only now what takes seconds to import: meanwhile the weights are read from the disk.
    if config.serve == "http":
        from ourvidz_serverless.serving.http import server

        server.serve(config, reader)
    else:
        from ourvidz_serverless.serving import runpod_sdk

        runpod_sdk.load()
        from ourvidz_serverless.serving import runpod_queue
        from ourvidz_serverless.worker import Worker

        runpod_queue.serve(Worker.of(config, reader()), config)
    return 0


def _reader(config: Settings) -> Callable[[], ReadAhead]:
    """Gives the weights' read-ahead: begun now if they are there, else when they are fetched."""
    from ourvidz_serverless.models.loading import fetch
    from ourvidz_serverless.models.loading.readahead import ReadAhead

    if not fetch.missing(config):
        reading = ReadAhead.of(config).start()
        return lambda: reading

    def fetch_and_read() -> ReadAhead:
        fetch.run(config)
        return ReadAhead.of(config).start()

    return fetch_and_read


def fetch(argv: Sequence[str]) -> int:
    """Bring the weights that the settings name, as a worker with FETCH_MODELS=true does."""
    parser = argparse.ArgumentParser(
        prog="python -m ourvidz_serverless fetch",
        description=fetch.__doc__,
        epilog="docs/deploying.md says where they are stored.",
    )
    # For a worker: what it starts ends with it.
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    config = read()
    logs.configure(config.log_level)
    from ourvidz_serverless.models.loading import fetch as fetching

    if args.with_parent:
        fetching.end_with_parent()
    changed: dict[str, object] = {"fetch_models": True}
    if not args.with_parent and config.device == "auto":
        # A volume may be filled on a machine without a GPU, for workers that have one.
        changed["device"] = "cuda"
    fetching.fetch(config.model_copy(update=changed))
    return 0


def bridge(argv: Sequence[str]) -> int:
    """Move jobs from the application's Redis lists to RunPod's endpoints."""
    from ourvidz_serverless.serving import redis_bridge

    return redis_bridge.main(argv)


def replay(argv: Sequence[str]) -> int:
    """Post again the documents that could not be delivered."""
    from ourvidz_serverless.delivery import replay

    return replay.main(argv)


def settings(argv: Sequence[str]) -> int:
    """Check this environment as a worker does, and print every setting; secrets are masked."""
    argparse.ArgumentParser(
        prog="python -m ourvidz_serverless settings",
        description=settings.__doc__,
        epilog="It exits with 1, and one line for each setting that does not hold, if a worker "
        "would not start with this environment. docs/settings.md says what each setting means.",
    ).parse_args(argv)
    try:
        config = read_for_worker()
    except ModelLoadError as exc:
        print(exc.message.replace("; ", "\n"), file=sys.stderr)
        return 1
    print("\n".join(_table(config)))
    return 0


def _table(config: Settings) -> Iterator[str]:
    """One line a setting: its name, its value, and its default if the environment changes it."""
    width = max(map(len, Settings.model_fields)) + 2
    for name, field in Settings.model_fields.items():
        value = _shown(getattr(config, name))
        default = _shown(field.get_default(call_default_factory=True))
        yield f"{name.upper():{width}}{value}" + (
            f"    (default {default})" if value != default else ""
        )


def _shown(value: object) -> str:
    """A value as the environment has it. Passwords and queries of URLs are masked like secrets."""
    if value is None or value == ():
        return "-"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr):
        return "***"
    text = str(value).replace("\n", " ")
    return re.sub(r"(?<=://)[^/]*(?=@)|(?<=\?).+", "***", text)


#: Each command reads the rest of the line, and imports only then what it needs.
COMMANDS = {
    "serve": serve,
    "fetch": fetch,
    "bridge": bridge,
    "replay": replay,
    "settings": settings,
}


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
