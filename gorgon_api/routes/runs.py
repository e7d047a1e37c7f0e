"""Runs: start, list, inspect, follow, cancel, resume."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Body, Header, Path, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from gorgon_api.dependencies import Acting, Caller, RunId
from gorgon_api.errors import documented
from gorgon_api.submission import dispatch
from gorgon_common import strict_json
from gorgon_common.application.session import Session
from gorgon_common.client.schemas import (
    MAX_PAGE,
    RUN_FINISHED,
    Accepted,
    Explanation,
    Run,
    RunPage,
    RunStatus,
    StepPage,
    Submission,
)
from gorgon_common.telemetry import trace_of

router = APIRouter(prefix="/v1/runs", tags=["runs"], responses=documented(401, 422, 503))

_EVENTS = 500
_FASTEST, _SLOWEST, _PING = 0.1, 1.0, 15.0
_Text = Query(max_length=200, pattern=r"^[^\x00]*$")
_IdempotencyKey = Header(
    min_length=1,
    max_length=200,
    pattern=r"^[\x21-\x7e]+$",
    description="The same key gives the same run, however often it is sent.",
)


EventName = Annotated[str, Path(min_length=1, max_length=200, description="The name of the event.")]
_Trace = Annotated[
    str | None, Header(max_length=512, description="W3C Trace Context: the run becomes part of this trace.")
]


@router.post(
    "",
    status_code=202,
    response_model=Accepted,
    summary="Start a run",
    responses=documented(403, 404, 409, 413),
)
def start(
    submission: Submission,
    session: Acting,
    caller: Caller,
    response: Response,
    idempotency_key: Annotated[str | None, _IdempotencyKey] = None,
    traceparent: _Trace = None,
) -> dict[str, Any]:
    """Start a run of a bundled workflow or of a YAML text; it continues in the background.

    It belongs to `team`, by default the file's `team:`; 403 if the key may not act for that team.
    """
    submitted = dispatch(session, submission, caller, idempotency_key, trace_of(traceparent))
    response.headers["Location"] = f"/v1/runs/{submitted.run_id}"
    return {
        "run_id": submitted.run_id,
        "created": submitted.created,
        "reused": submitted.reused,
        "to_run": submitted.to_run,
    }


@router.get("", response_model=RunPage, summary="List runs")
def page(
    session: Acting,
    status: Annotated[RunStatus | None, Query(description="Only runs in this state.")] = None,
    workflow: Annotated[str | None, _Text] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    cursor: Annotated[str | None, _Text] = None,
) -> JSONResponse:
    """Return runs, newest first; `next` is the cursor of the next page."""
    return JSONResponse(session.runs(status=status, workflow=workflow, limit=limit, cursor=cursor))


@router.get("/{run}", response_model=Run, summary="Look at a run", responses=documented(404))
def one(
    run: RunId,
    session: Acting,
    expand: Annotated[str | None, Query(pattern="^steps$", description="`steps` to have them inside.")] = None,
) -> JSONResponse:
    """Return the run in the same form as `gorgon run --json`."""
    return JSONResponse(session.run(run, steps=expand == "steps"))


@router.get("/{run}/steps", response_model=StepPage, summary="List a run's steps", responses=documented(404))
def steps(
    run: RunId,
    session: Acting,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    cursor: Annotated[int, Query(ge=0, le=2**31, description="`next` of the page before.")] = 0,
) -> JSONResponse:
    """Return the steps of the run, each followed by its items or iterations."""
    found = session.run(run, steps=True)["steps"]
    end = cursor + limit
    return JSONResponse({"items": found[cursor:end], "next": str(end) if end < len(found) else None})


@router.get("/{run}/explain", response_model=Explanation, summary="Explain a run", responses=documented(404))
def explain(
    run: RunId,
    session: Acting,
    step: Annotated[str | None, _Text] = None,
) -> JSONResponse:
    """Return what the run (or one step) is waiting for and until when, what it spent, and how long its parts took."""
    return JSONResponse(session.explain(run, step))


@router.get(
    "/{run}/events",
    summary="Follow a run",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events"},
        **documented(404),
    },
)
async def events(
    run: RunId,
    session: Acting,
    last_event_id: Annotated[int, Header(ge=0, le=2**63 - 1)] = 0,
    follow: Annotated[bool, Query(description="false: only what is written by now.")] = True,
) -> StreamingResponse:
    """Stream the run's journal as server-sent events, starting after `Last-Event-ID`, until the run has finished.

    Each event has its sequence number as id, its kind as name and the `Event` as data; `end` closes the stream.
    """
    await run_in_threadpool(session.run, run)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _journal(session, run, last_event_id, follow=follow), media_type="text/event-stream", headers=headers
    )


async def _journal(session: Session, run: str, after: int, *, follow: bool) -> AsyncIterator[str]:
    """Poll the journal.  Each poll is a separate read, so no transaction stays open while nothing happens."""
    pause, silent = _FASTEST, 0.0
    yield ": connected\n\n"
    while True:
        # The status is read before the events: events written in between arrive in this iteration or the next.
        state = str((await run_in_threadpool(session.run, run))["status"])
        found = await run_in_threadpool(session.events, run, after=after, limit=_EVENTS)
        for event in found:
            after = int(event["seq"])
            data = strict_json.dumps(event, compact=True)
            yield f"id: {after}\nevent: {event['kind']}\ndata: {data}\n\n"
        ended = state in RUN_FINISHED or not follow
        if ended and not found:  # a short page need not be the last: the engine's own steps are omitted
            yield f"event: end\ndata: {json.dumps({'status': state})}\n\n"
            return
        if ended or len(found) == _EVENTS:
            continue
        pause = _FASTEST if found else min(_SLOWEST, pause * 1.5)
        silent = 0.0 if found else silent + pause
        if silent >= _PING:
            silent = 0.0
            yield ": still there\n\n"
        await anyio.sleep(pause)


@router.post("/{run}/cancel", response_model=Run, summary="Cancel a run", responses=documented(403, 404, 409))
def cancel(run: RunId, session: Acting, caller: Caller) -> JSONResponse:
    """Cancel the run: calls in flight are aborted and no new step starts. 409 if it has already finished."""
    caller.require(str(session.run(run)["team"]))
    return JSONResponse(session.cancel(run))


@router.post(
    "/{run}/events/{name}",
    status_code=202,
    response_model=Run,
    summary="Send an event to a run",
    responses=documented(403, 404, 409),
)
def send_event(
    run: RunId, name: EventName, session: Acting, caller: Caller, data: Annotated[Any, Body()] = None
) -> JSONResponse:
    """Let a step that waits for the event (`wait: {event: NAME}`) go on; the body, any JSON value, is its output.

    An event that is sent before a step waits for it is kept.  409 where the run has ended.
    """
    caller.require(str(session.run(run)["team"]))
    return JSONResponse(session.send_event(run, name, data), status_code=202)


@router.post(
    "/{run}/resume",
    status_code=202,
    response_model=Accepted,
    summary="Continue a run",
    responses=documented(403, 404, 409),
)
def resume(
    run: RunId, session: Acting, caller: Caller, response: Response, traceparent: _Trace = None
) -> dict[str, Any]:
    """Continue a failed, cancelled or orphaned run as a new run that adopts the finished steps."""
    caller.require(str(session.run(run)["team"]))
    submitted = session.resume(run, trace_id=trace_of(traceparent))
    response.headers["Location"] = f"/v1/runs/{submitted.run_id}"
    return {
        "run_id": submitted.run_id,
        "created": submitted.created,
        "reused": submitted.reused,
        "to_run": submitted.to_run,
    }
