"""What every store must do, over SQLite and PostgreSQL: one suite for both.

The database itself refuses transitions that the tables of `engine.states` do not have (`support.engine.guard`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from sqlalchemy import update

from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import (
    Buried,
    Children,
    ClaimCapacity,
    Finish,
    ReadyStep,
    Recovered,
    Refusal,
    Released,
    Renewal,
    Result,
    RunClosed,
    Waiting,
    Weight,
    step_id,
)
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import Conflict, NotFound, Unavailable
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import blobs, checkpoints, runs, steps
from tests.support.engine import (
    ANTHROPIC,
    CONTROL,
    NOTHING,
    NOW,
    OPENAI,
    Desk,
    elapse,
    fan,
    new_run,
    now,
    paid,
    row,
    rows_of,
)

S = StepStatus
GATE = 3


@pytest.fixture
def store(stores: tuple[Store, Store]) -> Store:
    return stores[0]


@pytest.fixture
def desk(store: Store) -> Desk:
    return Desk(store)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at the same time, each in its thread; returns what each gave, or its exception."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[], Any]) -> Any:
        barrier.wait(10)
        try:
            return call()
        except (Conflict, Unavailable) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


# Claims


def test_only_what_is_ready_is_claimed_and_its_token_rises(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    (step,) = desk.claim(run, 0, 1)
    assert (step.row, step.run, step.token, step.attempt, step.crashes) == (0, run, 1, 1, 0)
    stored = desk.step(run, 0)
    assert (stored.status, stored.owner) == (S.RUNNING, desk.worker.owner)
    assert abs((stored.due - now(desk.store)).total_seconds()) < 60, "when it was claimed"
    assert desk.status(run, 1) is S.PENDING


def test_a_step_is_claimed_once(desk: Desk) -> None:
    run = desk.create([row(0)])
    assert len(desk.claim(run, 0, 0)) == 1
    assert desk.claim(run, 0, worker=desk.register()) == []
    assert desk.step(run, 0).token == 1


def test_unknown_ids_claim_nothing(desk: Desk) -> None:
    run = desk.create([row(0)])
    assert desk.claim(run + 1, 0) == []
    assert desk.claim(run, 7) == []
    assert desk.store.claim_and_finish(desk.worker, NOTHING, claims=[1, (1 << 63) - 1]).mine == []


@pytest.mark.parametrize("fields", [{"home": "laptop"}, {"target": "live"}])
def test_runs_of_another_home_or_target_are_not_claimed(desk: Desk, fields: dict[str, Any]) -> None:
    run = desk.create([row(0)], **fields)
    assert desk.claim(run, 0) == []
    other = desk.register(**{"home": "", "target": "sandbox", **fields})
    assert len(desk.claim(run, 0, worker=other)) == 1


def test_nothing_is_claimed_of_a_run_that_is_not_active(desk: Desk) -> None:
    run = desk.create([row(0)])
    with desk.store.database.write() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(active=False))
    assert desk.claim(run, 0) == []


def test_suspects_are_claimed_only_where_asked_for(desk: Desk) -> None:
    run = desk.create([row(0)])
    with desk.store.database.write() as connection:
        connection.execute(update(steps).values(crashes=2))
    assert desk.claim(run, 0) == []
    assert [step.crashes for step in desk.claim(run, 0, suspects=True)] == [2]


def test_many_workers_claim_each_step_once(desks: tuple[Desk, Desk]) -> None:
    mine, other = desks
    run = mine.create([row(number) for number in range(40)])
    both = together(*[lambda desk=desk: desk.claim(run, *range(40)) for desk in (mine, other, mine, other)])
    claimed = sorted(step.row for found in both for step in found)
    assert claimed == list(range(40))
    assert {mine.step(run, number).token for number in range(40)} == {1}


# Finishes


def test_a_finish_is_stored_with_all_that_it_says(desk: Desk) -> None:
    run = desk.create([row(0)])
    desk.end(
        desk.one(run, 0),
        output={"a": [1, None, "ü"]},
        attempts=2,
        reason="because",
        detail={"provider": "openai", "nothing": None, "exit_code": 0},
    )
    found = desk.checkpoint(run, 0)
    assert (found.status, found.output, found.attempts) == (S.SUCCEEDED, {"a": [1, None, "ü"]}, 2)
    assert (found.error, found.reason) == (None, "because")
    assert found.detail == {"provider": "openai", "exit_code": 0}
    (kept,) = desk.all(checkpoints)
    assert (kept.started_at, kept.finished_at) == (NOW, NOW)
    assert desk.kinds(run)[-1] == "step.succeeded"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(S.SUCCEEDED, "succeeded"), (S.FAILED, "failed"), (S.SKIPPED, "skipped"), (S.CANCELLED, "cancelled")],
)
def test_every_end_is_told(desk: Desk, status: StepStatus, kind: str) -> None:
    run = desk.create([row(0)])
    desk.end(desk.one(run, 0), status=status, error={"message": "no"})
    assert desk.status(run, 0) is status
    assert desk.checkpoint(run, 0).error == {"message": "no"}
    assert desk.kinds(run)[-1] == f"step.{kind}"


def test_a_finished_step_stays_as_it_is(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=2)])
    step = desk.one(run, 0)
    desk.end(step, output="first")
    refused = desk.end(step, output="second", status=S.FAILED)
    assert refused.refused == [step.id]
    assert refused.ready == refused.mine == []
    assert desk.checkpoint(run, 0).output == "first"
    assert desk.step(run, 1).deps_left == 1


def test_a_stale_token_is_refused(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)], home="")
    stale = desk.one(run, 0)
    desk.store.release(stale)
    fresh = desk.one(run, 0, worker=desk.register())
    assert fresh.token == stale.token + 1
    assert desk.end(stale, output="stale").refused == [stale.id]
    assert (desk.status(run, 0), desk.status(run, 1)) == (S.RUNNING, S.PENDING)
    desk.end(fresh, output="fresh")
    assert desk.checkpoint(run, 0).output == "fresh"


def test_one_stale_finish_does_not_stop_the_others_of_its_batch(desk: Desk) -> None:
    run = desk.create([row(0, 2), row(1, 2), row(2, deps=2)])
    first, second = desk.claim(run, 0, 1)
    desk.end(first)
    advance = desk.end(first, second)
    assert advance.refused == [first.id]
    assert rows_of(advance.ready) == [2]


def test_a_late_finish_counts_as_long_as_nobody_else_has_the_step(desk: Desk) -> None:
    """The lease ran out, the step is ready again, but its token is still the newest: that is good enough."""
    run = desk.create([row(0, 1), row(1, deps=1)])
    late = desk.one(run, 0, worker=desk.register(lease=1))
    elapse(desk.store, 2)
    desk.store.reap(home="")
    assert desk.status(run, 0) is S.READY
    assert rows_of(desk.end(late, output="late").ready) == [1]
    assert (desk.status(run, 0), desk.checkpoint(run, 0).output) == (S.SUCCEEDED, "late")
    assert desk.claim(run, 0) == []


def test_ledger_rows_are_kept_when_the_fence_refuses_the_rest(desk: Desk) -> None:
    run = desk.create([row(0)])
    stale = desk.one(run, 0)
    desk.store.release(stale)
    fresh = desk.one(run, 0)
    assert desk.end(stale, calls=(paid(1), paid(2, cost_micro=None))).refused
    desk.end(fresh, calls=(paid(1),))
    spent = sorted((entry.token, entry.ordinal, entry.cost_micro) for entry in desk.spent())
    assert spent == [(1, 1, 42), (1, 2, None), (2, 1, 42)]


def test_a_call_is_entered_once(desk: Desk) -> None:
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    desk.end(step, calls=(paid(),))
    desk.end(step, calls=(paid(),))
    (entry,) = desk.spent()
    assert (entry.step_id, entry.provider, entry.model, entry.role) == (step.id, "openai", "gpt-test", "builder")
    assert (entry.input_tokens, entry.output_tokens, entry.at) == (7, 3, NOW)


@pytest.mark.parametrize("size", [60_000, 70_000, 3_000_000])
def test_large_outputs_are_kept_apart(desk: Desk, size: int) -> None:
    run = desk.create([row(0)])
    desk.end(desk.one(run, 0), output="x" * size)
    assert desk.checkpoint(run, 0).output == "x" * size
    apart = desk.all(blobs)
    assert len(apart) == (size > 65_536)
    assert (desk.all(checkpoints)[0].output is None) == bool(apart)


def test_the_limit_of_an_inline_output_is_in_bytes(desk: Desk) -> None:
    run = desk.create([row(0)])
    desk.end(desk.one(run, 0), output="€" * 30_000)  # 90,002 bytes
    assert len(desk.all(blobs)) == 1
    assert desk.checkpoint(run, 0).output == "€" * 30_000


BAD = 'a\0b\ud800c\udfffd"\\u0000\U0001f600'
CLEAN = 'a\0b?c?d"\\u0000\U0001f600'


def test_nul_and_lone_surrogates_can_be_stored_everywhere(desk: Desk) -> None:
    run = desk.create([row(0), row(1, 2), row(2, deps=1)], inputs={"text": BAD})
    step = desk.one(run, 0)
    desk.end(
        step,
        status=S.FAILED,
        output={BAD: [BAD]},
        error={"message": BAD},
        reason=BAD,
        detail={"stderr": BAD},
        calls=(paid(model=BAD, request_id=BAD, role=BAD, outcome=BAD),),
    )
    found = desk.checkpoint(run, 0)
    assert found.output == {CLEAN: [CLEAN]}
    assert (found.error, found.reason, found.detail) == ({"message": CLEAN}, CLEAN, {"stderr": CLEAN})
    assert len(desk.spent()) == 1
    assert desk.store.info(run).inputs == {"text": CLEAN}
    parked = desk.one(run, 1)
    assert (
        desk.store.park(parked, Snoozed(seconds=0, reason="retry", message=BAD, calls=(paid(role=BAD),), attempt=True))
        == Waiting()
    )
    desk.store.wake([parked.id])
    failed = Finish(desk.one(run, 1), Result(S.FAILED, error={"message": BAD}), {})
    desk.store.fail(desk.worker, NOTHING, failed, container=2, keeps=frozenset({2}), run_fails=True)
    assert desk.store.failure(run) == ({"message": CLEAN}, False)


def test_output_of_every_json_kind_comes_back(desk: Desk) -> None:
    values: list[Any] = [None, True, 0, -1.5, 1e300, "", [], {}, "null", [None], {"": {"": []}}, 2**60]
    run = desk.create([row(number) for number in range(len(values))])
    for number, value in enumerate(values):
        desk.end(desk.one(run, number), output=value)
    assert [desk.checkpoint(run, number).output for number in range(len(values))] == values


# What follows


def test_a_join_is_ready_when_the_last_of_its_steps_has_ended(desk: Desk) -> None:
    run = desk.create(fan(3))
    assert rows_of(desk.end(desk.one(run, 0)).ready) == [1, 2, 3]
    assert desk.end(desk.one(run, 2)).ready == []
    assert desk.end(desk.one(run, 1), status=S.FAILED).ready == []
    assert desk.status(run, 4) is S.PENDING
    assert rows_of(desk.end(desk.one(run, 3), status=S.SKIPPED).ready) == [4]


def test_a_join_whose_steps_end_together_is_ready_once(desk: Desk) -> None:
    run = desk.create(fan(5))
    desk.end(desk.one(run, 0))
    assert rows_of(desk.end(*desk.claim(run, 1, 2, 3, 4, 5)).ready) == [6]
    assert desk.step(run, 6).deps_left == 0


def test_diamonds_on_diamonds(desk: Desk) -> None:
    # 0 → 1, 2 → 3; 0 → 3; 3 → 4, 5 → 6; 1 → 6
    run = desk.create(
        [
            row(0, 1, 2, 3),
            row(1, 3, 6, deps=1),
            row(2, 3, deps=1),
            row(3, 4, 5, deps=3),
            row(4, 6, deps=1),
            row(5, 6, deps=1),
            row(6, deps=3),
        ]
    )
    order = []
    while ready := [number for number, status in desk.statuses(run).items() if status is S.READY]:
        order.append(ready)
        desk.end(*desk.claim(run, *ready))
    assert order == [[0], [1, 2], [3], [4, 5], [6]]


def test_a_join_is_ready_exactly_once_when_two_processes_end_its_steps_at_the_same_time(
    desks: tuple[Desk, Desk],
) -> None:
    width, rounds = 8, 6
    chain: list[Any] = []
    for turn in range(rounds):  # fan, join, fan, join, …
        base = turn * (width + 1)
        join = base + width
        chain += [row(base + place, join, deps=int(turn > 0)) for place in range(width)]
        after = range(join + 1, join + 1 + width) if turn < rounds - 1 else ()
        chain.append(row(join, *after, deps=width))
    run = desks[0].create(chain)
    for turn in range(rounds):
        base = turn * (width + 1)
        held = desks[0].claim(run, *range(base, base + width))
        assert len(held) == width
        ends = [lambda desk=desks[place % 2], step=step: desk.end(step) for place, step in enumerate(held)]
        became = [number for advance in together(*ends) for number in rows_of(advance.ready)]
        assert became == [base + width]
        ready = rows_of(desks[turn % 2].end(desks[1].one(run, base + width)).ready)
        assert len(ready) == (width if turn < rounds - 1 else 0)


def test_ends_of_crossing_edges_do_not_block_each_other(desks: tuple[Desk, Desk]) -> None:
    """Every step of a layer leads to every one of the next: the counters are locked in one order."""
    layers, width = 5, 6
    made = []
    for layer in range(layers):
        after = range((layer + 1) * width, (layer + 2) * width) if layer < layers - 1 else ()
        made += [row(layer * width + place, *after, deps=width if layer else 0) for place in range(width)]
    run = desks[0].create(made)
    for layer in range(layers):
        held = desks[layer % 2].claim(run, *range(layer * width, (layer + 1) * width))
        assert len(held) == width
        calls = [
            lambda desk=desk, steps_=held[place::4]: desk.end(*reversed(steps_))
            for place, desk in enumerate((*desks, *desks))
        ]
        advances = together(*calls)
        became = sorted(number for advance in advances for number in rows_of(advance.ready))
        assert became == (list(range((layer + 1) * width, (layer + 2) * width)) if layer < layers - 1 else [])


# Keep: what a worker takes over in place


def keeps(desk: Desk, keep: ClaimCapacity, successors: list[Any]) -> tuple[list[int], list[int]]:
    """Return (rows that the worker holds, rows that are owed a message) when one step leads to `successors`."""
    run = desk.create([row(0, *range(1, len(successors) + 1)), *successors])
    advance = desk.end(desk.one(run, 0), keep=keep)
    for step in advance.mine:
        stored = desk.step(run, step.row)
        assert (stored.status, stored.owner, stored.token) == (S.RUNNING, desk.worker.owner, step.token)
        assert step.token == 1
    for head in advance.ready:
        stored = desk.step(run, head.id & 0xFFFFF)
        assert (stored.status, stored.owner, stored.token) == (S.READY, None, 0)
        assert stored.due is not None
    return rows_of(advance.mine), rows_of(advance.ready)


def test_a_slow_successor_of_its_own_queue_is_taken_over(desk: Desk) -> None:
    assert keeps(desk, ClaimCapacity(slow=1), [row(1, deps=1)]) == ([1], [])


def test_no_more_is_taken_over_than_there_are_slots(desk: Desk) -> None:
    assert keeps(desk, ClaimCapacity(slow=2), [row(number, deps=1) for number in range(1, 6)]) == ([1, 2], [3, 4, 5])
    assert keeps(desk, NOTHING, [row(1, deps=1)]) == ([], [1])


def test_what_belongs_to_another_queue_is_not_taken_over(desk: Desk) -> None:
    assert keeps(desk, ClaimCapacity(slow=4), [row(1, deps=1, queue=ANTHROPIC), row(2, deps=1)]) == ([2], [1])


def test_inline_steps_are_taken_over_whatever_their_queue(desk: Desk) -> None:
    inline = [row(number, deps=1, weight=Weight.INLINE, queue=ANTHROPIC) for number in (1, 2, 3)]
    assert keeps(desk, ClaimCapacity(fast=64, slow=0), inline) == ([1, 2, 3], [])
    assert keeps(desk, ClaimCapacity(fast=2, slow=9), inline) == ([1, 2], [3])


def test_fast_steps_count_by_themselves(desk: Desk) -> None:
    mixed = [row(1, deps=1, weight=Weight.FAST), row(2, deps=1), row(3, deps=1, weight=Weight.FAST)]
    assert keeps(desk, ClaimCapacity(fast=1, slow=1), mixed) == ([1, 2], [3])


def test_members_of_a_fan_out_are_not_taken_over(desk: Desk) -> None:
    assert keeps(desk, ClaimCapacity(slow=4), [row(1, deps=1, grouped=True), row(2, deps=1)]) == ([2], [1])


def test_what_a_canvas_sends_is_neither_taken_over_nor_owed_a_message(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    desk.store.attach([step_id(run, 1)])
    advance = desk.end(desk.one(run, 0), keep=ClaimCapacity(slow=4))
    assert advance.mine == advance.ready == []
    stored = desk.step(run, 1)
    assert (stored.status, stored.carried) == (S.READY, True)
    assert stored.due is not None  # the sweep sees to it if the canvas is lost


def test_nothing_of_a_run_that_is_not_active_is_taken_over(desk: Desk) -> None:
    run = desk.create([row(0, 1, 2), row(1, deps=1), row(2, deps=1, weight=Weight.INLINE)])
    step = desk.one(run, 0)
    with desk.store.database.write() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(active=False))
    advance = desk.end(step, keep=ClaimCapacity(slow=4))
    assert advance.mine == []
    assert desk.statuses(run) == {0: S.SUCCEEDED, 1: S.READY, 2: S.READY}


# Skips


def test_skips_are_passed_on_in_the_same_transaction(desk: Desk) -> None:
    run = desk.create([row(0, 1, 3), row(1, 2, deps=1), row(2, 3, deps=1), row(3, deps=2)])
    advance = desk.end(desk.one(run, 0), status=S.SKIPPED, skipped={1: "`0` was skipped", 2: "`1` was skipped"})
    assert rows_of(advance.ready) == [3]
    assert desk.statuses(run) == {0: S.SKIPPED, 1: S.SKIPPED, 2: S.SKIPPED, 3: S.READY}
    assert desk.checkpoint(run, 2).reason == "`1` was skipped"
    assert desk.checkpoint(run, 2).attempts == 0
    assert desk.kinds(run).count("step.skipped") == 3


def test_no_skip_is_passed_on_where_the_fence_refuses(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    stale = desk.one(run, 0)
    desk.store.release(stale)
    desk.one(run, 0)
    assert desk.end(stale, status=S.SKIPPED, skipped={1: "no"}).refused
    assert desk.status(run, 1) is S.PENDING


def test_what_has_ended_already_is_not_skipped(desk: Desk) -> None:
    run = desk.create([row(0, 2), row(1), row(2, deps=1)])
    first, second = desk.claim(run, 0, 1)
    desk.end(second, output="kept")
    desk.end(first, status=S.SKIPPED, skipped={1: "no", 2: "yes"})
    assert desk.statuses(run) == {0: S.SKIPPED, 1: S.SUCCEEDED, 2: S.SKIPPED}
    assert desk.checkpoint(run, 1).output == "kept"


def test_a_wide_cascade_of_skips(desk: Desk) -> None:
    width = 700
    run = desk.create(fan(width))
    advance = desk.end(desk.one(run, 0), status=S.SKIPPED, skipped=dict.fromkeys(range(1, width + 1), "no"))
    assert rows_of(advance.ready) == [width + 1]


# Composites


def items(count: int, window: int, *, reduce: bool = False, weight: Weight = Weight.SLOW) -> list[Any]:
    made = [
        row(number, *([count] if reduce else []), deps=int(number >= window), weight=weight, parent=0, position=number)
        for number in range(count)
    ]
    return [*made, row(count, deps=count, parent=0)] if reduce else made


def expanded(desk: Desk, count: int, window: int, **fields: Any) -> tuple[int, int, list[ReadyStep]]:
    """Return (run, first child's row, heads) of a map with a step after it."""
    run = desk.create([row(0, 1, weight=Weight.INLINE), row(1, deps=1)])
    made = items(count, window, **fields)
    found = desk.store.expand(
        desk.one(run, 0),
        made,
        phase="item",
        items=list(range(count)),
        window=window if window < count else None,
        reduce=count if fields.get("reduce") else None,
    )
    assert isinstance(found, Children)
    return run, found.base, list(found.ready)


def test_a_composite_waits_for_its_children(desk: Desk) -> None:
    run, base, heads = expanded(desk, 3, 3)
    assert base == 2
    assert rows_of(heads) == [2, 3, 4]
    parent = desk.step(run, 0)
    assert (parent.status, parent.deps_left, parent.owner, parent.due) == (S.WAITING, 3, None, None)
    (expansion,) = desk.store.expansions(step_id(run, 0))
    assert (expansion.phase, expansion.base, expansion.count, expansion.items) == ("item", 2, 3, [0, 1, 2])
    assert [desk.store.place(head.id) for head in heads] == [(0, 0, 0), (1, 0, 1), (2, 0, 2)]
    assert desk.end(*desk.claim(run, 2, 3)).ready == []
    advance = desk.end(desk.one(run, 4), keep=ClaimCapacity(fast=4))
    (again,) = advance.mine
    assert (again.row, again.token) == (0, 2)
    assert rows_of(desk.end(again).ready) == [1]


def test_a_composite_may_expand_again(desk: Desk) -> None:
    run = desk.create([row(0, weight=Weight.INLINE)])
    step = desk.one(run, 0)
    for turn in range(3):
        found = desk.store.expand(step, [row(0, parent=0, position=turn)], phase="body", round=turn)
        assert isinstance(found, Children)
        assert found.base == turn + 1
        (step,) = desk.end(desk.one(run, turn + 1), keep=ClaimCapacity(fast=1)).mine
    assert [entry.round for entry in desk.store.expansions(step.id)] == [0, 1, 2]


def test_never_more_items_than_the_window_are_under_way_and_all_are_in_the_end(desk: Desk) -> None:
    count, window = 23, 4
    run, base, heads = expanded(desk, count, window)
    assert rows_of(heads) == list(range(base, base + window))
    under_way = set(rows_of(heads))
    seen = set(under_way)
    while under_way:
        number = min(under_way)
        advance = desk.end(desk.one(run, number))
        under_way.remove(number)
        for head in advance.ready:
            if head.id & 0xFFFFF != 0:
                under_way.add(head.id & 0xFFFFF)
        seen |= under_way
        active = [n for n, s in desk.statuses(run).items() if n >= base and s in (S.READY, S.RUNNING)]
        assert sorted(under_way) == active
        assert len(active) <= window
    assert seen == set(range(base, base + count))
    assert desk.status(run, 0) is S.READY


def test_items_that_end_together_release_as_many(desk: Desk) -> None:
    run, base, _ = expanded(desk, 10, 3)
    advance = desk.end(*desk.claim(run, base, base + 1, base + 2))
    assert rows_of(advance.ready) == [base + 3, base + 4, base + 5]
    assert desk.step(run, 0).window_next == base + 6


def test_released_items_are_taken_over_as_slots_allow(desk: Desk) -> None:
    run, base, _ = expanded(desk, 10, 3)
    advance = desk.end(*desk.claim(run, base, base + 1, base + 2), keep=ClaimCapacity(slow=2))
    assert (rows_of(advance.mine), rows_of(advance.ready)) == ([base + 3, base + 4], [base + 5])
    assert [desk.step(run, number).token for number in range(base + 3, base + 6)] == [1, 1, 0]


def test_two_processes_ending_items_keep_the_window(desks: tuple[Desk, Desk]) -> None:
    count, window = 40, 4
    run, base, heads = expanded(desks[0], count, window)
    now = rows_of(heads)
    ended = []
    while now:
        held = desks[0].claim(run, *now)
        assert len(held) == len(now) <= window
        ended += now
        calls = [lambda desk=desks[place % 2], step=step: desk.end(step) for place, step in enumerate(held)]
        now = sorted(number for advance in together(*calls) for number in rows_of(advance.ready) if number)
    assert sorted(ended) == list(range(base, base + count))
    assert desks[0].status(run, 0) is S.READY


def test_a_map_with_a_reduce_waits_for_it(desk: Desk) -> None:
    run, base, heads = expanded(desk, 4, 2, reduce=True)
    assert rows_of(heads) == [base, base + 1]
    assert desk.take_all(run) == 4 + 1 + 1 + 1  # items, reduce, the map again, what follows it
    assert set(desk.statuses(run).values()) == {S.SUCCEEDED}


def test_an_expansion_of_a_lost_step_is_refused_but_its_calls_count(desk: Desk) -> None:
    run = desk.create([row(0, weight=Weight.INLINE)])
    stale = desk.one(run, 0)
    desk.store.release(stale)
    assert desk.store.expand(stale, [row(0, parent=0)], phase="fallback", calls=(paid(),)) is Refusal.LOST
    assert list(desk.statuses(run)) == [0]
    assert len(desk.spent()) == 1


# Waiting


def test_a_parked_step_is_woken_when_its_time_has_come(desk: Desk) -> None:
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    said = desk.store.park(step, Snoozed(seconds=30, reason="retry", message="busy", calls=(paid(),), attempt=True))
    assert said == Waiting()
    assert desk.status(run, 0) is S.WAITING
    assert desk.kinds(run)[-1] == "step.retry"
    assert len(desk.spent()) == 1
    assert desk.store.wake([step.id]) == []
    assert desk.store.overdue(home="") == ([], [])
    elapse(desk.store, 31)
    assert desk.store.overdue(home="") == ([], [step.id])
    assert rows_of(desk.store.wake([step.id])) == [0]
    assert desk.store.wake([step.id]) == []
    assert desk.one(run, 0).attempt == 2


def test_a_wait_that_is_no_attempt_does_not_count_as_one(desk: Desk) -> None:
    run = desk.create([row(0)])
    desk.store.park(desk.one(run, 0), Snoozed(seconds=0, reason="waiting", message="429", calls=(), attempt=False))
    desk.store.wake([step_id(run, 0)])
    assert desk.one(run, 0).attempt == 1


def test_a_lost_step_is_not_parked_but_its_calls_count(desk: Desk) -> None:
    run = desk.create([row(0)])
    stale = desk.one(run, 0)
    desk.store.release(stale)
    fresh = desk.one(run, 0)
    assert (
        desk.store.park(stale, Snoozed(seconds=0, reason="retry", message="", calls=(paid(),), attempt=True))
        is Refusal.LOST
    )
    assert desk.status(run, 0) is S.RUNNING
    assert [entry.token for entry in desk.spent()] == [stale.token]
    desk.end(fresh)


def test_a_waiting_step_that_was_woken_twice_is_claimed_once(desks: tuple[Desk, Desk]) -> None:
    run = desks[0].create([row(0)])
    step = desks[0].one(run, 0)
    desks[0].store.park(step, Snoozed(seconds=0, reason="retry", message="", calls=(), attempt=True))
    woken = together(*[lambda desk=desk: desk.store.wake([step.id]) for desk in desks])
    assert sorted(len(found) for found in woken) == [0, 1]


def test_a_released_step_is_ready_for_others(desk: Desk) -> None:
    run = desk.create([row(0, weight=Weight.INLINE)])
    step = desk.one(run, 0)
    assert desk.store.release(step, weight=Weight.SLOW) == Released(ReadyStep(step.id, 0, Weight.SLOW, OPENAI, 0))
    assert desk.store.release(step) is Refusal.LOST
    stored = desk.step(run, 0)
    assert (stored.status, stored.owner, stored.weight) == (S.READY, None, Weight.SLOW)
    assert stored.due is not None
    assert desk.one(run, 0, worker=desk.register()).token == 2


# Failure of a run, of a group


def gated(*fields: Any) -> list[Any]:
    """Rows 0, 1 → 2 → gate 3 → end 4."""
    return [
        row(0, 2),
        row(1, 2),
        row(2, GATE, deps=2),
        row(GATE, 4, deps=1, weight=Weight.INLINE, queue=CONTROL),
        row(4, deps=1, weight=Weight.INLINE, queue=CONTROL),
    ]


KEEPS = frozenset({3, 4})


def fails(
    desk: Desk, step: Any, *, container: int = GATE, keep: ClaimCapacity = NOTHING, run_fails: bool = True
) -> Any:
    finish = Finish(step, Result(S.FAILED, error={"message": "boom"}, finished_at=NOW), {})
    return desk.store.fail(
        desk.worker, keep, finish, container=container, keeps=KEEPS if run_fails else frozenset(), run_fails=run_fails
    )


def test_a_failure_cancels_what_has_not_started_and_waits_for_what_runs(desk: Desk) -> None:
    run = desk.create(gated())
    first, second = desk.claim(run, 0, 1)
    assert fails(desk, first).ready == []
    assert desk.statuses(run) == {0: S.FAILED, 1: S.RUNNING, 2: S.CANCELLED, 3: S.PENDING, 4: S.PENDING}
    assert desk.run_status(run) is RunStatus.FINISHING
    assert desk.store.failure(run) == ({"message": "boom"}, False)
    assert desk.checkpoint(run, 2).reason == "the run stopped because a step failed"
    advance = desk.end(second, keep=ClaimCapacity(fast=4))
    assert rows_of(advance.mine) == [GATE]


def test_the_gate_opens_with_the_failure_of_the_last_step(desk: Desk) -> None:
    run = desk.create(gated())
    first, second = desk.claim(run, 0, 1)
    desk.end(second)
    advance = fails(desk, first, keep=ClaimCapacity(fast=4))
    assert rows_of(advance.mine) == [GATE]
    assert desk.take_all(run) == 0
    assert rows_of(desk.end(*advance.mine).ready) == [4]


def test_two_failures_at_once_end_the_run_once(desks: tuple[Desk, Desk]) -> None:
    for _ in range(5):
        run = desks[0].create(gated())
        first, second = desks[0].claim(run, 0, 1)
        found = together(lambda step=first: fails(desks[0], step), lambda step=second: fails(desks[1], step))
        assert sorted(len(advance.ready) for advance in found) == [0, 1]
        assert desks[0].statuses(run) == {0: S.FAILED, 1: S.FAILED, 2: S.CANCELLED, 3: S.READY, 4: S.PENDING}


def test_a_failure_against_ends_loses_nothing(desks: tuple[Desk, Desk]) -> None:
    width = 6
    for _ in range(4):
        gate = width + 1
        made = [row(number, gate) for number in range(width)] + [row(width, gate)]
        run = desks[0].create([*made, row(gate, deps=width + 1, weight=Weight.INLINE, queue=CONTROL)])
        held = desks[0].claim(run, *range(width))
        finish = Finish(held[0], Result(S.FAILED, error={"message": "boom"}), {})
        found = together(
            lambda finish=finish, gate=gate: desks[0].store.fail(
                desks[0].worker, NOTHING, finish, container=gate, keeps=frozenset({gate}), run_fails=True
            ),
            *[lambda desk=desks[place % 2], step=step: desk.end(step) for place, step in enumerate(held[1:])],
        )
        assert [number for advance in found for number in rows_of(advance.ready)] == [gate]
        statuses = desks[0].statuses(run)
        assert (statuses[0], statuses[width], statuses[gate]) == (S.FAILED, S.CANCELLED, S.READY)


def test_a_late_failure_stops_the_run_too(desk: Desk) -> None:
    """Its lease ran out and nobody has taken the step over: the fence accepts it, so what follows must not start."""
    run = desk.create(gated())
    late, other = desk.one(run, 0, worker=desk.register(lease=1)), desk.one(run, 1)
    elapse(desk.store, 2)
    desk.store.reap(home="")
    fails(desk, late)
    assert desk.run_status(run) is RunStatus.FINISHING
    assert desk.statuses(run) == {0: S.FAILED, 1: S.RUNNING, 2: S.CANCELLED, 3: S.PENDING, 4: S.PENDING}
    assert rows_of(desk.end(other).ready) == [GATE]


def test_a_failure_that_the_fence_refuses_stops_nothing(desk: Desk) -> None:
    run = desk.create(gated())
    stale = desk.one(run, 0)
    desk.store.release(stale)
    desk.one(run, 0)
    assert fails(desk, stale).refused == [stale.id]
    assert desk.run_status(run) is not RunStatus.FINISHING
    assert desk.status(run, 2) is S.PENDING


def test_a_step_that_ran_on_may_neither_wait_nor_expand(desk: Desk) -> None:
    run = desk.create(gated())
    first, second = desk.claim(run, 0, 1)
    fails(desk, first)
    assert (
        desk.store.park(second, Snoozed(seconds=0, reason="retry", message="", calls=(), attempt=True))
        is Refusal.STOPPED
    )
    assert desk.store.expand(second, [row(0, parent=1)], phase="body") is Refusal.STOPPED
    assert desk.status(run, 1) is S.RUNNING
    assert rows_of(desk.end(second, status=S.CANCELLED).ready) == [GATE]


def test_a_step_that_ran_on_is_cancelled_when_it_is_given_back(desk: Desk) -> None:
    run = desk.create(gated())
    one, two = desk.claim(run, 0, 1)
    fails(desk, one)
    answer = desk.store.release(two, weight=Weight.SLOW)
    assert isinstance(answer, Buried)
    assert rows_of(answer.ready) == [GATE]
    assert desk.status(run, 1) is S.CANCELLED
    assert desk.claim(run, 1) == []


def test_a_failure_inside_a_group_stops_the_group_alone(desk: Desk) -> None:
    # 0: group → 2; 1: beside it → 2
    run = desk.create([row(0, 2, weight=Weight.INLINE), row(1, 2), row(2, deps=2)])
    group = desk.one(run, 0)
    desk.store.expand(group, [row(0, 2, parent=0), row(1, 2, parent=0), row(2, deps=2, parent=0)], phase="steps")
    first, second = desk.claim(run, 3, 4)
    assert fails(desk, first, container=0, run_fails=False).ready == []
    assert desk.statuses(run) == {
        0: S.WAITING, 1: S.READY, 2: S.PENDING, 3: S.FAILED, 4: S.RUNNING, 5: S.CANCELLED,
    }  # fmt: skip
    assert desk.run_status(run) is RunStatus.RUNNING
    assert rows_of(desk.end(second, keep=ClaimCapacity(fast=1)).mine) == [0]


def test_a_failure_inside_nested_groups_leaves_what_is_around_them(desk: Desk) -> None:
    run = desk.create([row(0, weight=Weight.INLINE)])
    desk.store.expand(desk.one(run, 0), [row(0, parent=0, weight=Weight.INLINE), row(1, parent=0)], phase="steps")
    desk.store.expand(desk.one(run, 1), [row(0, parent=1), row(1, parent=1)], phase="steps")
    failed, beside = desk.claim(run, 3, 4)
    fails(desk, failed, container=1, run_fails=False)
    assert desk.status(run, 2) is S.READY
    assert rows_of(desk.end(beside, keep=ClaimCapacity(fast=1)).mine) == [1]


def test_a_failure_of_the_run_stops_nested_groups(desk: Desk) -> None:
    run = desk.create(
        [
            row(0, 2, weight=Weight.INLINE),
            row(1, 2),
            row(2, deps=2, weight=Weight.INLINE, queue=CONTROL),
        ]
    )
    desk.store.expand(desk.one(run, 0), [row(0, parent=0, weight=Weight.INLINE), row(1, parent=0)], phase="steps")
    desk.store.expand(desk.one(run, 3), [row(0, parent=3), row(1, parent=3, deps=1)], phase="item", window=1)
    inner, failing = desk.claim(run, 5, 1)
    finish = Finish(failing, Result(S.FAILED, error={"message": "boom"}), {})
    desk.store.fail(desk.worker, NOTHING, finish, container=2, keeps=frozenset({2}), run_fails=True)
    assert desk.statuses(run) == {
        0: S.CANCELLED, 1: S.FAILED, 2: S.PENDING, 3: S.CANCELLED, 4: S.CANCELLED, 5: S.RUNNING, 6: S.CANCELLED,
    }  # fmt: skip
    # The inner group has been stopped before: a failure there now does no more.
    advance = desk.store.fail(
        desk.worker,
        NOTHING,
        Finish(inner, Result(S.FAILED, error={"message": "too"}), {}),
        container=3,
        keeps=frozenset(),
        run_fails=False,
    )
    assert rows_of(advance.ready) == [2]
    assert desk.status(run, 3) is S.CANCELLED


def test_a_stopped_map_releases_no_further_items(desk: Desk) -> None:
    run, base, _ = expanded(desk, 10, 2)
    first, second = desk.claim(run, base, base + 1)
    fails(desk, first, container=0, run_fails=False)
    advance = desk.end(second, keep=ClaimCapacity(fast=4, slow=4))
    assert (rows_of(advance.mine), advance.ready) == ([], []) or rows_of(advance.mine) == [0]
    statuses = desk.statuses(run)
    assert {statuses[number] for number in range(base + 2, base + 10)} == {S.CANCELLED}


def test_what_is_stopped_leaves_the_backlog(desk: Desk) -> None:
    run = desk.create([*gated()])
    desk.store.enqueue([ReadyStep(step_id(run, 1), 1, Weight.SLOW, OPENAI)], "team")
    fails(desk, desk.one(run, 0))
    assert desk.waiting() == []
    assert desk.status(run, 1) is S.CANCELLED


def test_an_expansion_and_a_failure_at_once_leave_nothing_behind(desks: tuple[Desk, Desk]) -> None:
    """The children of a group that expands while the run stops do not start."""
    for _ in range(6):
        run = desks[0].create([row(0, 2, weight=Weight.INLINE), row(1, 2), row(2, deps=2, weight=Weight.INLINE)])
        group, failing = desks[0].claim(run, 0, 1)
        children = [row(number, parent=0) for number in range(30)]
        finish = Finish(failing, Result(S.FAILED, error={"message": "boom"}), {})
        made, advance = together(
            lambda group=group, children=children: desks[0].store.expand(group, children, phase="steps"),
            lambda finish=finish: desks[1].store.fail(
                desks[1].worker, NOTHING, finish, container=2, keeps=frozenset({2}), run_fails=True
            ),
        )
        assert not isinstance(advance, Exception), advance
        ready = rows_of(advance.ready)
        if made is Refusal.STOPPED:
            ready += rows_of(desks[0].end(group, status=S.CANCELLED).ready)
        statuses = desks[0].statuses(run)
        assert ready == [2]
        assert {status for number, status in statuses.items() if number > 2} <= {S.CANCELLED}
        assert statuses[0] is S.CANCELLED


# Stop


def stop(desk: Desk, run: int, error: dict[str, Any] | None = None) -> list[ReadyStep]:
    return desk.store.stop(run, gate=GATE, keeps=KEEPS, error=error, reason="the run was cancelled")


def test_a_cancel_stops_everything_but_the_final_steps(desk: Desk) -> None:
    run = desk.create(gated())
    step = desk.one(run, 0)
    assert stop(desk, run) == []
    assert desk.statuses(run) == {0: S.RUNNING, 1: S.CANCELLED, 2: S.CANCELLED, 3: S.PENDING, 4: S.PENDING}
    assert (desk.run_status(run), desk.store.failure(run)) == (RunStatus.FINISHING, (None, True))
    assert desk.store.cancelled([run, run + 1]) == {run}
    assert rows_of(desk.end(step, status=S.CANCELLED).ready) == [GATE]


def test_a_cancel_of_a_run_in_which_nothing_runs_opens_its_gate(desk: Desk) -> None:
    run = desk.create(gated())
    assert rows_of(stop(desk, run)) == [GATE]
    assert desk.status(run, GATE) is S.READY
    assert desk.one(run, GATE)


def test_a_cancel_while_finishing_only_marks_the_run(desk: Desk) -> None:
    run = desk.create(gated())
    first, _ = desk.claim(run, 0, 1)
    fails(desk, first)
    assert stop(desk, run) == []
    assert desk.store.failure(run) == ({"message": "boom"}, True)
    assert desk.status(run, 1) is S.RUNNING


def test_a_run_that_is_out_of_time_has_failed(desk: Desk) -> None:
    run = desk.create(gated(), timeout=10)
    assert desk.store.expired_runs(home="") == []
    elapse(desk.store, 11)
    assert desk.store.expired_runs(home="") == [run]
    assert desk.store.expired_runs(home="laptop") == []
    assert desk.store.cancelled([run]) == set(), "calls are aborted only when nothing can follow them any more"
    stop(desk, run, error={"message": "too long"})
    assert desk.store.cancelled([run]) == {run}
    assert desk.store.failure(run) == ({"message": "too long"}, False)
    assert desk.store.expired_runs(home="") == []


def test_a_finished_run_cannot_be_stopped(desk: Desk) -> None:
    run = desk.create([row(0)])
    last = desk.one(run, 0)
    desk.store.finish_run(
        desk.worker, Finish(last, Result(S.SUCCEEDED)), status=RunStatus.SUCCEEDED, outputs={}, error=None
    )
    with pytest.raises(Conflict, match="The run has already succeeded"):
        stop(desk, run)
    assert desk.store.cancelled([run]) == set()


def test_cancel_and_the_end_of_the_run_have_one_winner(desks: tuple[Desk, Desk]) -> None:
    for _ in range(6):
        run = desks[0].create([row(number) for number in range(3)] + [row(3, deps=3), row(4, deps=0)])
        desks[0].end(*desks[0].claim(run, 0, 1, 2, 3))
        last = desks[0].one(run, 4)
        ended = Finish(last, Result(S.SUCCEEDED))
        said = together(
            lambda ended=ended: desks[0].store.finish_run(
                desks[0].worker, ended, status=RunStatus.SUCCEEDED, outputs={"a": 1}, error=None
            ),
            lambda run=run: stop(desks[1], run),
        )
        assert said[0] == RunClosed([])
        assert isinstance(said[1], Conflict) or said[1] == [] or rows_of(said[1]) == [GATE]
        assert desks[0].run_status(run) is RunStatus.SUCCEEDED


def test_a_run_ends_once(desk: Desk) -> None:
    run = desk.create([row(0)])
    step = desk.one(run, 0)
    for status, outputs in ((RunStatus.SUCCEEDED, {"a": "ü"}), (RunStatus.FAILED, {"b": 2})):
        desk.store.finish_run(
            desk.worker, Finish(step, Result(S.SUCCEEDED)), status=status, outputs=outputs, error={"message": "no"}
        )
    stored = desk.run(run)
    assert (stored.status, stored.active, stored.outputs) == (RunStatus.SUCCEEDED, False, '{"a":"ü"}')
    assert stored.finished_at is not None
    assert desk.kinds(run).count("run.succeeded") == 1
    assert "run.failed" not in desk.kinds(run)
    assert desk.store.finished(run)[0]


# Runs


def test_a_run_is_stored_as_it_was_asked_for(desk: Desk) -> None:
    new = new_run(inputs={"a": 1}, team="red", target="live", home="laptop", timeout=5.0)
    run, created = desk.store.create(new, [row(0)])
    info = desk.store.info(run)
    assert created
    assert (info.public_id, info.inputs, info.team, info.target, info.home) == (
        new.public_id,
        {"a": 1},
        "red",
        "live",
        "laptop",
    )
    assert (info.root, info.created_at) == (run, NOW)
    assert desk.store.plan_body(new.plan_hash) == "{}"
    assert desk.kinds(run)[0] == "run.queued"


def test_unknown_runs_and_plans(desk: Desk) -> None:
    with pytest.raises(NotFound):
        desk.store.info(999)
    with pytest.raises(NotFound):
        desk.store.plan_body("x")


def test_the_same_key_gives_the_same_run(desk: Desk) -> None:
    new = new_run(idempotency_key="k", request_hash="h")
    run, created = desk.store.create(new, [row(0)])
    again = replace(new, public_id="run_other")
    assert (created, desk.store.create(again, [row(0)])) == (True, (run, False))
    with pytest.raises(Conflict, match="used for another request"):
        desk.store.create(replace(again, request_hash="other"), [row(0)])
    assert len(desk.all(runs)) == 1


def test_one_key_at_the_same_time_makes_one_run(desks: tuple[Desk, Desk]) -> None:
    for key in "abcd":
        new = new_run(idempotency_key=key, request_hash="same")
        calls = [
            partial(desks[place % 2].store.create, replace(new, public_id=f"run_{key}{place}"), [row(0)])
            for place in range(4)
        ]
        other = replace(new, public_id=f"run_{key}x", request_hash="other")
        *found, odd = together(*calls, lambda other=other: desks[1].store.create(other, [row(0)]))
        made = [result for result in found if not isinstance(result, Conflict)]
        if isinstance(odd, Conflict):  # the odd one came too late, as it does nearly always
            assert len({run for run, _ in made}) == 1
            assert sorted(created for _, created in made) == [False, False, False, True]
        else:
            assert (odd[1], made) == (True, [])
    assert len(desks[0].all(runs)) == 4


def test_a_run_of_ten_thousand_steps_is_created_in_one_go(desk: Desk) -> None:
    made = [row(number, number + 1, deps=int(number > 0)) for number in range(9_999)] + [row(9_999, deps=1)]
    desk.store.create(new_run(), [row(0)])
    since = time.perf_counter()
    run = desk.create(made)
    assert time.perf_counter() - since < 1.0
    statuses = desk.statuses(run)
    assert len(statuses) == 10_000
    assert [number for number, status in statuses.items() if status is S.READY] == [0]
    assert rows_of(desk.end(desk.one(run, 0)).ready) == [1]


# Workers and their deaths


def test_a_lease_is_prolonged_until_it_was_taken_away(desk: Desk) -> None:
    worker = desk.register(lease=10)
    elapse(desk.store, 8)
    assert desk.store.heartbeat(worker, 10, {OPENAI: 5.5}) is Renewal.RENEWED
    elapse(desk.store, 8)
    assert desk.store.reap(home="") == Recovered([], [])
    assert desk.store.heartbeat(worker, 10, {}) is Renewal.RENEWED
    elapse(desk.store, 11)
    desk.store.reap(home="")
    assert desk.store.heartbeat(worker, 10, {}) is Renewal.REVIVED


def test_a_worker_that_comes_to_life_again_can_die_again(desk: Desk) -> None:
    """A process was stopped for longer than its lease; it claims a step before it knows."""
    run = desk.create([row(0), row(1)])
    worker = desk.register(lease=10)
    lost = desk.one(run, 0, worker=worker)
    elapse(desk.store, 11)
    desk.store.reap(home="")
    other = desk.one(run, 0)
    assert desk.claim(run, 1, worker=worker) == []
    assert desk.store.heartbeat(worker, 10, {}) is Renewal.REVIVED
    late = desk.one(run, 1, worker=worker)
    assert desk.store.heartbeat(worker, 10, {}) is Renewal.RENEWED
    assert desk.end(lost, worker=worker).refused == [lost.id]
    elapse(desk.store, 11)
    assert [head.id for head in desk.store.reap(home="").again] == [late.id]
    assert not desk.end(other).refused


def test_only_the_steps_of_the_dead_are_taken_back(desk: Desk) -> None:
    run = desk.create([row(number) for number in range(3)])
    dead = desk.register(lease=5)
    mine, lost = desk.one(run, 0), desk.one(run, 1, worker=dead)
    elapse(desk.store, 6)
    (head,) = desk.store.reap(home="").again
    assert (head.id, head.crashes) == (lost.id, 1)
    assert desk.store.reap(home="") == Recovered([], [])
    assert desk.statuses(run) == {0: S.RUNNING, 1: S.READY, 2: S.READY}
    assert desk.step(run, 1).owner is None
    assert "step.recovered" in desk.kinds(run)
    desk.end(mine)
    assert desk.one(run, 1).token == lost.token + 1


def test_a_worker_that_retires_is_reaped_at_once(desk: Desk) -> None:
    run = desk.create([row(0)])
    worker = desk.register()
    desk.one(run, 0, worker=worker)
    desk.store.retire(worker)
    assert [head.id for head in desk.store.reap(home="").again] == [step_id(run, 0)]


def test_nobody_takes_over_what_belongs_to_another_home(desk: Desk) -> None:
    here, there = desk.create([row(0)]), desk.create([row(0)], home="laptop")
    desk.one(here, 0, worker=desk.register(lease=1))
    desk.one(there, 0, worker=desk.register(lease=1, home="laptop"))
    elapse(desk.store, 20)
    assert [head.id for head in desk.store.reap(home="").again] == [step_id(here, 0)]
    assert desk.status(there, 0) is S.RUNNING
    assert [head.id for head in desk.store.reap(home="laptop").again] == [step_id(there, 0)]
    elapse(desk.store, 20)
    late, _ = desk.store.overdue(home="")
    assert [head.id for head, _ in late] == [step_id(here, 0)]


def test_two_sweeps_take_each_step_back_once(desks: tuple[Desk, Desk]) -> None:
    run = desks[0].create([row(number) for number in range(10)])
    for number in range(10):
        desks[0].one(run, number, worker=desks[0].register(lease=1))
    for desk in desks:
        if desk.store.database.sqlite:
            elapse(desk.store, 2)
    if not desks[0].store.database.sqlite:
        elapse(desks[0].store, 2)
    taken = together(*[lambda desk=desk: desk.store.reap(home="") for desk in (*desks, *desks)])
    assert sorted(head.id & 0xFFFFF for found in taken for head in found.again) == list(range(10))
    assert {desks[0].step(run, number).crashes for number in range(10)} == {1}


def test_a_step_that_ran_on_in_a_stopped_run_is_not_started_again(desk: Desk) -> None:
    """Its worker died after the run had stopped: it is cancelled, and what waited for it goes on."""
    run = desk.create(gated())
    desk.one(run, 0, worker=desk.register(lease=1))
    stop(desk, run)
    elapse(desk.store, 2)
    recovered = desk.store.reap(home="")
    assert (rows_of(recovered.again), rows_of(recovered.freed)) == ([], [GATE])
    assert (desk.status(run, 0), desk.status(run, GATE)) == (S.CANCELLED, S.READY)


def test_slots_of_the_living(desk: Desk) -> None:
    desk.register(queues=[OPENAI, ANTHROPIC], slots=3)
    desk.register(slots=7, lease=1)
    desk.register(slots=9, home="laptop")
    desk.register(slots=9, target="live")
    elapse(desk.store, 2)
    assert desk.store.slots("sandbox", "") == {OPENAI: 7, ANTHROPIC: 3, CONTROL: 4}


def test_watermarks_are_the_newest_of_all(desk: Desk) -> None:
    other = desk.register()
    desk.store.heartbeat(desk.worker, 60, {OPENAI: 5.0, CONTROL: 9.0})
    desk.store.heartbeat(other, 60, {OPENAI: 7.5})
    assert desk.store.watermarks(home="") == {OPENAI: 7.5, CONTROL: 9.0}
    assert desk.store.watermarks(home="laptop") == {}


# What may be lost


def test_ready_steps_are_overdue_after_a_while(desk: Desk) -> None:
    run = desk.create([row(0), row(1), row(2, deps=1)])
    assert desk.store.overdue(home="") == ([], [])
    elapse(desk.store, 5.1)
    late, sleepers = desk.store.overdue(home="")
    assert ([head.id & 0xFFFFF for head, _ in late], sleepers) == ([0, 1], [])
    assert desk.store.redispatch([step_id(run, 0), step_id(run, 2)]) == [step_id(run, 0)]
    late, _ = desk.store.overdue(home="")
    assert [head.id & 0xFFFFF for head, _ in late] == [1]


def test_all_that_was_published_can_be_asked_for(desk: Desk) -> None:
    run = desk.create([row(0), row(1)])
    desk.store.enqueue([ReadyStep(step_id(run, 1), 1, Weight.SLOW, OPENAI)], "team")
    late, _ = desk.store.overdue(home="", all_ready=True)
    assert [head.id & 0xFFFFF for head, _ in late] == [0]


def test_when_the_broker_has_lost_everything_no_canvas_carries_anything(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    other = desk.create([row(0, 1), row(1, deps=1)], home="laptop")
    desk.store.attach([step_id(run, 1), step_id(other, 1)])
    desk.store.detach_all(home="")
    assert (desk.step(run, 1).carried, desk.step(other, 1).carried) == (False, True)
    assert rows_of(desk.end(desk.one(run, 0)).ready) == [1], "who makes it ready publishes it"


def test_nothing_of_a_finished_or_paused_run_is_overdue(desk: Desk) -> None:
    run = desk.create([row(0)])
    elapse(desk.store, 6)
    with desk.store.database.write() as connection:
        connection.execute(update(runs).where(runs.c.id == run).values(active=False))
    assert desk.store.overdue(home="") == ([], [])


def test_what_is_on_the_backlog_is_never_overdue(desk: Desk) -> None:
    run = desk.create([row(0)])
    desk.store.enqueue([ReadyStep(step_id(run, 0), 0, Weight.SLOW, OPENAI)], "team")
    elapse(desk.store, 3600)
    assert desk.store.overdue(home="") == ([], [])


def test_a_dropped_step_is_owed_a_message_if_it_is_ready(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1), row(2, 3), row(3, deps=1)])
    ids = [step_id(run, 1), step_id(run, 3)]
    desk.store.attach([*ids, step_id(run, 0)])
    assert not desk.step(run, 0).carried  # it is ready: its message is under way already
    desk.end(desk.one(run, 0))
    assert rows_of(desk.store.detach(ids)) == [1]
    assert desk.store.detach(ids) == []
    assert rows_of(desk.end(desk.one(run, 2)).ready) == [3]


