"""Lists of runs on SQLite and PostgreSQL: what each has spent, whose runs they are, and with how many statements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from gorgon_common.errors import NotFound
from gorgon_common.persistence.queries.views import Views
from gorgon_common.persistence.store import Store
from gorgon_common.scope import SYSTEM, Scope
from gorgon_common.workflow.plan import Plan
from tests.contract.test_reports import record, spend
from tests.support.engine import agent, make_run, open_store, plan_of

PLAN = plan_of(agent("plan"), agent("build", 0))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    made = open_store(database_url)
    yield made
    made.close()


@pytest.fixture
def views(store: Store) -> Views:
    return Views(store.database, lambda plan_hash: Plan.from_json(store.plan_body(plan_hash)))


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(store.database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(store.database.engine, "before_cursor_execute", note)


def listed(views: Views, scope: Scope = SYSTEM, limit: int = 50) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = views.runs(scope, status=None, workflow=None, limit=limit, cursor=None)["items"]
    return items


def test_a_list_says_what_each_run_has_spent(store: Store, views: Views) -> None:
    first, second, _third = (make_run(store, PLAN) for _ in range(3))
    spend(store.database, first, 0, record(cost_micro=1_000), record(ordinal=2, cost_micro=500))
    spend(store.database, first, 1, record(cost_micro=2_500))
    spend(store.database, second, 1, record(cost_micro=None))
    found = [(run["cost_usd"], run["known_cost_usd"], run["unpriced_calls"]) for run in reversed(listed(views))]
    assert found == [(0.004, 0.004, 0), (None, 0.0, 1), (0.0, 0.0, 0)]
    assert [run["tokens"]["input"] for run in reversed(listed(views))] == [300, 100, 0]
    for run in listed(views):
        assert views.run(SYSTEM, run["run_id"], with_steps=False) == run


def test_a_longer_list_takes_no_more_statements(store: Store, views: Views) -> None:
    for _ in range(6):
        spend(store.database, make_run(store, PLAN), 0, record())
    with statements(store) as few:
        assert len(listed(views, limit=1)) == 1
    with statements(store) as many:
        assert len(listed(views)) == 6
    assert len(many) == len(few)


def test_a_list_has_the_runs_of_one_organisation(store: Store, views: Views) -> None:
    mine, theirs = make_run(store, PLAN), make_run(store, PLAN, org=2)
    other = Scope(org=2)
    assert [run["run_id"] for run in listed(views)] == [store.info(mine).public_id]
    assert [run["run_id"] for run in listed(views, other)] == [store.info(theirs).public_id]
    assert views.number(other, store.info(theirs).public_id) == theirs
    with pytest.raises(NotFound):
        views.number(SYSTEM, store.info(theirs).public_id)
