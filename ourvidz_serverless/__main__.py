"""The command line: `python -m ourvidz_serverless COMMAND`, with `--help` for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def replay(argv: Sequence[str]) -> int:
    """Post again the documents that could not be delivered."""
    from ourvidz_serverless.delivery import replay

    return replay.main(argv)


#: Each command reads the rest of the line, and imports only then what it needs.
COMMANDS = {"replay": replay}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m ourvidz_serverless")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, add_help=False)
        command.set_defaults(run=run)
    known, rest = parser.parse_known_args(argv)
    code: int = known.run(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