def test_a_step_that_is_sent_anew_leaves_its_canvas(desk: Desk) -> None:
    run = desk.create([row(0, 1), row(1, deps=1)])
    desk.store.attach([step_id(run, 1)])
    desk.end(desk.one(run, 0))
    desk.store.redispatch([step_id(run, 1)])
    assert not desk.step(run, 1).carried


# The backlog


def enqueue(desk: Desk, team: str, count: int, **fields: Any) -> int:
    run = desk.create([row(number) for number in range(count)])
    heads = [ReadyStep(step_id(run, number), number, Weight.SLOW, OPENAI) for number in range(count)]
    desk.store.enqueue(heads, team, **fields)
    return run


def dequeue(desk: Desk, count: int, **fields: Any) -> list[ReadyStep]:
    return desk.store.dequeue(OPENAI, count, **{"target": "sandbox", "home": "", **fields})


def test_the_backlog_is_taken_in_order_and_each_step_once(desk: Desk) -> None:
    enqueue(desk, "red", 5)
    assert desk.store.shelved() == {OPENAI: 5}
    assert [rows_of(dequeue(desk, 2)) for _ in range(4)] == [[0, 1], [2, 3], [4], []]
    assert desk.store.shelved() == {}


def test_a_quiet_team_is_not_behind_a_noisy_ones_thousand(desk: Desk) -> None:
    noisy = enqueue(desk, "noisy", 1_000)
    dequeue(desk, 10)
    quiet = enqueue(desk, "quiet", 3)
    taken = [head.id >> 20 for head in dequeue(desk, 8)]
    assert taken.count(quiet) == 3
    assert taken.count(noisy) == 5


