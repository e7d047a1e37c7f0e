"""The SQLite version of `budgets.sql`: the same parts, inside one BEGIN IMMEDIATE transaction, with a single writer."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gorgon_common.errors import Unavailable

OPEN, SETTLED, RELEASED, UNKNOWN = range(4)
ADJUST = 4
MARKS = (50, 80, 100)
GRACE_SECONDS = 10.0
"""How long a woken step keeps its claim on the room for which it was woken."""
_ROOM = (
    "(usd_limit IS NULL OR usd_limit - usd_spent - usd_overrun - usd_reserved - :usd_first >= :usd)"
    " AND (token_limit IS NULL"
    " OR token_limit - token_spent - token_overrun - token_reserved - :token_first >= :tokens)"
)
_PRESENT = "(starts_at IS NULL OR starts_at <= gorgon_now(0)) AND (ends_at IS NULL OR ends_at > gorgon_now(0))"
_POST = (
    "INSERT INTO postings (period_id, step_id, token, ordinal, kind, usd_reserved, usd_spent, usd_overrun,"
    " token_reserved, token_spent, token_overrun, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, gorgon_now(0))"
)

Key = tuple[int, int, int]


def reserve(
    db: sqlite3.Connection, key: Key, path: Sequence[int], usd: int, tokens: int, max_tokens: int
) -> tuple[Any, ...]:
    """Return the row that `gorgon_exchange` returns for a call, without `place`."""
    made = db.execute(
        "INSERT INTO reservations (step_id, token, ordinal, at, state, usd, tokens, max_tokens, accounts)"
        " VALUES (?, ?, ?, gorgon_now(0), 0, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (*key, usd, tokens, max_tokens, json.dumps(list(path))),
    )
    if not made.rowcount:
        known = db.execute(
            "SELECT state, max_tokens, usd, tokens FROM reservations WHERE step_id = ? AND token = ? AND ordinal = ?",
            key,
        ).fetchone()
        return (2, *known, *(None,) * 9)
    for place, period in enumerate(path):
        first = claimed(db, period, key[0])
        values = {"id": period, "usd": usd, "tokens": tokens, "usd_first": first[0], "token_first": first[1]}
        held = db.execute(
            "UPDATE budget_periods SET usd_reserved = usd_reserved + :usd, token_reserved = token_reserved + :tokens"
            f" WHERE id = :id AND {_ROOM} AND {_PRESENT}",
            values,
        )
        if held.rowcount:
            continue
        for taken in path[:place]:
            db.execute(
                "UPDATE budget_periods SET usd_reserved = usd_reserved - ?, token_reserved = token_reserved - ?"
                " WHERE id = ?",
                (usd, tokens, taken),
            )
        db.execute("DELETE FROM reservations WHERE step_id = ? AND token = ? AND ordinal = ?", key)
        row = db.execute(
            f"SELECT CASE WHEN {_PRESENT} THEN 3 ELSE 4 END, id, usd_limit, usd_spent + usd_overrun, usd_reserved,"
            " token_limit, token_spent + token_overrun, token_reserved FROM budget_periods WHERE id = ?",
            (period,),
        ).fetchone()
        if row is None:
            raise Unavailable(f"There is no account {period}.", hint="Try again; if it stays, restart the process.")
        return (row[0], None, None, None, None, *row[1:], *first)
    db.executemany(_POST, [(period, *key, OPEN, usd, 0, 0, tokens, 0, 0) for period in path])
    db.execute("DELETE FROM budget_waits WHERE step_id = ?", key[:1])
    return (1, OPEN, max_tokens, usd, tokens, *(None,) * 9)


def claimed(db: sqlite3.Connection, period: int, step: int) -> tuple[int, int]:
    """Return what `gorgon_claimed` returns; (0, 0) if no step waits."""
    usd, tokens = db.execute(
        "SELECT coalesce(sum(w.usd), 0), coalesce(sum(w.tokens), 0)"
        " FROM budget_waits w JOIN steps s ON s.id = w.step_id JOIN budget_periods b ON b.id = w.period_id"
        " WHERE w.period_id = ? AND b.waited_for AND w.step_id < ? AND w.until > gorgon_now(0)"
        " AND (w.woken OR NOT w.patient) AND s.status IN (1, 2, 3)"
        " AND w.usd <= coalesce(b.usd_limit - b.usd_spent - b.usd_overrun, w.usd)"
        " AND w.tokens <= coalesce(b.token_limit - b.token_spent - b.token_overrun, w.tokens)",
        (period, step),
    ).fetchone()
    return usd, tokens


def settle(db: sqlite3.Connection, facts: Iterable[Mapping[str, Any]]) -> None:
    """Do what `gorgon_settle` does."""
    changes: dict[int, list[int]] = {}
    told_of: dict[int, int] = {}
    for key, fact in sorted(_fullest(facts).items()):
        row = db.execute(
            "SELECT state, usd, tokens, accounts FROM reservations WHERE step_id = ? AND token = ? AND ordinal = ?", key
        ).fetchone()
        if row is None:
            continue
        was, usd, tokens, accounts = row
        complete = fact["state"] == RELEASED or (
            fact["state"] == SETTLED and (fact["usd"] is not None or not usd) and fact["tokens"] is not None
        )
        if was != OPEN and not (was == UNKNOWN and complete):
            continue
        state = UNKNOWN if fact["state"] == SETTLED and not complete else fact["state"]
        usd_now, tokens_now = _amounts(fact, usd, tokens)
        db.execute(
            "UPDATE reservations SET state = ?, usd_posted = ?, tokens_posted = ?"
            " WHERE step_id = ? AND token = ? AND ordinal = ?",
            (state, usd_now, tokens_now, *key),
        )
        kind = ADJUST if was == UNKNOWN else state
        change = (*_change(usd, usd_now, was), *_change(tokens, tokens_now, was))
        for period in json.loads(accounts):
            db.execute(_POST, (period, *key, kind, *change))
            changes[period] = [sum(pair) for pair in zip(changes.get(period, (0,) * 6), change, strict=True)]
            told_of.setdefault(period, key[0] >> 20)
    for period in _leaf_to_root(db, changes):
        _apply(db, period, changes[period], told_of[period])


def _fullest(facts: Iterable[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Return the fact about each call: of several, the first one that says the most."""

    def said(fact: Mapping[str, Any]) -> int:
        if fact["state"] == RELEASED or (fact["state"] == SETTLED and None not in (fact["usd"], fact["tokens"])):
            return 0
        return 1 if fact["state"] == SETTLED and fact["tokens"] is not None else 2

    found: dict[Key, Mapping[str, Any]] = {}
    for fact in facts:
        key = (fact["step_id"], fact["token"], fact["ordinal"])
        if key not in found or said(fact) < said(found[key]):
            found[key] = fact
    return found


