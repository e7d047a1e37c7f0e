"""Rows with NaN and infinity, as earlier versions stored them: they are read as null, and hide no other row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import insert, update

from gorgon_common.engine.records import step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence.queries.explain import Explanations
from gorgon_common.persistence.queries.views import Views
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import checkpoints, runs
from gorgon_common.scope import SYSTEM
from gorgon_common.workflow.plan import Plan
from tests.support.engine import agent, make_run, open_store, plan_of

PLAN = plan_of(agent("a"))
BAD = '{"n": NaN, "m": [Infinity, -Infinity, 1.5]}'
GOOD = {"n": None, "m": [None, None, 1.5]}


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    made = open_store(database_url)
    yield made
    made.close()


def test_they_are_null(store: Store) -> None:
    def plan(plan_hash: str) -> Plan:
        return Plan.from_json(store.plan_body(plan_hash))

    run, other = make_run(store, PLAN), make_run(store, PLAN)
    step = step_id(run, 0)
    with store.database.write() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(outputs=BAD, inputs=BAD))
        row: dict[str, Any] = {"step_id": step, "status": int(StepStatus.SUCCEEDED), "attempts": 1}
        row |= {"output": BAD, "detail": BAD}
        connection.execute(insert(checkpoints).values(**row))
    views = Views(store.database, plan)
    listed = views.runs(SYSTEM, status=None, workflow=None, limit=10, cursor=None)["items"]
    assert [entry["outputs"] for entry in listed] == [None, GOOD]
    assert {entry["run_id"] for entry in listed} == {store.info(run).public_id, store.info(other).public_id}
    shown = views.run(SYSTEM, store.info(run).public_id, with_steps=True)
    assert next(entry for entry in shown["steps"] if entry["id"] == "a")["output"] == GOOD
    assert store.info(run).inputs == GOOD
    assert store.checkpoints([step])[step].output == GOOD
    Explanations(store.database, plan).explain(SYSTEM, store.info(run).public_id, None)
    json.dumps(shown, allow_nan=False)
