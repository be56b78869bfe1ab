"""Python processes that need not import torch and the SDK's libraries, since their parent has.

`python handler.py` spends 3.5 seconds of a processor on imports. A process of this module is forked
from a server that has made them (`multiprocessing`'s fork server, with `preloaded` in it). It has
its own pid, session, environment, working directory, pipes and exit code, and it ends like
`python SCRIPT` does. Tests about the start itself take `sys.executable`.

All processes of a test run use one server (`share`).
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import TextIO

import pytest

from tests.files import ROOT
from tests.patience import PATIENCE_S, start

#: Variables that libraries read when they are imported: each warm process has these.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.servers.preloaded"])
_STARTING = threading.Lock()

#: The variable that tells a process of the tests where the run's fork server listens.
ADDRESS = "WARM_PYTHON"


def share() -> None:
    """Start the fork server, which the processes that this one starts will use as well.

    `multiprocessing` has no public way to do so: its servers are private to a process.
    """
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    with _server_environment():
        server.ensure_running()
    os.environ[ADDRESS] = server._forkserver_address


def _use(address: str) -> None:
    """Use the fork server of the process that started this one."""
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address = address
    # In the place of the pipe whose other end tells the server that its starter has ended.
    server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    server.ensure_running = resource_tracker.ensure_running


if ADDRESS in os.environ:
    _use(os.environ[ADDRESS])


def call(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that has begun to call the function. The function must be a module's own."""
    process = _CONTEXT.Process(target=function, args=arguments)
    with _STARTING:
        _start(process)
    return process


@dataclass(frozen=True)
class Start:
    """How a warm process begins. Its three pipes are stdin, stdout and stderr."""

    command: list[str]
    env: dict[str, str]
    cwd: str
    pipes: tuple[Connection | None, Connection, Connection]
    session: bool = True


class WarmProcess:
    """A process with the methods of `subprocess.Popen` that tests use.

    `command` is what follows `python`: a script and its arguments, or `-m`, a module and its
    arguments. `stderr` goes where `stdout` goes, unless `has_stderr` gives it a pipe of its own.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None = None,
        has_stderr: bool = False,
    ) -> None:
        self.args = list(command)
        other = [name for name, value in ENVIRONMENT.items() if env.get(name, value) != value]
        assert not other, f"{other} are read at import: start this process by sys.executable"
        self.stdout, stdout = _pipe()
        self.stderr, stderr = _pipe() if has_stderr else (None, stdout)
        place = str(cwd or os.getcwd())
        begin = Start(self.args, {**env, **ENVIRONMENT}, place, (None, stdout, stderr))
        self._process = _CONTEXT.Process(target=_run, args=(begin,))
        self._lock = threading.Lock()
        with _STARTING:
            _start(self._process)
        stdout.close()
        stderr.close()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Minus N if signal N killed it."""
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        if not wait_for([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            self._process.terminate()


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | os.PathLike[str] | None = None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run([sys.executable, *command], capture_output=True, text=True)`."""
    process = WarmProcess(command, env=env, cwd=cwd, has_stderr=True)
    assert process.stderr
    printed = [start(pipe.read) for pipe in (process.stdout, process.stderr)]
    with closing(process.stdout), closing(process.stderr):
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
        return subprocess.CompletedProcess(
            command, code, *(text.result(PATIENCE_S) for text in printed)
        )


def run_here(command: Sequence[str]) -> int:
    """Run `python COMMAND` warm, with this process' own pipes, in its session. Returns its code."""
    stdin, stdout, stderr = (Connection(os.dup(fd)) for fd in range(3))
    begin = Start(list(command), dict(os.environ), os.getcwd(), (stdin, stdout, stderr), False)
    process = call(_run, begin)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _pipe() -> tuple[TextIO, Connection]:
    """The end that the test reads, and the end for the process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    return os.fdopen(os.dup(ours.fileno()), errors="replace", encoding="utf-8"), theirs


def _start(process: BaseProcess) -> None:
    # The first start starts the fork server too, unless it is shared.
    with _server_environment():
        process.start()


@contextmanager
def _server_environment() -> Iterator[None]:
    """The fork server is a Python of its own, which must find `preloaded`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        yield


def _run(start: Start) -> None:
    """Become `python COMMAND`, in the forked process."""
    # Linux's default, which the fork server has replaced. The SDK's ping process needs it.
    multiprocessing.set_start_method("fork", force=True)
    if start.session:
        os.setsid()
    for fd, pipe in enumerate(start.pipes):
        os.dup2(pipe.fileno() if pipe else os.open(os.devnull, os.O_RDONLY), fd)
    for pipe in start.pipes:
        if pipe:
            pipe.close()
    sys.stdin = os.fdopen(0, closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through="PYTHONUNBUFFERED" in start.env)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(start.env)
    os.chdir(start.cwd)
    option, *rest = start.command if start.command[0] in ("-c", "-m") else ("", *start.command)
    sys.argv = rest
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    first = start.cwd if option else os.path.dirname(os.path.abspath(rest[0]))
    paths = [path for path in start.env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path = [first, *paths, *installed]
    if option == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(main))
    elif option == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(rest[0], run_name="__main__")
