"""Rate limits: the providers' limits, their current use, and configured limits."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gorgon_api.dependencies import Acting, Caller
from gorgon_api.errors import documented
from gorgon_common.client.schemas import LimitChange, LimitRule, LimitsView

router = APIRouter(prefix="/v1/limits", tags=["limits"], responses=documented(401, 422, 503))


@router.get("", response_model=LimitsView, summary="List rate limits")
def limits(session: Acting) -> JSONResponse:
    """Return the recent use of each model's limits, the configured limits, and the accuracy of token estimates."""
    return JSONResponse(session.limits())


@router.put("", response_model=LimitRule, summary="Set limits", responses=documented(403, 413))
def set_limits(change: LimitChange, session: Acting, caller: Caller) -> JSONResponse:
    """Set limits that apply regardless of what the provider reports; workers see them within five seconds.

    They apply to every team, so the key must be allowed to act for all teams.
    """
    caller.require_all("A rate limit")
    return JSONResponse(session.set_limits(change.provider, change.model, change.limits, clear=change.clear))
