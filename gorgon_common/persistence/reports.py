"""Reports of what calls cost: the ledger joined with its runs and steps, grouped by any of their properties.

Amounts are whole micro-dollars in the rows and US dollars in results.  A sum is None if it includes a call whose price
is unknown; the known part is reported beside it.  An unknown cost is never shown as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
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
    tuple_,
    union_all,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import Subquery

from gorgon_common.clock import format_time, parse_time
from gorgon_common.costs.tokens import Ratio
from gorgon_common.costs.tracker import RecordedCall
from gorgon_common.engine.records import ROW_BITS, ROW_MASK
from gorgon_common.errors import InputInvalid
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.tables import db_now, ledger, recorded_calls, runs, steps, token_ratios
from gorgon_common.persistence.views import MICRO, Places
from gorgon_common.workflow.plan import Plan

DIMENSIONS = ("provider", "model", "role", "team", "workflow", "run", "step", "day", "target", "outcome")
"""The dimensions by which a report can be grouped."""

LIBRARY = "library"
"""The target of calls that were made outside of runs and recorded with `costs.tracker`."""
REAL = ("live", LIBRARY)
"""Targets whose calls cost real money.  Costs in the sandbox are simulated, and are only included on request."""
TARGETS = (*REAL, "sandbox")

_TOKENS = ("input", "cache_read", "cache_write", "output", "reasoning")
_COUNTS = ("calls", "failed_calls", "unpriced_calls", "timed", "latency_ms", "cost_micro")
_SUMS = (*_COUNTS, *(f"{name}_tokens" for name in _TOKENS))
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


@dataclass(frozen=True, slots=True)
class Filters:
    """The calls that a report covers: `since` ≤ time < `until`, and exact values of dimensions."""

    since: datetime | None = None
    until: datetime | None = None
    only: Mapping[str, str] = field(default_factory=dict)
    """Dimension → value; `run` is a run's public id."""
    targets: tuple[str, ...] = TARGETS

    @classmethod
    def read(
        cls, since: str | None, until: str | None, only: Mapping[str, str] | None, by: Sequence[str] = ()
    ) -> Filters:
        """Parse filters from text: a day in UTC (the last one is included) or an RFC 3339 time.

        The target is live, sandbox, library or all.  Without a target, the filters select calls that cost real money,
        unless they name one run or the rows are grouped by target.  Raises InputInvalid.
        """
        rest = dict(only or {})
        target = rest.pop("target", None)
        targets: tuple[str, ...]
        if target is None:
            targets = TARGETS if "run" in rest or "target" in by else REAL
        elif target == "all":
            targets = TARGETS
        elif target in TARGETS:
            targets = (target,)
        else:
            raise InputInvalid(f"There is no target {target!r}.", hint=f"Targets: {', '.join(TARGETS)}, or all.")
        return cls(
            None if since is None else _moment(since, end=False),
            None if until is None else _moment(until, end=True),
            rest,
            targets,
        )


