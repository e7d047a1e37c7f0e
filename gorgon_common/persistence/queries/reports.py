"""Reports of what calls cost: the ledger joined with its runs and steps, grouped by any of their properties.

Amounts are whole micro-dollars in the rows and US dollars in results.  A sum is None if it includes a call whose price
is unknown; the known part is reported beside it.  An unknown cost is never shown as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import BigInteger, literal, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.clock import format_time
from gorgon_common.costs.tokens import Ratio
from gorgon_common.costs.tracker import RecordedCall
from gorgon_common.engine.records import ROW_MASK
from gorgon_common.errors import InputInvalid
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.queries.amounts import MICRO
from gorgon_common.persistence.queries.calls import SUMS, TOKENS, calls_of, sums_of_recorded, sums_of_runs
from gorgon_common.persistence.queries.filters import DIMENSIONS, TARGETS, Filters
from gorgon_common.persistence.queries.places import Places, step_name
from gorgon_common.persistence.tables import db_now, recorded_calls, token_ratios
from gorgon_common.scope import Scope
from gorgon_common.workflow.plan import Plan

EVERYTHING = Filters()
"""Every call of the only organisation."""


class Reports:
    """Reads the ledger.  `plan_of` returns the plan with a given hash, for the names of steps."""

    def __init__(self, database: Database, plan_of: Callable[[str], Plan]) -> None:
        self.database = database
        self.plan_of = plan_of

    def report(self, by: Sequence[str], filters: Filters = EVERYTHING, *, limit: int | None = None) -> dict[str, Any]:
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

    def calls(self, filters: Filters = EVERYTHING, *, limit: int = 1000, cursor: str | None = None) -> dict[str, Any]:
        """Return `{items, next}`: one row per call, ordered by run and step.

        An item has at, provider, model, role, team, workflow, run, step, item, attempt, call (1, 2 … within the
        attempt: repairs), tokens by kind, cost_usd, price_version, latency_ms, outcome, request_id and target.  Raises
        InputInvalid for a cursor that this method did not return.
        """
        _check(filters.only)
        source, query = calls_of(filters)
        columns = source.c
        order = (columns.run_number, columns.step_id, columns.token, columns.ordinal)
        query = query.with_only_columns(*columns).order_by(*order).limit(limit + 1)
        if cursor is not None:
            query = query.where(tuple_(*order) > tuple_(*(literal(part, BigInteger) for part in _position(cursor))))
        with self.database.report(filters.scope) as connection:
            rows = connection.execute(query).all()
            items = _items(connection, self.plan_of, rows[:limit])
        wanted = filters.only.get("step")
        shown = [item for item in items if wanted is None or item["step"] == wanted]
        last = rows[limit - 1] if len(rows) > limit else None
        following = None
        if last is not None:
            following = f"{last.run_number}.{last.step_id}.{last.token}.{last.ordinal}"
        return {"items": shown, "next": following}

    def record(self, scope: Scope, calls: Sequence[RecordedCall]) -> None:
        """Store calls that were made outside of runs."""
        rows = [
            {
                "org_id": scope.org,
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
            with self.database.write(scope) as connection:
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
        with self.database.report(filters.scope) as connection:
            rows = [
                *connection.execute(sums_of_runs(by, filters, by_step=by_step)).all(),
                *connection.execute(sums_of_recorded(by, filters)).all(),
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
            sums_here = {name: int(named[name] or 0) for name in (*SUMS, "runs")}
            found[key] = _added([found[key], sums_here]) if key in found else sums_here
        return found

    def _runs(self, filters: Filters) -> dict[str, int]:
        """Return target → number of runs that the calls belong to.  The filter on a step's name is ignored."""
        with self.database.report(filters.scope) as connection:
            rows = [
                *connection.execute(sums_of_runs(["target"], filters, by_step=False)).all(),
                *connection.execute(sums_of_recorded(["target"], filters)).all(),
            ]
        return {row.target: int(row.runs or 0) for row in rows}

    def _step(self, plan_hash: str | None, node: int | None, step: str | None) -> str | None:
        return step if plan_hash is None or node is None else step_name(self.plan_of(plan_hash), node)


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


def _check(names: Iterable[str]) -> None:
    for name in names:
        if name not in DIMENSIONS:
            raise InputInvalid(
                f"Costs cannot be grouped or filtered by {name!r}.", hint=f"Dimensions: {', '.join(DIMENSIONS)}."
            )


def _added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found = dict.fromkeys((*SUMS, "runs"), 0)
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
        "tokens": {name: sums[f"{name}_tokens"] for name in TOKENS},
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
                "tokens": {name: getattr(row, f"{name}_tokens") for name in TOKENS},
                "cost_usd": None if row.cost_micro is None else row.cost_micro / MICRO,
                **{name: getattr(row, name) for name in ("price_version", "latency_ms", "outcome", "request_id")},
                "target": row.target,
            }
        )
    return found
