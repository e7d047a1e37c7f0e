"""Budgets of the org, a team or a workflow."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gorgon_api.dependencies import Acting, Caller
from gorgon_api.errors import documented
from gorgon_common.application.budgets import parse_subject
from gorgon_common.client.schemas import BudgetChange, BudgetList, BudgetView
from gorgon_common.client.views import budget_document

router = APIRouter(prefix="/v1/budgets", tags=["budgets"], responses=documented(401, 422, 503))


@router.get("", response_model=BudgetList, summary="List budgets")
def budgets(session: Acting) -> JSONResponse:
    """Return every budget with the amounts spent and reserved, in dollars and tokens."""
    return JSONResponse({"items": [budget_document(entry) for entry in session.list_budgets()]})


@router.put("", response_model=BudgetView, summary="Set a budget", responses=documented(403, 413))
def set_budget(change: BudgetChange, session: Acting, caller: Caller) -> JSONResponse:
    """Set or change a budget.  A team's budget requires a key for that team; any other budget, a key for every team."""
    scope, name = parse_subject(change.scope)
    if scope == "team":
        caller.require(name)
    else:
        caller.require_all("This budget")
    given: dict[str, Any] = {field: getattr(change, field) for field in {"usd", "tokens"} & change.model_fields_set}
    limits = {field: None if value is None else str(value) for field, value in given.items()}
    made = session.set_budget(change.scope, period=change.period, timezone=change.timezone, **limits)
    return JSONResponse(budget_document(made))