def _leaf_to_root(db: sqlite3.Connection, periods: Iterable[int]) -> list[int]:
    wanted = list(periods)
    marks = ", ".join("?" * len(wanted))
    rows = db.execute(f"SELECT id FROM budget_periods WHERE id IN ({marks}) ORDER BY level DESC, id", wanted)
    return [row[0] for row in rows]


def _amounts(fact: Mapping[str, Any], usd: int, tokens: int) -> tuple[int, int]:
    if fact["state"] == RELEASED:
        return 0, 0
    if fact["state"] == UNKNOWN:
        return usd, tokens
    return usd if fact["usd"] is None else fact["usd"], tokens if fact["tokens"] is None else fact["tokens"]


def _change(held: int, now: int, was: int) -> tuple[int, int, int]:
    """Return the changes of (reserved, spent, overrun)."""
    if was == UNKNOWN:
        return 0, min(now, held) - held, max(now - held, 0)
    return -held, min(now, held), max(now - held, 0)


def _apply(db: sqlite3.Connection, period: int, change: Sequence[int], run: int) -> None:
    row = db.execute(
        "UPDATE budget_periods SET usd_reserved = usd_reserved + ?, usd_spent = usd_spent + ?,"
        " usd_overrun = usd_overrun + ?, token_reserved = token_reserved + ?, token_spent = token_spent + ?,"
        " token_overrun = token_overrun + ? WHERE id = ? RETURNING label, alerted, waited_for, usd_limit,"
        " usd_spent + usd_overrun, token_limit, token_spent + token_overrun",
        (*change, period),
    ).fetchone()
    label, alerted, waited_for, usd_limit, usd, token_limit, tokens = row
    if waited_for:
        make_room(db, period)
    if change[2] > 0 or change[5] > 0:
        said = (
            f"{label}: a call used more than had been reserved for it: {max(change[2], 0)} micro-dollars,"
            f" {max(change[5], 0)} tokens"
        )
        _tell(db, period, run, "budget.overrun", None, said)
    reached = [
        mark
        for mark in MARKS
        if mark > alerted
        and (
            (usd_limit is not None and usd * 100 >= usd_limit * mark)
            or (token_limit is not None and tokens * 100 >= token_limit * mark)
        )
    ]
    if reached:
        db.execute("UPDATE budget_periods SET alerted = ? WHERE id = ?", (reached[-1], period))
        _tell(db, period, run, "budget.alert", reached[-1], f"{label}: {reached[-1]} % is spent")