def test_teams_take_turns(desk: Desk) -> None:
    first, second = enqueue(desk, "red", 4), enqueue(desk, "blue", 4)
    taken = [head.id >> 20 for head in dequeue(desk, 8)]
    assert sorted(taken[:2]) == sorted(taken[2:4]) == sorted(taken[6:]) == sorted((first, second))


def test_a_team_that_was_quiet_has_saved_nothing_up(desk: Desk) -> None:
    enqueue(desk, "quiet", 1)
    enqueue(desk, "busy", 100)
    assert len(dequeue(desk, 60)) == 60
    quiet = enqueue(desk, "quiet", 20)
    taken = [head.id >> 20 for head in dequeue(desk, 20)]
    assert 8 <= taken.count(quiet) <= 12


def test_recovered_steps_go_first(desk: Desk) -> None:
    enqueue(desk, "red", 3)
    first = enqueue(desk, "red", 1, first=True)
    assert [head.id >> 20 for head in dequeue(desk, 1)] == [first]


def test_the_backlog_of_another_home_target_or_a_stopped_run_stays(desk: Desk) -> None:
    enqueue(desk, "red", 1)
    assert dequeue(desk, 1, home="laptop") == dequeue(desk, 1, target="live") == []
    with desk.store.database.write() as connection:
        connection.execute(update(runs).values(active=False))
    assert dequeue(desk, 1) == []
    assert desk.store.shelved() == {OPENAI: 1}


