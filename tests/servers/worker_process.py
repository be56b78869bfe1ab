"""A worker's process, as the container runs it, against a `Platform`."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.patience import PATIENCE_S
from tests.servers import warm_python
from tests.servers.runpod import Platform
from tests.servers.warm_python import WarmProcess

TAIL = 4000


class WorkerDied(Exception):
    """The worker's process ended or did not get ready."""


class WorkerProcess:
    """`python handler.py` in a process group of its own, for use in a `with` statement.

    Entering waits for the first poll for jobs; leaving kills the process if it still runs. Without
    a platform it runs as on a developer's machine (`--test_input`, `--rp_serve_api`), and entering
    does not wait. It is a `WarmProcess`. With a `program` it starts cold: `sys.executable`, or
    another one.
    """

    def __init__(
        self,
        platform: Platform | None,
        script: str | Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        args: Sequence[str] = (),
        worker_id: str = "worker-1",
        endpoint: str = "local",
        program: str | None = None,
        ready_timeout: float = PATIENCE_S,
    ) -> None:
        self.platform = platform
        self.worker_id = worker_id
        self.ready_timeout = ready_timeout
        self._program = program
        self._command = [str(script), *args]
        self._cwd = cwd
        theirs = platform.env(worker_id, endpoint) if platform else {}
        self._env = _environment({**theirs, **(env or {})})
        self._lines: list[str] = []
        self._grew = threading.Condition()

    def __enter__(self) -> Self:
        polls = self.platform.polls[self.worker_id] if self.platform else 0
        self._process = self._start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._wait_for_poll(polls)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"log of {self.worker_id} (exit code {self.returncode}):\n{self.tail}")
        self.kill()
        if self.platform:
            self.platform.remove(self.worker_id)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, None while it runs; negative is the signal that killed it."""
        return self._process.poll()

    @property
    def log(self) -> str:
        """The text on stdout and stderr so far."""
        with self._grew:
            return "".join(self._lines)

    @property
    def tail(self) -> str:
        return self.log[-TAIL:]

    def terminate(self) -> None:
        """SIGTERM to the main process alone, as a container's PID 1 gets it."""
        self._process.terminate()

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Wait for the end and return the exit code."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {timeout} s:\n{self.tail}") from None
        self._reader.join(1)
        return code

    def wait_for_log(self, text: str, timeout: float = PATIENCE_S) -> str:
        """Wait until the log holds this text and return the log."""
        with self._grew:
            found = self._grew.wait_for(lambda: text in "".join(self._lines), timeout)
        if not found:
            raise TimeoutError(f"no {text!r} in the log within {timeout} s:\n{self.tail}")
        return self.log

    def kill(self) -> None:
        """Kill the process and its children at once."""
        # Kill the group: the SDK's ping process would outlive the worker.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1)

    def _start(self) -> WarmProcess | subprocess.Popen[str]:
        if self._program is None:
            return WarmProcess(self._command, env=self._env, cwd=self._cwd)
        return subprocess.Popen(
            [self._program, *self._command],
            cwd=self._cwd,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def _wait_for_poll(self, polls: int) -> None:
        platform, deadline = self.platform, time.monotonic() + self.ready_timeout
        if platform is None:
            return
        while self.returncode is None and time.monotonic() < deadline:
            with suppress(TimeoutError):
                platform.wait_until(lambda: platform.polls[self.worker_id] > polls, 0.1)
                return
        self._reader.join(1)
        fate = "did not poll for jobs" if self.returncode is None else f"exit {self.returncode}"
        raise WorkerDied(f"{' '.join(self._command)}: {fate}\n{self.tail}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with self._grew:
                    self._lines.append(line)
                    self._grew.notify_all()


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if "RUNPOD" not in name}
    return {**inherited, **warm_python.ENVIRONMENT, "PYTHONUNBUFFERED": "1", **extra}