def _tell(db: sqlite3.Connection, period: int, run: int, kind: str, mark: int | None, message: str) -> None:
    """Do what `gorgon_tell` does."""
    db.execute("INSERT INTO events (run_id, kind, at, message) VALUES (?, ?, gorgon_now(0), ?)", (run, kind, message))
    db.execute(
        "INSERT INTO budget_alerts (org_id, period_id, run_id, kind, mark, at, message)"
        " SELECT org_id, id, ?, ?, ?, gorgon_now(0), ? FROM budget_periods WHERE id = ?",
        (run, kind, mark, message, period),
    )


def make_room(db: sqlite3.Connection, period: int) -> None:
    """Do what `gorgon_make_room` does."""
    db.execute(
        "DELETE FROM budget_waits WHERE period_id = ? AND (woken AND coalesce(until <= gorgon_now(0), 1)"
        " OR NOT EXISTS (SELECT 1 FROM steps s WHERE s.id = budget_waits.step_id AND s.status IN (1, 2, 3)))",
        (period,),
    )
    row = db.execute(
        "SELECT usd_limit - usd_spent - usd_overrun - usd_reserved,"
        " token_limit - token_spent - token_overrun - token_reserved, usd_reserved = 0 AND token_reserved = 0"
        " FROM budget_periods WHERE id = ?",
        (period,),
    ).fetchone()
    usd, tokens, idle = row
    line = db.execute(
        "SELECT step_id, woken, patient, usd, tokens FROM budget_waits WHERE period_id = ? ORDER BY step_id", (period,)
    ).fetchall()

    def fits(needed: int, needed_tokens: int) -> bool:
        return (usd is None or needed <= usd) and (tokens is None or needed_tokens <= tokens)

    usd_sum = token_sum = 0
    for step, woken, patient, needed, needed_tokens in line:
        if fits(needed, needed_tokens) or not (patient or idle):
            usd_sum += needed
            token_sum += needed_tokens
            wakes = fits(usd_sum, token_sum)
        else:
            wakes = not patient  # only to be refused
        if wakes and not woken:
            db.execute(
                "UPDATE budget_waits SET woken = 1, until = gorgon_now(?) WHERE step_id = ?", (GRACE_SECONDS, step)
            )
            db.execute("UPDATE steps SET due = gorgon_now(0) WHERE id = ? AND status = 3", (step,))
    if not line:
        db.execute("UPDATE budget_periods SET waited_for = 0 WHERE id = ?", (period,))