def test_steps_that_have_ended_meanwhile_are_left_out(desk: Desk) -> None:
    run = enqueue(desk, "red", 2)
    desk.one(run, 0)
    assert rows_of(dequeue(desk, 5)) == [1]
    assert desk.step(run, 1).due is not None


def test_two_publishers_take_different_steps(desks: tuple[Desk, Desk]) -> None:
    enqueue(desks[0], "red", 40)
    taken = together(*[lambda desk=desk: dequeue(desk, 10) for desk in (*desks, *desks)])
    numbers = [number for heads in taken for number in rows_of(heads)]
    assert len(numbers) == len(set(numbers))
    left = [entry.step_id & 0xFFFFF for entry in desks[0].waiting()]
    assert sorted(numbers + left) == list(range(40))
    assert {entry.id & 0xFFFFF for entry in desks[0].all(steps, steps.c.due.is_(None))} == set(left)


def test_a_worker_with_room_pulls_from_the_backlog(desk: Desk) -> None:
    run = enqueue(desk, "red", 4)
    assert rows_of(desk.store.claim_and_finish(desk.worker, ClaimCapacity(0, 0, 3)).mine) == [0, 1, 2]
    assert desk.store.shelved() == {OPENAI: 1}
    other = desk.create([row(0, 1), row(1, deps=1)])
    advance = desk.end(desk.one(other, 0), keep=ClaimCapacity(0, 1, 1))
    assert [step.id >> 20 for step in advance.mine] == [other]  # what follows fills the slot first
    assert desk.status(run, 3) is S.READY


