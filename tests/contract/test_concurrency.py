"""Concurrency keys, over SQLite and PostgreSQL: never more runs than a key lets in, and none forgotten."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.dialects import postgresql

from gorgon_common.application.explanations import key_worded
from gorgon_common.engine.records import Finish, KeyRequest, Result, RunClosed, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import Conflict, KeyTaken
from gorgon_common.ids import new_id
from gorgon_common.persistence import concurrency
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.queries.keys import waits_for
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import concurrency_keys, concurrency_places, plans, runs, steps
from tests.support import servers
from tests.support.engine import NOW, Desk, elapse, new_run, row, rows_of

S = StepStatus
ROOT = Path(__file__).parents[2]
GATE, KEEPS = 1, frozenset({1})


@pytest.fixture
def desk(desks: tuple[Desk, Desk]) -> Desk:
    return desks[0]


def submit(desk: Desk, key: str = "k", most: int = 1, on_conflict: str = "queue", **fields: Any) -> int:
    """Create a run of one step and its gate; row 1 is kept for the end, as the engine's own are."""
    hold = KeyRequest(key, most, on_conflict)
    values = {"home": desk.home, "target": desk.target, "hold": hold, **fields}
    run, created = desk.store.create(new_run(**values), [row(0, 1), row(1, deps=1)])
    assert created or "idempotency_key" in fields
    return run


def holds(desk: Desk, run: int) -> bool:
    return desk.store.admission(run).holds


def finish(desk: Desk, run: int, status: RunStatus = RunStatus.SUCCEEDED) -> list[int]:
    """Work a run off; returns the runs whose first steps are owed a message then."""
    if first := desk.claim(run, 0):
        desk.store.begin(run)
        desk.end(*first)
    (gate,) = desk.claim(run, 1)
    answer = desk.store.finish_run(
        desk.worker, Finish(gate, Result(S.SUCCEEDED, finished_at=NOW)), status=status, outputs=None, error=None
    )
    assert isinstance(answer, RunClosed)
    heads = answer.ready
    assert all(entry == 0 for entry in rows_of(heads))
    return [head.id >> 20 for head in heads]


def stop(desk: Desk, run: int) -> Any:
    return desk.store.stop(run, gate=GATE, keeps=KEEPS, error=None, reason="the run was cancelled")


def places(desk: Desk) -> dict[int, concurrency.Place]:
    return {entry.run_id: concurrency.Place(entry.state) for entry in desk.all(concurrency_places)}


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at the same time; returns what each gave, or its Conflict."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[], Any]) -> Any:
        barrier.wait(10)
        try:
            return call()
        except Conflict as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


# Waiting


def test_a_second_run_waits_and_nothing_of_it_moves(desk: Desk) -> None:
    first, second = submit(desk, timeout=60), submit(desk, timeout=60)
    assert holds(desk, first)
    assert not holds(desk, second)
    stored = desk.run(second)
    assert (stored.status, stored.active, stored.deadline, stored.key_at) == (RunStatus.QUEUED, False, None, None)
    assert desk.run(first).deadline is not None
    assert desk.claim(second, 0) == []
    elapse(desk.store, 3600)
    late, sleepers = desk.store.overdue(home="", all_ready=True)
    assert {head.id >> 20 for head, _ in late} == {first}
    assert sleepers == []
    assert desk.store.expired_runs(home="") == [first]  # time that a run waits for its key is not its own
    desk.store.begin(second)
    assert desk.run_status(second) is RunStatus.QUEUED


def test_who_ends_lets_the_next_one_in(desk: Desk) -> None:
    first, second, third = (submit(desk, timeout=60) for _ in range(3))
    assert finish(desk, first) == [second]
    assert holds(desk, second)
    assert not holds(desk, third)
    stored = desk.run(second)
    assert stored.active
    assert stored.deadline is not None
    assert stored.key_at is not None
    assert "run.admitted" in desk.kinds(second)
    assert finish(desk, second, RunStatus.FAILED) == [third]
    assert finish(desk, third) == []
    assert desk.all(concurrency_keys) == desk.all(concurrency_places) == []


def test_as_many_hold_it_as_may(desk: Desk) -> None:
    made = [submit(desk, most=2) for _ in range(4)]
    assert [holds(desk, run) for run in made] == [True, True, False, False]
    assert finish(desk, made[1]) == [made[2]]
    assert finish(desk, made[0]) == [made[3]]


def test_nobody_overtakes_even_where_more_would_fit(desk: Desk) -> None:
    one, two, three = submit(desk, most=1), submit(desk, most=1), submit(desk, most=5)
    assert not holds(desk, three)  # two came first and may not share
    assert finish(desk, one) == [two, three]


