"""The machine on a real store: what it takes, what it gives back, and what it survives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gorgon_common.engine.context import RunCache
from gorgon_common.engine.outcomes import ConditionMet, Done, Expanded, Failed, Outcome, RunFinished, Snoozed
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import (
    ClaimCapacity,
    Claimed,
    Finish,
    ReadyStep,
    Result,
    TransitionResult,
    Weight,
    step_id,
)
from gorgon_common.engine.slots import ReadyQueue
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.engine.worker_loop import Job, StepRunner
from gorgon_common.errors import GorgonError, Unavailable
from gorgon_common.persistence.store import Store
from gorgon_common.workflow.plan import Kind, Plan
from tests.support.engine import Desk, agent, elapse, make_run, node, open_store, plan_of, row
from tests.support.fleet import Counted, Mailbox

S = StepStatus
DONE = Done(Result(S.SUCCEEDED, "done"))


@dataclass
class Hand:
    """Executes as the test says: `does[node]` is an outcome, or is called with the step."""

    does: dict[int, Any] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    at_once: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def execute(self, step: Claimed) -> Outcome:
        with self.lock:
            self.seen.append(step.row)
            self.at_once += step.weight == Weight.SLOW
            self.most = max(self.most, self.at_once)
        try:
            found = self.does.get(step.node, DONE)
            return found(step) if callable(found) else found
        finally:
            with self.lock:
                self.at_once -= step.weight == Weight.SLOW


@dataclass
class Bench:
    """A machine, and the store under it."""

    store: Store
    slots: int = 4
    naps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.desk = Desk(self.store)
        self.hand = Hand()
        self.mailbox = Mailbox()
        knowledge = RunCache(self.store)
        self.publisher = Publisher(self.store, knowledge, self.mailbox, target="sandbox", home="")
        self.machine = StepRunner(
            self.store,
            knowledge,
            self.desk.worker,
            self.hand,
            self.publisher,
            slots=self.slots,
            sleep=self.naps.append,
            chance=lambda: 0.0,
            next_up=ReadyQueue(self.slots, short=0.0),
        )
        self.machine._pool.shutdown()
        self.pool = self.machine._pool = Counted(self.slots)

    def run(self, plan: Plan) -> int:
        return make_run(self.store, plan)

    def handle(self, run: int, *numbers: int, fast: bool = False) -> None:
        self.machine.handle([step_id(run, number) for number in numbers], fast=fast)
        self.pool.idle()

    def sent(self) -> list[int]:
        return sorted(key & 0xFFFFF for post in self.mailbox.waiting for key in post.ids)

    def resting(self) -> bool:
        """Nothing is held, every slot is free, every request was served."""
        machine = self.machine
        return not machine.held and machine._running == 0 and not machine.commits.waiting


@pytest.fixture
def bench(sqlite_url: str) -> Iterator[Bench]:
    made = Bench(open_store(sqlite_url))
    yield made
    made.machine.close(0)
    made.pool.shutdown()
    made.mailbox.close()
    made.store.close()


def chain(length: int) -> Plan:
    return plan_of(*[agent(f"s{number}", *([number - 1] if number else [])) for number in range(length)])


def wide(width: int, **fields: Any) -> Plan:
    return plan_of(*[agent(f"s{number}", **fields) for number in range(width)])


def ended(step: Claimed) -> RunFinished:
    return RunFinished(Result(S.SUCCEEDED), RunStatus.SUCCEEDED, {"a": 1}, None)


# What a message leads to


def test_a_message_is_over_when_all_that_it_led_to_is(bench: Bench) -> None:
    run = bench.run(chain(5))
    bench.hand.does[7] = ended
    bench.handle(run, 0)
    assert bench.hand.seen == [0, 1, 2, 3, 4, 5, 6, 7]
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED
    assert bench.sent() == []
    assert bench.resting()


def test_a_message_waits_for_steps_that_other_threads_run(bench: Bench) -> None:
    run = bench.run(plan_of(agent("a"), agent("b", 0), agent("c", 0)))
    gate = threading.Event()
    started = threading.Barrier(3)

    def slow(step: Claimed) -> Outcome:
        started.wait(10)
        assert gate.wait(10)
        return DONE

    bench.hand.does.update({1: slow, 2: slow, 5: ended})
    handling = threading.Thread(target=bench.machine.handle, args=([step_id(run, 0)],))
    handling.start()
    started.wait(10)
    assert handling.is_alive()
    gate.set()
    handling.join(10)
    assert not handling.is_alive()
    assert bench.resting()


def test_a_message_for_what_is_not_ready_is_over_at_once(bench: Bench) -> None:
    run = bench.run(chain(2))
    bench.handle(run, 1)
    bench.handle(run + 5, 0)
    assert bench.hand.seen == []
    assert bench.resting()


def test_a_message_that_comes_twice_runs_its_step_once(bench: Bench) -> None:
    run = bench.run(chain(1))
    bench.hand.does[3] = ended
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: bench.machine.handle([step_id(run, 0)]), range(4)))
    assert bench.hand.seen.count(0) == 1


# Slots


def test_slots_are_never_exceeded(bench: Bench) -> None:
    """Eight messages of four steps at once, for a machine of four slots; what finds none comes by the backlog."""
    run = bench.run(wide(32))
    together = threading.Barrier(8)

    def message(place: int) -> None:
        together.wait(10)
        bench.machine.handle([step_id(run, number) for number in range(4 * place, 4 * place + 4)])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(message, range(8)))
    bench.pool.idle()
    assert bench.hand.most <= 4
    left = [entry.step_id & 0xFFFFF for entry in bench.desk.waiting()]
    assert sorted(number for number in bench.hand.seen + left if number < 32) == list(range(32))
    assert bench.resting()


def test_what_follows_takes_free_slots_only(bench: Bench) -> None:
    run = bench.run(plan_of(agent("a"), *[agent(f"b{number}", 0) for number in range(10)]))
    bench.hand.does[0] = lambda step: DONE
    hold = threading.Barrier(4)

    def slow(step: Claimed) -> Outcome:
        hold.wait(10)  # four at a time, or this breaks
        return DONE

    bench.hand.does.update(dict.fromkeys(range(1, 9), slow))
    bench.handle(run, 0)
    assert bench.hand.most == 4
    assert len(bench.hand.seen) == 5
    assert len(bench.sent()) == 6  # a step that ends leads to none of these: the others are messages


def test_short_steps_leave_what_follows_to_the_next_free_slots(bench: Bench) -> None:
    bench.machine.next_up = ReadyQueue(bench.slots, short=1e6)
    run = bench.run(plan_of(agent("a"), *[agent(f"b{number}", 0) for number in range(10)]))
    bench.handle(run, 0)
    assert len(bench.hand.seen) == 1 + 2 * bench.slots  # those that found a slot at once, and as many after them
    assert len(bench.sent()) == 10 - 2 * bench.slots
    assert bench.resting()


def test_steps_that_wait_for_a_slot_are_sent_where_none_becomes_free_by_a_commit(bench: Bench) -> None:
    bench.machine.next_up = ReadyQueue(bench.slots, short=1e6)
    run = bench.run(plan_of(agent("a"), *[agent(f"b{number}", 0) for number in range(6)]))
    bench.hand.does.update(dict.fromkeys(range(1, 5), lambda step: Snoozed(60.0, "requests", "later")))
    bench.handle(run, 0)
    waiting = [number for number, status in bench.desk.statuses(run).items() if status is S.READY]
    assert waiting
    assert set(bench.sent()) >= set(waiting)


def test_with_the_backlog_in_sight_a_free_slot_pulls_from_it(bench: Bench) -> None:
    run, other = bench.run(chain(1)), bench.run(wide(3))
    heads = [ReadyStep(step_id(other, number), number, Weight.SLOW, 0) for number in range(3)]
    bench.store.enqueue(heads, "team")
    bench.machine.backlog_seen = True
    bench.handle(run, 0)
    assert bench.desk.waiting() == []
    assert set(bench.desk.statuses(other).values()) >= {S.SUCCEEDED}
    assert bench.resting()


def test_a_conditional_step_that_finds_no_slot_is_sent_to_its_queue(bench: Bench) -> None:
    run = bench.run(plan_of(agent("a", condition="true")))
    bench.hand.does[0] = ConditionMet()
    bench.machine._running = 4
    bench.handle(run, 0, fast=True)
    assert bench.sent() == [0]
    stored = bench.desk.step(run, 0)
    assert (stored.status, stored.weight) == (S.READY, Weight.SLOW)
    bench.machine._running = 0


def test_a_conditional_step_goes_on_here_if_it_is_ours(bench: Bench) -> None:
    run = bench.run(plan_of(agent("a", condition="true")))
    bench.hand.does.update({0: lambda step: DONE if step.weight == Weight.SLOW else ConditionMet(), 3: ended})
    bench.handle(run, 0, fast=True)
    assert bench.hand.seen[:2] == [0, 0]
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED
    assert bench.resting()


def test_a_conditional_step_of_another_queue_is_sent_there(bench: Bench) -> None:
    run = bench.run(plan_of(agent("a", condition="true", queue="anthropic")))
    bench.hand.does[0] = ConditionMet()
    bench.handle(run, 0, fast=True)
    assert [post.queue for post in bench.mailbox.waiting] == ["anthropic"]


def test_one_slot_is_enough_for_inline_steps_that_lead_to_slow_ones(sqlite_url: str) -> None:
    """A thread of the pool must not wait for work that needs a thread of the pool."""
    bench = Bench(open_store(sqlite_url), slots=1)
    plan = plan_of(agent("a", condition="true"), node("b", kind="checkpoint"), node("c", 1, kind="checkpoint"))
    run = bench.run(plan)
    bench.hand.does.update({0: lambda step: DONE if step.weight == Weight.SLOW else ConditionMet(), 5: ended})
    bench.publisher.here = bench.machine.run_here
    bench.publisher.publish([ReadyStep(step_id(run, number), number, Weight.INLINE, 8) for number in (0, 1)])
    bench.pool.idle()
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED
    bench.pool.shutdown()
    bench.store.close()


# Group commit


@dataclass
class Spy:
    """A store whose transactions can be held up, counted and broken."""

    store: Store
    batches: list[tuple[int, int]] = field(default_factory=list)
    before: Callable[[Sequence[Finish]], None] = lambda finishes: None
    after: Callable[[TransitionResult], None] = lambda advance: None

    def claim_and_finish(self, worker: Any, keep: ClaimCapacity, **fields: Any) -> TransitionResult:
        self.batches.append((len(fields.get("claims", ())), len(fields.get("finishes", ()))))
        self.before(fields.get("finishes", ()))
        advance = self.store.claim_and_finish(worker, keep, **fields)
        self.after(advance)
        return advance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


def test_whoever_commits_commits_what_all_have_queued_up(bench: Bench) -> None:
    run = bench.run(wide(4, queue="openai"))
    spy = Spy(bench.store)
    bench.machine.store = spy
    held = threading.Event()
    done = threading.Barrier(4)

    def works(step: Claimed) -> Outcome:
        done.wait(10)
        return DONE

    def wait(finishes: Sequence[Finish]) -> None:
        if len(finishes) == 1 and not held.is_set():  # the first commit waits until the others have queued up
            while bench.machine.commits.waiting < 3:
                held.wait(0.001)
            held.set()

    bench.hand.does.update(dict.fromkeys(range(4), works))
    spy.before = wait
    bench.handle(run, 0, 1, 2, 3)
    assert spy.batches[0] == (4, 0)
    assert [count for _, count in spy.batches[1:3]] == [1, 3]
    assert bench.resting()


def test_what_a_shared_commit_makes_ready_is_published_whoever_led_it(bench: Bench) -> None:
    """A claim that is committed first must not swallow the messages that the finish beside it owes."""
    run = bench.run(plan_of(agent("a"), agent("b", 0, queue="anthropic"), agent("c")))
    machine = bench.machine
    finish, claim = bench.desk.one(run, 0), step_id(run, 2)
    requests = []

    def ask(claims: Sequence[int], finishes: Sequence[Finish]) -> None:
        made = _request(machine, claims, finishes)
        requests.append(machine._claim_and_finish(made))

    with machine.commits.paused():
        first = threading.Thread(target=ask, args=([claim], ()))
        first.start()
        while machine.commits.waiting < 1:
            pass
        second = threading.Thread(target=ask, args=((), [Finish(finish, Result(S.SUCCEEDED))]))
        second.start()
        while machine.commits.waiting < 2:
            pass
    first.join(10)
    second.join(10)
    (finished,) = [request for request in requests if request.finishes]
    (claimed,) = [request for request in requests if request.claims]
    assert [head.id & 0xFFFFF for head in finished.ready] == [1]
    assert [step.row for step in claimed.mine] == [2]
    assert claimed.ready == []


def _request(machine: StepRunner, claims: Sequence[int], finishes: Sequence[Finish]) -> Any:
    kind = machine._round.__func__.__globals__["_Request"]
    job = machine._round.__func__.__globals__["Job"]()
    return kind(claims, finishes, job)


def test_one_request_that_cannot_be_stored_does_not_take_the_others_with_it(bench: Bench) -> None:
    run = bench.run(wide(4))
    spy = Spy(bench.store)
    bench.machine.store = spy
    together = threading.Barrier(4)

    def works(step: Claimed) -> Outcome:
        if step.crashes == 0:
            together.wait(10)
        return DONE

    def breaks(finishes: Sequence[Finish]) -> None:
        if any(finish.step.row == 2 for finish in finishes):
            raise ValueError("cannot be stored")

    bench.hand.does.update(dict.fromkeys(range(4), works))
    spy.before = breaks
    bench.handle(run, 0, 1, 2, 3)
    statuses = bench.desk.statuses(run)
    assert [statuses[number] for number in range(4)] == [S.SUCCEEDED, S.SUCCEEDED, S.READY, S.SUCCEEDED]
    assert bench.desk.step(run, 2).crashes == 1
    assert bench.sent() == [2]
    assert bench.resting()


# The database is away


def test_results_are_held_while_the_database_is_away(bench: Bench) -> None:
    run = bench.run(chain(2))
    spy = Spy(bench.store)
    bench.machine.store = spy
    left = [3]

    def away(finishes: Sequence[Finish]) -> None:
        if finishes and left[0]:
            left[0] -= 1
            raise Unavailable("away")

    spy.before = away
    bench.hand.does[4] = ended
    bench.handle(run, 0)
    assert bench.naps == [0.1, 0.2, 0.5]
    assert bench.hand.seen == [0, 1, 2, 3, 4]  # nothing was done twice
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED


@pytest.mark.parametrize("call", ["fail", "park", "expand", "finish_run", "release"])
def test_every_other_transaction_is_made_again_too(bench: Bench, call: str) -> None:
    outcomes: dict[str, Any] = {
        "fail": Failed(Result(S.FAILED, error={"message": "boom"}), 2, run_fails=True),
        "park": Snoozed(60, "retry", "busy"),
        "expand": Expanded([row(0, parent=0)], "body"),
        "finish_run": ended,
        "release": ConditionMet(),
    }
    queue = "anthropic" if call == "release" else "openai"
    run = bench.run(plan_of(agent("a", queue=queue, condition="true"), agent("b")))
    bench.machine.store = Broken(bench.store, call, 2)
    bench.hand.does.update({0: outcomes[call], 2: Snoozed(60, "retry", "no further")})
    bench.handle(run, 0, fast=True)
    assert bench.naps == [0.1, 0.2]
    expected = {"fail": S.FAILED, "park": S.WAITING, "expand": S.WAITING, "finish_run": S.SUCCEEDED, "release": S.READY}
    assert bench.desk.status(run, 0) is expected[call]
    assert bench.resting()


class Broken(Spy):
    """One of its methods is away for a number of calls."""

    def __init__(self, store: Store, name: str, times: int) -> None:
        super().__init__(store)
        self.name = name
        self.left = times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if name != self.__dict__.get("name"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left:
                self.left -= 1
                raise Unavailable("away")
            return found(*args, **kwargs)

        return call


def test_a_reply_that_was_lost_loses_no_step(bench: Bench) -> None:
    """The transaction was committed: its claims are ours, and we do not know it."""
    run = bench.run(plan_of(agent("a"), agent("b", 0), agent("c", 1)))
    spy = Spy(bench.store)
    bench.machine.store = spy
    lost = [1]

    def reply(advance: TransitionResult) -> None:
        if advance.mine and advance.mine[0].row == 1 and lost:
            lost.pop()
            raise Unavailable("the connection broke")

    spy.after = reply
    bench.handle(run, 0)
    assert bench.desk.statuses(run)[1] is S.RUNNING
    assert bench.hand.seen == [0]
    bench.machine.reconcile()
    assert bench.desk.status(run, 1) is S.RUNNING  # it may be on its way here still
    bench.machine.reconcile()
    assert bench.desk.status(run, 1) is S.READY
    assert bench.sent() == [1]


def test_what_is_run_here_is_not_given_back(bench: Bench) -> None:
    run = bench.run(chain(1))

    def works(step: Claimed) -> Outcome:
        bench.machine.doubts = 9
        for _ in range(4):
            bench.machine.reconcile()
        return DONE

    bench.hand.does.update({0: works, 3: ended})
    bench.handle(run, 0)
    assert bench.hand.seen.count(0) == 1
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED


def test_a_machine_that_has_no_doubts_asks_nothing(bench: Bench) -> None:
    bench.machine.store = Broken(bench.store, "owned", 1)
    bench.machine.reconcile()
    bench.machine.doubts = 1
    with pytest.raises(Unavailable):
        bench.machine.reconcile()


# Something of ours breaks


def test_a_step_that_breaks_the_executor_is_tried_again_and_poison_in_the_end(bench: Bench) -> None:
    run = bench.run(wide(2))

    def breaks(step: Claimed) -> Outcome:
        raise ZeroDivisionError

    bench.hand.does[0] = breaks
    with pytest.raises(ZeroDivisionError):
        bench.machine.handle([step_id(run, 0)])
    assert bench.desk.status(run, 0) is S.READY
    assert bench.sent() == [0]
    with pytest.raises(ZeroDivisionError):
        bench.machine.handle([step_id(run, 0)])
    with pytest.raises(ZeroDivisionError):
        bench.machine.handle([step_id(run, 0)])  # as a suspect
    assert bench.desk.step(run, 0).crashes == 3  # where the real executor fails it
    assert bench.resting()


def test_one_fast_step_that_breaks_leaves_the_others_of_its_batch(bench: Bench) -> None:
    run = bench.run(plan_of(*[node(f"s{number}") for number in range(4)]))

    def breaks(step: Claimed) -> Outcome:
        raise ZeroDivisionError

    bench.hand.does[1] = breaks
    bench.handle(run, 0, 1, 2, 3, fast=True)
    statuses = bench.desk.statuses(run)
    assert [statuses[number] for number in range(4)] == [S.SUCCEEDED, S.READY, S.SUCCEEDED, S.SUCCEEDED]
    assert bench.resting()


def test_a_step_that_cannot_even_be_given_back_is_found_later(bench: Bench) -> None:
    run = bench.run(wide(1))

    def breaks(step: Claimed) -> Outcome:
        raise ZeroDivisionError

    bench.hand.does[0] = breaks
    bench.machine.store = Broken(bench.store, "release", 1)
    with pytest.raises(ZeroDivisionError):
        bench.machine.handle([step_id(run, 0)])
    assert bench.desk.status(run, 0) is S.RUNNING
    bench.machine.reconcile()
    bench.machine.reconcile()
    assert bench.desk.status(run, 0) is S.READY


# Suspects


def test_suspects_are_run_one_at_a_time(bench: Bench) -> None:
    run = bench.run(wide(3))
    for _ in range(2):
        bench.desk.claim(run, 0, 1, worker=bench.desk.register(lease=1))
        elapse(bench.store, 2)
        bench.store.reap(home="")
    bench.handle(run, 0, 1, 2)
    assert bench.hand.most == 1
    assert bench.hand.seen[:3] == [2, 0, 1]
    assert bench.resting()


# Waiting and expanding


def test_a_short_wait_that_is_no_attempt_is_slept_in_place(bench: Bench) -> None:
    run = bench.run(wide(1))
    said = iter([Snoozed(0.2, "requests", "429", attempt=False), DONE])
    bench.hand.does.update({0: lambda step: next(said), 3: ended})
    bench.handle(run, 0)
    assert bench.naps == [0.2]
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED


def test_a_parked_step_leaves_its_slot(bench: Bench) -> None:
    run = bench.run(wide(1))
    bench.hand.does[0] = Snoozed(60, "retry", "busy")
    bench.handle(run, 0)
    assert bench.desk.status(run, 0) is S.WAITING
    assert bench.resting()


@pytest.mark.parametrize(("seconds", "reason", "pulls"), [(60, "requests", 0), (0.5, "requests", 9), (60, "retry", 9)])
def test_after_a_long_wait_for_a_quota_the_backlog_is_left_alone(
    bench: Bench, seconds: float, reason: str, pulls: int
) -> None:
    """Further steps would only wait elsewhere; others, whose quota is free, get the slots."""
    run = bench.run(wide(1))
    assert bench.machine._pull(9) == 9
    bench.hand.does[0] = Snoozed(seconds, reason, "rate limit", attempt=False)
    bench.handle(run, 0)
    assert bench.machine._pull(9) == pulls


def test_a_step_of_a_stopped_run_that_would_wait_ends(bench: Bench) -> None:
    run = bench.run(wide(2))

    def cancels(step: Claimed) -> Outcome:
        bench.store.stop(run, gate=2, keeps=frozenset({2, 3, 4}), error=None, reason="cancelled")
        return Snoozed(60, "retry", "busy")

    bench.hand.does.update({0: cancels, 4: ended})
    bench.handle(run, 0)
    assert bench.desk.statuses(run)[0] is S.CANCELLED
    assert "the run stopped while it waited" in bench.desk.checkpoint(run, 0).reason
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED  # as `ended` says


def test_an_expansion_is_run_and_its_composite_goes_on(bench: Bench) -> None:
    run = bench.run(plan_of(node("m", kind="group"), templates=[]))
    turns = iter([Expanded([row(0, parent=0, weight=Weight.INLINE), row(1, parent=0)], "steps"), DONE])
    plan_nodes = {0: lambda step: next(turns) if step.parent is None else DONE}
    bench.hand.does.update(plan_nodes)
    bench.hand.does[3] = lambda step: ended(step) if step.parent is None else DONE
    bench.handle(run, 0, fast=True)
    assert bench.sent() == [5]  # the slow child goes by a message
    bench.handle(run, 5)
    assert bench.desk.run_status(run) is RunStatus.SUCCEEDED
    assert bench.resting()


# Closing


def test_a_machine_that_closes_takes_nothing_more(bench: Bench) -> None:
    run = bench.run(chain(2))
    assert bench.machine.close(0)
    bench.handle(run, 0)
    assert bench.hand.seen == []
    assert [entry.step_id & 0xFFFFF for entry in bench.desk.waiting()] == [0]


def test_a_machine_that_closes_lets_what_runs_end_and_takes_nothing_over(bench: Bench) -> None:
    run = bench.run(chain(2))

    def closes(step: Claimed) -> Outcome:
        bench.machine.closing = True
        return DONE

    bench.hand.does[0] = closes
    bench.handle(run, 0)
    assert bench.hand.seen == [0]
    assert bench.desk.statuses(run)[1] is S.READY
    assert bench.sent() == [1]
    assert bench.machine.close(0)


def test_a_machine_that_closes_says_what_is_still_running(bench: Bench) -> None:
    run = bench.run(chain(1))
    began, go = threading.Event(), threading.Event()

    def works(step: Claimed) -> Outcome:
        began.set()
        assert go.wait(10)
        return DONE

    bench.hand.does[0] = works
    handling = threading.Thread(target=bench.machine.handle, args=([step_id(run, 0)],))
    handling.start()
    assert began.wait(10)
    assert not bench.machine.close(0)
    go.set()
    handling.join(10)
    assert bench.desk.status(run, 0) is S.SUCCEEDED


def test_while_it_stops_it_holds_its_results_until_the_database_is_there_again(bench: Bench) -> None:
    run = bench.run(chain(1))
    spy = Spy(bench.store)
    bench.machine.store = spy
    away = iter(range(4))

    def before(finishes: Sequence[Finish]) -> None:
        if finishes:
            bench.machine.closing = True
            if next(away, None) is not None:
                raise Unavailable("away")

    spy.before = before
    bench.handle(run, 0)
    assert next(away, None) is None
    assert bench.desk.status(run, 0) is S.SUCCEEDED


def test_when_it_has_closed_it_does_not_wait_for_the_database(bench: Bench) -> None:
    run = bench.run(chain(1))
    spy = Spy(bench.store)
    bench.machine.store = spy

    def away(finishes: Sequence[Finish]) -> None:
        if finishes:
            bench.machine.close(0)
            raise Unavailable("away")

    spy.before = away
    with pytest.raises(GorgonError):
        bench.machine.handle([step_id(run, 0)])
    assert bench.resting()


# Leases


def test_a_claim_that_finds_the_lease_run_out_renews_it_and_claims_again(bench: Bench) -> None:
    """A worker that was waiting for its broker, or was suspended: it must not leave the message to the sweep."""
    run = bench.run(chain(2))
    renewed: list[int] = []

    def renew() -> None:
        renewed.append(1)
        bench.store.heartbeat(bench.desk.worker, 60, {})

    bench.machine.renew = renew
    elapse(bench.store, 100)
    bench.store.reap(home="")
    bench.handle(run, 0)
    assert bench.hand.seen[:2] == [0, 1]
    assert renewed == [1]
    assert bench.resting()


def test_a_composite_that_was_lost_is_not_said_to_have_been_stopped(bench: Bench) -> None:
    """It is ready again with the same token, so that whatever is stored for it now would count."""
    group = node("group", kind=Kind.GROUP, bodies={"steps": (4,)})
    run = bench.run(plan_of(group, templates=[agent("inner", container=0)]))
    child = row(0, parent=0)
    lost = []

    def expands(step: Claimed) -> Outcome:
        if not lost:
            lost.append(step.token)
            elapse(bench.store, 100)
            bench.store.reap(home="")
            assert bench.desk.step(run, 0).token == step.token
        return Expanded([child], "steps")

    bench.hand.does[0] = expands
    bench.handle(run, 0, fast=True)
    assert bench.desk.statuses(run)[0] is S.READY
    assert bench.desk.checkpoint(run, 0) is None
    bench.store.heartbeat(bench.desk.worker, 60, {})
    bench.handle(run, 0, fast=True)
    assert bench.desk.statuses(run)[0] is S.WAITING
    assert bench.resting()


def test_the_end_of_a_lost_claim_leaves_the_claim_that_followed(bench: Bench) -> None:
    run = bench.run(chain(1))
    old = bench.desk.one(run, 0)
    bench.machine._take([old], job := Job())
    new = replace(old, token=old.token + 1)
    bench.machine._take([new], Job())
    bench.machine._left(job, [old])
    assert bench.machine.held == {old.id: new}
