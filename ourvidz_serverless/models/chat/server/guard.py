"""Runs a command until it ends, or until the process that started this one is gone.

    python guard.py PARENT PROGRAM ARGUMENT...

It is a process of its own, since nobody else can end the command's processes after the parent was
killed. The command gets a process group, with all that it starts. This file needs no package, so
that it starts quickly. Its exit code is the command's, or 127 if there is no such program.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

#: How often it looks for the parent and for the command, in seconds.
POLL_S = 0.1

#: How long the command may take to end after SIGTERM, in seconds.
GRACE_S = 10.0


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as exc:
        print(f"{command[0]}: {exc.strerror}", flush=True)
        return 127
    while child.poll() is None and os.getppid() == parent and not stops:
        time.sleep(POLL_S)
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(GRACE_S)
    # What the command left behind ends too.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
