"""Concurrency keys in the engine: the key of a run, who is sent when, and what the sweep makes good."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from gorgon_common.engine import control
from gorgon_common.engine.concurrency import hold_of
from gorgon_common.engine.records import ClaimCapacity, Finish, KeyRequest, Result, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import InputInvalid, KeyTaken
from gorgon_common.scope import SYSTEM
from gorgon_common.workflow.plan import Plan
from tests.support.engine import NOW, agent, plan_of
from tests.support.fleet import Fleet, Process, fleet

R = RunStatus


def plan(on_conflict: str = "queue", key: str = "{{inputs.repo}}", most: int = 1, **fields: Any) -> Plan:
    spec = {"provider": "openai", "model": "gpt-test", "prompt": "go"}
    concurrency = {"key": key, "max": most, "on_conflict": on_conflict}
    return plan_of(agent("a", spec=spec), agent("b", 0, spec=spec), concurrency=concurrency, **fields)


@pytest.fixture
def made(database_url: str) -> Iterator[Fleet]:
    with fleet(database_url, 2) as found:
        yield found


@pytest.fixture
def here(made: Fleet) -> Process:
    return made.processes[0]


def submit(process: Process, *args: Any, repo: str = "shop", **fields: Any) -> int:
    return process.submit(plan(*args), {"repo": repo}, **fields)


def statuses(made: Fleet, *numbers: int) -> list[RunStatus]:
    return [made.status(number) for number in numbers]


# The key


def held(source: str, inputs: dict[str, Any], **fields: Any) -> KeyRequest | None:
    return hold_of(plan(key=source, **fields), inputs, run_id="run_1", team="core", now=NOW)


@pytest.mark.parametrize(
    ("source", "inputs", "key"),
    [
        ("deploy", {}, "deploy"),
        ("{{inputs.repo}}", {"repo": " shop "}, "shop"),
        ("{{inputs.n}}/{{inputs.deep.x}}", {"n": 3, "deep": {"x": True}}, "3/true"),
        ("{{run.workflow}}-{{run.team}}", {}, "test-core"),
        ("{{default(inputs.repo, 'none')}}", {"repo": None}, "none"),
    ],
)
def test_the_key_is_made_of_the_inputs(source: str, inputs: dict[str, Any], key: str) -> None:
    assert held(source, inputs, most=2) == KeyRequest(key, 2, "queue")


@pytest.mark.parametrize(
    ("source", "inputs", "words"),
    [
        ("{{inputs.repo}}", {"repo": None}, "was not given"),
        ("a-{{inputs.repo}}", {"repo": None}, "was not given"),
        ("{{inputs.repo}}", {"repo": "  "}, "is empty"),
        ("{{inputs.list[3]}}", {"list": []}, "cannot be made"),
    ],
)
def test_a_key_that_cannot_be_made_is_told_when_the_run_is_submitted(
    source: str, inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputInvalid) as refused:
        held(source, inputs)
    assert words in refused.value.message
    assert source in refused.value.message
    assert refused.value.hint


def test_a_workflow_without_a_key_holds_none() -> None:
    assert hold_of(plan_of(agent("a")), {}, run_id="run_1", team="core", now=NOW) is None


# Turns


def test_one_after_the_other_without_a_sweep(made: Fleet, here: Process) -> None:
    first, second, other = submit(here), submit(here), submit(here, repo="blog")
    assert len(made.mailbox.waiting) == 2  # nothing of the second is sent
    made.drain()
    assert statuses(made, first, second, other) == [R.SUCCEEDED] * 3
    rows = [made.row(number) for number in (first, second)]
    assert rows[0].finished_at <= rows[1].key_at <= rows[1].started_at


def test_who_ends_a_run_and_dies_before_it_sends_the_next_is_made_good(made: Fleet, here: Process) -> None:
    first, second = submit(here), submit(here)
    here.publisher.publish = lambda *_, **__: None  # type: ignore[method-assign]
    here.machine.publisher.publish = here.publisher.publish
    made.drain()
    assert made.status(second) is R.QUEUED
    other = made.processes[1]
    for _ in range(20):
        made.elapse(6)
        other.sweep.once()
        made.idle()
        while made.mailbox.waiting:
            other.serve(made.mailbox.take())
    assert statuses(made, first, second) == [R.SUCCEEDED] * 2


def test_a_newer_run_takes_the_place_of_the_older(made: Fleet, here: Process) -> None:
    first = submit(here)
    (running,) = here.store.claim_and_finish(here.member, ClaimCapacity(0), claims=[step_id(first, 0)]).mine
    second, third = (submit(here, "cancel_running") for _ in range(2))
    assert made.status(second) is R.CANCELLED
    assert made.row(first).cancelled
    ended = Finish(running, Result(StepStatus.CANCELLED))
    here.publisher.publish(here.store.claim_and_finish(here.member, ClaimCapacity(0), finishes=[ended]).ready)
    made.drain()
    assert statuses(made, first, third) == [R.CANCELLED, R.SUCCEEDED]
    assert made.row(first).finished_at <= made.row(third).key_at


def test_the_sweep_cancels_for_a_submitter_that_died(made: Fleet, here: Process) -> None:
    first = submit(here)
    here.store.stop, stop = lambda *_, **__: [], here.store.stop  # type: ignore[method-assign]
    second = submit(here, "cancel_running")
    here.store.stop = stop  # type: ignore[method-assign]
    assert not made.row(first).cancelled
    here.sweep.once()
    assert made.row(first).cancelled
    made.drain()
    assert statuses(made, first, second) == [R.CANCELLED, R.SUCCEEDED]


def test_a_refused_run_is_none(made: Fleet, here: Process) -> None:
    first = submit(here)
    with pytest.raises(KeyTaken):
        submit(here, "reject")
    made.drain()
    assert made.status(first) is R.SUCCEEDED
    assert made.status(submit(here, "reject")) is R.QUEUED


def test_a_run_that_waits_is_cancelled_at_once(made: Fleet, here: Process) -> None:
    first, second, third = submit(here), submit(here), submit(here)
    control.cancel(here.store, here.publisher, here.knowledge.run(second))
    assert made.status(second) is R.CANCELLED
    made.drain()
    assert statuses(made, first, third) == [R.SUCCEEDED] * 2


def test_time_that_a_run_waits_is_not_its_own(made: Fleet, here: Process) -> None:
    hurried = plan(limits={"timeout": 60})
    first, second = here.submit(hurried, {"repo": "shop"}), here.submit(hurried, {"repo": "shop"})
    made.elapse(50)
    made.drain()
    made.elapse(50)
    here.sweep.once()
    assert statuses(made, first, second) == [R.SUCCEEDED] * 2


def test_a_resumed_run_takes_its_key_again(made: Fleet, here: Process) -> None:
    first = submit(here)
    control.cancel(here.store, here.publisher, here.knowledge.run(first))
    made.drain()
    other = submit(here)
    before = here.knowledge.run(first)
    again, _, _ = control.resume(
        here.store,
        here.knowledge,
        before,
        before.plan,
        scope=SYSTEM,
        publisher=here.publisher,
        public_id="run_again",
        now=NOW,
        home="",
        grouped=frozenset(),
    )
    assert not here.store.admission(again).holds
    made.drain()
    assert statuses(made, other, again) == [R.SUCCEEDED] * 2
    assert made.row(other).finished_at <= made.row(again).key_at


def test_a_dead_process_gives_its_key_up_when_somebody_wants_it(made: Fleet, here: Process) -> None:
    here.store.register("dead", target="sandbox", home="laptop", queues=[0], slots=1, lease=5)
    orphan = submit(here, home="laptop")
    made.mailbox.waiting.clear()
    made.elapse(10)
    here.sweep.once()
    assert made.status(orphan) is R.QUEUED  # nobody wants it
    second = submit(here)
    here.sweep.once()
    made.drain()
    assert statuses(made, orphan, second) == [R.FAILED, R.SUCCEEDED]


def test_a_dead_process_refuses_nobody(made: Fleet, here: Process) -> None:
    here.store.register("dead", target="sandbox", home="laptop", queues=[0], slots=1, lease=5)
    orphan = submit(here, home="laptop")
    made.mailbox.waiting.clear()
    made.elapse(10)
    second = submit(here, "reject")
    made.drain()
    assert statuses(made, orphan, second) == [R.FAILED, R.SUCCEEDED]


def test_messages_in_any_order_lost_and_repeated(made: Fleet, here: Process) -> None:
    chance = random.Random(7)
    made_runs = [submit(made.processes[turn % 2]) for turn in range(6)]
    for number in made_runs:
        made.finish(number, chance=chance, lose=0.2, repeat=0.2)
    rows = [made.row(number) for number in made_runs]
    assert {row.status for row in rows} == {int(R.SUCCEEDED)}
    assert all(before.finished_at <= after.key_at for before, after in pairwise(rows))
