"""Dependencies of the routes: the services, the caller, and a syntactically valid run id."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from gorgon_api.auth import Principal, authenticate
from gorgon_common.bootstrap import Services
from gorgon_common.errors import NotFound
from gorgon_common.ids import is_id


def services(request: Request) -> Services:
    """Return the application's services."""
    found: Services = request.app.state.services
    return found


def run_id(run: Annotated[str, Path(description="The run's id.", examples=["run_01KAR6V7Q3M8Z5T2N4H9C1X0WB"])]) -> str:
    """Return the id in the path.  Raises NotFound without querying the database if it is not a valid id."""
    if not is_id(run, "run"):
        raise NotFound(f"There is no run {run[:60]!r}.", hint="GET /v1/runs lists the runs.")
    return run


TheServices = Annotated[Services, Depends(services)]
Caller = Annotated[Principal, Depends(authenticate)]
RunId = Annotated[str, Depends(run_id)]
