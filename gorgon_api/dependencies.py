"""Dependencies of the routes: the caller, a session that acts for the caller, and a syntactically valid run id."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from gorgon_api.auth import Principal, authenticate
from gorgon_common.application.session import Session
from gorgon_common.errors import NotFound
from gorgon_common.ids import is_id

Caller = Annotated[Principal, Depends(authenticate)]


def server(request: Request) -> Session:
    """Return the session of the server itself, for routes that need no key."""
    session: Session = request.app.state.session
    return session


def acting(request: Request, caller: Caller) -> Session:
    """Return a session that acts for the caller.  Raises Unauthorized."""
    return server(request).of(caller.scope)


def run_id(run: Annotated[str, Path(description="The run's id.", examples=["run_01KAR6V7Q3M8Z5T2N4H9C1X0WB"])]) -> str:
    """Return the id in the path.  Raises NotFound without querying the database if it is not a valid id."""
    if not is_id(run, "run"):
        raise NotFound(f"There is no run {run[:60]!r}.", hint="GET /v1/runs lists the runs.")
    return run


Server = Annotated[Session, Depends(server)]
Acting = Annotated[Session, Depends(acting)]
RunId = Annotated[str, Depends(run_id)]
