"""`max_parallel` of a run, over SQLite and PostgreSQL: never more of its slow steps at a time, and none forgotten."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select

from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import ClaimCapacity, Finish, Released, Result, Weight, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence.tables import held_steps, run_slots, steps
from tests.support.engine import ANTHROPIC, NOW, Desk, elapse, row, rows_of

S = StepStatus


@pytest.fixture
def desk(desks: tuple[Desk, Desk]) -> Desk:
    return desks[0]


def ids(run: int, *numbers: int) -> list[int]:
    return [step_id(run, number) for number in numbers]


def counted(desk: Desk, run: int, *numbers: int, **fields: Any) -> list[int]:
    """Claim steps; returns those that `admit` has to count."""
    advance = desk.store.claim_and_finish(desk.worker, ClaimCapacity(0), claims=ids(run, *numbers), **fields)
    assert advance.mine == []
    return advance.counted


def claim_limited(
    desk: Desk, run: int, *numbers: int, free: int = 99, **fields: Any
) -> tuple[list[int], list[int], list[int]]:
    """Return the rows that the worker has now, that are owed a message, that wait."""
    made = desk.store.claim_limited(desk.worker, run, ids(run, *numbers), free=free, **fields)
    return rows_of(made.mine), rows_of(made.ready), [key & 0xFFFFF for key in made.held]


def held(desk: Desk, run: int) -> list[int]:
    return sorted(entry.step_id & 0xFFFFF for entry in desk.all(held_steps, held_steps.c.run_id == run))


def end(desk: Desk, run: int, *numbers: int) -> None:
    """End steps that run, whoever has them."""
    for number in numbers:
        stored = desk.step(run, number)
        claimed = desk.store.owned(desk.worker)
        mine = next(step for step in claimed if step.id == stored.id)
        desk.end(mine)


def test_slow_steps_are_counted_others_are_not(desk: Desk) -> None:
    run = desk.create([row(0), row(1, weight=Weight.INLINE), row(2, weight=Weight.FAST), row(3)], max_parallel=1)
    advance = desk.store.claim_and_finish(desk.worker, ClaimCapacity(0), claims=ids(run, 0, 1, 2, 3))
    assert sorted(rows_of(advance.mine)) == [1, 2]
    assert sorted(key & 0xFFFFF for key in advance.counted) == [0, 3]
    assert desk.status(run, 0) is S.READY


def test_without_a_limit_nothing_is_counted(desk: Desk) -> None:
    run = desk.create([row(0), row(1)])
    assert len(desk.claim(run, 0, 1)) == 2
    assert claim_limited(desk, run, 0, 1) == ([], [], [])
    assert desk.all(run_slots) == []


def test_as_many_are_claimed_as_may_run_and_the_rest_waits(desk: Desk) -> None:
    run = desk.create([row(number) for number in range(5)], max_parallel=2)
    assert len(counted(desk, run, 0, 1, 2, 3, 4)) == 5
    assert claim_limited(desk, run, 0, 1, 2, 3, 4) == ([0, 1], [], [2, 3, 4])
    assert held(desk, run) == [2, 3, 4]
    elapse(desk.store, 100)
    assert desk.store.overdue(home="", all_ready=True) == ([], [])  # no message of theirs can be lost
    desk.store.heartbeat(desk.worker, 60, {})
    assert claim_limited(desk, run) == ([], [], [])
    end(desk, run, 0)
    assert claim_limited(desk, run) == ([2], [], [])
    end(desk, run, 1, 2)
    assert claim_limited(desk, run) == ([3, 4], [], [])
    assert held(desk, run) == []


def test_whatever_stops_a_step_makes_room(desk: Desk) -> None:
    run = desk.create([row(number) for number in range(6)], max_parallel=1)
    assert claim_limited(desk, run, *range(6))[0] == [0]
    (step,) = desk.store.owned(desk.worker)
    desk.store.park(step, Snoozed(seconds=60, reason="retry", message="later", calls=(), attempt=True))
    assert claim_limited(desk, run)[0] == [1]
    (step,) = desk.store.owned(desk.worker)
    assert isinstance(desk.store.release(step), Released)
    assert claim_limited(desk, run)[0] == [2]
    elapse(desk.store, 100)  # the worker is dead
    other = desk.register()
    (back,) = desk.store.reap(home="").again
    assert back.id == step_id(run, 2)
    made = desk.store.claim_limited(other, run, [back.id], free=9)
    assert rows_of(made.mine) == [2]  # before those that came after it
    assert held(desk, run) == [3, 4, 5]


def test_what_is_not_for_this_worker_is_owed_a_message(desk: Desk) -> None:
    run = desk.create([row(0), row(1, queue=ANTHROPIC), row(2), row(3)], max_parallel=3)
    assert claim_limited(desk, run, 0, 1, 2, 3, free=1) == ([0], [1, 2], [3])
    assert desk.step(run, 1).due is not None
    assert claim_limited(desk, run, 1, free=0) == ([], [1, 3], [])
    assert held(desk, run) == []


def test_what_follows_is_claimed_in_place_but_a_fan_out_is_sent_together(desk: Desk) -> None:
    run = desk.create([row(0), row(1, grouped=True), row(2, grouped=True), row(3)], max_parallel=2)
    made = desk.store.claim_limited(desk.worker, run, follows=ids(run, 0, 1, 2, 3), free=9)
    assert (rows_of(made.mine), rows_of(made.ready), made.held) == ([0, 3], [1, 2], [])
    assert claim_limited(desk, run, 1, 2) == ([], [], [1, 2])  # when their messages come they are counted


def test_the_sweep_finds_what_waits(desk: Desk) -> None:
    run, other = (desk.create([row(0), row(1)], max_parallel=1) for _ in range(2))
    claim_limited(desk, run, 0, 1)
    claim_limited(desk, other, 0)
    assert desk.store.held_runs(home="", target="sandbox") == [run]
    assert desk.store.held_runs(home="laptop", target="sandbox") == []
    assert desk.store.claim_limited(None, run).ready == []
    end(desk, run, 0)
    assert rows_of(desk.store.claim_limited(None, run).ready) == [1]


def test_nothing_is_taken_over_past_the_count(desk: Desk) -> None:
    run = desk.create([row(0, 1, 2), row(1, deps=1), row(2, 3, deps=1), row(3, deps=1)], max_parallel=1)
    assert claim_limited(desk, run, 0)[0] == [0]
    (step,) = desk.store.owned(desk.worker)
    advance = desk.end(step, keep=ClaimCapacity(9, 9, 9))
    assert advance.mine == []
    assert sorted(rows_of(advance.ready)) == [1, 2]


def test_what_comes_from_the_backlog_is_counted_too(desk: Desk) -> None:
    run = desk.create([row(number) for number in range(3)], max_parallel=1)
    heads = [head for head, _ in desk.store.overdue(home="", all_ready=True)[0]]
    desk.store.enqueue(heads, "team")
    advance = desk.store.claim_and_finish(desk.worker, ClaimCapacity(0, 9, 9), claims=[1])
    assert (advance.mine, len(advance.counted)) == ([], 3)
    assert desk.waiting() == []
    assert all(desk.step(run, number).due is not None for number in range(3))  # not lost if this process dies now


def test_a_suspect_is_claimed_where_it_is_asked_for(desk: Desk) -> None:
    run = desk.create([row(0)], max_parallel=1)
    for _ in range(2):
        claim_limited(desk, run, 0, suspects=True)
        elapse(desk.store, 100)
        desk.store.reap(home="")
        desk.worker = desk.register()
    assert counted(desk, run, 0) == []
    assert claim_limited(desk, run, 0) == ([], [0], [])
    assert len(counted(desk, run, 0, suspects=True)) == 1
    assert claim_limited(desk, run, 0, suspects=True)[0] == [0]


def test_a_stopped_run_leaves_nothing_behind(desk: Desk) -> None:
    run = desk.create([*(row(number, 3) for number in range(3)), row(3, deps=3, weight=Weight.INLINE)], max_parallel=1)
    claim_limited(desk, run, 0, 1, 2)
    desk.store.stop(run, gate=3, keeps=frozenset({3}), error=None, reason="cancelled")
    assert claim_limited(desk, run) == ([], [], [])
    end(desk, run, 0)
    (gate,) = desk.claim(run, 3)
    done = Finish(gate, Result(S.SUCCEEDED, finished_at=NOW))
    desk.store.finish_run(desk.worker, done, status=RunStatus.CANCELLED, outputs=None, error=None)
    assert desk.all(held_steps) == desk.all(run_slots) == []


def test_workers_that_race_keep_to_it_and_end_all(desks: tuple[Desk, Desk]) -> None:
    """Eight threads on two processes' stores; steps of two runs, each with its own limit."""
    limits = {desks[0].create([row(number) for number in range(40)], max_parallel=most): most for most in (1, 3)}
    seen: list[bool] = []

    def work(desk: Desk, seed: int) -> None:
        chance = random.Random(seed)
        worker = desk.register()
        mine: list[Any] = []
        for _ in range(60):
            run = chance.choice(list(limits))
            some = ids(run, *(chance.randrange(40) for _ in range(3)))
            advance = desk.store.claim_and_finish(worker, ClaimCapacity(0), claims=some)
            mine += desk.store.claim_limited(worker, run, advance.counted, free=chance.randint(0, 3)).mine
            seen.append(running(desk, run) <= limits[run])
            if mine and chance.random() < 0.9:
                step = mine.pop(chance.randrange(len(mine)))
                desk.store.claim_and_finish(
                    worker, ClaimCapacity(0), finishes=[Finish(step, Result(S.SUCCEEDED, finished_at=NOW))]
                )
        desk.store.claim_and_finish(
            worker, ClaimCapacity(0), finishes=[Finish(step, Result(S.SUCCEEDED, finished_at=NOW)) for step in mine]
        )

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, desks[seed % 2], seed) for seed in range(8)]:
            future.result(60)
    assert all(seen)
    desk = desks[0]
    for run in limits:
        for _ in range(200):
            left = [number for number, status in desk.statuses(run).items() if status is S.READY]
            if not left:
                break
            desk.end(*desk.store.claim_limited(desk.worker, run, ids(run, *left), free=9).mine)
        assert set(desk.statuses(run).values()) == {S.SUCCEEDED}
        assert held(desk, run) == []


def running(desk: Desk, run: int) -> int:
    query = select(func.count()).where(
        steps.c.id >= step_id(run, 0), steps.c.id < step_id(run + 1, 0), steps.c.status == int(S.RUNNING)
    )
    with desk.store.database.read() as connection:
        return int(connection.scalar(query) or 0)
