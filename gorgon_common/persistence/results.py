"""What finished steps have left: checkpoints and expansions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from gorgon_common import strict_json
from gorgon_common.engine.records import (
    Checkpoint,
    Expansion,
)
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence import tables
from gorgon_common.persistence.predicates import chunks
from gorgon_common.persistence.tables import blobs, fingerprints


def checkpoints(connection: Connection, ids: Sequence[int]) -> dict[int, Checkpoint]:
    """Return the checkpoints of those of the steps that have finished."""
    found: dict[int, Checkpoint] = {}
    for part in chunks(ids):
        query = (
            select(tables.checkpoints, blobs.c.body)
            .select_from(tables.checkpoints.outerjoin(blobs, blobs.c.step_id == tables.checkpoints.c.step_id))
            .where(tables.checkpoints.c.step_id.in_(part))
        )
        for row in connection.execute(query):
            found[row.step_id] = _checkpoint(row)
    return found


def adoptable(connection: Connection, root: int, fingerprint: str) -> Checkpoint | None:
    """Return the checkpoint of a step with the same fingerprint in this run or in a run that it continues."""
    found = connection.scalar(
        select(fingerprints.c.step_id).where(fingerprints.c.root_id == root, fingerprints.c.hash == fingerprint)
    )
    return None if found is None else checkpoints(connection, [found]).get(found)


def expansions(connection: Connection, step: int) -> list[Expansion]:
    """Return the expansions of a composite, oldest round first."""
    query = select(tables.expansions).where(tables.expansions.c.step_id == step).order_by(tables.expansions.c.round)
    return [
        Expansion(
            id=row.step_id,
            phase=row.phase,
            base=row.base,
            count=row._mapping["count"],
            round=row.round,
            items=strict_json.loads_stored(row.items) if row.items else (),
            reduce=row.reduce,
        )
        for row in connection.execute(query)
    ]


def _checkpoint(row: Any) -> Checkpoint:
    detail = strict_json.loads_stored(row.detail) if row.detail else {}
    body = row.body if row.body is not None else row.output
    return Checkpoint(
        id=row.step_id,
        status=StepStatus(row.status),
        output=None if body is None else strict_json.loads_stored(body),
        error=detail.pop("error", None),
        reason=detail.pop("reason", None),
        detail=detail,
        attempts=row.attempts,
        finished_at=row.finished_at,
    )
