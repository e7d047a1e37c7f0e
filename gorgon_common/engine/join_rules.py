"""Decides whether a step may start, from its join rule, its condition and the states of its dependencies."""

from __future__ import annotations

from gorgon_common.engine.context import Run
from gorgon_common.engine.records import Claimed, Weight, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.workflow.expressions import evaluate_condition
from gorgon_common.workflow.plan import Join, Kind, Node

_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})


def blocked(run: Run, step: Claimed) -> str | None:
    """Return the reason why a step may not start, or None.  Raises ExpressionError."""
    node = run.node(step)
    if node.phase == "on_error" and step.weight == Weight.INLINE:
        error, cancelled = run.knowledge.reader.failure(run.info.id)
        if error is None or cancelled:
            return "no step has failed" if error is None else "the run was cancelled"
    unmet = _join(run, step, node)
    if unmet is not None:
        return unmet
    if step.weight != Weight.INLINE:
        return None  # the condition was evaluated when the step became ready
    if node.condition is not None and not run.expansions(step.row):
        held, why = evaluate_condition(node.condition, run.env(step, node.refs), lenient=run.plan.lenient)
        if not held:
            return f"its condition is false: {why}"
    return None


def _join(run: Run, step: Claimed, node: Node) -> str | None:
    """Return the reason why the join rule is not met, or None."""
    if node.join is Join.ALL_DONE or node.kind in _ENGINE:
        return None
    if node.join is Join.ALL_SUCCESS and (not step.unmet or len(node.deps) < 2):
        return None  # all dependencies succeeded, or the only one already decided what its end means for this step
    rows = {dep.node: run.locate(step, dep.node) for dep in node.deps if not dep.order}
    ids = {step_id(run.info.id, row): number for number, row in rows.items() if row is not None}
    ended = run.knowledge.checkpoints(list(ids))
    states = [checkpoint.status for checkpoint in ended.values()]
    if node.join is Join.ALL_SUCCESS:
        for key, checkpoint in ended.items():
            if checkpoint.status is not StepStatus.SUCCEEDED:
                verb = "failed" if checkpoint.status is StepStatus.FAILED else "was skipped"
                return f"`{run.plan.nodes[ids[key]].name}` {verb}"
    if node.join is Join.NONE_FAILED and any(state is StepStatus.FAILED for state in states):
        return "a step that it depends on has failed"
    if node.join is Join.ANY_SUCCESS and ids and StepStatus.SUCCEEDED not in states:
        return "no step that it depends on has succeeded"
    return None
