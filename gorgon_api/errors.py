"""Reports every error as `application/problem+json` (RFC 9457): problem, field and remedy, but nothing internal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gorgon_common import errors
from gorgon_common.client.http import ERROR_TYPES, PROBLEM_TYPE
from gorgon_common.client.schemas import ErrorBody
from gorgon_common.ids import new_id
from gorgon_common.logs import get_logger

_log = get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
_STATUS: dict[type[errors.GorgonError], int] = {
    errors.WorkflowInvalid: 422,
    errors.InputInvalid: 422,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.NotAvailable: 422,
    errors.Forbidden: 403,
    errors.ConfigurationError: 422,
    errors.Unavailable: 503,
}
KINDS: dict[str, str] = {
    "request-invalid": "a field of the request is missing, unknown or wrong; `errors` names each",
    "bad-request": "the request cannot be read or served as it is",
    "unauthorized": "the API key is missing or wrong",
    "forbidden": "the key may not act for the `team`",
    "not-found": "there is no such route, run, workflow or role",
    "method-not-allowed": "the route exists, but not with this method",
    "conflict": "the state does not allow it; a concurrency key that is taken gives its `key` and the runs `held_by`",
    "content-too-large": "the request has more bytes than it may have",
    "unsupported-media-type": "the body is not JSON",
    "workflow-invalid": "the workflow does not load; `problems` gives each with line and column",
    "input-invalid": "an input is missing, unknown or of the wrong type",
    "not-available": "the workflow needs something that this version cannot do",
    "configuration": "a setting of the server is missing or wrong",
    "unavailable": "the database or the broker cannot be reached; try again",
    "internal": "the server failed; `instance` is what its log calls it",
}
"""Every kind of problem: the end of its `type`, and its meaning."""

_HINTS = {
    404: "GET /openapi.json lists what there is.",
    405: "GET /openapi.json says which methods a path takes.",
}


class Unauthorized(errors.UserError):
    """This needs an API key."""

    hint = "Send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`."


def documented(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that may answer with these errors."""
    return {
        code: {
            "model": ErrorBody,
            "description": HTTPStatus(code).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
        }
        for code in codes
    }


def add_handlers(app: FastAPI) -> None:
    """Answer every exception with a problem document."""
    app.add_exception_handler(errors.GorgonError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_the_request)
    app.add_exception_handler(HTTPException, _of_the_framework)
    app.add_exception_handler(Exception, _unexpected)


def problem(
    status: int,
    kind: str,
    detail: str,
    *,
    hint: str | None = None,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    """Return the response for one problem; `more` are additional fields."""
    assert kind in KINDS, kind
    body = {
        "type": f"{PROBLEM_TYPE}{kind}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "hint": hint or None,
        **more,
    }
    shown = {name: value for name, value in body.items() if value is not None}
    return JSONResponse(shown, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


async def _of_ours(_request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, Unauthorized):
        return problem(
            401, "unauthorized", error.message, hint=error.hint, headers={"WWW-Authenticate": 'Bearer realm="gorgon"'}
        )
    if isinstance(error, errors.WorkflowInvalid):
        found = [entry.to_dict() for entry in error.problems]
        return problem(422, "workflow-invalid", "The workflow is not valid.", problems=found)
    for kind, known in ERROR_TYPES.items():
        if isinstance(error, known):
            status = _STATUS[known]
            headers = {"Retry-After": "5"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
            return problem(status, kind, error.message, hint=error.hint, headers=headers, **_facts(error))
    if isinstance(error, errors.UserError):
        return problem(422, "bad-request", error.message, hint=error.hint)
    return await _unexpected(_request, error)


def _facts(error: Exception) -> dict[str, Any]:
    if isinstance(error, errors.KeyTaken):
        return {"key": error.key, "held_by": error.held_by}
    if isinstance(error, errors.Forbidden) and error.team:
        return {"team": error.team}
    return {}


async def _of_the_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [{"field": _field(entry), "message": _sentence(entry)} for entry in error.errors()]
    return problem(422, "request-invalid", "The request is not valid.", errors=found)


async def _of_the_framework(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = error.status_code
    phrase = "content-too-large" if code == 413 else HTTPStatus(code).phrase.lower().replace(" ", "-")
    kind = phrase if phrase in KINDS else "bad-request" if code < 500 else "internal"
    return problem(code, kind, str(error.detail), hint=_HINTS.get(code), headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    reference = new_id("err")
    _log.error("request failed", reference=reference, method=request.method, path=request.url.path, exc_info=error)
    return problem(
        500,
        "internal",
        "The server failed to answer this request.",
        hint=f"Its log says why, under {reference}.",
        instance=reference,
    )


def _field(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "json_invalid":
        return f"body, character {entry['loc'][-1]}"
    return _path(entry["loc"])


def _path(location: Sequence[int | str]) -> str:
    parts = [str(part) for part in location if part != "body"]
    return ".".join(parts) or "body"


def _sentence(entry: Mapping[str, Any]) -> str:
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "json_invalid":
        return f"The body is not valid JSON: {(entry.get('ctx') or {}).get('error', message)}"
    return "This field is not known." if entry["type"] == "extra_forbidden" else message
