"""The HTTP service on a real socket in this process, with the worker of a test."""

import socket
import threading
from typing import Any, Self

import requests

from ourvidz_serverless.serving.http.server import make_server
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker
from tests.patience import PATIENCE_S


class ServedHttp:
    """A service behind uvicorn on a free port, for use in a `with` statement."""

    def __init__(self, settings: Settings, worker: Worker | None = None) -> None:
        self.service = HttpService(settings)
        if worker:
            self.service.open(worker)
        self._server = make_server(self.service)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the service did not stop"

    def stop(self) -> None:
        """Do what SIGTERM does in the process."""
        self._server.handle_exit(15, None)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=PATIENCE_S, **options)

    def head(self, path: str, **options: Any) -> requests.Response:
        return requests.head(self.url + path, timeout=PATIENCE_S, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, **{"timeout": PATIENCE_S, **options})


def events(answer: requests.Response) -> list[tuple[str, str]]:
    """The server-sent events of an answer: name (`message` where it has none) and data."""
    answer.encoding = "utf-8"
    found = []
    for block in answer.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            found.append((fields.get("event", "message"), fields["data"]))
    return found
