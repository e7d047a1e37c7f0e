"""The limiter's tables in the database: its state if there is no Redis, and the limits set by people."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.persistence.database import Database
from gorgon_common.persistence.tables import db_now, limit_rules, limit_states

Value = TypeVar("Value")


class LimitStates:
    """Documents by key, changed in one transaction: implements `ratelimit.local.Documents`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def change(self, keys: Sequence[str], work: Callable[[list[Any], float], Value]) -> Value:
        """Call `work(documents, now)` in one transaction, then store the list as `work` left it.  Raises Unavailable.

        A document that does not exist is None.  `now`: seconds since 1970 by the database's clock.
        """
        with self._database.write() as connection:
            known = self._locked(connection, keys)
            documents = [json.loads(known[key]) if known.get(key) else None for key in keys]
            result = work(documents, self._now(connection))
            rows = [
                {"key": key, "body": body}
                for key, document in zip(keys, documents, strict=True)
                if document is not None and (body := json.dumps(document, separators=(",", ":"))) != known.get(key)
            ]
            if rows:
                put = self._insert().values(rows)
                changed = {"body": put.excluded.body}
                connection.execute(put.on_conflict_do_update(index_elements=["key"], set_=changed))
            return result

    def keys(self) -> list[str]:
        """Return the keys of all documents."""
        with self._database.read() as connection:
            return list(connection.scalars(select(limit_states.c.key).order_by(limit_states.c.key)))

    def _locked(self, connection: Connection, keys: Sequence[str]) -> dict[str, str]:
        if not self._database.sqlite:  # on SQLite, the transaction itself is the lock
            rows = [{"key": key, "body": ""} for key in sorted(keys)]
            connection.execute(self._insert().values(rows).on_conflict_do_nothing())
        query = select(limit_states.c.key, limit_states.c.body).where(limit_states.c.key.in_(keys))
        found = connection.execute(query.order_by(limit_states.c.key).with_for_update())
        return {row.key: row.body for row in found}

    def _insert(self) -> Any:
        return (sqlite if self._database.sqlite else postgresql).insert(limit_states)

    def _now(self, connection: Connection) -> float:
        if self._database.sqlite:
            return self._database.now().timestamp()
        epoch = connection.scalar(select(func.extract("epoch", func.clock_timestamp())))
        return float(epoch or 0.0) + self._database.clock_offset


class LimitRules:
    """The limits stored by `gorgon limits set`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[tuple[str, str, dict[str, float]]]:
        """Return (provider, model pattern, limits), most recently set first.  Raises Unavailable."""
        query = select(limit_rules.c.provider, limit_rules.c.model, limit_rules.c.body)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(limit_rules.c.at.desc(), limit_rules.c.model)).all()
        return [(provider, model, json.loads(body)) for provider, model, body in rows]

    def set(self, provider: str, model: str, values: Mapping[str, float]) -> None:
        """Set limits for a pattern; limits that are not named keep their values.  Raises Unavailable."""
        with self._database.write() as connection:
            row = (limit_rules.c.provider == provider) & (limit_rules.c.model == model)
            known = connection.scalar(select(limit_rules.c.body).where(row))
            body = json.dumps({**(json.loads(known) if known else {}), **values}, sort_keys=True)
            connection.execute(delete(limit_rules).where(row))
            connection.execute(limit_rules.insert().values(provider=provider, model=model, body=body, at=db_now()))

    def clear(self, provider: str, model: str) -> bool:
        """Delete the limits of a pattern; returns whether there were any.  Raises Unavailable."""
        with self._database.write() as connection:
            row = (limit_rules.c.provider == provider) & (limit_rules.c.model == model)
            return bool(connection.execute(delete(limit_rules).where(row)).rowcount)
