"""Accepts a body as JSON even if the client does not declare it: `curl -d '{…}'` alone declares a form."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from gorgon_api.errors import problem

_METHODS = frozenset({"POST", "PUT", "PATCH"})
_UNSAID = frozenset({"", "application/x-www-form-urlencoded", "text/plain"})
"""Content types that clients send by default."""


class JsonBodies:
    """ASGI middleware: treats a body with no or a default type as JSON, and answers 415 to any other type."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or scope["method"] not in _METHODS:
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-type", "")
        kind = said.partition(";")[0].strip().lower()
        if kind in _UNSAID:
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        elif kind != "application/json" and not kind.endswith("+json"):
            refusal = problem(
                415,
                "unsupported-media-type",
                f"The body is {kind[:100]!r}, and this API takes JSON.",
                hint="Send `Content-Type: application/json`; the text of a workflow goes into the field `source`.",
                headers={"Connection": "close"},
            )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)
