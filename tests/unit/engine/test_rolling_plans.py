"""Two versions of Gorgon at work on one database: what each does with plans of the other."""

from __future__ import annotations

import json
import random

import pytest
from sqlalchemy import select

from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import PlanTooNew
from gorgon_common.persistence.tables import step_deaths, steps
from gorgon_common.workflow.plan import FORMAT, Plan
from tests.support.engine import agent, open_store, plan_of
from tests.support.fleet import Fleet

NEWER = FORMAT + 1
SPEC = {"provider": "openai", "model": "gpt-test", "prompt": "work"}


@pytest.fixture
def fleet(database_url: str) -> Fleet:
    """A process of this version, and one of the next, which reads a newer form."""
    made = Fleet([open_store(database_url), open_store(database_url)])
    made.processes[1].knowledge._plan_format = NEWER
    yield made  # type: ignore[misc]
    made.close()
    for process in made.processes:
        process.store.close()


def plan(**fields: object) -> Plan:
    return plan_of(agent("a", spec=SPEC), agent("b", 0, spec=SPEC), **fields)


def test_a_step_of_a_newer_plan_is_given_back_uncounted(fleet: Fleet) -> None:
    old, new = fleet.processes
    run = new.submit(plan(format=NEWER))
    for _ in range(4):  # more often than deaths would condemn a step
        old.serve(fleet.mailbox.take())
        fleet.idle()
        assert fleet.statuses(run)[0] is StepStatus.READY
        assert not fleet.mailbox.waiting  # it does not send itself what it cannot read
        fleet.elapse(6)
        new.sweep.once()
    with fleet.store.database.read() as connection:
        row = connection.execute(select(steps).where(steps.c.id == run << 20)).one()
        assert (row.crashes, row.attempt) == (0, 1)
        assert connection.execute(select(step_deaths)).all() == []


def test_both_versions_at_work_end_the_runs_of_both(fleet: Fleet) -> None:
    old, new = fleet.processes
    newer = [new.submit(plan(format=NEWER)) for _ in range(3)]
    older = [process.submit(plan()) for process in (old, new)]
    for run in (*newer, *older):
        assert fleet.finish(run, chance=random.Random(run)) is RunStatus.SUCCEEDED


def test_a_sweep_of_the_older_version_goes_on_behind_a_newer_plan(fleet: Fleet) -> None:
    old, new = fleet.processes
    new.submit(plan(format=NEWER))
    older = old.submit(plan())
    while fleet.mailbox.waiting:  # all messages are lost
        fleet.mailbox.take()
    fleet.elapse(6)
    old.sweep.once()
    assert [post.ids[0] >> 20 for post in fleet.mailbox.waiting] == [older]


def test_unknown_fields_of_a_plan_are_dropped() -> None:
    """Another version may have added some, wherever it likes."""
    known = plan()
    body = json.loads(known.to_json())
    body["colour"] = "red"
    for node in body["nodes"]:
        node["colour"] = "red"
        for dep in node.get("deps", ()):
            dep["colour"] = "red"
    assert Plan.from_json(json.dumps(body)) == known


def test_a_newer_form_is_refused_and_the_first_needs_no_number() -> None:
    assert "format" not in json.loads(plan().to_json())
    with pytest.raises(PlanTooNew, match=f"form {NEWER}"):
        Plan.from_json(plan(format=NEWER).to_json())
