"""Liveness, readiness and metrics of the server."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from gorgon_api.dependencies import Caller, Server
from gorgon_api.errors import documented
from gorgon_common import metrics
from gorgon_common.client.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/health", response_model=Health, summary="Is the server up?")
def alive() -> dict[str, Any]:
    """Report that the process is alive.  Does not query the database."""
    return {"status": "ok", "checks": {}}


@router.get(
    "/health/ready",
    response_model=Health,
    summary="Can the server work?",
    responses={503: {"model": Health, "description": "Something that it needs cannot be reached"}},
)
def ready(session: Server, response: Response) -> dict[str, Any]:
    """Check the database and the broker.  Details appear only in the log, because this requires no key."""
    checks = {name: {"ok": bool(check["ok"])} for name, check in session.health().items()}
    fine = all(check["ok"] for check in checks.values())
    response.status_code = 200 if fine else 503
    return {"status": "ok" if fine else "unavailable", "checks": checks}


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text exposition"},
        **documented(401),
    },
)
def figures(_caller: Caller) -> Response:
    """Return this process's metrics."""
    return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
