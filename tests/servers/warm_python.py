"""Python processes that need not import torch and the SDK's libraries, since their parent has.

`python handler.py` spends 3.5 seconds of a processor on imports. A process of this module is forked
from a server that has made them (`multiprocessing`'s fork server, with `preloaded` in it). It has
its own pid, session, environment, working directory, pipes and exit code, and it ends like
`python SCRIPT` does. Tests about the start itself take `sys.executable`.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
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


def call(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that has begun to call the function. The function must be a module's own."""
    process = _CONTEXT.Process(target=function, args=arguments)
    with _STARTING:
        _start(process)
    return process


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
        options = (self.args, {**env, **ENVIRONMENT}, place, stdout, stderr)
        self._process = _CONTEXT.Process(target=_run, args=options)
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


def _pipe() -> tuple[TextIO, Connection]:
    """The end that the test reads, and the end for the process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    return os.fdopen(os.dup(ours.fileno()), errors="replace", encoding="utf-8"), theirs


def _start(process: BaseProcess) -> None:
    # The first start starts the fork server too, a Python of its own, which must find `preloaded`.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        process.start()


def _run(
    command: list[str], env: dict[str, str], cwd: str, stdout: Connection, stderr: Connection
) -> None:
    """Become `python COMMAND`, in the forked process."""
    # Linux's default, which the fork server has replaced. The SDK's ping process needs it.
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    stdout.close()
    stderr.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through="PYTHONUNBUFFERED" in env)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    first = cwd if is_module else os.path.dirname(os.path.abspath(command[0]))
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path = [first, *paths, *installed]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")
