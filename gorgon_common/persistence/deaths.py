"""Records which steps saw their workers die.  `engine.poison` decides what follows from that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.engine.poison import (
    BEAT_SECONDS,
    MEMORY_SECONDS,
    SUSPECT_DEATHS,
    WINDOWS_SECONDS,
    Death,
    chance_of,
    death_rate,
    judge,
)
from gorgon_common.persistence.predicates import chunks, now
from gorgon_common.persistence.tables import db_now, step_deaths, workers

_UNKNOWN = 1.0
"""The probability is unknown: the death counts only for a step that was the only one."""
_WORKERS = 2000


def enter(connection: Connection, owner: int | None, held: Sequence[Any], *, limit: int) -> dict[int, int]:
    """Record that a worker died while it held these steps (id, token, due, crashes); return id → deaths to be stored.

    If it held suspects, only they are blamed.  The end of a worker that had retired is not a death.
    """
    worker = connection.execute(select(workers).where(workers.c.id == owner)).first()
    deaths = {row.id: int(row.crashes) for row in held}
    if not held or (worker is not None and worker.retired):
        return deaths
    blamed = [row for row in held if row.crashes >= SUSPECT_DEATHS] or list(held)
    alone = len(blamed) == 1
    earlier = _earlier(connection, [row.id for row in blamed])
    around = None if worker is None else _Around.read(connection, worker)
    for row in blamed:
        known = earlier.get(row.id, [])
        chance = _UNKNOWN
        if around is not None and row.due is not None:
            chance = around.chance(worker, row.due, {entry.owner for entry in known})
        _note(connection, row.id, row.token, owner, chance, alone=alone, why=None)
        deaths[row.id] = judge([*_deaths(known), Death(chance, alone)], limit).deaths
    return deaths


def enter_broken(connection: Connection, step: int, token: int, why: str, *, limit: int) -> int:
    """Record that the worker's code broke while it ran a step; no other step is to blame.  Return its deaths."""
    known = _earlier(connection, [step]).get(step, [])
    _note(connection, step, token, None, 0.0, alone=True, why=why)
    return judge([*_deaths(known), Death(0.0)], limit).deaths


def _note(
    connection: Connection, step: int, token: int, owner: int | None, chance: float, *, alone: bool, why: str | None
) -> None:
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    entered = dialect.insert(step_deaths).values(
        step_id=step, token=token, owner=owner, at=db_now(), chance=chance, alone=alone, why=why
    )
    connection.execute(entered.on_conflict_do_nothing())


def _earlier(connection: Connection, ids: Sequence[int]) -> Mapping[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for part in chunks(ids):
        query = select(step_deaths).where(step_deaths.c.step_id.in_(part), step_deaths.c.at > db_now(-MEMORY_SECONDS))
        for row in connection.execute(query.order_by(step_deaths.c.at)):
            found.setdefault(row.step_id, []).append(row)
    return found


def _deaths(rows: Iterable[Any]) -> list[Death]:
    return [Death(row.chance, row.alone) for row in rows]


@dataclass(frozen=True, slots=True)
class _Life:
    """The data about another worker: from when to when its lease was valid, and whether it died then."""

    id: int
    began: datetime
    ended: datetime
    died: bool


@dataclass(frozen=True, slots=True)
class _Around:
    """The workers of the same home and target, used to estimate how often workers die."""

    now: datetime
    lives: Sequence[_Life]

    @classmethod
    def read(cls, connection: Connection, worker: Any) -> _Around:
        moment = now(connection)
        query = select(workers.c.id, workers.c.started_at, workers.c.lease_until, workers.c.retired).where(
            workers.c.home == worker.home,
            workers.c.target == worker.target,
            workers.c.lease_until > db_now(-WINDOWS_SECONDS[-1]),
        )
        rows = connection.execute(query.order_by(workers.c.id.desc()).limit(_WORKERS))
        return cls(
            moment,
            [
                _Life(
                    row.id, row.started_at, min(row.lease_until, moment), row.lease_until < moment and not row.retired
                )
                for row in rows
            ],
        )

    def chance(self, worker: Any, claimed: datetime, seen: Iterable[int | None]) -> float:
        """Return the probability that an innocent step, claimed at that time, sees this worker die.

        `seen`: the workers whose deaths the step has already seen; they are excluded, as they do not show how often
        others die.
        """
        beat = worker.beat_at or worker.lease_until
        known_to = min(BEAT_SECONDS, max(0.0, (worker.lease_until - beat).total_seconds() / 3))
        ran = max(0.0, (beat - claimed).total_seconds()) + known_to
        without = {worker.id, *seen}
        return chance_of(max(self._rate(seconds, without) for seconds in WINDOWS_SECONDS), ran)

    def _rate(self, window: float, without: set[int | None]) -> float:
        begin = self.now - timedelta(seconds=window)
        recent = [life for life in self.lives if life.ended > begin]
        died = sum(life.died and life.id not in without for life in recent)
        seconds = sum((life.ended - max(life.began, begin)).total_seconds() for life in recent)
        return death_rate(died, seconds)
