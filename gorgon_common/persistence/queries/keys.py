"""What a run waits for when another one holds its concurrency key."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from gorgon_common.clock import format_time
from gorgon_common.engine.states import RunStatus
from gorgon_common.persistence.concurrency import Place, members_of
from gorgon_common.persistence.tables import concurrency_keys


def waits_for(connection: Connection, run: Any) -> dict[str, Any] | None:
    """Return `{key, max, on_conflict, since, ahead, held_by}` for a run (its row) that waits for its key.

    `held_by`: `[{run_id, workflow, status, since, process_died, cancelled}]`; `cancelled`: its end is requested.
    `ahead`: number of runs that wait before it.  Returns None if the run does not wait.
    """
    if run.key_id is None or run.status != RunStatus.QUEUED:
        return None
    members = members_of(connection, run.key_id)
    own = next((member for member in members if member.run_id == run.id), None)
    if own is None or own.state != Place.WAITS:
        return None
    key = connection.scalar(select(concurrency_keys.c.shown).where(concurrency_keys.c.id == run.key_id))
    return {
        "key": key,
        "max": own.most,
        "on_conflict": own.on_conflict,
        "since": format_time(run.created_at),
        "ahead": sum(member.state == Place.WAITS and member.run_id < run.id for member in members),
        "held_by": [
            {
                "run_id": member.public_id,
                "workflow": member.workflow,
                "status": RunStatus(member.status).name.lower(),
                "since": format_time(member.key_at or member.created_at),
                "process_died": bool(member.dead),
                "cancelled": bool(member.cancelled),
            }
            for member in members
            if member.state != Place.WAITS
        ],
    }
