"""Turns a submission into a run: compile, refuse what cannot run, create and publish.

`Session.submit` publishes by task name, so no worker code is imported here.
"""

from __future__ import annotations

from gorgon_api.auth import Principal
from gorgon_common.application import workflows
from gorgon_common.application.runs import Submitted
from gorgon_common.application.session import Session
from gorgon_common.application.workflows import Plan
from gorgon_common.client.schemas import Source, Submission
from gorgon_common.errors import InputInvalid, NotAvailable, Problem


def read(session: Session, asked: Source | Submission) -> tuple[Plan, list[Problem]]:
    """Return the compiled workflow and its warnings.  Raises WorkflowInvalid, NotFound, InputInvalid."""
    if (asked.workflow is None) == (asked.source is None):
        raise InputInvalid(
            "Exactly one of `workflow` and `source` is needed.",
            hint="`workflow` is the name of a bundled workflow, `source` the text of a YAML file.",
        )
    if asked.source is not None:
        return session.read(asked.source)
    return session.read(workflows.bundled_text(str(asked.workflow)), file=asked.workflow)


def dispatch(
    session: Session, submission: Submission, caller: Principal, key: str | None, trace_id: str | None = None
) -> Submitted:
    """Start the run that a submission asks for.

    It belongs to the submission's team, by default the file's `team:`; the key must be allowed to act for that team.
    Raises WorkflowInvalid, NotFound, InputInvalid, Forbidden, NotAvailable, Conflict, Unavailable.
    """
    plan, _ = read(session, submission)
    team = submission.team or plan.team
    caller.require(team)
    if plan.unavailable:
        raise NotAvailable("This workflow cannot run yet: " + " ".join(plan.unavailable))
    if submission.max_cost_usd is not None:
        plan = workflows.capped(plan, submission.max_cost_usd)
    return session.submit(
        plan, submission.inputs, target=submission.target, team=team, idempotency_key=key, trace_id=trace_id
    )
