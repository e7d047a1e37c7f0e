"""Routes requests: the providers' paths, and the sandbox's own under `/_…`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from gorgon_api.sandbox.faults import Fault
from gorgon_api.sandbox.http import Request, Response
from gorgon_api.sandbox.limits import Limit
from gorgon_api.sandbox.model_service import ModelService
from gorgon_api.sandbox.protocols import anthropic, openai

Provider = Callable[[ModelService, Request], Awaitable[Response]]

PROVIDERS: dict[str, Provider] = {"openai": openai.handle, "anthropic": anthropic.handle}
"""A base URL may name its provider (`http://127.0.0.1:8900/anthropic`); otherwise path and headers determine it."""


class App:
    """The handler of every request."""

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._started = time.time()

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        if request.path.startswith("/_"):
            return self.own(request)
        first, _, rest = request.path[1:].partition("/")
        if first in PROVIDERS:
            request.path = f"/{rest}"
            return await PROVIDERS[first](self._service, request)
        if request.path.startswith("/v1/"):
            ours = request.path.startswith("/v1/messages") or "anthropic-version" in request.headers
            return await PROVIDERS["anthropic" if ours else "openai"](self._service, request)
        return reply(404, {"error": f"the sandbox serves no {request.path}; it simulates {', '.join(PROVIDERS)}"})

    def own(self, request: Request) -> Response:
        """Answer a request to the sandbox itself."""
        name, _, rest = request.path[2:].partition("/")
        handlers: dict[tuple[str, str], Callable[[Request, str], Response]] = {
            ("GET", "health"): self.health,
            ("GET", "log"): self.log,
            ("DELETE", "log"): self.clear_log,
            ("GET", "bill"): self.bill,
            ("GET", "limits"): self.limits,
            ("POST", "limits"): self.add_limits,
            ("DELETE", "limits"): self.clear_limits,
            ("GET", "faults"): self.faults,
            ("POST", "faults"): self.add_faults,
            ("DELETE", "faults"): self.clear_faults,
        }
        handler = handlers.get((request.method, name))
        if handler is None:
            return reply(404, {"error": f"there is no {request.method} {request.path}"})
        try:
            return handler(request, rest)
        except (ValueError, TypeError) as error:
            return reply(400, {"error": str(error)})

    def health(self, request: Request, rest: str) -> Response:
        """Report the health of the sandbox."""
        service = self._service
        state = {"status": "ok", "pid": os.getpid(), "seed": service.seed, "latency": service.latency}
        return reply(
            200, {**state, "providers": list(PROVIDERS), "requests": service.log.total, "since": self._started}
        )

    def log(self, request: Request, rest: str) -> Response:
        """Return the log, or with `/count` how many entries there are by some fields."""
        query = dict(request.query)
        if rest == "count":
            by = [name for name in query.pop("by", "provider,model,status").split(",") if name]
            return reply(200, {"total": self._service.log.total, "groups": self._service.log.count(by, query)})
        since, limit = int(query.pop("since", 0)), query.pop("limit", None)
        entries = self._service.log.entries(query, since, int(limit) if limit else None)
        return reply(200, {"total": self._service.log.total, "entries": entries})

    def clear_log(self, request: Request, rest: str) -> Response:
        """Clear the log and the bill."""
        self._service.log.clear()
        return reply(200, {})

    def bill(self, request: Request, rest: str) -> Response:
        """Return what every account has used."""
        return reply(200, self._service.log.bill())

    def limits(self, request: Request, rest: str) -> Response:
        """Return the limits."""
        return reply(200, self._service.limits.describe(time.time()))

    def add_limits(self, request: Request, rest: str) -> Response:
        """Set limits: one object or a list of them, all or none."""
        for limit in [Limit.parse(item) for item in objects(request.body)]:
            self._service.limits.add(limit)
        return self.limits(request, rest)

    def clear_limits(self, request: Request, rest: str) -> Response:
        """Return to the default limits."""
        self._service.limits.clear()
        return reply(200, {})

    def faults(self, request: Request, rest: str) -> Response:
        """Return the faults with their counts."""
        return reply(200, {"faults": self._service.faults.describe()})

    def add_faults(self, request: Request, rest: str) -> Response:
        """Set faults: one object or a list of them, all or none."""
        parsed = [Fault.parse(item) for item in objects(request.body)]
        return reply(200, {"ids": [self._service.faults.add(fault) for fault in parsed]})

    def clear_faults(self, request: Request, rest: str) -> Response:
        """Remove one fault, or all."""
        if not rest:
            self._service.faults.clear()
        elif not self._service.faults.remove(int(rest)):
            return reply(404, {"error": f"there is no fault {rest}"})
        return reply(200, {})


def objects(body: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects in a body.  Raises ValueError."""
    data = json.loads(body or b"null")
    items = data if isinstance(data, list) else [data]
    if not all(isinstance(item, dict) for item in items):
        raise ValueError("send a JSON object, or a list of them")
    return items


def reply(status: int, data: Any) -> Response:
    """Return JSON."""
    return Response(status, json.dumps(data, ensure_ascii=False).encode(), {"content-type": "application/json"})
