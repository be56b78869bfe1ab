"""Both Python clients behind one interface, and the three kinds of servers that they talk to."""

import asyncio
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ourvidz_serverless.client import AsyncClient, AsyncSubmittedJob, Client, Retry
from tests.servers.handler import LOCAL_API, served_at, start
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerProcess

WORKER_KEY = "worker-key-that-nobody-may-see"
QUICK = Retry(tries=4, base_s=0.01, max_s=0.05)


class Awaited:
    """The asynchronous client, or one of its jobs, with each call awaited."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return self._call(value) if inspect.ismethod(value) else value

    def _call(self, method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            made = method(*args, **options)
            if inspect.isasyncgen(made):
                return self._items(made)
            result = self._loop.run_until_complete(made) if inspect.isawaitable(made) else made
            is_job = isinstance(result, AsyncSubmittedJob)
            return Awaited(result, self._loop) if is_job else result

        return call

    def _items(self, items: Any) -> Iterator[Any]:
        try:
            while True:
                yield self._loop.run_until_complete(anext(items))
        except StopAsyncIteration:
            return
        finally:
            self._loop.run_until_complete(items.aclose())


@dataclass(frozen=True)
class Server:
    """One of the three kinds of servers, with the folder of its worker's assets."""

    kind: str
    url: str
    outputs: Path
    caller_key: str = ""
    worker_key: str = WORKER_KEY

    def made(self, client: type[Client] | type[AsyncClient], **changes: Any) -> Any:
        """A client of this server."""
        options = {"worker_key": WORKER_KEY, "policy": QUICK, **changes}
        if self.kind == "the HTTP service":
            return client.over_http(self.url, options.pop("worker_key"), **options)
        if self.kind == "the SDK's test server":
            return client.local(self.url, **{"assets": self.outputs, **options})
        endpoints = {"sdxl": "local", "chat": "local"}
        options = {"base_url": self.url, "assets": self.outputs, **options}
        return client(endpoints, self.caller_key, **options)


@contextmanager
def served(kind: str, outputs: Path, env: Mapping[str, str]) -> Iterator[Server]:
    """A server of this kind, with a real worker in a process of its own."""
    env = {
        **env,
        "FAMILIES": "sdxl,chat",
        "STORAGE_URL": f"file:{outputs}",
        "WORKER_API_KEY": WORKER_KEY,
    }
    if kind == "the SDK's test server":
        with start(None, *LOCAL_API, **env) as process:
            yield Server(kind, served_at(process), outputs)
    elif kind == "the HTTP service":
        http = {"SERVE": "http", "HOST": "127.0.0.1", "PORT": "0"}
        with start(None, **env, **http) as process:
            yield Server(kind, f"http://127.0.0.1:{_port(process)}", outputs)
    else:
        with Platform() as platform, start(platform, **env):
            yield Server(kind, platform.caller_url, outputs, platform.caller_key)


def _port(process: WorkerProcess) -> str:
    found = re.search(r"HTTP on port (\d+)", process.wait_for_log("ready"))
    assert found
    return found[1]
