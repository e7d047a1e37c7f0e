"""Concurrency keys: which runs hold a key, which wait for it, and which are next.

Lock order: a run that ends, then its key, then the runs that wait for that key.  A transaction that has locked a key
never waits for a run that holds it, so there can be no deadlock.  On SQLite, the single writer makes locks unnecessary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, case, delete, func, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.clock import format_time
from gorgon_common.engine.records import KeyDecision, KeyRequest, KeyState, NewRun, ReadyStep, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import KeyTaken
from gorgon_common.persistence import encoding
from gorgon_common.persistence.endings import run_ended
from gorgon_common.persistence.journal import tell, tell_cancelled
from gorgon_common.persistence.predicates import orphaned
from gorgon_common.persistence.tables import (
    concurrency_keys,
    concurrency_places,
    db_now,
    runs,
    steps,
)

CANCEL_RUNNING = "cancel_running"
REJECT = "reject"
_SHOWN = 200
_places = concurrency_places.c


class Place(IntEnum):
    """A run's position at its key.  The numbers are stored in the database."""

    WAITS = 0  # none of its steps may be claimed
    OWED = 1  # it holds the key; the sweep of its home still has to send the messages of its first steps
    HOLDS = 2


# Entering


def lock(connection: Connection, new: NewRun, hold: KeyRequest) -> int:
    """Lock the key that a new run asks for, creating it if necessary; return its id."""
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = {
        "org_id": new.org,
        "target": new.target,
        "digest": hashlib.sha256(hold.key.encode("utf-8", "replace")).hexdigest(),
        "shown": shown(hold.key),
    }
    # An update that changes nothing: it locks the row, and waits for a transaction that is creating or deleting it.
    entered = (
        dialect.insert(concurrency_keys)
        .values(values)
        .on_conflict_do_update(index_elements=["org_id", "target", "digest"], set_={"shown": values["shown"]})
    )
    return int(connection.execute(entered.returning(concurrency_keys.c.id)).scalar_one())


def shown(key: str) -> str:
    """Return the beginning of a key, the part that is stored for display."""
    text = encoding.clean(key) or ""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def enter(connection: Connection, key: int, new: NewRun, hold: KeyRequest) -> Place:
    """Decide where a new run stands at its key, which is locked.

    Ends waiting runs that the new one supersedes.  Raises KeyTaken if the run may not wait.
    """
    members = members_of(connection, key)
    holding = [member for member in members if member.state != Place.WAITS]
    waiting = [member for member in members if member.state == Place.WAITS]
    if hold.on_conflict == CANCEL_RUNNING:
        kept = waiting[len(waiting) - (hold.most - 1) :] if hold.most - 1 < len(waiting) else waiting
        for member in waiting:
            if member not in kept:
                end_waiting(connection, member.run_id, f"a newer run took its place: {new.public_id}")
        waiting = kept
    if not waiting and len(holding) < hold.most:
        return Place.HOLDS
    if hold.on_conflict == REJECT:
        raise _taken(hold, holding, waiting)
    return Place.WAITS


def _taken(hold: KeyRequest, holding: Sequence[Any], waiting: Sequence[Any]) -> KeyTaken:
    first = (*holding, *waiting)[0]
    verb = "held" if holding else "waited for"
    others = len(holding) + len(waiting) - 1
    more = f" and {others} more" if others else ""
    return KeyTaken(
        f"The concurrency key {shown(hold.key)!r} is {verb} by {_named(first)}{more}; this workflow says"
        " `on_conflict: reject`, so no run was created.",
        hint=f"Wait for it (gorgon runs watch {first.public_id}) or end it (gorgon runs cancel {first.public_id}).",
        key=shown(hold.key),
        held_by=[member.public_id for member in (*holding, *waiting)],
        numbers=[member.run_id for member in (*holding, *waiting)],
    )


def _named(member: Any) -> str:
    since = format_time(member.key_at or member.created_at)[:19]
    return f"{member.public_id} ({member.workflow}) since {since}Z"


