"""The process of the HTTP service: its sockets, uvicorn, the loading of models, and SIGTERM.

The sockets are open before the models are loaded. Until then `/ping` answers 204.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.logs import log
from ourvidz_serverless.models.loading.readahead import ReadAhead
from ourvidz_serverless.serving.http import page
from ourvidz_serverless.serving.http.app import make_app
from ourvidz_serverless.serving.http.connections import KEEP_ALIVE_S, Connection
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker

#: How often a closing server checks whether the last job has ended, in seconds.
CLOSING_POLL_S = 0.1


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM closes the service first, and the process ends with code 0."""

    def __init__(self, config: uvicorn.Config, service: HttpService) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.close()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen until the last job has ended.

        Meanwhile a load balancer gets 503 from `/ping`, and callers get their jobs' documents.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while any(self._service.job_store.counts.values()):
                    await asyncio.sleep(CLOSING_POLL_S)
        await super().shutdown(sockets)


def make_server(service: HttpService) -> Server:
    """The server of a service. Give its sockets to `run`."""
    # uvicorn's own tracebacks may quote a request; ours (`logs.bug`) do not.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        ws="none",
        timeout_graceful_shutdown=int(service.settings.shutdown_grace_s) + 10,
    )
    return Server(config, service)


def serve(settings: Settings, read: Callable[[], ReadAhead | None] = lambda: None) -> None:
    """Answer requests until SIGTERM. Running jobs then have `SHUTDOWN_GRACE_S`, as on the queue.

    `read` begins to read the models' files, and may fetch them first.

    Raises ModelLoadError if an address cannot be used or the models do not load.
    """
    service = HttpService(settings)
    server = make_server(service)
    sockets = [_listen(settings.host, port) for port in _ports(settings)]
    log.info("HTTP on %s", ", ".join(f"port {each.getsockname()[1]}" for each in sockets))
    if page.is_wanted(settings):
        log.info("a page at http://%s:%d/", settings.host, sockets[0].getsockname()[1])
    errors: list[BaseException] = []

    def load() -> None:
        try:
            service.open(Worker.of(settings, read()))
            log.info("ready")
        except BaseException as exc:
            errors.append(exc)
            server.should_exit = True

    threading.Thread(target=load, daemon=True, name="load").start()
    server.run(sockets)
    service.flush()
    if errors:
        raise errors[0]


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ModelLoadError if this machine does not have the address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # A name such as localhost may have an IPv6 address too: prefer the IPv4 one.
        kind, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        is_any = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=kind, dualstack_ipv6=is_any)
    except OSError as exc:
        why = exc.strerror or type(exc).__name__
        raise ModelLoadError(f"HOST, PORT: cannot listen at {host}, port {port}: {why}") from exc


def _ports(settings: Settings) -> list[int]:
    health = settings.port_health
    return [settings.port] if health in (None, settings.port) else [settings.port, int(health or 0)]
