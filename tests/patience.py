"""How long a test waits, and threads that cannot keep a failed test from its end."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

#: In seconds: long enough for a slow machine.
PATIENCE_S = 150.0

P = ParamSpec("P")
T = TypeVar("T")


def start(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
    """Start a call in a thread of its own. Ask for its `result(PATIENCE_S)`.

    Nobody joins the thread: the threads of a ThreadPoolExecutor would be joined without a bound,
    at the end of its block and of the process.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_until(condition: Callable[[], object]) -> None:
    """Return as soon as a condition holds. It fails after `PATIENCE_S`."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.01)
