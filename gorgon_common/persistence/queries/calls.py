"""The SQL of reports: every call, of runs and recorded, and its sums by dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    String,
    cast,
    distinct,
    false,
    func,
    literal,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import Subquery

from gorgon_common.engine.records import ROW_BITS, ROW_MASK
from gorgon_common.persistence.queries.filters import DIMENSIONS, LIBRARY, TARGETS, Filters
from gorgon_common.persistence.queries.places import run_of
from gorgon_common.persistence.tables import ledger, recorded_calls, runs, steps

TOKENS = ("input", "cache_read", "cache_write", "output", "reasoning")
_COUNTS = ("calls", "failed_calls", "unpriced_calls", "timed", "latency_ms", "cost_micro")
SUMS = (*_COUNTS, *(f"{name}_tokens" for name in TOKENS))
_NOBODY = "none"
"""The provider of steps that stand in for a call in benchmarks and tests."""


class _Day(ColumnElement[str]):
    """The UTC day of a time, such as `2026-11-22`."""

    inherit_cache = False
    type = String()

    def __init__(self, moment: ColumnElement[datetime]) -> None:
        self.moment = moment


@compiles(_Day, "postgresql")
def _day_postgresql(element: _Day, compiler: Any, **options: Any) -> str:
    return f"to_char({compiler.process(element.moment, **options)} AT TIME ZONE 'UTC', 'YYYY-MM-DD')"


@compiles(_Day, "sqlite")
def _day_sqlite(element: _Day, compiler: Any, **options: Any) -> str:
    return f"substr({compiler.process(element.moment, **options)}, 1, 10)"


def calls_of(filters: Filters) -> tuple[Subquery, Select[Any]]:
    """Return every call, both of runs and recorded, and a query of the calls that pass the filters."""
    number = run_of(ledger.c.step_id)
    of_runs = (
        select(
            ledger.c.at,
            ledger.c.provider,
            ledger.c.model,
            ledger.c.role,
            runs.c.team,
            runs.c.workflow,
            runs.c.public_id.label("run"),
            cast(null(), String).label("step"),
            runs.c.target,
            ledger.c.outcome,
            runs.c.id.label("run_number"),
            ledger.c.step_id,
            ledger.c.token,
            ledger.c.ordinal,
            ledger.c.attempt,
            runs.c.plan_hash,
            steps.c.node,
            *(getattr(ledger.c, f"{name}_tokens") for name in TOKENS),
            ledger.c.cost_micro,
            ledger.c.price_version,
            ledger.c.latency_ms,
            ledger.c.request_id,
        )
        .select_from(ledger.join(runs, runs.c.id == number).join(steps, steps.c.id == ledger.c.step_id))
        .where(ledger.c.provider != _NOBODY, runs.c.org_id == filters.scope.org)
    )
    recorded = select(
        recorded_calls.c.at,
        recorded_calls.c.provider,
        recorded_calls.c.model,
        recorded_calls.c.role,
        recorded_calls.c.team,
        recorded_calls.c.workflow,
        recorded_calls.c.run,
        recorded_calls.c.step,
        literal(LIBRARY, String),
        recorded_calls.c.outcome,
        literal(0, BigInteger),
        recorded_calls.c.id,
        literal(0, Integer),
        literal(1, Integer),
        literal(1, Integer),
        cast(null(), String),
        cast(null(), Integer),
        *(getattr(recorded_calls.c, f"{name}_tokens") for name in TOKENS),
        recorded_calls.c.cost_micro,
        recorded_calls.c.price_version,
        recorded_calls.c.latency_ms,
        cast(null(), String),
    ).where(recorded_calls.c.org_id == filters.scope.org)
    run = filters.only.get("run")
    if run is not None:  # run ids are in the ledger's key; public ids are not
        chosen = select(runs.c.id).where(runs.c.public_id == run).scalar_subquery()
        low = chosen.op("<<", return_type=BigInteger())(literal_column(str(ROW_BITS)))
        of_runs = of_runs.where(runs.c.public_id == run, ledger.c.step_id >= low, ledger.c.step_id <= low + ROW_MASK)
    source = union_all(of_runs, recorded).subquery("calls")
    query = select(source)
    query = query.where(*_within(source.c.at, filters))
    if filters.targets != TARGETS:
        query = query.where(source.c.target.in_(filters.targets))
    for name, value in filters.only.items():
        if name == "day":
            query = query.where(_Day(source.c.at) == value)
        elif name != "step":
            query = query.where(getattr(source.c, name) == value)
    return source, query


def sums_of_runs(by: Sequence[str], filters: Filters, *, by_step: bool) -> Select[Any]:
    """Return sums over the ledger by dimensions.  It sums up each run first, so that each run is looked up once."""
    number = run_of(ledger.c.step_id)
    own: dict[str, Any] = {name: getattr(ledger.c, name) for name in ("provider", "model", "role", "outcome")}
    own["day"] = _Day(ledger.c.at)
    inner: list[Any] = [number.label("number"), *(own[name].label(name) for name in by if name in own)]
    source: Any = ledger
    if by_step:
        source = ledger.join(steps, steps.c.id == ledger.c.step_id)
        inner.append(steps.c.node)
    chosen = [ledger.c.provider != _NOBODY, *_within(ledger.c.at, filters)]
    chosen += [own[name] == value for name, value in filters.only.items() if name in own]
    run = filters.only.get("run")
    if run is not None:  # run ids are in the ledger's key; public ids are not
        first = select(runs.c.id).where(runs.c.public_id == run).scalar_subquery()
        low = first.op("<<", return_type=BigInteger())(literal_column(str(ROW_BITS)))
        chosen += [ledger.c.step_id >= low, ledger.c.step_id <= low + ROW_MASK]
    part = select(*inner, *_sums(ledger.c)).select_from(source).where(*chosen)
    part_of_run = part.group_by(*(literal_column(str(place + 1)) for place in range(len(inner)))).subquery("parts")
    around = {"team": runs.c.team, "workflow": runs.c.workflow, "run": runs.c.public_id, "target": runs.c.target}
    keys: list[Any] = [
        (around[name] if name in around else part_of_run.c[name]).label(name) for name in by if name != "step"
    ]
    if by_step:
        keys += [runs.c.plan_hash, part_of_run.c.node, cast(null(), String).label("step")]
    names = (*SUMS, "runs")
    sums = [func.sum(part_of_run.c[name]).label(name) for name in names if name != "runs"]
    runs_of = func.count(distinct(part_of_run.c.number)).label("runs")
    query = select(*keys, *sums, runs_of).select_from(part_of_run.join(runs, runs.c.id == part_of_run.c.number))
    query = query.where(runs.c.org_id == filters.scope.org)
    query = query.where(*(around[name] == value for name, value in filters.only.items() if name in around))
    if filters.targets != TARGETS:
        query = query.where(runs.c.target.in_(filters.targets))
    return query.group_by(*keys) if keys else query


def sums_of_recorded(by: Sequence[str], filters: Filters) -> Select[Any]:
    """Return the same sums over the recorded calls."""
    columns: dict[str, Any] = {name: getattr(recorded_calls.c, name) for name in DIMENSIONS if name in recorded_calls.c}
    columns |= {"day": _Day(recorded_calls.c.at), "target": literal(LIBRARY, String)}
    keys = [columns[name].label(name) for name in by]
    query = select(*keys, *_sums(recorded_calls.c), func.count(distinct(recorded_calls.c.run)).label("runs"))
    query = query.where(recorded_calls.c.org_id == filters.scope.org, *_within(recorded_calls.c.at, filters))
    query = query.where(*(columns[name] == value for name, value in filters.only.items()))
    if LIBRARY not in filters.targets:
        query = query.where(false())
    return query.group_by(*(literal_column(str(place + 1)) for place in range(len(keys)))) if keys else query


def _sums(columns: Any) -> list[Any]:
    return [
        func.count().label("calls"),
        func.count().filter(columns.outcome != "ok").label("failed_calls"),
        (func.count() - func.count(columns.cost_micro)).label("unpriced_calls"),
        *(func.sum(columns[f"{name}_tokens"]).label(f"{name}_tokens") for name in TOKENS),
        func.coalesce(func.sum(columns.cost_micro), 0).label("cost_micro"),
        func.coalesce(func.sum(columns.latency_ms), 0).label("latency_ms"),
        func.count(columns.latency_ms).label("timed"),
    ]


def _within(moment: Any, filters: Filters) -> list[Any]:
    found = [] if filters.since is None else [moment >= filters.since]
    return found if filters.until is None else [*found, moment < filters.until]