def settle_in(
    connection: Connection, run: int, key: int, place: Place, hold: KeyRequest, timeout: float | None
) -> None:
    """Store the place of a new run."""
    connection.execute(
        insert(concurrency_places).values(
            run_id=run,
            key_id=key,
            state=int(place),
            most=hold.most,
            on_conflict=hold.on_conflict,
            timeout=timeout,
        )
    )


def members_of(connection: Connection, key: int) -> Sequence[Any]:
    """Return the unfinished runs of a key in order of arrival."""
    return connection.execute(_MEMBERS.where(_places.key_id == key).order_by(_places.run_id)).all()


_MEMBERS = select(
    _places.key_id,
    _places.run_id,
    _places.state,
    _places.most,
    _places.on_conflict,
    runs.c.public_id,
    runs.c.workflow,
    runs.c.status,
    runs.c.cancelled,
    runs.c.home,
    runs.c.target,
    runs.c.key_at,
    runs.c.created_at,
    case((orphaned(), 1), else_=0).label("dead"),
).select_from(concurrency_places.join(runs, runs.c.id == _places.run_id))


def _evicted(members: Sequence[Any]) -> list[int]:
    """Return the runs that have to be cancelled for a waiting run with `cancel_running`, oldest first."""
    waiting = [member for member in members if member.state == Place.WAITS]
    wants = [place for place, member in enumerate(waiting, 1) if member.on_conflict == CANCEL_RUNNING]
    if not wants:
        return []
    holding = [member for member in members if member.state != Place.WAITS]
    room = max(0, waiting[wants[-1] - 1].most - wants[-1])
    staying = [member for member in holding if not member.cancelled and member.status != RunStatus.FINISHING]
    return [member.run_id for member in staying[: max(0, len(staying) - room)]]


def admission(connection: Connection, run: int) -> KeyDecision:
    """Return whether a run may start, and which runs have to be cancelled before it can."""
    own = connection.execute(select(_places.key_id, _places.state).where(_places.run_id == run)).first()
    if own is None or own.state != Place.WAITS:
        return KeyDecision(own is None or own.state == Place.HOLDS, ())
    return KeyDecision(False, _evicted(members_of(connection, own.key_id)))


# Leaving


def waits(connection: Connection, run: int) -> bool:
    """Return whether a run waits for its key.  While the run is locked, this does not change."""
    return connection.scalar(select(_places.state).where(_places.run_id == run)) == Place.WAITS


def end_waiting(connection: Connection, run: int, why: str) -> None:
    """End a run that waits for its key.  None of its steps has begun, so there is nothing to finish."""
    ended = connection.execute(
        update(runs)
        .where(runs.c.id == run, runs.c.status == int(RunStatus.QUEUED), runs.c.active.is_(False))
        .values(status=int(RunStatus.CANCELLED), cancelled=True, finished_at=db_now())
    )
    if not ended.rowcount:
        return  # another transaction was faster
    low, high = step_id(run, 0), step_id(run + 1, 0)
    tell_cancelled(connection, run)
    connection.execute(
        update(steps)
        .where(steps.c.id >= low, steps.c.id < high, steps.c.status < int(StepStatus.SUCCEEDED))
        .values(status=int(StepStatus.CANCELLED))
    )
    connection.execute(delete(concurrency_places).where(_places.run_id == run))
    run_ended(connection, run, why)


def release(connection: Connection, run: int, key: int | None, *, home: str | None, lost: float) -> list[ReadyStep]:
    """Release the key of a run that ends in this transaction; waiting runs may take it.  See `promote`."""
    if key is None:
        return []
    state = connection.scalar(select(_places.state).where(_places.run_id == run))
    if state is None:
        return []
    if state != Place.WAITS:
        _lock(connection, key)
    connection.execute(delete(concurrency_places).where(_places.run_id == run))
    return [] if state == Place.WAITS else promote(connection, key, home=home, lost=lost)


def _lock(connection: Connection, key: int) -> None:
    connection.execute(select(concurrency_keys.c.id).where(concurrency_keys.c.id == key).with_for_update())


