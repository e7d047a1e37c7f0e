"""Cost reports, the same on SQLite and PostgreSQL: sums by any dimension, each call, and what the library records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.tokens import Ratio
from gorgon_common.costs.tracker import CostTracker, RecordedCall
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.records import Claimed, step_id
from gorgon_common.errors import InputInvalid
from gorgon_common.persistence import encoding
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.reports import DIMENSIONS, Filters, Reports
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import ledger
from gorgon_common.workflow.plan import Plan
from tests.support.engine import agent, make_run, open_store, plan_of

PLAN = plan_of(agent("plan"), agent("build", 0))
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    made = open_store(database_url)
    yield made
    made.close()


@pytest.fixture
def reports(store: Store) -> Reports:
    def plan(plan_hash: str) -> Plan:
        return Plan.from_json(store.plan_body(plan_hash))

    return Reports(store.database, plan)


def record(**fields: Any) -> CallRecord:
    made = CallRecord(
        provider="anthropic",
        model="claude-sonnet-5-5",
        role="planner",
        ordinal=1,
        usage=Usage(input_tokens=100, cache_read_tokens=40, output_tokens=20, reasoning_tokens=5),
        cost_micro=1_000,
        price_version="v1",
        latency_ms=200,
        outcome="ok",
        request_id="req_1",
    )
    return replace(made, **fields)


def spend(database: Database, run: int, row: int, *calls: CallRecord, token: int = 1, at: datetime = NOON) -> None:
    """Write calls of a step's claim to the ledger, as the store does."""
    claimed = Claimed(step_id(run, row), token, row, 2, 0, 1, None, None, 0)
    with database.write() as connection:
        connection.execute(ledger.insert(), encoding.calls(claimed, calls, 1, at))


@pytest.fixture
def filled(store: Store, reports: Reports) -> Reports:
    """Two runs of two teams on two days: $0.007 of known cost, one call without a price."""
    first = make_run(store, replace(PLAN, name="one"), team="red", target="live")
    second = make_run(store, replace(PLAN, name="two"), team="blue")
    spend(store.database, first, 0, record(), record(ordinal=2, outcome="invalid", cost_micro=500))
    spend(store.database, first, 1, record(role="builder", provider="openai", model="gpt-6.1-terra", cost_micro=2_500))
    spend(store.database, second, 0, record(cost_micro=3_000), at=NOON + timedelta(days=1))
    spend(store.database, second, 1, record(role=None, cost_micro=None, outcome="server"), at=NOON + timedelta(days=1))
    return reports


def by(reports: Reports, *names: str, **filters: Any) -> dict[Any, dict[str, Any]]:
    rows = reports.report(names, Filters(**filters))["rows"]
    return {tuple(row[name] for name in names) if len(names) > 1 else row[names[0]]: row for row in rows}


def test_sums_by_team(filled: Reports) -> None:
    rows = by(filled, "team")
    assert rows["red"]["cost_usd"] == 0.004
    assert (rows["red"]["calls"], rows["red"]["failed_calls"], rows["red"]["runs"]) == (3, 1, 1)
    assert rows["red"]["tokens"] == {"input": 300, "cache_read": 120, "cache_write": 0, "output": 60, "reasoning": 15}
    assert rows["red"]["latency_ms"] == 200


def test_what_is_unknown_is_none_and_not_zero(filled: Reports) -> None:
    blue = by(filled, "team")["blue"]
    assert (blue["cost_usd"], blue["known_cost_usd"], blue["unpriced_calls"]) == (None, 0.003, 1)
    total = filled.report(["team"])["total"]
    assert (total["cost_usd"], total["known_cost_usd"], total["runs"]) == (None, 0.007, 2)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_every_dimension_adds_up_to_the_same(filled: Reports, name: str) -> None:
    report = filled.report([name])
    assert sum(row["calls"] for row in report["rows"]) == report["total"]["calls"] == 5
    assert sum(row["known_cost_usd"] for row in report["rows"]) == pytest.approx(0.007)
    assert report["groups"] == len(report["rows"]) >= 1


def test_steps_are_named_and_days_are_utc(filled: Reports) -> None:
    assert by(filled, "step", "day").keys() == {
        ("plan", "2026-11-20"),
        ("build", "2026-11-20"),
        ("plan", "2026-11-21"),
        ("build", "2026-11-21"),
    }
    assert [row["day"] for row in filled.report(["day"])["rows"]] == ["2026-11-20", "2026-11-21"]


def test_the_dearest_come_first_and_the_rest_is_counted(filled: Reports) -> None:
    report = filled.report(["step", "model"], limit=1)
    assert [row["step"] for row in report["rows"]] == ["plan"]
    assert report["groups"] == 3


