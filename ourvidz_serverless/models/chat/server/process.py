"""The chat server that a worker starts: a child that ends with it, and whose output is logged."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ourvidz_serverless.logs import log
from ourvidz_serverless.models.chat.server import guard, server_log
from ourvidz_serverless.settings import Settings

#: The one setting of ours that the server gets too: it may download its model.
SHARED = "HF_TOKEN"


class ServerProcess:
    """A running command with all the processes that it starts, below `guard`."""

    def __init__(self, command: Sequence[str], secret: str | None = None) -> None:
        """Start the command. Its lines are logged without the secret."""
        self._secret, self._has_prompts = secret, False
        self._callbacks: list[Callable[[], None]] = []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._is_closing = False
        self._process = subprocess.Popen(
            # -I: without the environment and the packages of this worker.
            [sys.executable, "-I", "-S", str(Path(guard.__file__)), str(os.getpid()), *command],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True, name="chat server").start()
        threading.Thread(target=self._wait, daemon=True, name="chat server's end").start()

    @property
    def exit_code(self) -> int | None:
        """The command's exit code; None while it runs."""
        return self._process.returncode if self._ended.is_set() else None

    def expect_prompts(self) -> None:
        """From now on log nothing that a caller can have written."""
        self._has_prompts = True

    def on_end(self, report: Callable[[], None]) -> None:
        """Call `report` when the server ends by itself; at once if it has ended."""
        with self._lock:
            self._callbacks.append(report)
            has_ended = self._ended.is_set()
        if has_ended:
            report()

    def ends_within(self, within_s: float) -> bool:
        """Whether the server has ended, or ends within some seconds."""
        return self._ended.wait(within_s)

    def close(self) -> None:
        """End the server, and wait for its end."""
        self._is_closing = True
        with suppress(ProcessLookupError):
            self._process.terminate()
        self._ended.wait()

    def _read(self) -> None:
        assert self._process.stdout
        after_prompts = server_log.AfterPrompts()
        for line in self._process.stdout:
            shown: str | None = server_log.before_prompts(line, self._secret)
            if self._has_prompts:
                shown = after_prompts.shown(line)
            if shown:
                log.info("chat server: %s", shown)

    def _wait(self) -> None:
        code = self._process.wait()
        if not self._is_closing:
            log.error("the chat server ended with code %s", code)
        with self._lock:
            self._ended.set()
            callbacks = [] if self._is_closing else list(self._callbacks)
        for report in callbacks:
            report()


def environment() -> dict[str, str]:
    """This process's environment without the worker's own settings, of which some are secrets.

    The server's own variables stay, such as vLLM's VLLM_API_KEY.
    """
    ours = {name.upper() for name in Settings.model_fields} - {SHARED}
    return {name: value for name, value in os.environ.items() if name.upper() not in ours}


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
