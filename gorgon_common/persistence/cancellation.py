"""Stops a run or the contents of a composite: no new step starts, and the container waits for those still running."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from gorgon_common.engine.records import ROW_MASK, ReadyStep, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence import encoding
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.predicates import LIVE, LOST_SECONDS, chunks
from gorgon_common.persistence.tables import backlog, checkpoints, db_now, events, runs, steps


def finishing(connection: Connection, run: int, *, error: Mapping[str, Any] | None) -> None:
    """Move a run on to its final steps; `error`: the reason, if it has failed."""
    changed = connection.execute(
        update(runs)
        .where(runs.c.id == run, runs.c.status.in_([int(status) for status in LIVE[:3]]))
        .values(
            status=int(RunStatus.FINISHING),
            active=True,
            error=None if error is None else encoding.dump(dict(error)),
        )
    )
    if changed.rowcount:
        tell(connection, run, None, "run.finishing", str(error["message"]) if error else None)


def halt(connection: Connection, run: int, container: int, keeps: frozenset[int], reason: str) -> list[ReadyStep]:
    """Cancel the steps under `container` that have not started, and let it wait for those that are running.

    The journal names what stops: the run, or the group or map in row `container`.  Rows are locked in ascending order,
    as in `claim_and_finish`.
    """
    low, high = step_id(run, 0), step_id(run + 1, 0)
    rows = connection.execute(
        select(steps.c.id, steps.c.status, steps.c.parent, steps.c.node, steps.c.weight, steps.c.queue)
        .where(steps.c.id >= low, steps.c.id < high, steps.c.status < int(StepStatus.SUCCEEDED))
        .order_by(steps.c.id)
        .with_for_update()
    ).all()
    parents = {row.id & ROW_MASK: row.parent for row in rows}
    top = container in keeps

    def under(number: int) -> bool:
        if top:
            return number not in keeps
        parent = parents.get(number)
        while parent is not None and parent != container:
            parent = parents.get(parent)
        return parent == container

    inside = [row for row in rows if under(row.id & ROW_MASK)]
    running = [row.id for row in inside if row.status == StepStatus.RUNNING]
    stopped = [row.id for row in inside if row.status != StepStatus.RUNNING]
    now = datetime.now(UTC)
    for ids in chunks(stopped):
        connection.execute(update(steps).where(steps.c.id.in_(ids)).values(status=int(StepStatus.CANCELLED)))
        connection.execute(delete(backlog).where(backlog.c.step_id.in_(ids)))
        detail = encoding.dump({"reason": reason})
        connection.execute(
            insert(events),
            [{"run_id": run, "row": key & ROW_MASK, "kind": "step.cancelled", "at": now} for key in ids],
        )
        connection.execute(
            insert(checkpoints),
            [{"step_id": key, "status": 8, "attempts": 0, "finished_at": now, "detail": detail} for key in ids],
        )
    for ids in chunks(running):
        connection.execute(
            update(steps).where(steps.c.id.in_(ids)).values(halted=True, parent=container, successors=[])
        )
    if stopped:
        count = "1 step" if len(stopped) == 1 else f"{len(stopped)} steps"
        what = "run.stopping" if top else "step.stopping"
        tell(connection, run, None if top else container, what, f"{count} will not start: {reason}")
    ready = not running
    found = connection.execute(
        update(steps)
        .where(
            steps.c.id == step_id(run, container),
            steps.c.status.in_([int(StepStatus.PENDING), int(StepStatus.WAITING)]),
        )
        .values(
            deps_left=len(running),
            window_next=steps.c.window_end,
            status=int(StepStatus.READY) if ready else steps.c.status,
            due=db_now(LOST_SECONDS) if ready else None,
        )
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
    ).first()
    return [ReadyStep(*found)] if found is not None and ready else []
