"""`limits.max_parallel` of a run: counts its slow steps in progress, and keeps the others waiting.

The count is made when such a step is claimed, with the run's row in `run_slots` locked.  That row lists the steps that
were claimed last; those still running are counted.  Code that ends, parks or loses a step therefore has nothing to
update here.  A waiting step continues with the next claim in the run, or with the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, delete, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.engine.poison import SUSPECT_DEATHS
from gorgon_common.engine.records import Claimed, ClaimResult, ReadyStep
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.predicates import chunks, lives
from gorgon_common.persistence.tables import db_now, held_steps, run_slots, runs, steps


def open_slots(connection: Connection, run: int) -> None:
    """Prepare a new run that has `max_parallel`."""
    connection.execute(insert(run_slots).values(run_id=run, holders="[]"))


def close_slots(connection: Connection, run: int) -> None:
    """Delete the rows of a run that has ended."""
    connection.execute(delete(held_steps).where(held_steps.c.run_id == run))
    connection.execute(delete(run_slots).where(run_slots.c.run_id == run))


def claim_limited(
    connection: Connection,
    worker: Any,
    run: int,
    ids: Sequence[int],
    *,
    follows: Sequence[int] = (),
    free: int,
    suspects: bool,
    lost: float,
) -> ClaimResult:
    """Claim ready steps of a run while it has room: the waiting steps and `ids`, in the order of their rows.

    `follows` have just become ready.  Members of a fan-out among them are sent together; the others are claimed like
    `ids`.  `worker` takes steps of its own queues while it has `free` slots.  Other steps for which there is room are
    owed a message, and the rest wait.  With `worker` None, no step is taken.  `lost`: seconds after which a message
    counts as lost.
    """
    query = select(run_slots.c.holders, runs.c.max_parallel, runs.c.target, runs.c.home).join(
        runs, runs.c.id == run_slots.c.run_id
    )
    row = connection.execute(
        query.where(run_slots.c.run_id == run, runs.c.active).with_for_update(of=run_slots)
    ).first()
    if row is None:
        return ClaimResult()
    if worker is not None and (
        (row.target, row.home) != (worker.target, worker.home) or not _lives(connection, worker)
    ):
        worker = None
    running = _with_status(connection, json.loads(row.holders), StepStatus.RUNNING)
    room = max(0, row.max_parallel - len(running))
    waiting = select(held_steps.c.step_id).where(held_steps.c.run_id == run).order_by(held_steps.c.step_id)
    next_ = list(connection.scalars(waiting.limit(room))) if room else []
    found = _ready(connection, sorted({*next_, *ids, *follows}))
    made = ClaimResult()
    mine: list[int] = []
    sent: list[int] = []
    together = set(follows).difference(ids, next_)
    canvas = [step.id for step in found if step.grouped and step.id in together]
    for step in found:
        if step.grouped and step.id in together:
            continue
        known = step.crashes < SUSPECT_DEATHS or (suspects and step.id in ids)
        if len(mine) + len(sent) >= room:
            made.held.append(step.id)
        elif worker is not None and free > len(mine) and step.queue in worker.queues and known:
            mine.append(step.id)
        else:
            sent.append(step.id)
    made.held = _hold(connection, run, made.held)
    made.mine = _claim(connection, worker, mine)
    if len(made.mine) < len(mine):  # its lease has just expired: another worker may take them
        taken = {step.id for step in made.mine}
        sent += [key for key in mine if key not in taken]
        mine = [key for key in mine if key in taken]
    made.ready = _owe(connection, [*sent, *canvas], lost)
    if next_:
        over = set(next_) - set(_with_status(connection, next_, StepStatus.READY))
        gone = over.union(mine, sent).intersection(next_)
        connection.execute(delete(held_steps).where(held_steps.c.run_id == run, held_steps.c.step_id.in_(gone)))
    if mine:
        holders = json.dumps([*running, *(step.id for step in made.mine)])
        connection.execute(update(run_slots).where(run_slots.c.run_id == run).values(holders=holders))
    return made


def _lives(connection: Connection, worker: Any) -> bool:
    return connection.scalar(select(literal(1)).where(lives(worker.owner))) is not None


def _with_status(connection: Connection, ids: Sequence[int], status: StepStatus) -> list[int]:
    if not ids:
        return []
    return list(connection.scalars(select(steps.c.id).where(steps.c.id.in_(ids), steps.c.status == int(status))))


def _ready(connection: Connection, ids: Sequence[int]) -> list[Any]:
    """Lock those of the steps that are ready.

    Locked rows are skipped: the transaction that holds the lock will count the step next, cancel it, or has found that
    its message is late.  Waiting for the lock while holding the lock on the run's slots could deadlock.
    """
    found: list[Any] = []
    for part in chunks(ids):
        found += connection.execute(
            select(steps.c.id, steps.c.queue, steps.c.crashes, steps.c.grouped)
            .where(steps.c.id.in_(part), steps.c.status == int(StepStatus.READY))
            .order_by(steps.c.id)
            .with_for_update(skip_locked=True)
        ).all()
    return found


def _hold(connection: Connection, run: int, ids: Sequence[int]) -> list[int]:
    """Let steps wait.  They have no message any more that could get lost."""
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    for part in chunks(ids):
        rows = [{"run_id": run, "step_id": key} for key in part]
        connection.execute(dialect.insert(held_steps).values(rows).on_conflict_do_nothing())
        connection.execute(update(steps).where(steps.c.id.in_(part)).values(due=None))
    return list(ids)


def _claim(connection: Connection, worker: Any, ids: Sequence[int]) -> list[Claimed]:
    if not ids:
        return []
    claimed = (
        update(steps)
        .where(steps.c.id.in_(ids), lives(worker.owner))
        .values(status=int(StepStatus.RUNNING), token=steps.c.token + 1, owner=worker.owner, due=db_now())
        .returning(
            steps.c.id,
            steps.c.token,
            steps.c.node,
            steps.c.weight,
            steps.c.queue,
            steps.c.attempt,
            steps.c.parent,
            steps.c.position,
            steps.c.crashes,
            steps.c.unmet,
        )
    )
    mine = sorted((Claimed(*row) for row in connection.execute(claimed)), key=lambda step: step.id)
    for step in mine:
        tell(connection, step.run, step.row, "step.started", None, {"attempt": step.attempt})
    return mine


def _owe(connection: Connection, ids: Sequence[int], lost: float) -> list[ReadyStep]:
    if not ids:
        return []
    owed = (
        update(steps)
        .where(steps.c.id.in_(ids))
        .values(due=db_now(lost))
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
    )
    return sorted((ReadyStep(*row) for row in connection.execute(owed)), key=lambda head: head.id)


def waiting_runs(connection: Connection, *, home: str, target: str) -> list[int]:
    """Return the unfinished runs of a home that have steps waiting for `max_parallel`."""
    query = select(runs.c.id).where(
        runs.c.status.in_([int(RunStatus.RUNNING), int(RunStatus.QUEUED), int(RunStatus.FINISHING)]),
        runs.c.max_parallel.is_not(None),
        runs.c.active,
        runs.c.home == home,
        runs.c.target == target,
        select(literal(1)).where(held_steps.c.run_id == runs.c.id).exists(),
    )
    return list(connection.scalars(query.order_by(runs.c.id)))


def held(connection: Connection, run: int) -> set[int]:
    """Return the steps of a run that wait until fewer of its steps are in progress."""
    return set(connection.scalars(select(held_steps.c.step_id).where(held_steps.c.run_id == run)))
