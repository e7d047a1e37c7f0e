"""The sweep: what counts as lost, what does not, and what it does about it.  Time is moved by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gorgon_common.engine import control
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import ClaimCapacity, Renewal, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.engine.sweep import INTERVAL, LEASE, MARGIN, QUIET, QUIET_LEASE, STEADY_SECONDS, TIDY_SECONDS, Sweep
from gorgon_common.engine.worker_loop import TIMER_SECONDS
from gorgon_common.errors import Conflict, Final, Throttled, Unavailable
from gorgon_common.scope import SYSTEM
from gorgon_common.workflow.plan import Plan
from tests.support.engine import NOTHING, OPENAI, Desk, agent, plan_of
from tests.support.fleet import Fleet, Post, Process, fleet

S = StepStatus


class Hands:
    """A clock that a test moves, for the sweeps and for the database alike."""

    def __init__(self, made: Fleet) -> None:
        self.made = made
        self.now = made.store.database.now().timestamp()

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.made.elapse(seconds)


def step(name: str, *after: int, **fields: Any) -> Any:
    return agent(name, *after, **{"spec": {"provider": "openai", "model": "gpt-test", "prompt": "go"}, **fields})


@pytest.fixture
def made(sqlite_url: str) -> Iterator[Fleet]:
    with fleet(sqlite_url, 2) as found:
        yield found


@pytest.fixture
def clock(made: Fleet) -> Hands:
    hands = Hands(made)
    for process in made.processes:
        process.sweep._clock = hands
    return hands


@pytest.fixture
def here(made: Fleet, clock: Hands) -> Process:
    return made.processes[0]


def other_message(made: Fleet) -> Post:
    """A message that stands in the queue, so that it is not empty."""
    post = Post([1], "openai", "gorgon.agent")
    made.mailbox.waiting.append(post)
    return post


# What is lost


def test_what_was_sent_a_moment_ago_is_not_lost(made: Fleet, here: Process, clock: Hands) -> None:
    here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    clock.move(4)
    assert here.sweep.once() == 0


def test_a_message_is_lost_if_its_queue_is_empty(made: Fleet, here: Process, clock: Hands) -> None:
    run = here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    clock.move(5.5)
    assert here.sweep.once() == 1
    assert [post.ids for post in made.mailbox.waiting] == [[step_id(run, 0)]]
    clock.move(1)
    assert here.sweep.once() == 0  # it was sent anew just now


def test_a_message_that_stands_in_its_queue_is_slow_not_lost(made: Fleet, here: Process, clock: Hands) -> None:
    here.submit(plan_of(step("a")))
    clock.move(30)
    assert here.sweep.once() == 0
    assert len(made.mailbox.waiting) == 1


def test_a_message_is_lost_if_a_later_one_was_served_some_time_ago(made: Fleet, here: Process, clock: Hands) -> None:
    here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    other_message(made)
    clock.move(6)
    assert here.sweep.once() == 0  # the queue is not empty: who knows
    here.store.heartbeat(here.member, 1e6, {0: clock.now})
    assert here.sweep.once() == 0  # the later one was served only now
    clock.move(5.5)
    assert here.sweep.once() == 1


def test_an_earlier_one_that_was_served_proves_nothing(made: Fleet, here: Process, clock: Hands) -> None:
    here.store.heartbeat(here.member, 1e6, {0: clock.now - 10})
    here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    other_message(made)
    for _ in range(4):
        clock.move(6)
        assert here.sweep.once() == 0


def test_everything_is_lost_if_the_broker_has_lost_its_memory(made: Fleet, here: Process, clock: Hands) -> None:
    here.sweep.once()
    run = here.submit(plan_of(step("a"), step("b")))
    made.mailbox.waiting.clear()
    made.mailbox.mark = "another epoch"
    other_message(made)
    assert here.sweep.once() == 2
    assert sorted(key for post in made.mailbox.waiting[1:] for key in post.ids) == [step_id(run, 0), step_id(run, 1)]
    assert here.sweep.once() == 0


def test_a_message_is_lost_after_a_minute_whatever_the_queue_looks_like(
    made: Fleet, here: Process, clock: Hands
) -> None:
    here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    other_message(made)
    clock.move(59)
    assert here.sweep.once() == 0
    clock.move(7)
    assert here.sweep.once() == 1


def test_nothing_is_lost_while_the_broker_is_away(made: Fleet, here: Process, clock: Hands) -> None:
    here.submit(plan_of(step("a")))
    made.mailbox.away = True
    clock.move(20)
    assert here.sweep.once() == 0
    made.mailbox.away = False
    assert here.sweep.once() == 0


def test_what_a_worker_holds_is_not_lost(made: Fleet, here: Process, clock: Hands) -> None:
    run = here.submit(plan_of(step("a")))
    desk = Desk(made.store)
    desk.one(run, 0, worker=here.member)
    made.mailbox.waiting.clear()
    clock.move(30)
    assert here.sweep.once() == 0


# Who sweeps


def test_one_sweeps_at_a_time(made: Fleet, here: Process, clock: Hands) -> None:
    other = made.processes[1]
    here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    clock.move(5.5)
    assert here.store.lead(f"sweep:sandbox:{here.home}", "somebody", 5)
    assert (here.sweep.once(), other.sweep.once()) == (0, 0)
    clock.move(5.5)
    assert sorted([here.sweep.once(), other.sweep.once()]) == [0, 1]


def test_a_sweep_that_fails_is_made_again(made: Fleet, here: Process, clock: Hands) -> None:
    """Its thread must live."""
    calls = []

    def breaks() -> float:
        calls.append(len(calls))
        if len(calls) == 3:
            here.sweep._stop.set()
        raise Unavailable("away") if len(calls) == 1 else RuntimeError("a fault of ours")

    here.sweep.look = breaks  # type: ignore[method-assign]
    here.sweep._stop.wait = lambda _=None: here.sweep._stop.is_set()  # type: ignore[method-assign, assignment]
    here.sweep._forever()
    assert calls == [0, 1, 2]


# The dead, the waiting, the late


def test_what_the_dead_held_goes_out_one_to_a_message(made: Fleet, here: Process, clock: Hands) -> None:
    run = here.submit(plan_of(*[step(f"s{number}") for number in range(4)]))
    made.mailbox.waiting.clear()
    desk = Desk(made.store)
    desk.claim(run, 0, 1, 2, 3, worker=desk.register(lease=5))
    clock.move(6)
    here.sweep.once()
    assert sorted(post.ids for post in made.mailbox.waiting) == [[step_id(run, number)] for number in range(4)]


def test_a_process_that_was_suspended_lives(sqlite_url: str) -> None:
    """It sweeps first when it wakes up, with its lease run out: it must not take its own steps back."""
    with fleet(sqlite_url, home="laptop", lease=5) as made:
        (here,) = made.processes
        here.sweep.worker = here.member.owner
        here.sweep.renew = lambda: renewed.append(here.store.heartbeat(here.member, 5, {}))
        renewed: list[Any] = []
        run = here.submit(plan_of(step("a")))
        held = here.store.claim_and_finish(here.member, NOTHING, claims=[step_id(run, 0)]).mine
        made.elapse(60)
        here.sweep.once()
        assert renewed == [Renewal.RENEWED], "before anything was taken for dead"
        here.sweep.renew = lambda: None
        made.elapse(60)
        here.sweep.once()
        assert here.store.owned(here.member) == held
        assert not here.sweep._alien(run), "nor does it end its own runs"


def test_sleepers_are_woken(made: Fleet, here: Process, clock: Hands) -> None:
    run = here.submit(plan_of(step("a")))
    made.mailbox.waiting.clear()
    desk = Desk(made.store)
    held = desk.one(run, 0, worker=here.member)
    made.store.park(held, Snoozed(seconds=20, reason="retry", message="busy", calls=(), attempt=True))
    clock.move(19)
    here.sweep.once()
    assert made.mailbox.waiting == []
    clock.move(2)
    here.sweep.once()
    assert [post.ids for post in made.mailbox.waiting] == [[step_id(run, 0)]]


def test_a_run_that_is_out_of_time_fails_and_says_so(made: Fleet, here: Process, clock: Hands) -> None:
    run = here.submit(plan_of(step("a"), step("b", 0), limits={"timeout": 30}))
    made.mailbox.waiting.clear()
    clock.move(29)
    here.sweep.once()
    assert made.statuses(run)[0] is S.READY
    clock.move(2)
    made.mailbox.waiting.clear()
    here.sweep.once()
    made.drain()
    assert made.status(run) is RunStatus.FAILED
    error, cancelled = made.store.failure(run)
    assert error is not None
    assert (error["kind"], cancelled) == ("timeout", False)
    assert "longer than its limit of 30 s" in error["message"]
    assert set(made.statuses(run).values()) == {S.CANCELLED, S.SUCCEEDED}


def test_the_backlog_is_refilled(made: Fleet, here: Process, clock: Hands) -> None:
    here.submit(plan_of(*[step(f"s{number}") for number in range(70)]))
    made.mailbox.waiting.clear()
    assert made.store.shelved() == {0: 6}
    here.sweep.once()
    assert made.store.shelved() == {}
    assert len(made.mailbox.waiting) == 6


# Control


def cancelled(made: Fleet, here: Process, run: int) -> None:
    control.cancel(made.store, here.publisher, here.knowledge.run(run))


def test_a_cancel_runs_only_the_final_steps(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(step("a"), step("b", 0), step("last", phase="finally")))
    cancelled(made, here, run)
    made.drain()
    assert made.status(run) is RunStatus.CANCELLED
    assert made.provider.calls == ["last"]
    with pytest.raises(Conflict, match="already been cancelled"):
        cancelled(made, here, run)


def test_steps_for_errors_are_skipped_after_a_cancel(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(step("a"), step("mend", phase="on_error")))
    cancelled(made, here, run)
    made.drain()
    assert made.provider.calls == []
    assert made.statuses(run)[1] is S.SKIPPED


def resumed(made: Fleet, here: Process, before: int, plan: Plan) -> tuple[int, int, int]:
    return control.resume(
        made.store,
        here.knowledge,
        here.knowledge.run(before),
        plan,
        scope=SYSTEM,
        publisher=here.publisher,
        public_id=f"run_again{before}",
        now=made.store.database.now(),
        home="",
        grouped=frozenset(),
    )


def test_a_resume_pays_for_nothing_twice(made: Fleet, here: Process) -> None:
    fails = [True]

    def flaky(call: Any) -> str:
        if fails:
            raise Final("boom")
        return "mended"

    made.provider.behaves["flaky"] = flaky
    plan = plan_of(step("a"), step("b", 0, spec={"provider": "openai", "model": "gpt-test", "prompt": "flaky"}))
    run = here.submit(plan)
    made.drain()
    assert made.status(run) is RunStatus.FAILED
    fails.clear()
    again, reused, left = resumed(made, here, run, plan)
    made.drain()
    assert (reused, left) == (1, 1)
    assert made.status(again) is RunStatus.SUCCEEDED
    assert made.provider.calls == ["a", "b", "b"]
    assert made.store.info(again).root == run


def test_a_run_that_failed_by_poison_can_be_resumed(made: Fleet, here: Process, clock: Hands) -> None:
    """The machine was at fault, and has been mended: the step begins with a clean record."""
    plan = plan_of(step("a"), step("b", 0))
    run = here.submit(plan)
    here.machine.worker.queues.remove(OPENAI)  # `b` needs a message
    here.serve(made.mailbox.take())
    here.machine.worker.queues.append(OPENAI)
    desk = Desk(made.store)
    for _ in range(3):
        made.store.claim_and_finish(desk.register(lease=5), NOTHING, claims=[step_id(run, 1)], suspects=True)
        clock.move(6)
        made.store.reap(home="")
    made.mailbox.waiting.clear()
    clock.move(6)
    here.sweep.once()
    made.drain()
    assert made.status(run) is RunStatus.FAILED
    error, _ = made.store.failure(run)
    assert error is not None
    assert (error["kind"], "runs resume" in error["hint"]) == ("poison", True)
    again, reused, left = resumed(made, here, run, plan)
    made.drain()
    assert made.status(again) is RunStatus.SUCCEEDED
    assert (reused, left, made.provider.calls) == (1, 1, ["a", "b"])


def test_a_run_that_is_going_on_cannot_be_resumed(made: Fleet, here: Process) -> None:
    plan = plan_of(step("a"))
    run = here.submit(plan)
    with pytest.raises(Conflict, match="has not ended yet"):
        resumed(made, here, run, plan)


def test_a_changed_step_and_what_comes_after_it_are_run_anew(made: Fleet, here: Process) -> None:
    plan = plan_of(step("a"), step("b", 0))
    run = here.submit(plan)
    made.drain()
    edited = plan_of(step("a"), step("b", 0, spec={"provider": "openai", "model": "gpt-test", "prompt": "other"}))
    again, reused, left = resumed(made, here, run, edited)
    made.drain()
    assert (reused, left) == (1, 1)
    assert made.status(again) is RunStatus.SUCCEEDED
    assert made.provider.calls == ["a", "b", "b"]


# How often


def test_it_looks_seldom_while_there_is_nothing_to_do(made: Fleet, here: Process, clock: Hands) -> None:
    here.sweep.look()  # the first one tidies up
    assert here.sweep.look() == QUIET
    run = here.submit(plan_of(step("a")))
    assert here.sweep.look() == INTERVAL, "a step is ready"
    made.drain()
    assert made.status(run) is RunStatus.SUCCEEDED
    assert here.sweep.look() == LEASE - MARGIN, "it has to renew a short lease"
    assert here.sweep.look() == QUIET


def test_a_wait_that_no_timer_ends_is_never_seen_too_late() -> None:
    assert QUIET <= TIMER_SECONDS


def test_the_lead_is_kept_through_a_quiet_time(made: Fleet, here: Process, clock: Hands) -> None:
    second = made.processes[1].sweep
    for _ in range(3):
        for busy in (True, False, False):
            run = here.submit(plan_of(step("a"))) if busy else None
            pause = here.sweep.look()
            assert second.look() > 0
            assert here.sweep._leading
            assert not second._leading
            clock.move(pause)
            if run is not None:
                made.drain()


def passes(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the time of each pass."""
    found: list[float] = []
    whole = sweep._pass

    def counted() -> int:
        found.append(sweep._clock())
        return whole()

    monkeypatch.setattr(sweep, "_pass", counted)
    return found


