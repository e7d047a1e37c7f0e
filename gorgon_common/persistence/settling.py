"""The budget side of the store's transactions: a call is settled, a step waits for room, a worker is gone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Row, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common import metrics
from gorgon_common.costs.budgets import MICRO, Balance
from gorgon_common.engine.budget import RECHECK_SECONDS
from gorgon_common.engine.records import ROW_BITS, BudgetRequest
from gorgon_common.logs import get_logger
from gorgon_common.persistence import budgets_sqlite
from gorgon_common.persistence.budgets_sqlite import GRACE_SECONDS, OPEN, UNKNOWN
from gorgon_common.persistence.tables import (
    budget_alerts,
    budget_periods,
    budget_waits,
    budgets,
    conversations,
    db_now,
    reservations,
    runs,
    steps,
)

log = get_logger(__name__)

ORPHAN_SECONDS = 600.0


def settle(connection: Connection, facts: Sequence[Mapping[str, Any]]) -> None:
    """Post the outcomes of reserved calls; see `encoding.settlements`.  Idempotent."""
    if not facts:
        return
    if connection.dialect.name == "sqlite":
        budgets_sqlite.settle(driver(connection), facts)
    else:
        connection.exec_driver_sql("SELECT gorgon_settle(%s::jsonb)", (json.dumps(list(facts)),))


def abandon(connection: Connection, ids: Iterable[int], *, token: int | None = None) -> None:
    """Post open reservations of steps in full: their worker is gone, so the outcome of their calls is unknown.

    `token`: only reservations made under this claim.
    """
    wanted = sorted(ids)
    claim = () if token is None else (reservations.c.token == token,)
    for start in range(0, len(wanted), 500):
        _abandoned(connection, reservations.c.step_id.in_(wanted[start : start + 500]), *claim)


def abandon_run(connection: Connection, run: int) -> None:
    """Do the same as `abandon` for a whole run."""
    _abandoned(connection, reservations.c.step_id >= run << ROW_BITS, reservations.c.step_id < (run + 1) << ROW_BITS)


def abandon_orphans(connection: Connection) -> None:
    """Do the same as `abandon` for old reservations whose claim no longer holds, whatever the reason.

    Also cleans up claims of woken steps that never came and conversations of steps that have ended, and reports new
    alerts.
    """
    taken = select(steps.c.id).where(
        steps.c.id == reservations.c.step_id, steps.c.token == reservations.c.token, steps.c.status == 2
    )
    _abandoned(connection, reservations.c.at < db_now(-ORPHAN_SECONDS), ~taken.exists())
    connection.execute(
        delete(budget_waits).where(budget_waits.c.woken.is_(True), budget_waits.c.until < db_now(-ORPHAN_SECONDS))
    )
    unfinished = select(steps.c.id).where(steps.c.id == conversations.c.step_id, steps.c.status.in_((1, 2, 3)))
    connection.execute(delete(conversations).where(~unfinished.exists()))
    tell(connection)


def tell(connection: Connection) -> None:
    """Log and count new budget alerts; each is reported once.

    An integration that forwards alerts belongs here.
    """
    waiting = connection.scalars(select(budget_alerts.c.id).where(budget_alerts.c.told_at.is_(None)).limit(100)).all()
    if not waiting:
        return
    mine = connection.execute(
        update(budget_alerts)
        .where(budget_alerts.c.id.in_(waiting), budget_alerts.c.told_at.is_(None))
        .values(told_at=db_now())
        .returning(budget_alerts.c.id)
    ).scalars()
    found = connection.execute(
        select(budget_alerts, budget_periods, budgets.c.scope, budgets.c.name, runs.c.public_id)
        .select_from(
            budget_alerts.join(budget_periods, budget_periods.c.id == budget_alerts.c.period_id)
            .outerjoin(budgets, budgets.c.id == budget_periods.c.budget_id)
            .outerjoin(runs, runs.c.id == budget_alerts.c.run_id)
        )
        .where(budget_alerts.c.id.in_(list(mine)))
        .order_by(budget_alerts.c.id)
    )
    for row in found.all():
        balance = balance_of(row)
        log.warning(
            row.message,
            kind=row.kind,
            percent=row.mark,
            budget=row.label,
            run_id=row.public_id,
            usd_limit=_dollars(balance.usd_limit),
            usd_spent=_dollars(balance.usd_spent),
            token_limit=balance.token_limit,
            token_spent=balance.token_spent,
        )
        budget = "file" if row.scope is None else f"{row.scope} {row.name}".strip()
        metrics.BUDGET_ALERTS.inc(budget=budget, kind=row.kind.removeprefix("budget."), mark=str(row.mark or ""))


def _abandoned(connection: Connection, *where: Any) -> None:
    found = connection.execute(
        select(reservations.c.step_id, reservations.c.token, reservations.c.ordinal)
        .where(reservations.c.state == OPEN, *where)
        .order_by(reservations.c.step_id)
    ).all()
    settle(
        connection,
        [
            {"step_id": step, "token": claim, "ordinal": ordinal, "state": UNKNOWN, "usd": None, "tokens": None}
            for step, claim, ordinal in found
        ],
    )


def wait(connection: Connection, step: int, room: BudgetRequest) -> None:
    """Enter a waiting step in the queue of an account.  If there is room by now, it is woken immediately."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = {
        "period_id": room.period,
        "patient": room.patient,
        "usd": room.usd,
        "tokens": room.tokens,
        "woken": False,
        "until": db_now(RECHECK_SECONDS + GRACE_SECONDS),
    }
    connection.execute(
        dialect.insert(budget_waits)
        .values(step_id=step, **values)
        .on_conflict_do_update(index_elements=["step_id"], set_=values)
    )
    connection.execute(update(budget_periods).where(budget_periods.c.id == room.period).values(waited_for=True))
    _make_room(connection, room.period)


