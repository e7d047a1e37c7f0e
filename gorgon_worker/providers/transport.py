"""The HTTP client of both model SDKs: calls that can be cancelled, with a deadline for the whole of each.

A thread that waits for a model blocks in `recv` for minutes, and neither SDK can interrupt it.  The wait is therefore
divided into slices of a quarter of a second, and the call's `cancelled()` and its deadline are checked between two
slices.  This works with and without streaming and costs about 30 µs per slice.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import httpx2

from gorgon_common import errors

SLICE = 0.25
"""Seconds between two checks of `cancelled()`."""
CONNECT_TIMEOUT = 5.0
"""Seconds for TCP and TLS each; a cancelled call waits for them."""
MAX_RECEIVED = 64 * 1024**2
"""The most bytes of one reply, so that an endless one cannot fill the memory."""

_WRITE_CHUNK = 256 * 1024


@dataclass(slots=True)
class Watch:
    """What the transport checks while this thread makes a call.

    `deadline` is on time.monotonic().  `ended` says why the transport gave up: cancelled, timeout or too_large; SDKs
    wrap what is raised here in errors of their own.
    """

    deadline: float
    cancelled: Callable[[], bool]
    received: int = 0
    ended: str | None = None

    def remaining(self) -> float:
        """Return the seconds that are left; aborts the call if there are none, or if it was cancelled."""
        left = self.deadline - time.monotonic()
        if self.cancelled():
            self.ended = "cancelled"
            raise errors.Cancelled
        if left <= 0:
            self.ended = "timeout"
            raise httpcore2.ReadTimeout("the call's time is over")
        return left

    def count(self, data: bytes) -> bytes:
        """Count the received bytes; aborts the call above MAX_RECEIVED."""
        self.received += len(data)
        if self.received > MAX_RECEIVED:
            self.ended = "too_large"
            raise errors.OutputTooLarge
        return data


class _Current(threading.local):
    watch: Watch | None = None


_current = _Current()


@contextmanager
def watching(timeout: float, cancelled: Callable[[], bool]) -> Iterator[Watch]:
    """Limit the requests of this thread inside the block to `timeout` seconds in total; abort them on `cancelled`."""
    watch = Watch(time.monotonic() + timeout, cancelled)
    before, _current.watch = _current.watch, watch
    try:
        yield watch
    finally:
        _current.watch = before


class _WatchedStream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        watch = _current.watch
        if watch is None:
            return self._inner.read(max_bytes, timeout)
        while True:
            try:
                # Receiving again after a timeout is safe, with TLS too: a partial record stays in its buffer.
                return watch.count(self._inner.read(max_bytes, min(SLICE, watch.remaining())))
            except httpcore2.ReadTimeout:
                if watch.ended:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        watch = _current.watch
        if watch is None:
            return self._inner.write(buffer, timeout)
        # A write that timed out halfway cannot be continued, so it is divided by size, not by time.
        for start in range(0, len(buffer), _WRITE_CHUNK):
            self._inner.write(buffer[start : start + _WRITE_CHUNK], watch.remaining())
        return None

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _WatchedStream(self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _WatchedBackend(httpcore2.NetworkBackend):
    """Connects with TCP keep-alive, because NAT routers drop silent connections and a reasoning model sends nothing."""

    def __init__(self, inner: httpcore2.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        options = [*(socket_options or ()), *_keep_alive()]
        watch = _current.watch
        if watch is not None:
            timeout = min(timeout or CONNECT_TIMEOUT, watch.remaining())
        return _WatchedStream(self._inner.connect_tcp(host, port, timeout, local_address, options))


def _keep_alive() -> list[tuple[int, int, int]]:
    wanted = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 60, "TCP_KEEPCNT": 5}
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in wanted.items():
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def http_client(url: str, *, idle_connections: int = 100) -> httpx2.Client:
    """Return a client for an SDK: as many connections as there are calls, `idle_connections` of them kept open.

    The environment's proxies and certificates apply, proxies not to loopback (the sandbox, a model on this machine).
    Redirects are not followed, so that a key is sent only to the configured address.
    """
    client = httpx2.Client(
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=idle_connections, keepalive_expiry=30.0),
        timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT),
        follow_redirects=False,
        verify=httpx2.create_ssl_context(),
        trust_env=not _is_loopback(url),
    )
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx2.HTTPTransport):
            # httpx2 has no parameter for it; tests/contract/test_agent_providers.py notices when this stops working.
            pool = transport._pool
            pool._network_backend = _WatchedBackend(pool._network_backend)
    return client


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
