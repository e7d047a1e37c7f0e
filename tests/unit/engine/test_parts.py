"""The small parts: states, rows, retries."""

from __future__ import annotations

import pytest

from gorgon_common.engine import retry, rows
from gorgon_common.engine.records import MAX_ROWS, Claimed, Weight, step_id
from gorgon_common.engine.states import (
    FINISHED_RUN,
    FINISHED_STEP,
    RUN_TRANSITIONS,
    STEP_TRANSITIONS,
    RunStatus,
    StepStatus,
)
from gorgon_common.errors import Final, Malformed, Refused, Retryable, StepError
from gorgon_common.workflow.plan import Dep, Join, Kind, Node, Retry
from tests.support.engine import agent, node, plan_of

# States.  That the store makes no other transitions, the database holds itself: see support.engine.guard.


def test_finished_states_are_final_and_all_others_can_be_left() -> None:
    assert {state for state, after in STEP_TRANSITIONS.items() if not after} == FINISHED_STEP
    assert {state for state, after in RUN_TRANSITIONS.items() if not after} == FINISHED_RUN
    assert set(STEP_TRANSITIONS) == set(StepStatus)
    assert set(RUN_TRANSITIONS) == set(RunStatus)


def test_every_state_can_be_reached_and_cancelled() -> None:
    for table, first in ((STEP_TRANSITIONS, StepStatus.PENDING), (RUN_TRANSITIONS, RunStatus.QUEUED)):
        reached, new = {first}, [first]
        while new:
            new = [state for state in {after for before in new for after in table[before]} if state not in reached]  # type: ignore[index]
            reached.update(new)
        unreached = set(table) - reached
        assert unreached == set()
    assert all(StepStatus.CANCELLED in after for after in STEP_TRANSITIONS.values() if after)


def test_the_numbers_are_those_that_databases_hold() -> None:
    """Whoever renumbers them changes the meaning of every stored row."""
    assert [state.value for state in StepStatus] == list(range(9))
    assert StepStatus.READY == 1
    assert StepStatus.SUCCEEDED == 5
    assert [state.value for state in RunStatus] == list(range(7))
    assert RunStatus.FINISHING == 3


# Ids and rows


@pytest.mark.parametrize(("run", "row"), [(1, 0), (7, 12), (1 << 42, MAX_ROWS - 1)])
def test_a_steps_id_is_its_run_and_row(run: int, row: int) -> None:
    step = Claimed(step_id(run, row), 1, 0, 2, 0, 1, None, None, 0)
    assert (step.run, step.row) == (run, row)
    assert step.id < 1 << 63


@pytest.mark.parametrize(
    ("entry", "weight"),
    [
        (agent("a"), Weight.SLOW),
        (node("a", kind=Kind.COMMAND), Weight.SLOW),
        (node("a"), Weight.FAST),
        (node("a", kind=Kind.CHECKPOINT), Weight.INLINE),
        (node("a", kind=Kind.MAP), Weight.INLINE),
        (agent("a", condition="x"), Weight.INLINE),
        (agent("a", join=Join.ANY_SUCCESS), Weight.INLINE),
        (agent("a", phase="finally"), Weight.INLINE),
    ],
)
def test_what_a_step_costs(entry: Node, weight: Weight) -> None:
    assert rows.weight(entry) is weight


def test_rows_of_a_run_are_its_top_level() -> None:
    plan = plan_of(
        agent("a"),
        agent("b", 0, queue="anthropic"),
        agent("c", 0),
        Node("d", Kind.AGENT, "openai", (Dep(1), Dep(1, order=True), Dep(2))),
        templates=[agent("inner", container=0)],
    )
    made = rows.top_rows(plan, plan.successors(), frozenset({1, 2}))
    assert [entry.node for entry in made] == list(range(plan.top))
    assert [entry.deps_left for entry in made] == [0, 1, 1, 2, 1, 1, 1]
    assert [entry.grouped for entry in made] == [False, True, True, False, False, False, False]
    assert made[1].queue == rows.QUEUE_NUMBERS["anthropic"]
    assert made[4].queue == rows.CONTROL


def test_every_edge_of_a_row_is_counted_as_often_as_it_is_walked() -> None:
    """A counter that is raised once and lowered twice would let a join go too early."""
    plan = plan_of(agent("a"), agent("b"), Node("c", Kind.AGENT, "openai", (Dep(0), Dep(0, order=True), Dep(1))))
    made = rows.top_rows(plan, plan.successors(), frozenset())
    walked = sum(list(entry.successors).count(2) for entry in made)
    assert made[2].deps_left == walked


def test_rows_of_a_groups_body_count_from_nought_and_know_only_each_other() -> None:
    inner = [
        agent("x", container=0),
        agent("y", 4, container=0),
        Node("z", Kind.AGENT, "openai", (Dep(4), Dep(5)), container=0),
    ]
    plan = plan_of(node("g", kind=Kind.GROUP, bodies={"steps": (4, 5, 6)}), templates=inner)
    made = rows.body_rows(plan, plan.successors(), (4, 5, 6), parent=0)
    assert [(entry.row, entry.node, entry.deps_left, list(entry.successors)) for entry in made] == [
        (0, 4, 0, [1, 2]),
        (1, 5, 1, [2]),
        (2, 6, 2, []),
    ]
    assert {entry.parent for entry in made} == {0}


# Retries


@pytest.mark.parametrize(
    ("policy", "attempt", "bound"),
    [
        (Retry(max=9, initial=2, cap=60, jitter="none"), 1, 2),
        (Retry(max=9, initial=2, cap=60, jitter="none"), 4, 16),
        (Retry(max=9, initial=2, cap=60, jitter="none"), 40, 60),
        (Retry(max=9, initial=2, cap=60, jitter="none", backoff="fixed"), 7, 2),
    ],
)
def test_waits_between_attempts(policy: Retry, attempt: int, bound: float) -> None:
    assert retry.delay(policy, attempt, lambda: 0.25) == bound


def test_full_jitter_is_anything_up_to_the_bound() -> None:
    policy = Retry(max=3, initial=2, cap=60)
    assert [retry.delay(policy, 3, lambda share=share: share) for share in (0.0, 0.5, 1.0)] == [0.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (Retryable("slow", kind="timeout"), True),
        (Retryable("busy", kind="server"), True),
        (Retryable("busy", kind="overloaded"), True),
        (Malformed("not json"), True),
        (Final("bad key"), False),
        (Refused("no"), False),
        (StepError("whatever"), False),
    ],
)
def test_what_another_attempt_can_help(error: StepError, again: bool) -> None:
    policy = Retry(max=2)
    assert retry.again(policy, error, 1) is again
    assert retry.again(policy, error, 2) is again
    assert not retry.again(policy, error, 3)
    assert not retry.again(Retry(max=0), error, 1)


def test_only_the_kinds_that_the_file_names_are_tried_again() -> None:
    assert not retry.again(Retry(max=2, on=("timeout",)), Retryable("busy", kind="server"), 1)
