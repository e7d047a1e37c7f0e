"""A TCP proxy that can go silent: it keeps its connections open, but forwards nothing on them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, unquote, urlsplit


class Proxy:
    """Listens on a loopback port and forwards to the server of `url` (TCP or a unix socket)."""

    def __init__(self, url: str) -> None:
        self._target = _target(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._silent: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.port: int = self._listener.getsockname()[1]
        self._begin(self._accept)

    def silence(self) -> int:
        """Stop forwarding on the existing connections; new ones work.  Returns the number of silenced connections."""
        with self._lock:
            self._silent |= self._sockets
            return len(self._sockets) // 2

    def close(self) -> None:
        """Close every connection."""
        _shut(self._listener)
        self._threads[0].join(10)
        for each in self._sockets:
            _shut(each)
        for thread in self._threads:
            thread.join(10)
        for each in (self._listener, *self._sockets):
            each.close()

    def _begin(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = self._connected()
                with self._lock:
                    self._sockets |= {client, server}
                for source, sink in ((client, server), (server, client)):
                    self._begin(self._pump, source, sink)

    def _connected(self) -> socket.socket:
        if isinstance(self._target, str):
            made = socket.socket(socket.AF_UNIX)
            made.connect(self._target)
            return made
        return socket.create_connection(self._target)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._silent:
                    sink.sendall(data)
        if source not in self._silent:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def _target(url: str) -> str | tuple[str, int]:
    parts = urlsplit(url)
    folder = parse_qs(parts.query).get("host", [unquote(parts.hostname or "")])[0]
    if folder.startswith("/"):
        return f"{folder}/.s.PGSQL.{parts.port or 5432}"
    return folder or "127.0.0.1", parts.port or 5432


@contextlib.contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """Yield a proxy in front of the server of a postgresql:// or redis:// URL, and the URL of the proxy."""
    proxy = Proxy(url)
    parts = urlsplit(url)
    user = f"{parts.username}:{parts.password}@" if parts.password else f"{parts.username}@" if parts.username else ""
    try:
        yield proxy, f"{parts.scheme}://{user}127.0.0.1:{proxy.port}{parts.path}"
    finally:
        proxy.close()
