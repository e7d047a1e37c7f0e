"""Steps: what happens to them besides claims and ends.  Each function is part of its caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import Connection, and_, insert, select, update

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import (
    ROW_MASK,
    Buried,
    Children,
    Claimed,
    ReadyStep,
    Refusal,
    Released,
    Row,
    Waiting,
    Weight,
    step_id,
)
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import Conflict
from gorgon_common.persistence import (
    deaths,
    encoding,
    lost_calls,
    settling,
    waits,
)
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.predicates import LOST_SECONDS, chunks, is_live, live_steps, lock_run, now
from gorgon_common.persistence.tables import (
    SQLITE_TIME,
    db_now,
    expansions,
    runs,
    steps,
)
from gorgon_common.persistence.transitions import bury
from gorgon_common.persistence.workers import Worker


def insert_rows(connection: Connection, run: int, rows: Sequence[Row], *, offset: int) -> None:
    """Insert rows in bulk; `row` and `successors` are relative to `offset`."""
    if not rows:
        return
    due = now(connection) + timedelta(seconds=LOST_SECONDS)
    driver = cast(Any, connection.connection.driver_connection)
    if connection.dialect.name == "sqlite":
        text = due.strftime(SQLITE_TIME)
        driver.executemany(
            "INSERT INTO steps (id, due, token, node, deps_left, status, attempt, crashes, weight, queue, grouped,"
            " carried, parent, position, successors) VALUES (?, ?, 0, ?, ?, ?, 1, 0, ?, ?, ?, 0, ?, ?, ?)",
            [
                (
                    step_id(run, offset + row.row),
                    None if row.deps_left else text,
                    row.node,
                    row.deps_left,
                    _initial(row),
                    int(row.weight),
                    row.queue,
                    row.grouped,
                    row.parent,
                    row.position,
                    json.dumps([offset + successor for successor in row.successors]),
                )
                for row in rows
            ],
        )
        return
    stamp = due.isoformat()
    lines = [
        f"{step_id(run, offset + row.row)}\t{_null(None if row.deps_left else stamp)}\t0\t"
        f"{row.node}\t{row.deps_left}\t{_initial(row)}\t1\t0\t{int(row.weight)}\t{row.queue}\t"
        f"{'t' if row.grouped else 'f'}\tf\t{_null(row.parent)}\t{_null(row.position)}\t"
        f"{{{','.join(str(offset + successor) for successor in row.successors)}}}\n"
        for row in rows
    ]
    with driver.cursor().copy(
        "COPY steps (id, due, token, node, deps_left, status, attempt, crashes, weight, queue, grouped, carried,"
        " parent, position, successors) FROM STDIN"
    ) as copy:
        copy.write("".join(lines))


def owned(connection: Connection, worker: Worker) -> list[Claimed]:
    """Return the steps that a worker holds.  Reads every step of the live runs of its home."""
    columns: list[Any] = [steps.c[entry.name] for entry in fields(Claimed)]
    query = (
        select(*columns)
        .select_from(live_steps())
        .where(is_live(worker.home), steps.c.status == int(StepStatus.RUNNING), steps.c.owner == worker.owner)
    )
    return [Claimed(*row) for row in connection.execute(query)]


def release(
    connection: Connection,
    step: Claimed,
    *,
    weight: Weight | None = None,
    crashed: str | None = None,
    poison_deaths: int,
) -> Released | Buried | Refusal:
    """Give a claimed step back: it becomes ready again, or is cancelled if its run stopped while it was running.

    `weight`: the step's weight from now on.  Once its condition holds, a step belongs to its own queue.  `crashed`:
    what broke while the step ran; it counts like the death of its worker.  `poison_deaths`: the number of deaths that
    condemns a step.
    """
    back = (
        update(steps)
        .where(held(step))
        .values(
            status=int(StepStatus.READY),
            owner=None,
            due=db_now(LOST_SECONDS),
            weight=step.weight if weight is None else int(weight),
        )
        .returning(
            steps.c.id,
            steps.c.node,
            steps.c.weight,
            steps.c.queue,
            steps.c.crashes,
            steps.c.token,
            steps.c.halted,
        )
    )
    if step.weight == Weight.SLOW:  # only slow steps reserve anything
        if crashed is not None:
            lost_calls.enter(connection, [step])
        settling.abandon(connection, [step.id], token=step.token)
    found = connection.execute(back).first()
    if found is None:
        return Refusal.LOST
    if found.halted:
        return Buried(bury(connection, found))
    head = ReadyStep(*found[:5])
    if crashed is not None:
        seen = deaths.enter_broken(connection, step.id, step.token, crashed, limit=poison_deaths)
        connection.execute(update(steps).where(steps.c.id == step.id).values(crashes=seen))
        head = replace(head, crashes=seen)
    return Released(head)


def park(connection: Connection, step: Claimed, snoozed: Snoozed) -> Waiting | Refusal:
    """Let a claimed step wait."""
    if snoozed.event is not None:
        lock_run(connection, step.run)
    _facts(connection, step, snoozed.calls)
    row = connection.execute(
        update(steps)
        .where(held(step), steps.c.halted.is_(False))
        .values(
            status=int(StepStatus.WAITING),
            owner=None,
            due=db_now(snoozed.seconds),
            attempt=steps.c.attempt + (1 if snoozed.attempt else 0),
        )
        .returning(steps.c.id)
    ).first()
    if row is not None:
        kind = "step.retry" if snoozed.attempt else "step.waiting"
        data = {"why": snoozed.reason, "seconds": round(snoozed.seconds, 3)}
        tell(connection, step.run, step.row, kind, snoozed.message, data)
        if snoozed.room is not None:
            settling.wait(connection, step.id, snoozed.room)
        if snoozed.event is not None:
            waits.wait(connection, step.id, snoozed.event)
        return Waiting()
    return _refusal(connection, step)


def _refusal(connection: Connection, step: Claimed) -> Refusal:
    """Return why a claimed step could not be changed."""
    mine = connection.execute(select(steps.c.id).where(held(step))).first()
    return Refusal.LOST if mine is None else Refusal.STOPPED


def _facts(connection: Connection, step: Claimed, calls: Sequence[CallRecord]) -> None:
    settling.settle(connection, encoding.settlements(step, calls))
    lost_calls.store_calls(connection, encoding.calls(step, calls, step.attempt, datetime.now(UTC)))


def wake(connection: Connection, ids: Sequence[int]) -> list[ReadyStep]:
    """Make waiting steps ready if their time has come."""
    awake = (
        update(steps)
        .where(steps.c.id.in_(ids), steps.c.status == int(StepStatus.WAITING), steps.c.due <= db_now(0.005))
        .values(status=int(StepStatus.READY), due=db_now(LOST_SECONDS))
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
    )
    heads = [ReadyStep(*row) for row in connection.execute(awake)]
    settling.leave(connection, [head.id for head in heads])
    return heads


def expand(
    connection: Connection,
    step: Claimed,
    rows: Sequence[Row],
    *,
    phase: str,
    round: int = 0,
    items: Sequence[Any] | None = None,
    window: int | None = None,
    reduce: int | None = None,
    calls: Sequence[CallRecord] = (),
) -> Children | Refusal:
    """Turn a claimed composite into its children; the composite waits for them.

    `rows` are numbered from 0.  `window`: how many items may be in progress at once; each item beyond it has an
    extra dependency, which the composite releases.
    """
    lock_run(connection, step.run)  # otherwise a concurrent stop of the run would miss the children
    parent = connection.execute(
        select(steps.c.id).where(held(step), steps.c.halted.is_(False)).with_for_update()
    ).first()
    _facts(connection, step, calls)
    if parent is None:
        return _refusal(connection, step)
    base = connection.execute(
        update(runs)
        .where(runs.c.id == step.run)
        .values(next_row=runs.c.next_row + len(rows))
        .returning(runs.c.next_row)
    ).scalar_one() - len(rows)
    if base + len(rows) > ROW_MASK:
        raise Conflict(f"A run may have at most {ROW_MASK} steps; step {step.row} would expand beyond that.")
    connection.execute(
        update(steps)
        .where(steps.c.id == step.id)
        .values(
            status=int(StepStatus.WAITING),
            owner=None,
            due=None,
            deps_left=len(rows),
            weight=int(Weight.INLINE),  # the worker that finishes its last child continues it
            window_next=None if window is None else base + window,
            window_end=None if window is None else base + len(rows) - (0 if reduce is None else 1),
        )
    )
    connection.execute(
        insert(expansions).values(
            step_id=step.id,
            round=round,
            phase=phase,
            base=base,
            count=len(rows),
            reduce=None if reduce is None else base + reduce,
            items=None if items is None else encoding.dump(list(items)),
        )
    )
    insert_rows(connection, step.run, rows, offset=base)
    tell(connection, step.run, step.row, "step.expanded", "1 step" if len(rows) == 1 else f"{len(rows)} steps")
    heads = [
        ReadyStep(step_id(step.run, base + row.row), row.node, int(row.weight), row.queue)
        for row in rows
        if not row.deps_left
    ]
    return Children(heads, base)


def attach(connection: Connection, ids: Sequence[int]) -> None:
    """Mark pending steps whose message a canvas will send."""
    connection.execute(
        update(steps).where(steps.c.id.in_(ids), steps.c.status == int(StepStatus.PENDING)).values(carried=True)
    )


def detach(connection: Connection, ids: Sequence[int]) -> list[ReadyStep]:
    """Detach steps from their canvas.  Returns those that are already ready: they are owed a message now."""
    left = (
        update(steps)
        .where(steps.c.id.in_(ids), steps.c.carried)
        .values(carried=False)
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes, steps.c.status)
    )
    return [ReadyStep(*row[:5]) for row in connection.execute(left) if row.status == StepStatus.READY]


def detach_all(connection: Connection, *, home: str, target: str | None = None) -> None:
    """Detach every step of the live runs from its canvas, because the broker has lost all messages."""
    lost = select(steps.c.id).select_from(live_steps()).where(is_live(home, target), steps.c.carried)
    ids = list(connection.scalars(lost.order_by(steps.c.id).with_for_update(of=steps)))
    for part in chunks(ids):
        connection.execute(update(steps).where(steps.c.id.in_(part)).values(carried=False))


def states(connection: Connection, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return step id → (status, queue) for those of the steps that exist."""
    query = select(steps.c.id, steps.c.status, steps.c.queue).where(steps.c.id.in_(ids))
    return {row.id: (row.status, row.queue) for row in connection.execute(query)}


def place(connection: Connection, step: int) -> tuple[int, int | None, int | None]:
    """Return a row's (node, parent row, position).  These never change."""
    query = select(steps.c.node, steps.c.parent, steps.c.position).where(steps.c.id == step)
    row = connection.execute(query).one()
    return row.node, row.parent, row.position


def _initial(row: Row) -> int:
    if row.status is not None:
        return int(row.status)
    return int(StepStatus.PENDING if row.deps_left else StepStatus.READY)


def _null(value: Any) -> str:
    return "\\N" if value is None else str(value)


def held(step: Claimed) -> Any:
    """Return the condition that a claim still holds its step."""
    return and_(steps.c.id == step.id, steps.c.token == step.token, steps.c.status == int(StepStatus.RUNNING))
