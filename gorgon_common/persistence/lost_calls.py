"""Calls that were lost with their worker: it is unknown whether they were made, and what they cost.

Each gets a row in the ledger with the outcome `unknown`, so that reports never state less than the bill.  A finished
call is stored before the next call of its claim begins, so each claim loses at most one call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, and_, select
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.engine.records import ROW_BITS
from gorgon_common.errors import NotFound
from gorgon_common.persistence.budgets_sqlite import OPEN
from gorgon_common.persistence.predicates import chunks
from gorgon_common.persistence.tables import db_now, expansions, ledger, plans, reservations, runs
from gorgon_common.roles.models import resolve_model
from gorgon_common.workflow.plan import Kind

UNKNOWN = "unknown"
"""The outcome of a call whose result never arrived."""


def store_calls(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Store calls in the ledger, each once.  A call that was presumed lost is updated if its result arrives."""
    if not rows:
        return
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    entered = dialect.insert(ledger)
    told = {column.name: entered.excluded[column.name] for column in ledger.c if not column.primary_key}
    told.pop("org_id")
    connection.execute(
        entered.on_conflict_do_update(
            index_elements=[ledger.c.step_id, ledger.c.token, ledger.c.ordinal],
            set_=told,
            where=ledger.c.outcome == UNKNOWN,
        ),
        rows,
    )


def enter(connection: Connection, claims: Sequence[Any]) -> None:
    """Enter in the ledger the calls that claims (id, token, node, attempt) of a dead worker may have been making."""
    for part in chunks(claims):
        nodes = _nodes(connection, part)
        ids = [row.id for row in part]
        waited = set(connection.scalars(select(expansions.c.step_id).where(expansions.c.step_id.in_(ids))))
        reserved = _by_claim(connection, reservations, ids)
        stored = _by_claim(connection, ledger, ids)
        for row in part:
            known = nodes[row.id >> ROW_BITS]
            node = known[row.node] if row.node < len(known) else {}
            if node.get("kind") != Kind.AGENT or row.id in waited:
                continue  # a failed step whose fallback has ended makes no call either
            held = reserved.get((row.id, row.token), [])
            done = {entry.ordinal for entry in stored.get((row.id, row.token), [])}
            open_ = [entry.ordinal for entry in held if entry.state == OPEN and entry.ordinal not in done]
            for ordinal in open_ if held else [max(done, default=0) + 1]:
                _enter(connection, row, node.get("spec", {}), ordinal)


def _by_claim(connection: Connection, table: Any, ids: Sequence[int]) -> dict[tuple[int, int], list[Any]]:
    found: dict[tuple[int, int], list[Any]] = {}
    for row in connection.execute(select(table).where(table.c.step_id.in_(ids))):
        found.setdefault((row.step_id, row.token), []).append(row)
    return found


def _nodes(connection: Connection, claims: Sequence[Any]) -> dict[int, list[dict[str, Any]]]:
    """Return run → the nodes of its plan, in their stored form."""
    query = (
        select(runs.c.id, plans.c.hash, plans.c.body)
        .select_from(runs.join(plans, and_(plans.c.org_id == runs.c.org_id, plans.c.hash == runs.c.plan_hash)))
        .where(runs.c.id.in_({row.id >> ROW_BITS for row in claims}))
    )
    bodies: dict[str, list[dict[str, Any]]] = {}
    found: dict[int, list[dict[str, Any]]] = {}
    for row in connection.execute(query):
        if row.hash not in bodies:
            bodies[row.hash] = json.loads(row.body).get("nodes", [])
        found[row.id] = bodies[row.hash]
    return found


def _enter(connection: Connection, row: Any, spec: dict[str, Any], ordinal: int) -> None:
    provider, model = _model(spec)
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    values = {
        "step_id": row.id,
        "token": row.token,
        "ordinal": ordinal,
        "at": db_now(),
        "provider": provider,
        "model": model,
        "role": spec.get("role"),
        "attempt": row.attempt,
        **{f"{kind}_tokens": 0 for kind in ("input", "cache_read", "cache_write", "output", "reasoning")},
        "latency_ms": 0,
        "outcome": UNKNOWN,
    }
    connection.execute(dialect.insert(ledger).values(values).on_conflict_do_nothing())


def _model(spec: dict[str, Any]) -> tuple[str, str]:
    """Return the provider and the model that a step calls first."""
    provider, _, name = str((spec.get("models") or [f"{spec.get('provider')}:{spec.get('model') or ''}"])[0]).partition(
        ":"
    )
    name = name or str(spec.get("tier") or "standard")
    try:
        return provider, resolve_model(provider, name)
    except NotFound:
        return provider, name
