"""An HTTPS server with scripted responses, and a name server in memory."""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: What a connection gets: bytes, or what a function does with its socket.
Act = bytes | Callable[[ssl.SSLSocket], None]


class HttpsServer:
    """An HTTPS server whose script has an act for each connection."""

    def __init__(self, authority: Path) -> None:
        self.script: list[Act] = [b""]  # the last act is repeated for ever
        self.before_tls: Callable[[socket.socket], None] = lambda raw: None
        self.heads: list[str] = []
        self.connections = 0
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(authority / "host.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                act = self.script[min(self.connections, len(self.script) - 1)]
                self.connections += 1
                threading.Thread(target=self._play, args=(raw, act), daemon=True).start()

    def _play(self, raw: socket.socket, act: Act) -> None:
        with suppress(OSError), raw:
            raw.settimeout(10)
            self.before_tls(raw)
            with self._tls.wrap_socket(raw, server_side=True) as sock:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(65536)
                self.heads.append(head.decode())
                if callable(act):
                    act(sock)
                else:
                    sock.sendall(act)


def answer(status: str = "200 OK", body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(status, b"", f"Location: {location}")


def reset(sock: ssl.SSLSocket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket.close(sock)


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Callable[[socket.socket], None]:
    """Send `head`, then `piece` until the client closes the connection."""

    def act(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(piece)
            time.sleep(pause_s)

    return act


class NameServer:
    """Knows the addresses of some names, and the names that were looked up."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = {"images.example": ["127.0.0.1"], "cdn.example": ["127.0.0.1"]}

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        try:
            return self.answers[host]
        except KeyError:
            raise socket.gaierror(socket.EAI_NONAME, "unknown name") from None
