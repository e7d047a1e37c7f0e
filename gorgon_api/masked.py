"""Masks secrets in responses: JSON bodies and event streams are masked before they are sent."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gorgon_common.masking import SECRETS
from gorgon_common.printable import json_safe


class MaskedAnswers:
    """Masks responses.  A JSON body is buffered first; each event of a stream is already a separate message."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self.app(scope, receive, _Masked(send).send)


class _Masked:
    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()
        self._form = ""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._form = kinds[0].decode("latin-1") if kinds else ""
            if "json" in self._form:
                self._start = message
                return
        elif message["type"] == "http.response.body" and "json" in self._form:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish()
            return
        elif message["type"] == "http.response.body" and "event-stream" in self._form:
            message = {**message, "body": _events(bytes(message.get("body", b"")))}
        await self._send(message)

    async def _finish(self) -> None:
        body = SECRETS.mask_json(self._body.decode("utf-8", "replace")).encode()
        start = self._start
        assert start is not None  # a response starts with its headers
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def _events(chunk: bytes) -> bytes:
    text = chunk.decode("utf-8", "replace")
    lines = text.split("\n")
    masked = [f"data: {SECRETS.mask_json(line[6:])}" if line.startswith("data: ") else line for line in lines]
    return json_safe("\n".join(masked)).encode()
