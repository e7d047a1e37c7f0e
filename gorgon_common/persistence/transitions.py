"""Claims and ends of steps inside a transaction, and what calls `claim_and_finish` on either database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import Connection, and_, update

from gorgon_common.engine.records import (
    ClaimCapacity,
    Claimed,
    Finish,
    ReadyStep,
    Recovered,
    Result,
    TransitionResult,
    step_id,
)
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence import (
    cancellation,
    claim_and_finish_sqlite,
    encoding,
    recovery,
    settling,
)
from gorgon_common.persistence.predicates import LOST_SECONDS, lock_run
from gorgon_common.persistence.tables import (
    steps,
)
from gorgon_common.persistence.workers import Worker

CLAIM_AND_FINISH = (
    "SELECT * FROM gorgon_claim_and_finish(%b, %b, %b, %b::smallint[], %b::interval, %b::int, %b::int, %b::int, %b,"
    " %b::bigint[], %b::jsonb, %b::jsonb, %b::jsonb)"
)
# Budgets are settled in the same transaction, before the steps: the lock order is budget rows, then step rows.
SETTLE_CLAIM_AND_FINISH = (
    "SELECT t.* FROM (SELECT gorgon_settle(%b::jsonb) AS zero OFFSET 0) s, LATERAL gorgon_claim_and_finish(%b, %b, %b,"
    " %b::smallint[], %b::interval, %b::int + s.zero, %b::int, %b::int, %b, %b::bigint[], %b::jsonb, %b::jsonb,"
    " %b::jsonb) t"
)


def claim_and_finish(
    connection: Connection,
    worker: Worker,
    keep: ClaimCapacity,
    *,
    claims: Sequence[int] = (),
    finishes: Sequence[Finish] = (),
    suspects: bool = False,
) -> TransitionResult:
    """Claim and finish steps; see `Store.claim_and_finish`."""
    settling.settle(connection, settlements(finishes))
    driver = cast(Any, connection.connection.driver_connection)
    if connection.dialect.name == "sqlite":
        said, facts, skips = encoded(finishes)
        who = claim_and_finish_sqlite.Who(worker.owner, worker.target, worker.home, worker.queues, LOST_SECONDS)
        rows = claim_and_finish_sqlite.claim_and_finish(
            driver, who, keep, suspects=suspects, claims=claims, finishes=said, calls=facts, skips=skips
        )
    else:
        given = arguments(worker, keep, claims=claims, finishes=finishes, suspects=suspects)
        rows = driver.execute(CLAIM_AND_FINISH, given, binary=True).fetchall()
    return decoded(rows)


def arguments(
    worker: Worker,
    keep: ClaimCapacity,
    *,
    claims: Sequence[int] = (),
    finishes: Sequence[Finish] = (),
    suspects: bool = False,
) -> tuple[Any, ...]:
    """Return the arguments of `gorgon_claim_and_finish`."""
    said, facts, skips = encoded(finishes)
    return (
        worker.owner,
        worker.target,
        worker.home,
        worker.queues,
        f"{LOST_SECONDS} seconds",
        keep.fast,
        keep.slow,
        keep.pull,
        suspects,
        list(claims) or None,
        json.dumps(said, default=_iso) if said else None,
        json.dumps(facts, default=_iso) if facts else None,
        json.dumps(skips) if skips else None,
    )


def bury(connection: Connection, row: Any) -> list[ReadyStep]:
    """End an ownerless step of a stopped run; return the steps that become ready as a result."""
    step = Claimed(row.id, row.token, row.node, row.weight, row.queue, 1, None, None, row.crashes)
    ended = Finish(step, Result(StepStatus.CANCELLED, reason="the run stopped before the step ended"))
    nobody = Worker(0, target="", home="", queues=())
    return claim_and_finish(connection, nobody, ClaimCapacity(0, 0, 0), finishes=[ended]).ready


def fail(
    connection: Connection,
    worker: Worker,
    keep: ClaimCapacity,
    finish: Finish,
    *,
    container: int,
    keeps: frozenset[int],
    run_fails: bool,
) -> TransitionResult:
    """Finish a failed step and stop the steps around it: no new step starts, but calls in flight finish.

    `container`: the row that continues when the last of them has ended (a composite, or the run's gate).
    `keeps`: top-level rows that may still run (the engine's own, on_error, finally).
    """
    settling.settle(connection, settlements([finish]))  # lock order: budgets before runs and steps
    lock_run(connection, finish.step.run)
    # Same rule as the fence: a step whose lease has expired may still fail, as long as no other worker has
    # taken it over.
    mine = connection.execute(
        update(steps).where(_fenced(finish.step)).values(status=int(StepStatus.RUNNING)).returning(steps.c.id)
    )
    if mine.first() is None:
        return claim_and_finish(connection, worker, keep, finishes=[finish])
    reason = "the run stopped because a step failed" if run_fails else "another step of the same part failed"
    heads = cancellation.halt(connection, finish.step.run, container, keeps, reason)
    if run_fails:
        cancellation.finishing(connection, finish.step.run, error=finish.result.error)
    advance = claim_and_finish(connection, worker, keep, finishes=[finish])
    advance.ready += heads
    return advance


def reap(
    connection: Connection,
    *,
    home: str,
    target: str | None = None,
    sparing: int | None = None,
    thorough: bool = True,
    poison_deaths: int,
) -> Recovered:
    """Take back the steps of dead workers, so that they are ready again.

    If the dead worker held suspects (steps whose owners died twice), only these are blamed; otherwise all its steps
    are.  See `engine.poison`.  A step that was still running after its run had stopped is cancelled instead.

    `sparing`: the calling worker, which counts as alive whatever its lease says.  `thorough`: read every step of
    the live runs.  Otherwise they are read only if the sweep has not handled a dead worker yet.  `poison_deaths`: the
    number of worker deaths that condemns a step.
    """
    freed: list[ReadyStep] = []
    taken = recovery.reap(connection, home=home, target=target, sparing=sparing, thorough=thorough, limit=poison_deaths)
    for row in taken.stopped:
        freed += bury(connection, row)
    settling.abandon_orphans(connection)
    return Recovered(taken.ready, freed)


def _iso(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} cannot be stored")


def _fenced(step: Claimed) -> Any:
    open_ = [int(StepStatus.READY), int(StepStatus.RUNNING)]
    return and_(steps.c.id == step.id, steps.c.token == step.token, steps.c.status.in_(open_))


def encoded(
    finishes: Sequence[Finish],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (finishes, calls, skips) in the form that `claim_and_finish.sql` takes.

    A second finish of the same claim would be refused; it is left out, but its calls are facts.
    """
    said: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    skips: list[dict[str, Any]] = []
    seen: set[tuple[int, int]] = set()
    for finish in finishes:
        claim = finish.step.id, finish.step.token
        if claim not in seen:
            said.append(encoding.checkpoint(finish))
        seen.add(claim)
        if finish.result.calls:
            at = finish.result.finished_at or datetime.now(UTC)
            facts += encoding.calls(finish.step, finish.result.calls, finish.result.attempts, at)
        run = finish.step.run
        skips += [
            {"step_id": step_id(run, row), "detail": encoding.dump({"reason": reason})}
            for row, reason in finish.skipped.items()
        ]
    return said, facts, skips


def settlements(finishes: Sequence[Finish]) -> list[dict[str, Any]]:
    """Return what the budgets have to post for finishes."""
    return [fact for finish in finishes for fact in encoding.settlements(finish.step, finish.result.calls)]


def decoded(rows: Sequence[tuple[Any, ...]]) -> TransitionResult:
    """Return the rows of `gorgon_claim_and_finish` as a result."""
    advance = TransitionResult()
    for what, key, token, node, weight, queue, attempt, parent, position, crashes, unmet in rows:
        if what == 1:
            advance.mine.append(Claimed(key, token, node, weight, queue, attempt, parent, position, crashes, unmet))
        elif what == 2:
            advance.ready.append(ReadyStep(key, node, weight, queue, crashes))
        elif what == 4:
            advance.counted.append(key)
        elif what == 5:
            advance.lapsed = True
        elif what == 6:
            advance.suspects.append(key)
        else:
            advance.refused.append(key)
    return advance
