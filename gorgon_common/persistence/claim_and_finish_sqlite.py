"""The SQLite version of `claim_and_finish.sql`: the same parts in the same order, in one BEGIN IMMEDIATE transaction.

SQLite allows one writer at a time, so no row locks are needed; plain statements process row by row.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gorgon_common.engine.records import ROW_BITS, ROW_MASK, ClaimCapacity, Weight
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence.tables import SQLITE_TIME

_COLUMNS = "id, token, node, weight, queue, attempt, parent, position, crashes, unmet"
_KINDS = {5: "step.succeeded", 6: "step.failed", 7: "step.skipped", 8: "step.cancelled"}
_CALL = (
    "step_id",
    "token",
    "ordinal",
    "at",
    "provider",
    "model",
    "role",
    "attempt",
    "input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "cost_micro",
    "price_version",
    "latency_ms",
    "outcome",
    "request_id",
)
_INSERT_CALL = (
    f"INSERT INTO ledger ({', '.join(_CALL)}) VALUES ({', '.join(f':{name}' for name in _CALL)})"
    f" ON CONFLICT DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _CALL[3:])}"
    " WHERE ledger.outcome = 'unknown'"
)


@dataclass(frozen=True, slots=True)
class Who:
    """The calling worker."""

    owner: int
    target: str
    home: str
    queues: Sequence[int]
    lost: float


_Ended = tuple[int, str, int | None, int]
"""id, successors, parent and status of a step that has ended."""


def claim_and_finish(
    db: sqlite3.Connection,
    who: Who,
    keep: ClaimCapacity,
    *,
    suspects: bool = False,
    claims: Sequence[int] = (),
    finishes: Sequence[Mapping[str, Any]] = (),
    calls: Sequence[Mapping[str, Any]] = (),
    skips: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[Any, ...]]:
    """Return the same rows as `gorgon_claim_and_finish`.

    Each is (what, id, token, node, weight, queue, attempt, parent, position, crashes, unmet).
    """
    for call in calls:
        db.execute(_INSERT_CALL, {**call, "at": _time(call["at"])})
    fenced = [(finish["step_id"], _fence(db, finish)) for finish in finishes]
    done = [row for _, row in fenced if row is not None]
    ended = {row[0] for row in done}
    refused = [(3, step, *(None,) * 9) for step, _ in fenced if step not in ended]
    if skips and done:
        done += _skip(db, skips)
    alive = lives(db, who.owner)
    pending = _Taker(db, who, keep if alive else ClaimCapacity(0, 0, 0))
    brought = pending.advance(done) if done else []
    claims = [*claims, *pending.pull(len(brought), suspects=suspects)]
    if claims and not alive:
        return [*refused, *brought, (5, *(None,) * 10)]
    return [*refused, *brought, *_claim(db, who, dict.fromkeys(claims), suspects=suspects)]


def lives(db: sqlite3.Connection, owner: int) -> bool:
    """Return whether a worker's lease is valid.  There is only one writer, so this stays true until the transaction
    ends.
    """
    row = db.execute("SELECT 1 FROM workers WHERE id = ? AND NOT reaped AND lease_until > gorgon_now(0)", (owner,))
    return row.fetchone() is not None


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).strftime(SQLITE_TIME)


def _fence(db: sqlite3.Connection, finish: Mapping[str, Any]) -> _Ended | None:
    row: _Ended | None = db.execute(
        "UPDATE steps SET status = ?, owner = NULL WHERE id = ? AND token = ? AND status IN (1, 2)"
        " RETURNING id, successors, parent, status",
        (finish["status"], finish["step_id"], finish["token"]),
    ).fetchone()
    if row is None:
        return None
    ended = _time(finish["finished_at"])
    db.execute(
        "INSERT INTO checkpoints (step_id, status, attempts, started_at, finished_at, output, detail)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            row[0],
            finish["status"],
            finish["attempts"],
            _time(finish["started_at"]),
            ended,
            finish["output"],
            finish["detail"],
        ),
    )
    if finish["blob"] is not None:
        db.execute("INSERT INTO blobs (step_id, body) VALUES (?, ?)", (row[0], finish["blob"]))
    if finish["fingerprint"] is not None:
        db.execute(
            "INSERT INTO fingerprints (root_id, hash, step_id) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (finish["root_id"], finish["fingerprint"], row[0]),
        )
    _tell(db, row[0], _KINDS[finish["status"]], ended)
    return row


def _tell(db: sqlite3.Connection, step: int, kind: str, at: str | None) -> None:
    db.execute(
        "INSERT INTO events (run_id, row, kind, at) VALUES (?, ?, ?, coalesce(?, gorgon_now(0)))",
        (step >> ROW_BITS, step & ROW_MASK, kind, at),
    )


def _skip(db: sqlite3.Connection, skips: Iterable[Mapping[str, Any]]) -> list[_Ended]:
    gone = []
    for skip in skips:
        row = db.execute(
            "UPDATE steps SET status = 7 WHERE id = ? AND status IN (0, 1) RETURNING id, successors, parent, status",
            (skip["step_id"],),
        ).fetchone()
        if row is not None:
            gone.append(row)
            db.execute(
                "INSERT INTO checkpoints (step_id, status, attempts, finished_at, detail)"
                " VALUES (?, 7, 0, gorgon_now(0), ?)",
                (row[0], skip["detail"]),
            )
            _tell(db, row[0], "step.skipped", None)
    return gone


class _Taker:
    """Decrements the dependents of finished steps, and takes over those that the worker may and can run."""

    def __init__(self, db: sqlite3.Connection, who: Who, keep: ClaimCapacity) -> None:
        self.db = db
        self.who = who
        self.fast = keep.fast
        self.slow = keep.slow
        self.pulls = keep.pull
        self._active: dict[int, tuple[bool, bool]] = {}
        self._opened: list[int] = []
        """Children that windows release; they take the places that the other steps have left."""

    def active(self, step: int, weight: int) -> bool:
        """Return whether a step of that weight may be taken over.

        Slow steps of runs with `max_parallel` may not: they have to be counted first.
        """
        run = step >> ROW_BITS
        if run not in self._active:
            row = self.db.execute("SELECT active, max_parallel IS NULL FROM runs WHERE id = ?", (run,)).fetchone()
            self._active[run] = bool(row[0]), bool(row[1])
        active, free = self._active[run]
        return active and (free or weight < 2)

    def take(self, step: int, weight: int, *, ours: bool) -> bool:
        """Return whether the worker takes the step over; if it does, use up one of its places."""
        if not ours or not self.active(step, weight):
            return False
        if weight == 2:
            self.slow -= 1
            return self.slow >= 0
        self.fast -= 1
        return self.fast >= 0

    def advance(self, done: Sequence[_Ended]) -> list[tuple[Any, ...]]:
        counts: Counter[int] = Counter()
        unmet: set[int] = set()
        for step, successors, parent, status in done:
            run = step & ~ROW_MASK
            after = [run | row for row in (*_rows(successors), *(() if parent is None else (parent,)))]
            counts.update(after)
            if status != StepStatus.SUCCEEDED:
                unmet.update(after)
        out: list[tuple[Any, ...]] = []
        for step in sorted(counts):
            if step in unmet:
                self.db.execute("UPDATE steps SET unmet = 1 WHERE id = ? AND status IN (0, 3)", (step,))
            out += self._decrement(step, counts[step])
        for step in sorted(self._opened):
            out += self._release(step)
        return out

    def _decrement(self, step: int, times: int) -> list[tuple[Any, ...]]:
        row = self.db.execute(
            "SELECT deps_left, weight, queue, carried, grouped, window_next, window_end FROM steps"
            " WHERE id = ? AND status IN (0, 3)",
            (step,),
        ).fetchone()
        if row is None:
            return []
        left, weight, queue, carried, grouped, window, end = row
        moved = None if window is None else min(end, window + times)
        out: list[tuple[Any, ...]] = []
        if left != times:
            self.db.execute(
                "UPDATE steps SET deps_left = deps_left - ?, window_next = ? WHERE id = ?", (times, moved, step)
            )
        else:
            self.db.execute("UPDATE steps SET window_next = ? WHERE id = ?", (moved, step))
            ours = weight == 0 or (queue in self.who.queues and not carried and not grouped)
            out += self._open(step, self.take(step, weight, ours=ours), told=not carried)
        if window is not None and moved is not None:
            self._opened += [(step & ~ROW_MASK) | opened for opened in range(window, moved)]
        return out

    def _release(self, step: int) -> list[tuple[Any, ...]]:
        row = self.db.execute("SELECT weight, queue FROM steps WHERE id = ? AND status = 0", (step,)).fetchone()
        if row is None:
            return []
        return self._open(step, self.take(step, row[0], ours=row[0] == 0 or row[1] in self.who.queues), told=True)

    def _open(self, step: int, taken: bool, *, told: bool) -> list[tuple[Any, ...]]:
        if taken:
            row = self.db.execute(
                "UPDATE steps SET deps_left = 0, status = 2, token = token + 1, owner = ?, due = gorgon_now(0)"
                f" WHERE id = ? RETURNING {_COLUMNS}",
                (self.who.owner, step),
            ).fetchone()
            _tell_start(self.db, row)
            return [(1, *row)]
        row = self.db.execute(
            f"UPDATE steps SET deps_left = 0, status = 1, due = gorgon_now(?) WHERE id = ? RETURNING {_COLUMNS}",
            (self.who.lost, step),
        ).fetchone()
        return [(2, *row)] if told else []

    def pull(self, brought: int, *, suspects: bool) -> list[int]:
        wanted = self.pulls - brought
        if wanted <= 0:
            return []
        marks = ", ".join("?" * len(self.who.queues))
        picked = self.db.execute(
            "SELECT b.queue, b.rank, b.step_id FROM backlog b JOIN runs r ON r.id = b.step_id >> 20"
            " JOIN steps s ON s.id = b.step_id AND (s.crashes < 2 OR ?)"
            f" WHERE b.queue IN ({marks}) AND r.active AND r.target = ? AND r.home = ?"
            " ORDER BY b.rank, b.step_id LIMIT ?",
            (suspects, *self.who.queues, self.who.target, self.who.home, wanted),
        ).fetchall()
        self.db.executemany("DELETE FROM backlog WHERE queue = ? AND rank = ? AND step_id = ?", picked)
        return [step for _, _, step in picked]


def _rows(successors: str) -> list[int]:
    inner = successors.strip()[1:-1]
    return [int(row) for row in inner.split(",")] if inner else []


def _claim(db: sqlite3.Connection, who: Who, claims: Iterable[int], *, suspects: bool) -> list[tuple[Any, ...]]:
    out = []
    for step in claims:
        row = db.execute(
            "UPDATE steps SET status = 2, token = token + 1, owner = ?, due = gorgon_now(0)"
            " WHERE id = ? AND status = 1 AND (crashes < 2 OR ?) AND EXISTS (SELECT 1 FROM runs r"
            " WHERE r.id = steps.id >> 20 AND (r.max_parallel IS NULL OR steps.weight < 2)"
            " AND r.active AND r.target = ? AND r.home = ?)"
            f" RETURNING {_COLUMNS}",
            (who.owner, step, suspects, who.target, who.home),
        ).fetchone()
        if row is not None:
            _tell_start(db, row)
            out.append((1, *row))
        elif _counted(db, who, step, suspects=suspects):
            out.append((4, step, *(None,) * 9))
        elif not suspects and _suspect(db, step):
            out.append((6, step, *(None,) * 9))
    return out


def _tell_start(db: sqlite3.Connection, row: Sequence[Any]) -> None:
    """Record in the journal that a slow step has been claimed; `row` has _COLUMNS."""
    step, weight, attempt = row[0], row[3], row[5]
    if weight == Weight.SLOW:
        db.execute(
            "INSERT INTO events (run_id, row, kind, at, data) VALUES (?, ?, 'step.started', gorgon_now(0), ?)",
            (step >> ROW_BITS, step & ROW_MASK, f'{{"attempt": {attempt}}}'),
        )


def _suspect(db: sqlite3.Connection, step: int) -> bool:
    row = db.execute("SELECT 1 FROM steps WHERE id = ? AND status = 1 AND crashes >= 2", (step,)).fetchone()
    return row is not None


def _counted(db: sqlite3.Connection, who: Who, step: int, *, suspects: bool) -> bool:
    """Return whether a step is slow, ready and in a run with `max_parallel`; its message then counts as sent now."""
    row = db.execute(
        "UPDATE steps SET due = gorgon_now(?)"
        " WHERE id = ? AND status = 1 AND weight = 2 AND (crashes < 2 OR ?) AND EXISTS (SELECT 1 FROM runs r"
        " WHERE r.id = steps.id >> 20 AND r.active AND r.target = ? AND r.home = ? AND r.max_parallel IS NOT NULL)"
        " RETURNING id",
        (who.lost, step, suspects, who.target, who.home),
    ).fetchone()
    return row is not None


assert [int(status) for status in (StepStatus.READY, StepStatus.RUNNING, StepStatus.SKIPPED)] == [1, 2, 7]  # see above
