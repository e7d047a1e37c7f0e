"""The journal of a run: one line for each thing that has happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert

from gorgon_common.persistence import encoding
from gorgon_common.persistence.tables import db_now, events


def tell(
    connection: Connection,
    run: int,
    row: int | None,
    kind: str,
    message: str | None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write a line; `data` is for machines."""
    body = None if data is None else encoding.dump(data)
    connection.execute(
        insert(events).values(run_id=run, row=row, kind=kind, message=encoding.clean(message), data=body, at=db_now())
    )
