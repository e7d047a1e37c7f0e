"""Limits request sizes: refuses a body unread if its Content-Length is too large, and otherwise while reading it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gorgon_api.errors import problem


class BodyLimit:
    """ASGI middleware; `maximum` is in bytes.

    Starlette's own limit responds in plain text if the Content-Length is too large.
    """

    def __init__(self, app: ASGIApp, *, maximum: int) -> None:
        self._app, self._maximum = app, maximum

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        if said.isdecimal() and int(said) > self._maximum:
            await self._refusal()(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._maximum:
                raise HTTPException(413, self._sentence)
            return message

        await self._app(scope, counted, send)

    @property
    def _sentence(self) -> str:
        return f"A request may have at most {self._maximum:,} bytes."

    def _refusal(self) -> ASGIApp:
        # The rest of the body is not read, so the connection cannot be reused.
        return problem(413, "content-too-large", self._sentence, headers={"Connection": "close"})
