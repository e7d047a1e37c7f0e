"""A small HTTP/1.1 server on asyncio.

A simulator has to do what a proper server does not allow: truncate a body, close a connection after the work is done,
never answer.  This server also starts in milliseconds and needs no package.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

MAX_HEAD = 64 * 1024
MAX_BODY = 64 * 1024 * 1024
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Payload Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
    529: "Overloaded",
}


@dataclass(slots=True)
class Request:
    """A received request.  Header names are lower-case; `closed` is done when the client has disconnected."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    arrived: float
    closed: asyncio.Future[None]


@dataclass(slots=True)
class Response:
    """A response: `body`, or `stream` in chunks.

    `end`: `whole`; `truncate` announces everything, sends half and closes; `drop` closes without sending anything;
    `hang` sends nothing and waits until the client disconnects.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    stream: AsyncGenerator[bytes, None] | None = None
    end: str = "whole"


Handler = Callable[[Request], Awaitable[Response]]


class BadRequest(Exception):
    """The bytes are not an HTTP request that this server supports."""


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str], dict[str, str]]:
    """Return method, path, query and headers.  Raises BadRequest."""
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise BadRequest(f"not an HTTP/1.1 request line: {lines[0][:100]!r}")
    target, _, query = parts[1].partition("?")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadRequest(f"not a header line: {line[:100]!r}")
        headers[name.lower()] = value.strip()
    return parts[0], unquote(target), dict(parse_qsl(query, keep_blank_values=True)) if query else {}, headers


def _parse_chunks(data: bytes, start: int) -> tuple[bytes, int] | None:
    """Return a chunked body and where it ends, None while it is incomplete.  Raises BadRequest."""
    parts: list[bytes] = []
    while True:
        line = data.find(b"\r\n", start)
        if line < 0:
            return None
        try:
            size = int(data[start:line].split(b";")[0], 16)
        except ValueError:
            raise BadRequest("broken chunk size") from None
        start = line + 2
        if size == 0:
            end = data.find(b"\r\n", start)
            return None if end < 0 else (b"".join(parts), end + 2)
        if len(data) < start + size + 2:
            return None
        parts.append(data[start : start + size])
        start += size + 2


class Connection(asyncio.Protocol):
    """One client connection.  Requests on it are answered one after the other."""

    def __init__(self, handler: Handler, connections: set[Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._head: tuple[str, str, dict[str, str], dict[str, str]] | None = None
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start on a new connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify waiters that the client has disconnected."""
        self._connections.discard(self)
        self._writable.set()
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._writable.set()

    def close(self) -> None:
        """Close the connection and cancel its pending response."""
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Collect data; answer when a request is complete."""
        self._buffer += data
        if self._task is None:
            self._next()

    def _next(self) -> None:
        """Start on the next request if it is complete."""
        try:
            request = self._read()
        except BadRequest as error:
            self._transport.write(
                b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n\r\n"
                + str(error).encode()
            )
            self._transport.close()
            return
        if request is not None:
            self._task = self._loop.create_task(self._answer(request))
            self._task.add_done_callback(self._ended)

    def _read(self) -> Request | None:
        """Take a request out of the buffer.  Raises BadRequest."""
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD:
                    raise BadRequest("the header is too long")
                return None
            self._head = _parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            if self._head[3].get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        method, path, query, headers = self._head
        if headers.get("transfer-encoding", "").lower() == "chunked":
            chunked = _parse_chunks(bytes(self._buffer), 0)
            if chunked is None:
                return None
            body, used = chunked
        else:
            try:
                used = int(headers.get("content-length", "0"))
            except ValueError:
                raise BadRequest("content-length is no number") from None
            if used > MAX_BODY or used < 0:
                raise BadRequest(f"the body is too long: {used} bytes, at most {MAX_BODY}")
            if len(self._buffer) < used:
                return None
            body = bytes(self._buffer[:used])
        del self._buffer[:used]
        self._head = None
        return Request(method, path, query, headers, body, self._loop.time(), self._closed)

    async def _answer(self, request: Request) -> None:
        keep = request.headers.get("connection", "").lower() != "close"
        response = await self._handler(request)
        if response.end == "hang":
            await asyncio.shield(self._closed)
        if response.end in ("drop", "hang"):
            self._transport.abort()
            return
        keep = await self._write(response, keep)
        self._task = None
        if not keep:
            self._transport.close()
        elif self._buffer:
            self._next()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Report the error of a handler; the client gets a 500 or a closed connection."""
        if task.cancelled() or task.exception() is None:
            return
        self._loop.call_exception_handler({"message": "the sandbox failed on a request", "exception": task.exception()})
        self._transport.write(b"HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self._transport.close()

    async def _write(self, response: Response, keep: bool) -> bool:
        """Send the response; return whether the connection can be reused."""
        head = [f"HTTP/1.1 {response.status} {REASONS.get(response.status, 'Unknown')}"]
        head += [f"{name}: {value}" for name, value in response.headers.items()]
        if not keep:
            head.append("connection: close")
        if response.stream is None:
            head.append(f"content-length: {len(response.body)}\r\n\r\n")
            body = response.body[: len(response.body) // 2] if response.end == "truncate" else response.body
            self._transport.write("\r\n".join(head).encode() + body)
            await self._writable.wait()
            return keep and response.end == "whole"
        head.append("transfer-encoding: chunked\r\n\r\n")
        self._transport.write("\r\n".join(head).encode())
        async with aclosing(response.stream) as chunks:
            async for chunk in chunks:
                if self._transport.is_closing():
                    return False
                self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                await self._writable.wait()
        if response.end != "whole":
            return False
        self._transport.write(b"0\r\n\r\n")
        return keep


class Server:
    """Listens on one address and hands every request to `handler`."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._connections: set[Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port (a free one where `port` is 0).  Raises OSError where it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self._handler, self._connections), host, port, backlog=2048
        )
        return int(self._server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()
