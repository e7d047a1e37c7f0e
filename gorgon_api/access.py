"""Counts, times and logs each request: the client, the path, the response and the duration."""

from __future__ import annotations

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gorgon_common import metrics
from gorgon_common.ids import is_id
from gorgon_common.logs import context, get_logger
from gorgon_common.telemetry import trace_of

log = get_logger("gorgon.access")

_QUIET = ("/health", "/metrics")
"""Paths that machines poll every few seconds; they are logged at level debug."""


class AccessLog:
    """The outermost ASGI middleware.  `logs`: write a line per request; requests are counted in any case.

    The line contains the path without its query, which may contain private data.
    """

    def __init__(self, app: ASGIApp, *, logs: bool) -> None:
        self._app, self._logs = app, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 500
        sent = 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        about = _about(scope)
        with context(**about):
            try:
                await self._app(scope, receive, counted)
            finally:
                self._tell(scope, status, time.perf_counter() - begun, sent)

    def _tell(self, scope: Scope, status: int, seconds: float, sent: int) -> None:
        path = scope["path"]
        route = getattr(scope.get("route"), "path", None) or "(none)"  # an unknown path would remain a label forever
        metrics.REQUESTS.inc(1, method=_method(scope), route=route, status=str(status))
        metrics.REQUEST_SECONDS.observe(seconds, method=_method(scope), route=route)
        if not self._logs:
            return
        fields: dict[str, Any] = {
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": sent,
            "client": (scope.get("client") or ("",))[0],
        }
        actor = scope.get("state", {}).get("actor")
        if actor is not None:
            fields["actor"] = actor
        if path.startswith(_QUIET):
            log.debug("request", **fields)
        else:
            log.always("request", **fields)


def _method(scope: Scope) -> str:
    known = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
    return scope["method"] if scope["method"] in known else "OTHER"


def _about(scope: Scope) -> dict[str, str]:
    """Return the fields for every log line of this request: its run and its trace."""
    found = {}
    parts = scope["path"].split("/")
    if len(parts) > 3 and parts[1:3] == ["v1", "runs"] and is_id(parts[3], "run"):
        found["run_id"] = parts[3]
    header = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    trace = trace_of(header.decode("latin-1"))
    if trace is not None:
        found["trace_id"] = trace
    return found