def test_only_what_is_the_workers_is_pulled(desk: Desk) -> None:
    enqueue(desk, "red", 2)
    for fields in ({"home": "laptop"}, {"target": "live"}, {"queues": [ANTHROPIC]}):
        assert desk.store.claim_and_finish(desk.register(**fields), ClaimCapacity(0, 0, 5)).mine == []
    assert desk.store.shelved() == {OPENAI: 2}


def test_a_suspect_on_the_backlog_is_not_lost(desk: Desk) -> None:
    """A worker may not pull a suspect: it stays there until a publisher sends it."""
    run = enqueue(desk, "red", 1)
    with desk.store.database.write() as connection:
        connection.execute(update(steps).values(crashes=2))
    assert desk.store.claim_and_finish(desk.worker, ClaimCapacity(0, 0, 5)).mine == []
    assert desk.store.shelved() == {OPENAI: 1} or desk.step(run, 0).due is not None
    assert rows_of(dequeue(desk, 1)) == [0]


# Leading, resuming


def test_one_leads_until_its_time_is_over(desks: tuple[Desk, Desk]) -> None:
    first, second = desks
    assert first.store.lead("sweep", "a", 5)
    assert first.store.lead("sweep", "a", 5)
    assert not second.store.lead("sweep", "b", 5)
    assert second.store.lead("other", "b", 5)
    for desk in desks if first.store.database.sqlite else desks[:1]:
        elapse(desk.store, 6)
    assert second.store.lead("sweep", "b", 5)
    assert not first.store.lead("sweep", "a", 5)