def promote(connection: Connection, key: int, *, home: str | None, lost: float) -> list[ReadyStep]:
    """Give a key to the runs that wait for it while there is room, first come, first served.  The key is locked.

    Returns the first steps of those in `home`, which are owed a message.  For runs of other homes, their own sweep
    sends the messages.  `lost`: seconds after which a message counts as lost.
    """
    holding = connection.scalar(select(func.count()).where(_places.key_id == key, _places.state != int(Place.WAITS)))
    heads: list[ReadyStep] = []
    after = 0
    while True:
        row = connection.execute(
            select(_places.run_id, _places.most, _places.timeout)
            .where(_places.key_id == key, _places.state == int(Place.WAITS), _places.run_id > after)
            .order_by(_places.run_id)
            .limit(1)
        ).first()
        if row is None or int(holding or 0) >= row.most:
            break
        after = row.run_id
        started = connection.execute(
            update(runs)
            .where(runs.c.id == row.run_id, runs.c.status == int(RunStatus.QUEUED))
            .values(active=True, key_at=db_now(), deadline=None if row.timeout is None else db_now(row.timeout))
            .returning(runs.c.home)
        ).first()
        if started is None:
            continue  # it is being ended, and its place will be deleted
        holding = int(holding or 0) + 1
        here = started.home == home
        state = Place.HOLDS if here else Place.OWED
        connection.execute(update(concurrency_places).where(_places.run_id == row.run_id).values(state=int(state)))
        tell(connection, row.run_id, None, "run.admitted", "the run holds its concurrency key now")
        if here:
            heads += _heads(connection, row.run_id, lost)
    connection.execute(
        delete(concurrency_keys).where(
            concurrency_keys.c.id == key, ~select(literal(1)).where(_places.key_id == key).exists()
        )
    )
    return heads


def _heads(connection: Connection, run: int, lost: float) -> list[ReadyStep]:
    low, high = step_id(run, 0), step_id(run + 1, 0)
    ready = (
        update(steps)
        .where(steps.c.id >= low, steps.c.id < high, steps.c.status == int(StepStatus.READY))
        .values(due=db_now(lost))
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
    )
    return [ReadyStep(*row) for row in connection.execute(ready)]


# The sweep


def turns(connection: Connection, *, home: str, target: str) -> list[KeyState]:
    """Return the work of a home's sweep for the keys that runs wait for."""
    contested = select(_places.key_id).where(_places.state != int(Place.HOLDS))
    query = _MEMBERS.where(_places.key_id.in_(contested), runs.c.target == target)
    rows = connection.execute(query.order_by(_places.key_id, _places.run_id)).all()
    found = []
    for key, group in groupby(rows, key=lambda row: int(row.key_id)):
        members = list(group)
        mine = {member.run_id for member in members if member.home == home}
        if not mine:
            continue
        turn = KeyState(
            key=key,
            ready=_ready(members, mine),
            evict=[number for number in _evicted(members) if number in mine],
            dead=[member.run_id for member in members if member.dead],
        )
        if turn.ready or turn.evict or turn.dead:
            found.append(turn)
    return found


def _ready(members: Sequence[Any], mine: set[int]) -> bool:
    """Return whether a run of `mine` is owed its messages, or is the first in the queue and could start."""
    if any(member.state == Place.OWED and member.run_id in mine for member in members):
        return True
    waiting = [member for member in members if member.state == Place.WAITS]
    return bool(waiting) and len(members) - len(waiting) < waiting[0].most and waiting[0].run_id in mine


def take_turn(connection: Connection, key: int, *, home: str, lost: float) -> list[ReadyStep]:
    """Promote the runs whose turn it is; return all first steps of runs in `home` that are owed a message."""
    _lock(connection, key)
    heads = promote(connection, key, home=home, lost=lost)
    owed = select(_places.run_id).join(runs, runs.c.id == _places.run_id)
    mine = connection.scalars(
        owed.where(_places.key_id == key, _places.state == int(Place.OWED), runs.c.home == home)
    ).all()
    for run in mine:
        connection.execute(update(concurrency_places).where(_places.run_id == run).values(state=int(Place.HOLDS)))
        heads += _heads(connection, run, lost)
    return heads