def leave(connection: Connection, ids: Sequence[int]) -> None:
    """Mark steps as woken.  Their claims on the room last a little longer, until they arrive."""
    connection.execute(
        update(budget_waits)
        .where(budget_waits.c.step_id.in_(ids), budget_waits.c.woken.is_(False))
        .values(woken=True, until=db_now(GRACE_SECONDS))
    )


def _make_room(connection: Connection, period: int) -> None:
    if connection.dialect.name == "sqlite":
        budgets_sqlite.make_room(driver(connection), period)
    else:
        connection.exec_driver_sql("SELECT gorgon_make_room(%s)", (period,))


def set_limits(connection: Connection, periods: Sequence[int], usd: int | None, tokens: int | None) -> None:
    """Set the limits of accounts.  The wall stays at or above what is already taken, however low the new limit is."""
    for period in periods:
        row = connection.execute(select(budget_periods).where(budget_periods.c.id == period).with_for_update()).one()
        connection.execute(
            update(budget_periods)
            .where(budget_periods.c.id == period)
            .values(
                usd_limit=usd,
                usd_wall=None if usd is None else max(usd, row.usd_spent + row.usd_reserved),
                token_limit=tokens,
                token_wall=None if tokens is None else max(tokens, row.token_spent + row.token_reserved),
                alerted=0,
            )
        )
        if row.waited_for:
            _make_room(connection, period)


def driver(connection: Connection) -> Any:
    """Return the driver's own connection."""
    return cast(Any, connection.connection.driver_connection)


def balance_of(row: Row[Any]) -> Balance:
    """Return the balance in the row of an account."""
    return Balance(
        row.usd_limit,
        row.usd_spent + row.usd_overrun,
        row.usd_reserved,
        row.usd_overrun,
        row.token_limit,
        row.token_spent + row.token_overrun,
        row.token_reserved,
        row.token_overrun,
    )


def _dollars(micro: int | None) -> float | None:
    return None if micro is None else micro / MICRO