@pytest.mark.parametrize(
    ("only", "calls"),
    [
        ({"team": "red"}, 3),
        ({"step": "build"}, 2),
        ({"step": "plan", "team": "blue"}, 1),
        ({"target": "live"}, 3),
        ({"outcome": "server"}, 1),
        ({"day": "2026-11-21"}, 2),
        ({"role": "builder", "provider": "openai"}, 1),
        ({"team": "'; drop table runs; --"}, 0),
    ],
)
def test_filters(filled: Reports, only: dict[str, str], calls: int) -> None:
    assert filled.report(["model"], Filters(only=only))["total"]["calls"] == calls
    assert len(filled.calls(Filters(only=only))["items"]) == calls


def test_the_total_counts_each_run_once_whatever_it_is_told_by(filled: Reports) -> None:
    for dimension in DIMENSIONS:
        assert filled.report([dimension])["total"]["runs"] == 2, dimension
    assert filled.report([])["total"]["runs"] == 2


def test_one_run(filled: Reports) -> None:
    runs = by(filled, "run")
    name = next(run for run, row in runs.items() if row["calls"] == 3)
    assert by(filled, "step", only={"run": name})["plan"]["cost_usd"] == 0.0015


def test_the_last_day_is_included_and_a_moment_is_not(filled: Reports) -> None:
    def count(since: str | None, until: str | None) -> int:
        return int(filled.report([], Filters.read(since, until, {"target": "all"}))["total"]["calls"])

    assert count("2026-11-20", "2026-11-20") == 3
    assert count("2026-11-20", "2026-11-21") == 5
    assert count("2026-11-21", None) == 2
    assert count(None, "2026-11-20T12:00:00Z") == 0
    assert count("2026-11-20T13:00:00+01:00", None) == 5


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-11-20T12:00:00", "9999-12-31T23:59:59-23:59", ""])
def test_what_is_no_time_is_told(text: str) -> None:
    with pytest.raises(InputInvalid):
        Filters.read(text, None, None)


def test_a_dimension_counts_once(filled: Reports) -> None:
    assert filled.report(["day", "step", "day"]) == filled.report(["day", "step"])


def test_unknown_dimensions_and_cursors_are_told(filled: Reports) -> None:
    with pytest.raises(InputInvalid, match="'colour'"):
        filled.report(["colour"])
    with pytest.raises(InputInvalid, match="cursor"):
        filled.calls(cursor="1.2.3'")


def test_each_call_can_be_had_in_pages(filled: Reports) -> None:
    whole = filled.calls()["items"]
    assert len(whole) == 5
    pages, cursor = [], None
    while True:
        page = filled.calls(limit=2, cursor=cursor)
        pages += page["items"]
        cursor = page["next"]
        if cursor is None:
            break
    assert pages == whole
    first = whole[0]
    assert {key: first[key] for key in ("team", "workflow", "step", "item", "attempt", "call", "outcome")} == {
        "team": "red", "workflow": "one", "step": "plan", "item": None, "attempt": 1, "call": 1, "outcome": "ok",
    }  # fmt: skip
    assert (first["cost_usd"], first["price_version"], first["latency_ms"]) == (0.001, "v1", 200)
    assert first["request_id"] == "req_1"
    assert whole[-1]["cost_usd"] is None


def test_nothing_spent_is_nothing_and_known(reports: Reports) -> None:
    report = reports.report(["model"])
    assert report["rows"] == []
    assert (report["total"]["calls"], report["total"]["cost_usd"]) == (0, 0.0)
    assert reports.calls() == {"items": [], "next": None}


def test_money_is_exact_beyond_what_floats_hold(store: Store, reports: Reports) -> None:
    run = make_run(store, PLAN)
    spend(store.database, run, 0, *(record(ordinal=number, cost_micro=1) for number in range(1, 301)))
    spend(store.database, run, 1, record(cost_micro=7_000_000_000_001))
    assert reports.report([])["total"]["cost_usd"] == 7_000_000.000301


# The library's tracker, in the same reports


class Book:
    """What `application.costs` does with these, on one Reports."""

    def __init__(self, reports: Reports) -> None:
        self.reports = reports

    def record_calls(self, calls: Any) -> None:
        self.reports.record(calls)

    def costs(self, by: Any, *, since: Any = None, until: Any = None, only: Any = None, limit: Any = None) -> Any:
        return self.reports.report(by, Filters.read(since, until, only, by), limit=limit)


def test_a_reply_may_call_itself_what_it_likes(store: Store, reports: Reports) -> None:
    run = make_run(store, PLAN)
    spend(store.database, run, 0, record(model="m" * 1000 + "\ud800", request_id="\0r" * 500, outcome="o" * 90))
    (call,) = reports.calls()["items"]
    assert (call["model"], len(call["request_id"]), len(call["outcome"])) == ("m" * 200, 200, 40)


