"""Reads what past runs say about the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select

from gorgon_common import strict_json
from gorgon_common.costs.history import History, StepHistory
from gorgon_common.engine.records import step_id
from gorgon_common.engine.states import FINISHED_RUN, RunStatus, StepStatus
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.queries.places import run_of
from gorgon_common.persistence.tables import checkpoints, expansions, ledger, runs, steps
from gorgon_common.workflow.plan import Plan

RUNS = 20
"""The number of past runs of the workflow to read, newest first."""
ROWS = 2_000
"""The number of rows of one run to read; more rows of the same run add little."""
SIMILAR_CALLS = 1_000
"""The number of calls of any workflow to read, newest first."""

_UNCOUNTED = frozenset({"rate_limited", "cancelled", "unknown"})
"""Outcomes of calls that did no work."""


def read_history(database: Database, plan_of: Callable[[str], Plan], *, workflow: str, target: str) -> History:
    """Return data from finished runs of a workflow on a target (live, sandbox), and from recent calls of other
    workflows.
    """
    with database.report() as connection:
        past = connection.execute(
            select(runs.c.id, runs.c.plan_hash, runs.c.status, runs.c.started_at, runs.c.finished_at)
            .where(
                runs.c.workflow == workflow,
                runs.c.target == target,
                runs.c.status.in_([int(status) for status in FINISHED_RUN]),
            )
            .order_by(runs.c.id.desc())
            .limit(RUNS)
        ).all()
        found: dict[str, StepHistory] = {}
        for row in past:
            _run(connection, row.id, plan_of(row.plan_hash), found)
        similar = _similar(connection, target)
    seconds = tuple(
        (row.finished_at - row.started_at).total_seconds()
        for row in past
        if row.status == RunStatus.SUCCEEDED and row.started_at is not None and row.finished_at is not None
    )
    return History(len(past), seconds, found, similar)


def _run(connection: Connection, number: int, plan: Plan, found: dict[str, StepHistory]) -> None:
    low, high = step_id(number, 0), step_id(number + 1, 0)

    def of(node: int) -> StepHistory:
        return found.setdefault(plan.nodes[node].id, StepHistory())

    called: set[int] = set()
    query = (
        select(ledger, steps.c.node)
        .select_from(ledger.join(steps, steps.c.id == ledger.c.step_id))
        .where(ledger.c.step_id >= low, ledger.c.step_id < high, ledger.c.provider != "none")
        .order_by(ledger.c.step_id)
        .limit(ROWS)
    )
    for call in connection.execute(query):
        if call.outcome not in _UNCOUNTED:
            _note(of(call.node), call, first=call.step_id not in called)
            called.add(call.step_id)
    states = (
        select(steps.c.id, steps.c.node, steps.c.status, checkpoints.c.started_at, checkpoints.c.finished_at)
        .select_from(steps.outerjoin(checkpoints, checkpoints.c.step_id == steps.c.id))
        .where(steps.c.id >= low, steps.c.id < high)
        .order_by(steps.c.id)
        .limit(ROWS)
    )
    samples: dict[int, int] = {}
    for row in connection.execute(states):
        known = of(row.node)
        if row.status == StepStatus.SKIPPED:
            known.skipped += 1
        elif row.status in (StepStatus.SUCCEEDED, StepStatus.FAILED) and row.id not in called:
            known.executions += 1
            if row.started_at is not None and row.finished_at is not None:
                known.took.append((row.finished_at - row.started_at).total_seconds())
        if row.status == StepStatus.SUCCEEDED and known.sample is None:
            samples.setdefault(row.node, row.id)
    _expanded(connection, plan, low, high, of)
    texts = connection.execute(
        select(checkpoints.c.step_id, checkpoints.c.output).where(
            checkpoints.c.step_id.in_(list(samples.values())[:500])
        )
    )
    outputs = {row.step_id: row.output for row in texts}
    for node, key in samples.items():
        if outputs.get(key):
            of(node).sample = strict_json.loads_stored(outputs[key])


def _expanded(connection: Connection, plan: Plan, low: int, high: int, of: Callable[[int], StepHistory]) -> None:
    """Record how many items each map had, and how many rounds each loop."""
    query = (
        select(expansions.c.step_id, expansions.c.phase, expansions.c.count, expansions.c.reduce, steps.c.node)
        .select_from(expansions.join(steps, steps.c.id == expansions.c.step_id))
        .where(expansions.c.step_id >= low, expansions.c.step_id < high)
        .limit(ROWS)
    )
    rounds: dict[int, tuple[int, int]] = {}
    for row in connection.execute(query):
        if row.phase == "item":
            of(row.node).counts.append(int(row._mapping["count"]) - (row.reduce is not None))
        elif row.phase == "body":
            rounds[row.step_id] = (row.node, rounds.get(row.step_id, (row.node, 0))[1] + 1)
    for node, count in rounds.values():
        of(node).counts.append(count)


def _note(known: StepHistory, call: Any, *, first: bool) -> None:
    known.calls += 1
    known.executions += first
    known.input_tokens += call.input_tokens
    known.cached_tokens += call.cache_read_tokens
    if call.output_tokens:
        known.input.append(float(call.input_tokens))
        known.output.append(float(call.output_tokens))
        known.seconds.append(call.latency_ms / 1000)


def _similar(connection: Connection, target: str) -> dict[tuple[str | None, str, str], StepHistory]:
    query = (
        select(ledger)
        .select_from(ledger.join(runs, runs.c.id == run_of(ledger.c.step_id)))
        .where(runs.c.target == target, ledger.c.provider != "none")
        .order_by(ledger.c.step_id.desc())
        .limit(SIMILAR_CALLS)
    )
    found: dict[tuple[str | None, str, str], StepHistory] = {}
    for call in connection.execute(query):
        if call.outcome not in _UNCOUNTED:
            _note(found.setdefault((call.role, call.provider, call.model), StepHistory()), call, first=True)
    return found