def test_two_want_to_lead_and_one_does(desks: tuple[Desk, Desk]) -> None:
    for name in "abcdef":
        said = together(*[lambda desk=desk, n=name, o=str(o): desk.store.lead(n, o, 5) for o, desk in enumerate(desks)])
        assert sorted(said) == [False, True]


def test_paid_steps_are_adoptable_by_the_runs_that_continue_theirs(desk: Desk) -> None:
    run = desk.create([row(0), row(1), row(2)])
    first, second, third = desk.claim(run, 0, 1, 2)
    desk.end(first, output="paid", detail={"fingerprint": f"{run}:abc", "model": "m"})
    desk.end(second, status=S.FAILED, detail={"fingerprint": f"{run}:def"})
    desk.end(third, output="free")
    assert desk.store.finished(run) == (False, [(0, 0)])
    found = desk.store.adoptable(run, "abc")
    assert found is not None
    assert (found.id, found.output, found.detail) == (first.id, "paid", {"model": "m"})
    assert desk.store.adoptable(run, "def") is None
    assert desk.store.adoptable(run + 1, "abc") is None
    later = desk.create([row(0)], root=run, resumed_from=run)
    assert desk.store.info(later).root == run
    assert desk.kinds(later)[0] == "run.resumed"


def test_the_first_of_two_equal_steps_is_the_one_adopted(desk: Desk) -> None:
    run = desk.create([row(0), row(1)])
    first, second = desk.claim(run, 0, 1)
    desk.end(first, output="first", detail={"fingerprint": f"{run}:abc"})
    desk.end(second, output="second", detail={"fingerprint": f"{run}:abc"})
    found = desk.store.adoptable(run, "abc")
    assert found is not None
    assert found.output == "first"