def test_a_key_is_one_for_all_workflows_and_another_in_each_target_and_org(desk: Desk) -> None:
    assert holds(desk, submit(desk))
    assert not holds(desk, submit(desk, workflow="another"))
    assert holds(desk, submit(desk, key="K"))
    assert holds(desk, submit(desk, target="live"))
    assert holds(desk, submit(desk, org=2))


def test_long_and_odd_keys(desk: Desk) -> None:
    long = "a" * 5000
    assert holds(desk, submit(desk, key=long + "1"))
    assert holds(desk, submit(desk, key=long + "2"))
    assert holds(desk, submit(desk, key="\x00'%s{}\ud800é"))
    assert not holds(desk, submit(desk, key=long + "1"))
    assert max(len(entry.shown) for entry in desk.all(concurrency_keys)) == 200


def test_a_cancelled_holder_keeps_its_key_until_it_has_ended(desk: Desk) -> None:
    first, second = submit(desk), submit(desk)
    (step,) = desk.claim(first, 0)
    stop(desk, first)
    assert not holds(desk, second)
    desk.end(step, status=S.CANCELLED)
    assert finish(desk, first, RunStatus.CANCELLED) == [second]


def test_a_waiting_run_that_is_cancelled_ends_at_once(desk: Desk) -> None:
    first, second, third = (submit(desk) for _ in range(3))
    assert stop(desk, second) == []
    assert desk.run_status(second) is RunStatus.CANCELLED
    assert set(desk.statuses(second).values()) == {S.CANCELLED}
    assert desk.kinds(second)[-1] == "run.cancelled"
    with pytest.raises(Conflict):
        stop(desk, second)
    assert finish(desk, first) == [third]
    assert places(desk) == {third: concurrency.Place.HOLDS}


def test_a_run_of_another_home_is_left_to_the_sweep_of_its_home(desk: Desk) -> None:
    laptop = desk.register(home="laptop")
    first, second = submit(desk), submit(desk, home="laptop")
    assert finish(desk, first) == []
    assert places(desk)[second] is concurrency.Place.OWED
    assert holds(desk, second) is False
    assert desk.store.turns(home="", target="sandbox") == []
    (turn,) = desk.store.turns(home="laptop", target="sandbox")
    assert turn.ready
    (head,) = desk.store.take_turn(turn.key, home="laptop")
    assert head.id == step_id(second, 0)
    assert desk.store.take_turn(turn.key, home="laptop") == []
    assert len(desk.claim(second, 0, worker=laptop)) == 1


# Refusing


def test_a_run_that_may_not_wait_is_refused_and_leaves_nothing(desk: Desk) -> None:
    first = submit(desk, public_id="run_first")
    before = [len(desk.all(table)) for table in (runs, steps, plans, concurrency_keys, concurrency_places)]
    with pytest.raises(KeyTaken) as refused:
        submit(desk, on_conflict="reject")
    assert "run_first" in refused.value.message
    assert "gorgon runs cancel run_first" in refused.value.hint
    assert (refused.value.key, refused.value.held_by, refused.value.numbers) == ("k", ["run_first"], [first])
    assert [len(desk.all(table)) for table in (runs, steps, plans, concurrency_keys, concurrency_places)] == before
    finish(desk, first)
    assert holds(desk, submit(desk, on_conflict="reject"))


def test_the_same_idempotency_key_gives_the_same_run_whatever_is_held(desk: Desk) -> None:
    fields = {"on_conflict": "reject", "idempotency_key": "i", "request_hash": "h"}
    run = submit(desk, **fields)
    assert submit(desk, **fields) == run
    assert submit(desk, on_conflict="queue", idempotency_key="i", request_hash="h") == run
    with pytest.raises(Conflict):
        submit(desk, idempotency_key="i", request_hash="another")


def test_one_idempotency_key_at_once_is_one_run_and_refuses_nobody(desks: tuple[Desk, Desk]) -> None:
    fields = {"on_conflict": "reject", "idempotency_key": "i", "request_hash": "h"}
    made = together(*(partial(submit, desk, **fields) for desk in desks * 4))
    assert len(set(made)) == 1, made


# Cancelling what runs


def test_a_newer_run_cancels_the_holder_and_starts_when_that_has_ended(desk: Desk) -> None:
    first = submit(desk)
    second = submit(desk, on_conflict="cancel_running")
    assert desk.store.admission(second).evict == [first]
    (turn,) = desk.store.turns(home="", target="sandbox")
    assert (turn.ready, turn.evict, turn.dead) == (False, [first], [])
    stop(desk, first)
    assert desk.store.admission(second).evict == []
    assert desk.store.turns(home="", target="sandbox") == []
    assert not holds(desk, second)
    assert finish(desk, first, RunStatus.CANCELLED) == [second]