class Reports:
    """Reads the ledger.  `plan_of` returns the plan with a given hash, for the names of steps."""

    def __init__(self, database: Database, plan_of: Callable[[str], Plan]) -> None:
        self.database = database
        self.plan_of = plan_of

    def report(self, by: Sequence[str], filters: Filters = Filters(), *, limit: int | None = None) -> dict[str, Any]:
        """Return `{by, from, to, filters, targets, rows, groups, total, by_target}`: one row for each combination of
        `by`.

        A row has the dimensions and calls, failed_calls, runs, tokens {input, cache_read, cache_write, output,
        reasoning}, cost_usd (None if the cost of any call is unknown), known_cost_usd, unpriced_calls and latency_ms
        (mean).  `by_target` has the sums of every target, including targets that the filters exclude.  Rows are sorted
        by descending cost, or by day if that is the first dimension.  Raises InputInvalid for an unknown dimension.
        """
        by = list(dict.fromkeys(by))
        _check(by)
        _check(filters.only)
        found, by_target = self._by_target(by, filters)
        rows = [_row(list(by), key, sums) for key, sums in found.items()]
        if by and by[0] == "day":
            rows.sort(key=lambda row: tuple(str(row[name] or "") for name in by))
        else:
            rows.sort(key=lambda row: (-row["known_cost_usd"], *(str(row[name] or "") for name in by)))
        total = _row([], (), _added(found.values()))
        if not by or not {"team", "workflow", "run", "target"}.issuperset(by):  # otherwise each run is in only one row
            for name, count in self._runs(replace(filters, targets=TARGETS)).items():
                by_target.get(name, {})["runs"] = count
            total["runs"] = sum(by_target[name]["runs"] for name in filters.targets if name in by_target)
        return {
            "by": list(by),
            "from": None if filters.since is None else format_time(filters.since),
            "to": None if filters.until is None else format_time(filters.until),
            "filters": dict(filters.only),
            "targets": list(filters.targets),
            "rows": rows if limit is None else rows[:limit],
            "groups": len(rows),
            "total": total,
            "by_target": {name: _row([], (), sums) for name, sums in sorted(by_target.items())},
        }

    def calls(self, filters: Filters = Filters(), *, limit: int = 1000, cursor: str | None = None) -> dict[str, Any]:
        """Return `{items, next}`: one row per call, ordered by run and step.

        An item has at, provider, model, role, team, workflow, run, step, item, attempt, call (1, 2 … within the
        attempt: repairs), tokens by kind, cost_usd, price_version, latency_ms, outcome, request_id and target.  Raises
        InputInvalid for a cursor that this method did not return.
        """
        _check(filters.only)
        source, query = self._calls(filters)
        columns = source.c
        order = (columns.run_number, columns.step_id, columns.token, columns.ordinal)
        query = query.with_only_columns(*columns).order_by(*order).limit(limit + 1)
        if cursor is not None:
            query = query.where(tuple_(*order) > tuple_(*(literal(part, BigInteger) for part in _position(cursor))))
        with self.database.report() as connection:
            rows = connection.execute(query).all()
            items = _items(connection, self.plan_of, rows[:limit])
        wanted = filters.only.get("step")
        shown = [item for item in items if wanted is None or item["step"] == wanted]
        last = rows[limit - 1] if len(rows) > limit else None
        following = None
        if last is not None:
            following = f"{last.run_number}.{last.step_id}.{last.token}.{last.ordinal}"
        return {"items": shown, "next": following}

    def record(self, calls: Sequence[RecordedCall]) -> None:
        """Store calls that were made outside of runs."""
        rows = [
            {
                **{name: getattr(call, name) for name in _RECORDED},
                "input_tokens": call.usage.input_tokens,
                "cache_read_tokens": call.usage.cache_read_tokens,
                "cache_write_tokens": call.usage.cache_write_5m_tokens + call.usage.cache_write_1h_tokens,
                "output_tokens": call.usage.output_tokens,
                "reasoning_tokens": call.usage.reasoning_tokens,
            }
            for call in calls
        ]
        if rows:
            with self.database.write() as connection:
                connection.execute(recorded_calls.insert(), rows)

    # Token estimates against the providers' counts

    def ratios(self, target: str) -> dict[tuple[str, str], Ratio]:
        """Return (provider, model) → how estimates of input tokens compare with the counts on a target."""
        with self.database.report() as connection:
            rows = connection.execute(select(token_ratios).where(token_ratios.c.target == target)).all()
        return {(row.provider, row.model): Ratio(int(row.calls), row.log_ratio, row.log_square) for row in rows}

    def add_ratios(self, target: str, seen: Mapping[tuple[str, str], Ratio]) -> None:
        """Add observations to the stored ones."""
        insert = (sqlite if self.database.sqlite else postgresql).insert(token_ratios)
        statement = insert.on_conflict_do_update(
            index_elements=["target", "provider", "model"],
            set_={
                "calls": token_ratios.c.calls + insert.excluded.calls,
                "log_ratio": token_ratios.c.log_ratio + insert.excluded.log_ratio,
                "log_square": token_ratios.c.log_square + insert.excluded.log_square,
                "updated_at": insert.excluded.updated_at,
            },
        )
        with self.database.write() as connection:
            now = connection.execute(select(db_now())).scalar_one()
            # In a fixed order, so that two processes that add the same models cannot deadlock.
            rows = [
                {
                    "target": target,
                    "provider": provider,
                    "model": model,
                    "calls": ratio.calls,
                    "log_ratio": ratio.log_sum,
                    "log_square": ratio.log_square,
                    "updated_at": now,
                }
                for (provider, model), ratio in sorted(seen.items())
                if ratio.calls
            ]
            if rows:
                connection.execute(statement, rows)

    # Queries

    def _by_target(
        self, by: list[str], filters: Filters
    ) -> tuple[dict[tuple[Any, ...], dict[str, int]], dict[str, dict[str, int]]]:
        """Return dimensions → sums of the filters' targets, and target → sums of every target."""
        found: dict[tuple[Any, ...], dict[str, int]] = {}
        targets: dict[str, dict[str, int]] = {}
        place_of = by.index("target") if "target" in by else len(by)
        grouped = self._grouped(list(dict.fromkeys((*by, "target"))), replace(filters, targets=TARGETS))
        for key, sums in grouped.items():
            target = key[place_of]
            targets[target] = _added([targets[target], sums]) if target in targets else sums
            if target in filters.targets:
                place = key[: len(by)]
                found[place] = _added([found[place], sums]) if place in found else sums
        return found, targets

    def _grouped(self, by: list[str], filters: Filters) -> dict[tuple[Any, ...], dict[str, int]]:
        """Return dimensions → sums.  Steps are grouped by node first, because their names are in the plans."""
        by_step = "step" in by or "step" in filters.only
        found: dict[tuple[Any, ...], dict[str, int]] = {}
        with self.database.report() as connection:
            rows = [
                *connection.execute(_of_runs(by, filters, by_step=by_step)).all(),
                *connection.execute(_of_recorded(by, filters)).all(),
            ]
        for row in rows:
            named = dict(row._mapping)
            if not named["calls"]:
                continue
            if by_step:
                step = named.get("step", filters.only.get("step"))
                named["step"] = self._step(named.get("plan_hash"), named.get("node"), step)
                if named["step"] != filters.only.get("step", named["step"]):
                    continue
            key = tuple(named[name] for name in by)
            sums_here = {name: int(named[name] or 0) for name in (*_SUMS, "runs")}
            found[key] = _added([found[key], sums_here]) if key in found else sums_here
        return found

    def _runs(self, filters: Filters) -> dict[str, int]:
        """Return target → number of runs that the calls belong to.  The filter on a step's name is ignored."""
        with self.database.report() as connection:
            rows = [
                *connection.execute(_of_runs(["target"], filters, by_step=False)).all(),
                *connection.execute(_of_recorded(["target"], filters)).all(),
            ]
        return {row.target: int(row.runs or 0) for row in rows}

    def _step(self, plan_hash: str | None, node: int | None, step: str | None) -> str | None:
        return step if plan_hash is None or node is None else step_name(self.plan_of(plan_hash), node)

    def _calls(self, filters: Filters) -> tuple[Subquery, Select[Any]]:
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
                *(getattr(ledger.c, f"{name}_tokens") for name in _TOKENS),
                ledger.c.cost_micro,
                ledger.c.price_version,
                ledger.c.latency_ms,
                ledger.c.request_id,
            )
            .select_from(ledger.join(runs, runs.c.id == number).join(steps, steps.c.id == ledger.c.step_id))
            .where(ledger.c.provider != _NOBODY)
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
            *(getattr(recorded_calls.c, f"{name}_tokens") for name in _TOKENS),
            recorded_calls.c.cost_micro,
            recorded_calls.c.price_version,
            recorded_calls.c.latency_ms,
            cast(null(), String),
        )
        run = filters.only.get("run")
        if run is not None:  # run ids are in the ledger's key; public ids are not
            chosen = select(runs.c.id).where(runs.c.public_id == run).scalar_subquery()
            low = chosen.op("<<", return_type=BigInteger())(literal_column(str(ROW_BITS)))
            of_runs = of_runs.where(
                runs.c.public_id == run, ledger.c.step_id >= low, ledger.c.step_id <= low + ROW_MASK
            )
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