def look_for(sweep: Sweep, clock: Hands, seconds: float) -> None:
    """Let the sweep look for so long, as often as it says itself."""
    until = clock.now + seconds
    while clock.now < until:
        clock.move(sweep.look())


def test_a_pass_is_made_where_something_is_wrong_and_seldom_else(
    made: Fleet, here: Process, clock: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_at = passes(here.sweep, monkeypatch)
    look_for(here.sweep, clock, 120)
    assert len(made_at) <= 1 + 120 / TIDY_SECONDS, "nothing is under way"
    run = here.submit(plan_of(step("a")))
    (running,) = here.store.claim_and_finish(here.member, ClaimCapacity(0, 0, 0), claims=[step_id(run, 0)]).mine
    made.mailbox.waiting.clear()
    before = len(made_at)
    look_for(here.sweep, clock, 60)
    assert 10 <= len(made_at) - before <= 60 / STEADY_SECONDS + 1, "a step runs on a worker that lives"
    assert made.statuses(run)[0] is StepStatus.RUNNING
    here.store.vacate("")
    before = len(made_at)
    clock.move(here.sweep.look())
    assert len(made_at) == before + 1
    assert made.statuses(run)[0] is StepStatus.READY, "its worker has died: that is seen at the next look"
    assert running.id == step_id(run, 0)


def test_it_looks_again_when_a_waiting_step_is_due(made: Fleet, here: Process, clock: Hands) -> None:
    def wait(_: object) -> str:
        raise Throttled("wait", seconds=60.0, reason="requests", until=0.0)

    made.provider.behaves["go"] = wait
    run = here.submit(plan_of(step("a")))
    made.drain()
    assert made.statuses(run)[0] is StepStatus.WAITING
    here.sweep.look()
    assert here.sweep.look() == QUIET
    clock.move(58)
    here.sweep.look()
    assert INTERVAL < here.sweep.look() <= 2.0
    made.provider.behaves["go"] = "done"
    clock.move(2.1)
    here.sweep.look()
    made.drain()
    assert made.status(run) is RunStatus.SUCCEEDED


def test_the_second_one_waits_until_the_lease_of_the_first_is_over(made: Fleet, here: Process, clock: Hands) -> None:
    second = made.processes[1].sweep
    here.sweep.look()
    first = second.look()
    assert first <= LEASE
    clock.move(2)
    assert second.look() <= max(INTERVAL, first - 2)
    clock.move(QUIET_LEASE)
    second.look()
    here.sweep.look()
    assert here.sweep.look() > INTERVAL, "it was too late, and has lost the lead"
