"""A TCP proxy whose connections a test can cut, refuse for a while, and make slow.

with SwitchedProxy(service.url) as proxy:
    open_page(proxy.url)
    proxy.stop()     # as a server that died: open connections are closed, new ones refused
    proxy.start()    # the same port again

It passes bytes as they come, so that a stream of events goes through while it is written.
"""

import contextlib
import socket
import threading
import time
from typing import Self
from urllib.parse import urlsplit

#: A slow proxy sends this many bytes at once, and then waits this long, in seconds.
SLOW_BYTES, SLOW_S = 4096, 0.02


class SwitchedProxy:
    """The proxy, for use in a `with` statement."""

    def __init__(self, upstream: str, is_slow: bool = False) -> None:
        #: The URL of the server behind the proxy.
        self.upstream = upstream
        self._is_slow = is_slow
        self._port = 0
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Accept connections, at the same port as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and close the open ones."""
        if self._listener:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        self.cut()

    def cut(self) -> None:
        """Close the open connections; new ones are accepted."""
        for each in tuple(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server_at = urlsplit(self.upstream)
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection((server_at.hostname, server_at.port)) as server,
        ):
            self._open |= {client, server}
            request = threading.Thread(target=self._pass, args=(client, server), daemon=True)
            request.start()
            self._pass(server, client, is_slow=self._is_slow)
            client.shutdown(socket.SHUT_RDWR)
            request.join()
            self._open -= {client, server}

    def _pass(self, source: socket.socket, to: socket.socket, is_slow: bool = False) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(SLOW_BYTES if is_slow else 65536):
                if is_slow:
                    time.sleep(SLOW_S)
                to.sendall(piece)
            to.shutdown(socket.SHUT_WR)
