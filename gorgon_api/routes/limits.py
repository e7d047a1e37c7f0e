"""What providers allow, what is used of it, and limits of one's own."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gorgon_api.dependencies import Caller, TheServices
from gorgon_api.errors import documented
from gorgon_common.client.schemas import LimitChange, LimitRule, LimitsView

router = APIRouter(prefix="/v1/limits", tags=["limits"], responses=documented(401, 422, 503))


@router.get("", response_model=LimitsView, summary="List rate limits")
def limits(services: TheServices, _caller: Caller) -> JSONResponse:
    """Return what was used lately of each model's limits, the limits that were set, how well tokens are estimated."""
    return JSONResponse(services.limits())


@router.put("", response_model=LimitRule, summary="Set limits", responses=documented(403, 413))
def set_limits(change: LimitChange, services: TheServices, caller: Caller) -> JSONResponse:
    """Set limits that apply regardless of what the provider reports; workers see them within five seconds.

    They hold for every team, so the key must be allowed to act for all.
    """
    caller.require_all("A rate limit")
    return JSONResponse(services.set_limits(change.provider, change.model, change.limits, clear=change.clear))
