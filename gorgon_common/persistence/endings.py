"""What belongs to every end of a run, whatever has ended it."""

from __future__ import annotations

import json
from functools import partial

from sqlalchemy import Connection, select

from gorgon_common import telemetry
from gorgon_common.engine.states import RunStatus
from gorgon_common.persistence import max_parallel
from gorgon_common.persistence.database import after_commit
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.tables import runs


def run_ended(connection: Connection, run: int, message: str | None) -> None:
    """Do what belongs to the end of a run whose row has just got its last status.

    It is called wherever a run ends, in the same transaction: when its last step ends, when its process has died, and
    when it is stopped while it waits for its concurrency key.  What else has to know that a run has ended (an outbox,
    an audit log) is told here; what may only happen if the transaction is committed goes through `after_commit`.
    """
    row = connection.execute(select(runs).where(runs.c.id == run)).one()
    status = RunStatus(row.status).name.lower()
    if row.max_parallel is not None:
        max_parallel.close_slots(connection, run)
    tell(connection, run, None, f"run.{status}", message)
    error = (json.loads(row.error) if row.error else {}).get("message")
    seconds = max(0.0, (row.finished_at - row.created_at).total_seconds())
    ref = telemetry.RunRef(row.public_id, row.workflow, row.team, row.target, row.trace_id)
    after_commit(connection, partial(telemetry.emit, telemetry.RunEnded(ref, status, seconds, error)))