def _of_runs(by: Sequence[str], filters: Filters, *, by_step: bool) -> Select[Any]:
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
    names = (*_SUMS, "runs")
    sums = [func.sum(part_of_run.c[name]).label(name) for name in names if name != "runs"]
    runs_of = func.count(distinct(part_of_run.c.number)).label("runs")
    query = select(*keys, *sums, runs_of).select_from(part_of_run.join(runs, runs.c.id == part_of_run.c.number))
    query = query.where(*(around[name] == value for name, value in filters.only.items() if name in around))
    if filters.targets != TARGETS:
        query = query.where(runs.c.target.in_(filters.targets))
    return query.group_by(*keys) if keys else query


def _of_recorded(by: Sequence[str], filters: Filters) -> Select[Any]:
    """Return the same sums over the recorded calls."""
    columns: dict[str, Any] = {name: getattr(recorded_calls.c, name) for name in DIMENSIONS if name in recorded_calls.c}
    columns |= {"day": _Day(recorded_calls.c.at), "target": literal(LIBRARY, String)}
    keys = [columns[name].label(name) for name in by]
    query = select(*keys, *_sums(recorded_calls.c), func.count(distinct(recorded_calls.c.run)).label("runs"))
    query = query.where(*_within(recorded_calls.c.at, filters))
    query = query.where(*(columns[name] == value for name, value in filters.only.items()))
    if LIBRARY not in filters.targets:
        query = query.where(false())
    return query.group_by(*(literal_column(str(place + 1)) for place in range(len(keys)))) if keys else query