def test_an_orphan_is_a_run_of_a_home_without_a_living_worker(desk: Desk) -> None:
    here, there = desk.create([row(0)]), desk.create([row(0)], home="laptop")
    assert desk.store.orphaned(there)
    assert not desk.store.orphaned(here)
    desk.register(home="laptop", lease=5)
    assert not desk.store.orphaned(there)
    elapse(desk.store, 6)
    assert desk.store.orphaned(there)


def test_a_closed_orphan_has_failed_and_leaves_nothing_behind(desk: Desk) -> None:
    run = desk.create(gated(), home="laptop")
    worker = desk.register(home="laptop", lease=1)
    desk.one(run, 0, worker=worker)
    desk.store.enqueue([ReadyStep(step_id(run, 1), 1, Weight.SLOW, OPENAI)], "team")
    assert not desk.store.close_orphan(run), "its process lives"
    elapse(desk.store, 2)
    assert desk.store.close_orphan(run)
    assert desk.run_status(run) is RunStatus.FAILED
    assert set(desk.statuses(run).values()) == {S.CANCELLED}
    assert desk.waiting() == []
    assert desk.store.finished(run)[0]
    elapse(desk.store, 5)
    assert desk.store.reap(home="laptop") == Recovered([], [])


def test_a_run_that_has_ended_is_not_closed_as_an_orphan(desk: Desk) -> None:
    run = desk.create([row(0)], home="laptop")
    step = desk.one(run, 0, worker=desk.register(home="laptop"))
    desk.store.finish_run(
        desk.worker, Finish(step, Result(S.SUCCEEDED)), status=RunStatus.SUCCEEDED, outputs=1, error=None
    )
    elapse(desk.store, 61)
    assert not desk.store.close_orphan(run)
    assert desk.run_status(run) is RunStatus.SUCCEEDED
    assert "run.failed" not in desk.kinds(run)


def test_states_of_steps(desk: Desk) -> None:
    run = desk.create([row(0), row(1, deps=1, queue=ANTHROPIC)])
    found = desk.store.states([step_id(run, 0), step_id(run, 1), step_id(run, 2)])
    assert found == {step_id(run, 0): (S.READY, OPENAI), step_id(run, 1): (S.PENDING, ANTHROPIC)}
