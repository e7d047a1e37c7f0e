"""The journal of a run: one entry per event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BigInteger, Connection, insert, literal, select

from gorgon_common.engine.records import ROW_MASK, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence import encoding
from gorgon_common.persistence.tables import db_now, events, steps


def tell(
    connection: Connection,
    run: int,
    row: int | None,
    kind: str,
    message: str | None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write an entry; `data` is for machines."""
    body = None if data is None else encoding.dump(data)
    connection.execute(
        insert(events).values(run_id=run, row=row, kind=kind, message=encoding.clean(message), data=body, at=db_now())
    )


def tell_cancelled(connection: Connection, run: int) -> None:
    """Write an entry for each unfinished step of a run; these steps are about to be cancelled."""
    left = select(literal(run, BigInteger), steps.c.id.op("&")(ROW_MASK), literal("step.cancelled"), db_now()).where(
        steps.c.id >= step_id(run, 0),
        steps.c.id < step_id(run + 1, 0),
        steps.c.status < int(StepStatus.SUCCEEDED),
    )
    connection.execute(insert(events).from_select(["run_id", "row", "kind", "at"], left.order_by(steps.c.id)))