def test_real_money_is_never_added_to_play_money(filled: Reports) -> None:
    tracker = CostTracker(Book(filled), prices=GenaiPricer())
    tracker.record(provider="openai", model="own", input_tokens=5, output_tokens=5, cost_usd=0.25, run="mine")
    real = tracker.get_report(by="provider")
    assert (real["targets"], real["total"]["cost_usd"], real["total"]["runs"]) == (["live", "library"], 0.254, 2)
    sums = {name: (entry["calls"], entry["cost_usd"], entry["runs"]) for name, entry in real["by_target"].items()}
    assert sums == {"library": (1, 0.25, 1), "live": (3, 0.004, 1), "sandbox": (2, None, 1)}
    assert real["by_target"]["sandbox"]["unpriced_calls"] == 1
    for target, calls in (("live", 3), ("library", 1), ("sandbox", 2), ("all", 6)):
        assert tracker.get_report(by="model", target=target)["total"]["calls"] == calls
        assert len(filled.calls(Filters.read(None, None, {"target": target}))["items"]) == calls
    with pytest.raises(InputInvalid, match="no target 'play'"):
        tracker.get_report(target="play")


def test_one_run_and_rows_that_name_their_target_are_shown_unasked(filled: Reports) -> None:
    run = filled.report(["run"], Filters(only={"team": "blue"}))["rows"][0]["run"]
    assert filled.report([], Filters.read(None, None, {"run": run}))["total"]["calls"] == 2
    rows = filled.report(["target"], Filters.read(None, None, None, ["target"]))["rows"]
    assert {row["target"]: row["calls"] for row in rows} == {"live": 3, "sandbox": 2}


def test_what_the_library_records_stands_beside_the_runs(filled: Reports) -> None:
    tracker = CostTracker(Book(filled), prices=GenaiPricer())
    cost = tracker.record(
        provider="openai", model="gpt-6.1-terra", role="reviewer", input_tokens=1000, output_tokens=100, team="red"
    )
    assert cost == pytest.approx(0.0015)
    assert tracker.record(provider="openai", model="own", input_tokens=5, output_tokens=5, cost_usd=0.25) == 0.25
    assert tracker.record(provider="openai", model="own", input_tokens=5, output_tokens=5, team="red") is None
    red = tracker.get_report(team="red", start_date="2026-11-01", by="target")
    assert {row["target"]: row["calls"] for row in red["rows"]} == {"live": 3, "library": 2}
    assert red["total"]["cost_usd"] is None
    assert tracker.get_report(role="reviewer")["rows"][0]["latency_ms"] is None
    assert filled.calls(Filters(only={"target": "library"}))["items"][0]["workflow"] == "library"


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider": ""},
        {"model": "x" * 201},
        {"input_tokens": -1},
        {"output_tokens": 2.5},
        {"cost_usd": -0.01},
        {"cost_usd": "much"},
        {"at": datetime(2026, 1, 1)},  # noqa: DTZ001
    ],
)
def test_absurd_figures_are_refused(reports: Reports, wrong: dict[str, Any]) -> None:
    tracker = CostTracker(Book(reports), prices=GenaiPricer())
    with pytest.raises(InputInvalid):
        tracker.record(**{"provider": "openai", "model": "gpt-6", "input_tokens": 1, "output_tokens": 1, **wrong})
    assert reports.report([])["total"]["calls"] == 0


def test_recorded_calls_keep_their_place_in_time(reports: Reports) -> None:
    call = RecordedCall(NOON, "red", "w", "openai", "m", Usage(input_tokens=3), 5, None, run="job 7", step="one")
    reports.record([call, replace(call, at=NOON - timedelta(days=3))])
    assert by(reports, "day", "run", "step").keys() == {
        ("2026-11-17", "job 7", "one"),
        ("2026-11-20", "job 7", "one"),
    }


# How token estimates hold


def test_ratios_add_up_and_targets_are_apart(reports: Reports) -> None:
    key = ("openai", "gpt-6")
    reports.add_ratios("live", {key: Ratio(3, 0.6, 0.2), ("openai", "a"): Ratio(0, 0.0, 0.0)})
    reports.add_ratios("live", {key: Ratio(2, 0.4, 0.1)})
    reports.add_ratios("sandbox", {key: Ratio(1, -1.0, 1.0)})
    (found,) = reports.ratios("live").values()
    assert (found.calls, found.log_sum, found.log_square) == pytest.approx((5, 1.0, 0.3))
    assert reports.ratios("sandbox")[key].calls == 1
    assert reports.ratios("other") == {}


def test_calls_without_a_role_have_a_row_of_their_own(filled: Reports, store: Store) -> None:
    with store.database.write() as connection:
        connection.execute(update(ledger).where(ledger.c.role == "builder").values(role=None))
    assert filled.report(["role"])["total"]["calls"] == 5
    assert None in by(filled, "role")
