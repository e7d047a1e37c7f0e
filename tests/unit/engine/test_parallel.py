"""`max_parallel` of a run in the engine: several workers together keep to it, whatever shape the run has."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gorgon_common.engine.ports import AgentCall
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import Throttled
from gorgon_common.persistence.tables import held_steps, run_slots
from gorgon_common.workflow.plan import Kind, Plan
from tests.support.engine import agent, node, plan_of
from tests.support.fleet import Fleet, Scripted, fleet

SPEC = {"provider": "openai", "model": "gpt-test", "prompt": "go"}


def takes_a_moment(_call: AgentCall) -> str:
    time.sleep(0.002)  # long enough to meet others
    return "done"


@pytest.fixture
def made(database_url: str) -> Iterator[Fleet]:
    with fleet(database_url, 2, Scripted({"go": takes_a_moment}), slots=8) as found:
        yield found


def wide(most: int | None) -> Plan:
    limits = {} if most is None else {"max_parallel": most}
    return plan_of(*(agent(f"s{number}", spec=SPEC) for number in range(24)), limits=limits)


def fan_out_and_in(most: int | None) -> Plan:
    """A step, a fan-out that a chord joins, a map with a reduce and a chain beside it."""
    limits = {} if most is None else {"max_parallel": most}
    middle = [agent(f"m{number}", 0, spec=SPEC) for number in range(8)]
    top = [agent("first", spec=SPEC), *middle, agent("join", *range(1, 9), spec=SPEC)]
    over = {"over": list(range(9)), "max_items": 100}
    base = 13 + 3
    top.append(node("each", 0, kind=Kind.MAP, spec=over, bodies={"item": (base,), "reduce": (base + 1,)}))
    top.append(agent("maybe", 0, spec=SPEC, condition="true"))
    top.append(agent("last", 10, 11, spec=SPEC))
    templates = [agent("each[]", spec=SPEC, container=10), agent("each.reduce", spec=SPEC, container=10)]
    return plan_of(*top, templates=templates, limits=limits)


def worked(made: Fleet, plan: Plan, seed: int, **faults: float) -> int:
    """Run a plan to its end; returns the most calls at once."""
    made.provider.most_at_once = 0
    chance = random.Random(seed)
    run = made.processes[0].submit(plan)
    assert made.finish(run, chance=chance, **faults) is RunStatus.SUCCEEDED
    assert set(made.statuses(run).values()) == {StepStatus.SUCCEEDED}
    with made.store.database.read() as connection:
        assert connection.execute(held_steps.select()).all() == []
        assert connection.execute(run_slots.select()).all() == []
    return made.provider.most_at_once


@pytest.mark.parametrize("shape", [wide, fan_out_and_in])
@pytest.mark.parametrize("most", [1, 3])
def test_never_more_than_may(made: Fleet, shape: Any, most: int) -> None:
    assert worked(made, shape(most), 1) <= most
    assert worked(made, shape(most), 2, lose=0.15, repeat=0.15) <= most


@pytest.mark.parametrize("shape", [wide, fan_out_and_in])
def test_without_the_limit_there_are_more(made: Fleet, shape: Any) -> None:
    """The negative control.  The calls take long enough to meet on a busy machine too."""
    made.provider.behaves["go"] = lambda _call: time.sleep(0.05) or "done"
    assert worked(made, shape(None), 1) > 3


def test_the_room_is_used(made: Fleet) -> None:
    """Each call waits until it is one of four."""
    meeting = threading.Barrier(4)
    made.provider.behaves = {"go": lambda _: meeting.wait(10)}
    run = made.processes[0].submit(wide(4))
    with ThreadPoolExecutor(32) as threads:
        while made.status(run) is not RunStatus.SUCCEEDED:
            posts = [made.mailbox.take() for _ in range(len(made.mailbox.waiting))]
            served = [threads.submit(made.processes[turn % 2].serve, post) for turn, post in enumerate(posts)]
            for future in served:
                future.result(30)
            made.idle()
            made.elapse(6)
            made.processes[0].sweep.once()
    assert made.provider.most_at_once == 4


def test_who_waits_for_a_quota_holds_nobody_up(made: Fleet) -> None:
    """Each step is told to come again once; with room for one, all get their turn."""
    told: set[str] = set()

    def later(call: AgentCall) -> str:
        if call.label not in told:
            told.add(call.label)
            raise Throttled("no room", seconds=2.0, reason="requests", until=time.time() + 2)
        return "done"

    made.provider.behaves = {"go": later}
    assert worked(made, wide(1), 3) == 1


def test_no_message_is_needed_from_step_to_step_of_a_chain(made: Fleet) -> None:
    steps = [agent("s0", spec=SPEC), *(agent(f"s{number}", number - 1, spec=SPEC) for number in range(1, 6))]
    run = made.processes[0].submit(plan_of(*steps, limits={"max_parallel": 2}))
    made.drain()
    assert made.status(run) is RunStatus.SUCCEEDED
    assert len(made.mailbox.published) == 1
