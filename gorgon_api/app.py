"""The FastAPI application: routes, errors, limits; all dependencies are arguments."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from gorgon_api import docs_page
from gorgon_api.access import AccessLog
from gorgon_api.auth import KeyRing
from gorgon_api.body_limit import BodyLimit
from gorgon_api.errors import add_handlers
from gorgon_api.json_bodies import JsonBodies
from gorgon_api.masked import MaskedAnswers
from gorgon_api.routes import budgets, costs, health, limits, runs, workflows
from gorgon_common.application.session import Session

MAX_BODY = 8_000_000
"""Maximum size of a request, in bytes."""

_DESCRIPTION = """Start, follow and look at runs of Gorgon workflows.

Send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Errors are `application/problem+json`.
Times are RFC 3339 in UTC. Money is US dollars."""


def create_app(session: Session, keys: KeyRing, *, access_log: bool = False) -> FastAPI:
    """Return the application.  It does not own the session; the caller closes it.

    `access_log`: log each request.
    """
    app = FastAPI(
        title="Gorgon",
        version=_version(),
        description=_DESCRIPTION,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.session, app.state.keys = session, keys
    app.add_middleware(JsonBodies)
    app.add_middleware(BodyLimit, maximum=MAX_BODY)
    app.add_middleware(MaskedAnswers)
    app.add_middleware(AccessLog, logs=access_log)
    add_handlers(app)
    for part in (runs, workflows, costs, budgets, limits, health, docs_page):
        app.include_router(part.router)
    return app


def _version() -> str:
    try:
        return version("gorgon")
    except PackageNotFoundError:
        return "0"