def test_of_several_that_wait_only_the_newest_stays(desk: Desk) -> None:
    first, plain, second = submit(desk), submit(desk), submit(desk, on_conflict="cancel_running")
    third = submit(desk, on_conflict="cancel_running", public_id="run_third")
    assert [desk.run_status(run) for run in (plain, second)] == [RunStatus.CANCELLED] * 2
    assert desk.store.admission(third).evict == [first]
    assert finish(desk, first) == [third]


def test_room_for_two_means_two_stay(desk: Desk) -> None:
    made = [submit(desk, most=2, on_conflict="cancel_running") for _ in range(2)]
    third = submit(desk, most=2, on_conflict="cancel_running")
    assert desk.store.admission(third).evict == [made[0]]  # the oldest goes, the other fits beside it
    fourth = submit(desk, most=2, on_conflict="cancel_running")
    assert desk.store.admission(fourth).evict == made
    fifth = submit(desk, most=2, on_conflict="cancel_running")
    assert desk.run_status(third) is RunStatus.CANCELLED
    assert finish(desk, made[0]) == [fourth]
    assert finish(desk, made[1]) == [fifth]


def test_who_waits_behind_a_newer_run_makes_it_cancel_no_more(desk: Desk) -> None:
    first, second = submit(desk, most=2), submit(desk, most=2)
    newer = submit(desk, most=2, on_conflict="cancel_running")
    submit(desk, most=2)
    (turn,) = desk.store.turns(home="", target="sandbox")
    assert turn.evict == desk.store.admission(newer).evict == [first]
    assert holds(desk, second)


# Runs of processes that died


def test_a_dead_process_does_not_keep_its_key(desk: Desk) -> None:
    desk.register(home="laptop", lease=5)
    first, second = submit(desk, home="laptop"), submit(desk)
    assert desk.store.turns(home="", target="sandbox") == []
    elapse(desk.store, 10)
    assert desk.store.orphaned(first)
    (turn,) = desk.store.turns(home="", target="sandbox")
    assert turn.dead == [first]
    desk.store.close_orphan(first)
    assert desk.run_status(first) is RunStatus.FAILED
    (turn,) = desk.store.turns(home="", target="sandbox")
    assert turn.ready
    assert [head.id >> 20 for head in desk.store.take_turn(turn.key, home="")] == [second]
    assert desk.store.turns(home="", target="sandbox") == []


def test_a_dead_process_that_waited_blocks_nobody(desk: Desk) -> None:
    desk.register(home="laptop", lease=5)
    first, dead, third = submit(desk), submit(desk, home="laptop"), submit(desk)
    elapse(desk.store, 10)
    (turn,) = desk.store.turns(home="", target="sandbox")
    assert turn.dead == [dead]
    desk.store.close_orphan(dead)
    assert desk.run_status(dead) is RunStatus.FAILED
    assert finish(desk, first) == [third]


# Looking


def test_what_a_run_waits_for_is_told(desk: Desk) -> None:
    def told(run: int) -> Any:
        with desk.store.database.read() as connection:
            return key_worded(waits_for(connection, desk.run(run)))

    first = submit(desk, public_id="run_first", workflow="deploy")
    second, third = submit(desk), submit(desk)
    assert told(first) is None
    found = told(third)
    assert (found["key"], found["max"], found["ahead"]) == ("k", 1, 1)
    assert [holder["run_id"] for holder in found["held_by"]] == ["run_first"]
    assert "held by run_first (deploy) since 20" in found["what"]
    assert found["what"].endswith("1 run is ahead of it")
    stop(desk, second)
    assert told(second) is None
    assert told(third)["ahead"] == 0


# Races


def test_many_at_once_and_as_many_hold_it_as_may(desks: tuple[Desk, Desk]) -> None:
    made = together(*(partial(submit, desk, most=3) for desk in desks * 8))
    held = [run for run in made if holds(desks[0], run)]
    assert len(held) == 3
    assert sorted(held) == sorted(made)[:3]


def test_many_that_may_not_wait_at_once(desks: tuple[Desk, Desk]) -> None:
    made = together(*(partial(submit, desk, most=2, on_conflict="reject") for desk in desks * 6))
    assert sum(isinstance(entry, int) for entry in made) == 2
    assert sum(isinstance(entry, KeyTaken) for entry in made) == 10


def test_submit_and_end_at_once_forget_nobody(desks: tuple[Desk, Desk]) -> None:
    for _ in range(15):
        first = submit(desks[0])
        promoted, second = together(partial(finish, desks[0], first), partial(submit, desks[1]))
        assert holds(desks[0], second)
        assert promoted in ([], [second])
        assert finish(desks[0], second) == []
    assert desks[0].all(concurrency_keys) == []


