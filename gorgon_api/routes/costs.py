"""The cost of calls: reports by any dimension, and the calls themselves."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse

from gorgon_api.dependencies import Acting
from gorgon_api.errors import documented
from gorgon_common.client.schemas import CallPage, CostReport

router = APIRouter(prefix="/v1/costs", tags=["costs"], responses=documented(401, 422, 503))

MAX_ROWS = 10_000
_Text = Query(max_length=200, pattern=r"^[^\x00]*$")


def selection(
    since: Annotated[str | None, Query(alias="from", max_length=40, description="A day (UTC) or a time.")] = None,
    until: Annotated[str | None, Query(alias="to", max_length=40, description="A day (included) or a time.")] = None,
    provider: Annotated[str | None, _Text] = None,
    model: Annotated[str | None, _Text] = None,
    role: Annotated[str | None, _Text] = None,
    team: Annotated[str | None, _Text] = None,
    workflow: Annotated[str | None, _Text] = None,
    run: Annotated[str | None, _Text] = None,
    step: Annotated[str | None, _Text] = None,
    target: Annotated[
        str | None,
        Query(max_length=20, description="live, sandbox, library or all; without it live and library: real money."),
    ] = None,
    outcome: Annotated[str | None, _Text] = None,
) -> dict[str, Any]:
    """Return the filter for calls."""
    named = {
        "provider": provider,
        "model": model,
        "role": role,
        "team": team,
        "workflow": workflow,
        "run": run,
        "step": step,
        "target": target,
        "outcome": outcome,
    }
    only = {name: value for name, value in named.items() if value is not None}
    return {"since": since, "until": until, "only": only}


Selection = Annotated[dict[str, Any], Depends(selection)]


@router.get("", response_model=CostReport, summary="Report costs")
def report(
    session: Acting,
    chosen: Selection,
    by: Annotated[
        str,
        Query(max_length=200, description="provider, model, role, team, workflow, run, step, day, target, outcome"),
    ] = "provider,model",
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 1000,
) -> JSONResponse:
    """Return the cost of calls by one or more dimensions, most expensive first."""
    dimensions = [name.strip() for name in by.split(",") if name.strip()]
    return JSONResponse(session.costs(dimensions, **chosen, limit=limit))


@router.get("/calls", response_model=CallPage, summary="List calls")
def calls(
    session: Acting,
    chosen: Selection,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 1000,
    cursor: Annotated[str | None, _Text] = None,
) -> JSONResponse:
    """Return one row per call; `next` is the cursor of the next page."""
    return JSONResponse(session.calls(**chosen, limit=limit, cursor=cursor))
