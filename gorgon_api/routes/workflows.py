"""Workflows and roles: the bundled ones, and checking and planning a YAML text."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from gorgon_api.dependencies import Acting, Caller
from gorgon_api.errors import documented
from gorgon_api.submission import read
from gorgon_common.application.roles import load_roles
from gorgon_common.application.workflows import bundled
from gorgon_common.client.schemas import Planning, PlanView, RoleList, Source, Validation, WorkflowList
from gorgon_common.client.views import plan_view
from gorgon_common.errors import InputInvalid, WorkflowInvalid

router = APIRouter(prefix="/v1", tags=["workflows"], responses=documented(401, 422))


@router.get("/workflows", response_model=WorkflowList, summary="List the bundled workflows")
def workflows(_caller: Caller) -> dict[str, Any]:
    """Return the bundled workflows; each can be started by its name."""
    return {"items": [entry.to_dict() for entry in bundled()]}


@router.post(
    "/workflows/validate", response_model=Validation, summary="Check a workflow", responses=documented(404, 413)
)
def validate(source: Source, session: Acting) -> dict[str, Any]:
    """Return every problem and every warning in a YAML text; 200 in either case."""
    try:
        _, warnings = read(session, source)
    except WorkflowInvalid as error:
        return {"valid": False, "problems": [problem.to_dict() for problem in error.problems]}
    return {"valid": True, "problems": [problem.to_dict() for problem in warnings]}


@router.post(
    "/workflows/plan", response_model=PlanView, summary="Compile a workflow", responses=documented(403, 404, 413)
)
def plan(planning: Planning, session: Acting, caller: Caller) -> dict[str, Any]:
    """Return the compiled workflow with its inputs and steps, and the estimated cost and duration of a run."""
    compiled, warnings = read(session, planning)
    team = planning.team or compiled.team
    if planning.estimate:
        caller.require(team)  # an estimate reveals what is left of the team's budgets
    view = {**plan_view(compiled, warnings), "estimate": None, "estimate_problem": None}
    if not planning.estimate:
        return view
    try:
        view["estimate"] = session.estimate(compiled, planning.inputs or {}, target=planning.target, team=team)
    except InputInvalid as error:
        if planning.inputs is not None:
            raise
        view["estimate_problem"] = error.message
    return view


@router.get("/roles", response_model=RoleList, summary="List the roles")
def roles(_caller: Caller) -> dict[str, Any]:
    """Return the roles for agents."""
    return {
        "items": [
            {"name": role.name, "purpose": role.purpose, "provider": role.provider, "tier": role.tier}
            for role in load_roles().values()
        ]
    }