def test_cancel_and_promotion_at_once_lose_nobody(desks: tuple[Desk, Desk]) -> None:
    for _ in range(15):
        first, second, third = (submit(desks[0]) for _ in range(3))
        promoted, _ = together(partial(finish, desks[0], first), partial(stop, desks[1], second))
        if promoted == [second]:  # it was cancelled as a holder, or before it was let in
            assert desks[0].run_status(second) is RunStatus.FINISHING
            assert finish(desks[0], second, RunStatus.CANCELLED) == [third]
        else:
            assert promoted == [third]
            assert desks[0].run_status(second) is RunStatus.CANCELLED
        finish(desks[0], third)
    assert desks[0].all(concurrency_places) == []


def test_newer_ones_at_once_leave_one(desks: tuple[Desk, Desk]) -> None:
    first = submit(desks[0])
    made = together(*(partial(submit, desk, on_conflict="cancel_running") for desk in desks * 6))
    assert all(isinstance(run, int) for run in made), made
    waiting = [run for run in made if desks[0].run_status(run) is RunStatus.QUEUED]
    assert waiting == [max(made)]
    assert finish(desks[0], first) == waiting


# Several processes, and what becomes of it without the lock

MOST = 2
CHILD = """
import sys
from gorgon_common.persistence import concurrency
from tests.contract import test_concurrency as own

url, how, seed = sys.argv[1:]
if how == "naive":
    concurrency.lock = own.naive
own.work(url, int(seed))
"""


def naive(connection: Any, new: Any, hold: KeyRequest) -> int:
    """What locks nothing: the key is looked up, and made where it is not there."""
    values = {"target": new.target, "digest": hold.key, "shown": hold.key}
    connection.execute(postgresql.insert(concurrency_keys).values(values).on_conflict_do_nothing())
    found = select(concurrency_keys.c.id).where(concurrency_keys.c.shown == hold.key)
    return int(connection.execute(found).scalar_one())


def work(url: str, seed: int, rounds: int = 20) -> None:
    """One process: submits runs of one key, works off and cancels what it finds; says how many it saw at once."""
    chance = random.Random(seed)
    desk = Desk(Store(Database(url)))
    most = 0
    for _ in range(rounds):
        with contextlib.suppress(KeyTaken):
            submit(desk, most=MOST, on_conflict=chance.choice(["queue", "reject"]), public_id=new_id("run"))
        most = max(most, len(going(desk)))
        found = unfinished(desk)
        for run in chance.sample(found, min(2, len(found))):
            attempt(desk, run, cancels=chance.random() < 0.2)
            most = max(most, len(going(desk)))
    sys.stdout.write(f"{most}\n")


def attempt(desk: Desk, run: int, *, cancels: bool = False) -> None:
    """Cancel a run, or work it off; it may wait, or another process may be faster."""
    with contextlib.suppress(Conflict, ValueError):
        if cancels:
            stop(desk, run)
        else:
            finish(desk, run)


def going(desk: Desk) -> list[int]:
    """Return the runs that workers may take steps of."""
    return [entry.id for entry in desk.all(runs, runs.c.active, runs.c.status < int(RunStatus.SUCCEEDED))]


def unfinished(desk: Desk) -> list[int]:
    return [entry.id for entry in desk.all(runs, runs.c.status < int(RunStatus.SUCCEEDED))]


def processes(url: str, how: str) -> int:
    """Return the most runs that any of four processes saw at once.

    Without the lock a process may also find that the row of the key is gone; that counts as one run too many.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GORGON_")}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, url, how, str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=kept,
            cwd=ROOT,
        )
        for seed in range(4)
    ]
    said = [child.communicate(timeout=120) for child in children]
    if how == "naive" and any("NoResultFound" in error for _, error in said):
        return MOST + 1
    assert [child.returncode for child in children] == [0] * 4, [error[-2000:] for _, error in said]
    return max(int(out) for out, _ in said)


def test_processes_that_submit_end_and_cancel_keep_to_the_key(desk: Desk) -> None:
    url = desk.store.database.engine.url.render_as_string(hide_password=False)
    assert processes(url, "locked") <= MOST
    for _ in range(400):
        for run in going(desk):
            attempt(desk, run)
        if not unfinished(desk):
            break
    assert unfinished(desk) == []  # nobody was forgotten
    assert desk.all(concurrency_places) == []


def test_without_the_lock_the_same_processes_break_it(postgres_admin: str) -> None:
    """The negative control: SQLite has one writer anyway."""
    with servers.fresh_database(postgres_admin) as url:
        assert any(processes(url, "naive") > MOST for _ in range(5))
