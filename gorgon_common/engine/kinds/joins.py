"""The engine's own steps: the joins between the phases of a run, and the end of the run."""

from __future__ import annotations

from typing import Any, ClassVar

from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import Outcome, RunFinished
from gorgon_common.engine.records import step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions import render_value


class PhaseJoin(StepHandler):
    """Joins the file's main steps.  Their failures are stored in the run's row."""

    kind: ClassVar[str] = "gate"

    def execute(self, context: StepContext) -> Outcome:
        """Let the next phase start."""
        return context.succeeded()


class Finally(PhaseJoin):
    """Joins the `on_error` steps."""

    kind: ClassVar[str] = "finally"


class End(StepHandler):
    """The run's last step: renders the outputs and determines the run's final status."""

    kind: ClassVar[str] = "end"

    def execute(self, context: StepContext) -> Outcome:
        """Render the outputs, unless the run has failed or was cancelled."""
        error, cancelled = context.run.knowledge.reader.failure(context.run.info.id)
        outputs: Any = None
        if error is None and not cancelled:
            error = _late_failure(context)
            try:
                outputs = _outputs(context)
            except ExpressionError as wrong:
                error = _without_outputs(context, wrong)
        status = RunStatus.CANCELLED if cancelled else RunStatus.FAILED if error else RunStatus.SUCCEEDED
        return RunFinished(context.result(StepStatus.SUCCEEDED), status, outputs, error)


def _outputs(context: StepContext) -> Any:
    plan = context.run.plan
    return render_value(dict(plan.outputs), context.run.env(context.step, plan.output_refs), legacy=plan.lenient)


def _without_outputs(context: StepContext, wrong: ExpressionError) -> dict[str, Any]:
    error = {**context.error_data(wrong), "step": "outputs"}
    cause = _first_error(context)
    if cause is not None:
        error["message"] += f".  Before that, `{cause['step']}` failed: {cause['message']}"
        error["hint"] = cause.get("hint") or error["hint"]
    error["summary"] = f"{context.run.info.workflow}: its outputs failed: {error['message']}"
    return error


def _first_error(context: StepContext) -> dict[str, Any] | None:
    """Return the error of the first failed step, if the run continued without it."""
    run = context.run
    ids = [step_id(run.info.id, row) for row in range(run.plan.top)]
    failed = [found for found in run.knowledge.checkpoints(ids).values() if found.error and found.finished_at]
    return dict(min(failed, key=lambda found: str(found.finished_at)).error or {}) if failed else None


def _late_failure(context: StepContext) -> dict[str, Any] | None:
    """Return the error of a failed `finally` step."""
    run = context.run
    ids = [step_id(run.info.id, row) for row in run.keeps]
    for checkpoint in run.knowledge.checkpoints(ids).values():
        if checkpoint.status is StepStatus.FAILED:
            return dict(checkpoint.error or {"message": "a final step failed"})
    return None
