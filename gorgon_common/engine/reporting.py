"""Emits telemetry events for steps, at the points where the engine has just committed a change.

The engine's own steps (gates, the end of a run) are omitted, because no file names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gorgon_common import telemetry
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.context import Run, RunCache
from gorgon_common.engine.outcomes import Expanded, Snoozed
from gorgon_common.engine.records import ROW_BITS, ROW_MASK, Claimed, Finish, ReadyStep, Result, Weight
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import GorgonError
from gorgon_common.telemetry import StepRef
from gorgon_common.workflow.plan import Kind

_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})

FALLBACK = "fallback"
"""Reason for the wait of a failed step whose fallback is running."""


def ref(run: Run, step: Claimed) -> StepRef | None:
    """Return the reference to a step for events; None for the engine's own steps."""
    node = run.node(step)
    if node.kind in _ENGINE:
        return None
    return StepRef(
        run=run.ref,
        step=run.path(step),
        kind=node.kind.value,
        queue=node.queue or "control",
        role=node.spec.get("role"),
        attempt=step.attempt,
        slow=step.weight == Weight.SLOW,
    )


def names(run: Run, step: Claimed) -> dict[str, Any]:
    """Return the log fields that identify a step."""
    found = {"run_id": run.info.public_id, "step": run.path(step), "attempt": step.attempt}
    return {**found, "trace_id": run.info.trace_id} if run.info.trace_id else found


def named(knowledge: RunCache, step: Claimed) -> dict[str, Any]:
    """Return the same fields for a run that may not be cached; only numbers if the database is unavailable too."""
    try:
        return names(knowledge.run(step.run), step)
    except GorgonError:
        return {"run": step.run, "step": step.row}


def claimed(knowledge: RunCache, steps: Iterable[Claimed]) -> None:
    """Steps were claimed by this worker."""
    if telemetry.active():
        for step in steps:
            found = _ref(knowledge, step)
            if found is not None:
                telemetry.emit(telemetry.StepClaimed(found))


def started(run: Run, step: Claimed) -> None:
    """Work on a step has begun."""
    if telemetry.active():
        found = ref(run, step)
        if found is not None:
            telemetry.emit(telemetry.StepStarted(found))


def parked(knowledge: RunCache, step: Claimed, outcome: Snoozed) -> None:
    """A step is waiting."""
    if telemetry.active():
        found = _ref(knowledge, step)
        if found is not None:
            event = telemetry.StepParked(
                found, outcome.reason, outcome.seconds, outcome.message, outcome.attempt, outcome.kind, outcome.took
            )
            telemetry.emit(event)


def expanded(knowledge: RunCache, step: Claimed, outcome: Expanded) -> None:
    """A step was expanded.  If that is its fallback, the step has failed."""
    if telemetry.active() and outcome.result is not None:
        found = _ref(knowledge, step)
        error = outcome.result.error or {}
        if found is not None:
            took = _seconds(outcome.result)
            message = str(error.get("message") or "")
            event = telemetry.StepParked(found, FALLBACK, 0.0, message, True, str(error.get("kind") or ""), took)
            telemetry.emit(event)


def ended(knowledge: RunCache, finishes: Sequence[Finish], refused: Sequence[int] = ()) -> None:
    """Steps have ended; `refused` are those whose results the fence rejected."""
    if not telemetry.active():
        return
    turned_away = set(refused)
    for finish in finishes:
        found = _ref(knowledge, finish.step)
        if finish.step.id in turned_away:
            if found is not None:
                telemetry.emit(telemetry.StepFenced(found))
            continue
        if found is not None:
            telemetry.emit(_ended(found, finish.result))
        if finish.skipped:
            _skipped(knowledge, finish)


def fenced(knowledge: RunCache, step: Claimed) -> None:
    """A step's outcome was rejected by the fence."""
    found = _ref(knowledge, step) if telemetry.active() else None
    if found is not None:
        telemetry.emit(telemetry.StepFenced(found))


def recovered(knowledge: RunCache, heads: Iterable[ReadyStep | Claimed], why: str) -> None:
    """Steps were recovered; `why`: see `telemetry.StepRecovered`."""
    if not telemetry.active():
        return
    for head in heads:
        if isinstance(head, Claimed):
            step = head
        else:
            _, parent, position = knowledge.run(head.id >> ROW_BITS).place(head.id & ROW_MASK)
            step = Claimed(head.id, 0, head.node, head.weight, head.queue, 1, parent, position, head.crashes)
        found = _ref(knowledge, step)
        if found is not None:
            telemetry.emit(telemetry.StepRecovered(found, why))


def settled(run: Run, step: Claimed, call: CallRecord) -> None:
    """A call of a step has ended."""
    found = ref(run, step) if telemetry.active() else None
    if found is not None:
        event = telemetry.CallSettled(
            found,
            call.provider,
            call.model,
            call.outcome,
            call.latency_ms / 1000,
            call.usage.input_tokens,
            call.usage.output_tokens,
            call.cost_micro,
        )
        telemetry.emit(event)


def over_budget(run: Run, step: Claimed, message: str, *, waits: bool) -> None:
    """A budget had no room for a call."""
    found = ref(run, step) if telemetry.active() else None
    if found is not None:
        telemetry.emit(telemetry.BudgetRefused(found, message, waits))


def _ref(knowledge: RunCache, step: Claimed) -> StepRef | None:
    return ref(knowledge.run(step.run), step)


def _ended(step: StepRef, result: Result) -> telemetry.StepEnded:
    error = result.error or {}
    return telemetry.StepEnded(
        step,
        StepStatus(result.status).name.lower(),
        _seconds(result),
        str(error["message"]) if "message" in error else None,
        str(error.get("kind") or ""),
        result.reason,
    )


def _skipped(knowledge: RunCache, finish: Finish) -> None:
    """Report the steps that were skipped together with one; they belong to the same body."""
    run = knowledge.run(finish.step.run)
    nodes = {row: number for number, row in run.siblings(finish.step).items()}
    for row, reason in finish.skipped.items():
        step = Claimed(
            (finish.step.run << ROW_BITS) | row,
            0,
            nodes[row],
            int(Weight.INLINE),
            finish.step.queue,
            0,
            finish.step.parent,
            finish.step.position,
            0,
        )
        found = ref(run, step)
        if found is not None:
            telemetry.emit(telemetry.StepEnded(found, "skipped", reason=reason))


def _seconds(result: Result) -> float | None:
    if result.started_at is None or result.finished_at is None:
        return None
    return max(0.0, (result.finished_at - result.started_at).total_seconds())