def _sums(columns: Any) -> list[Any]:
    return [
        func.count().label("calls"),
        func.count().filter(columns.outcome != "ok").label("failed_calls"),
        (func.count() - func.count(columns.cost_micro)).label("unpriced_calls"),
        *(func.sum(columns[f"{name}_tokens"]).label(f"{name}_tokens") for name in _TOKENS),
        func.coalesce(func.sum(columns.cost_micro), 0).label("cost_micro"),
        func.coalesce(func.sum(columns.latency_ms), 0).label("latency_ms"),
        func.count(columns.latency_ms).label("timed"),
    ]


def _within(moment: Any, filters: Filters) -> list[Any]:
    found = [] if filters.since is None else [moment >= filters.since]
    return found if filters.until is None else [*found, moment < filters.until]


_RECORDED = (
    "at",
    "team",
    "workflow",
    "run",
    "step",
    "provider",
    "model",
    "role",
    "cost_micro",
    "price_version",
    "latency_ms",
    "outcome",
)


def run_of(step: ColumnElement[int]) -> ColumnElement[int]:
    """Return the run id in a step's id.  The shift uses a literal, because PostgreSQL cannot shift by a bigint."""
    return step.op(">>", return_type=BigInteger())(literal_column(str(ROW_BITS)))


def step_name(plan: Plan, node: int) -> str:
    """Return the display name of a node: for a map's items and a loop's rounds, without the mark."""
    return plan.nodes[node].name


def _moment(text: str, *, end: bool) -> datetime:
    try:
        if len(text) == len("2026-11-22"):
            day = datetime.fromisoformat(text).replace(tzinfo=UTC)
            return day + timedelta(days=1) if end else day
        return parse_time(text)
    except (ValueError, OverflowError):
        raise InputInvalid(
            f"{text[:60]!r} is not a valid date or time.", hint="Write 2026-11-22, or 2026-11-22T09:30:00Z."
        ) from None


def _check(names: Iterable[str]) -> None:
    for name in names:
        if name not in DIMENSIONS:
            raise InputInvalid(
                f"Costs cannot be grouped or filtered by {name!r}.", hint=f"Dimensions: {', '.join(DIMENSIONS)}."
            )


def _added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found = dict.fromkeys((*_SUMS, "runs"), 0)
    for part in parts:
        for name in found:
            found[name] += part.get(name, 0)
    return found


def _row(by: Sequence[str], key: Sequence[Any], sums: Mapping[str, int]) -> dict[str, Any]:
    known = sums["cost_micro"] / MICRO
    return {
        **dict(zip(by, key, strict=True)),
        "calls": sums["calls"],
        "failed_calls": sums["failed_calls"],
        "runs": sums["runs"],
        "tokens": {name: sums[f"{name}_tokens"] for name in _TOKENS},
        "cost_usd": None if sums["unpriced_calls"] else known,
        "known_cost_usd": known,
        "unpriced_calls": sums["unpriced_calls"],
        "latency_ms": round(sums["latency_ms"] / sums["timed"]) if sums["timed"] else None,
    }


def _position(cursor: str) -> list[int]:
    parts = cursor.split(".")
    if len(parts) != 4 or not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise InputInvalid("The cursor is not valid.", hint="Use the `next` of the previous page.")
    return [int(part) for part in parts]


def _items(connection: Any, plan_of: Callable[[str], Plan], rows: Sequence[Any]) -> list[dict[str, Any]]:
    places: dict[int, dict[int, tuple[str, int | None]]] = {}
    by_run: dict[int, list[Any]] = {}
    for row in rows:
        if row.plan_hash is not None:
            by_run.setdefault(row.run_number, []).append(row)
    for number, members in by_run.items():
        wanted = {row.step_id & ROW_MASK: row.node for row in members}
        places[number] = Places(connection, number, plan_of(members[0].plan_hash)).of(wanted)
    found = []
    for row in rows:
        place = places.get(row.run_number, {}).get(row.step_id & ROW_MASK)
        step, item = place if place is not None and row.plan_hash is not None else (row.step, None)
        found.append(
            {
                "at": format_time(row.at),
                **{name: getattr(row, name) for name in ("provider", "model", "role", "team", "workflow", "run")},
                "step": step,
                "item": item,
                "attempt": row.attempt,
                "call": row.ordinal,
                "tokens": {name: getattr(row, f"{name}_tokens") for name in _TOKENS},
                "cost_usd": None if row.cost_micro is None else row.cost_micro / MICRO,
                **{name: getattr(row, name) for name in ("price_version", "latency_ms", "outcome", "request_id")},
                "target": row.target,
            }
        )
    return found
