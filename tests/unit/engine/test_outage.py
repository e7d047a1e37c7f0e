"""The sweep after the database was away: workers that could not renew their leases are not taken for dead."""

from __future__ import annotations

from typing import Any

import pytest

from gorgon_common.engine.records import Keep, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.engine.sweep import GRACE
from gorgon_common.errors import Unavailable
from tests.support.engine import agent, plan_of
from tests.support.fleet import Fleet, fleet

LEASE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def held_when_the_database_went_away(found: Fleet, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int]:
    """Let a worker hold a step, the lease run out and a pass of the sweep fail; returns the process and the run."""
    process = found.processes[0]
    run = process.submit(plan_of(agent("a", spec={"provider": "openai", "prompt": "a"})))
    (step,) = process.store.tick(process.member, Keep(0, 0, 0), claims=[step_id(run, 0)]).mine
    process.machine.held[step.id] = step
    found.elapse(LEASE + 1)
    with monkeypatch.context() as patch:

        def away(*_: object) -> bool:
            raise Unavailable("The database cannot be used.")

        patch.setattr(process.store, "lead", away)
        with pytest.raises(Unavailable):
            process.sweep.once()
    return process, run


def test_who_renews_the_lease_in_time_keeps_its_steps(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with fleet(database_url, lease=LEASE, clock=clock) as found:
        process, run = held_when_the_database_went_away(found, monkeypatch)
        process.sweep.once()
        assert found.statuses(run)[0] is StepStatus.RUNNING
        assert process.store.heartbeat(process.member, LEASE, {})
        clock.now += GRACE
        process.sweep.once()
        assert found.statuses(run)[0] is StepStatus.RUNNING


def test_who_does_not_is_dead(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with fleet(database_url, lease=LEASE, clock=clock) as found:
        process, run = held_when_the_database_went_away(found, monkeypatch)
        clock.now += GRACE
        process.sweep.once()
        assert found.statuses(run)[0] is StepStatus.READY
