"""The negative control: the protocol of claims, finishes and sweeps, and what happens when a part of it is missing.

`violations` puts workers through what goes wrong (a process that freezes, messages that are lost or come twice, a
laptop that died) and says what it saw that must not be.  On the real store it sees nothing; with any of the faults
below planted, it must see something.  A check that is blind to the fault that it is there for fails here.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from gorgon_common.engine import worker_loop as machine_module
from gorgon_common.engine.context import Run
from gorgon_common.engine.ports import AgentCall
from gorgon_common.engine.records import Claimed, Finish, ReadyStep, Recovered, Weight, step_id
from gorgon_common.engine.slots import ReadyQueue
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import RateLimited
from gorgon_common.persistence import claim_and_finish_sqlite, deaths, functions
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import db_now, workers
from gorgon_common.workflow.plan import Dep, Join, Kind
from tests.support import servers
from tests.support.engine import Desk, agent, empty, node, open_store, plan_of, row
from tests.support.fleet import Fleet, Post, Process

pytestmark = pytest.mark.chaos
S = StepStatus
PATIENCE = 5.0
Stores = Callable[[], contextlib.AbstractContextManager[tuple[Store, Store]]]


# The harness


class Watched(Fleet):
    """Two processes, and a note of everything that must not be."""

    def __init__(self, stores: Sequence[Store]) -> None:
        super().__init__(stores)
        self.seen: list[str] = []
        self.blocks: dict[str, list[threading.Event]] = {}
        self.began: dict[str, threading.Semaphore] = {}
        post = self.mailbox._post

        def watch(signature: Any, then: Any) -> None:
            before = len(self.mailbox.published)
            post(signature, then)
            for made in self.mailbox.published[before:]:
                self._published(made)

        self.mailbox._post = watch  # type: ignore[method-assign]

    def _published(self, made: Post) -> None:
        for key, (status, _) in self.store.states(made.ids).items():
            if status == S.PENDING:
                self.seen.append(f"a message was sent for step {key & 0xFFFFF}, which is not ready in the database")

    def works(self, call: AgentCall) -> str:
        """What steps do: those that a scenario has named wait until it lets them go."""
        waits = self.blocks.get(call.label)
        if not waits:
            return "done"
        event = waits.pop(0)
        word = f"{call.label}{len(waits)}"
        self.began[call.label].release()
        if not event.wait(PATIENCE):
            self.seen.append(f"{call.label} was never let go")
        return word

    def block(self, label: str, times: int = 1) -> list[threading.Event]:
        events = [threading.Event() for _ in range(times)]
        self.blocks[label] = list(events)
        self.began[label] = threading.Semaphore(0)
        return events

    def serving(self, process: Process, post: Post) -> threading.Thread:
        def serve() -> None:
            try:
                process.serve(post)
            except Exception as error:  # noqa: BLE001  a machine that breaks is a violation too
                self.seen.append(f"a machine broke: {error!r}")

        thread = threading.Thread(target=serve)
        thread.start()
        return thread

    def wait_for(self, label: str) -> None:
        if not self.began[label].acquire(timeout=PATIENCE):
            self.seen.append(f"{label} did not begin")

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.seen.append(otherwise)

    def state(self, run: int, number: int) -> StepStatus:
        return self.statuses(run)[number]

    def output(self, run: int, number: int) -> Any:
        key = step_id(run, number)
        found = self.store.checkpoints([key]).get(key)
        return None if found is None else found.output

    def sent(self, run: int, number: int) -> int:
        return sum(step_id(run, number) in post.ids for post in self.mailbox.published)

    def ends(self, run: int) -> None:
        """Serve what there is, without a sweep: the run must end."""
        for _ in range(50):
            self.idle()
            if not self.mailbox.waiting:
                break
            self.serving(self.processes[1], self.mailbox.take()).join(PATIENCE)
        self.expect(self.status(run) is RunStatus.SUCCEEDED, f"the run did not end: {self.statuses(run)}")


def spec(prompt: str = "work") -> dict[str, Any]:
    return {"provider": "openai", "model": "gpt-test", "prompt": prompt}


def step(name: str, *after: int, **fields: Any) -> Any:
    return agent(name, *after, **{"spec": spec(), **fields})


def a_frozen_worker_comes_back(fleet: Watched) -> None:
    """It was stopped for longer than its lease, and another one has its step when it wakes up."""
    frozen, other = fleet.processes
    frozen.store.heartbeat(frozen.member, 5, {})
    run = frozen.submit(plan_of(step("a"), step("b", 0)))
    first, second = fleet.block("a", 2)
    threads = [fleet.serving(frozen, fleet.mailbox.take())]
    fleet.wait_for("a")
    fleet.elapse(6)
    other.sweep.once()
    fleet.expect(len(fleet.mailbox.waiting) == 1, "the step of a dead worker was not sent again")
    if fleet.mailbox.waiting:
        threads.append(fleet.serving(other, fleet.mailbox.take()))
        fleet.wait_for("a")
    first.set()
    threads[0].join(PATIENCE)
    fleet.expect(fleet.state(run, 0) is S.RUNNING, "a stale result was accepted while another worker had the step")
    second.set()
    for thread in threads:
        thread.join(PATIENCE)
    fleet.expect(fleet.output(run, 0) == "a0", "the result is not that of the worker that had the step")
    fleet.ends(run)
    fleet.expect(fleet.provider.calls.count("b") == 1, "what follows was run more than once, or never")


def a_frozen_worker_comes_back_too_late(fleet: Watched) -> None:
    """When it wakes up, its step has ended, and what it has is a second result."""
    frozen, other = fleet.processes
    frozen.store.heartbeat(frozen.member, 5, {})
    run = frozen.submit(plan_of(step("a"), step("x"), step("b", 0, 1)))
    (first,) = fleet.block("a")
    (beside,) = fleet.block("x")
    by_step = {post.ids[0] & 0xFFFFF: post for post in [fleet.mailbox.take(), fleet.mailbox.take()]}
    late = fleet.serving(frozen, by_step[0])
    fleet.wait_for("a")
    fleet.elapse(6)
    other.sweep.once()
    waiting = [post for post in fleet.mailbox.waiting if step_id(run, 0) in post.ids]
    fleet.mailbox.waiting.clear()
    fleet.serving(other, waiting[0] if waiting else by_step[0]).join(PATIENCE)
    still = fleet.serving(other, by_step[1])
    fleet.wait_for("x")
    first.set()
    late.join(PATIENCE)
    fleet.expect(fleet.output(run, 0) == "done", "a result that was stored has been replaced")
    fleet.expect(fleet.state(run, 2) is S.PENDING, "a join began before all of its steps had ended")
    beside.set()
    still.join(PATIENCE)
    fleet.ends(run)


def a_worker_that_was_given_up_gets_a_message(fleet: Watched) -> None:
    """It has not said since that it lives, and may die at once: nobody would look for its steps."""
    given_up, other = fleet.processes
    given_up.store.heartbeat(given_up.member, 5, {})
    run = given_up.submit(plan_of(step("a"), step("b", 0)))
    fleet.elapse(6)
    other.sweep.once()
    fleet.mailbox.waiting.sort(key=lambda post: post.ids)
    fleet.serving(given_up, fleet.mailbox.take()).join(PATIENCE)
    fleet.expect(fleet.state(run, 0) is S.READY, "a worker without a lease was given a step")

    def renew() -> None:
        given_up.store.heartbeat(given_up.member, 5, {})

    given_up.machine.renew = renew
    fleet.elapse(6)
    other.sweep.once()
    fleet.serving(given_up, fleet.mailbox.take()).join(PATIENCE)
    fleet.expect(fleet.state(run, 1) is S.SUCCEEDED, "a worker that renewed its lease was given nothing")
    fleet.ends(run)


def steps_end_together(fleet: Watched) -> None:
    """Several predecessors of a join end in one transaction."""
    run = fleet.processes[0].submit(plan_of(node("a"), node("b"), node("c"), node("join", 0, 1, 2)))
    fleet.ends(run)


def steps_end_one_after_another(fleet: Watched) -> None:
    """A join that no canvas carries gets one message, when the last of its steps has ended."""
    here, _ = fleet.processes
    here.machine.worker.queues.remove(1)  # what goes to the other queue needs a message
    here.machine.next_up = ReadyQueue(4, short=0.0)  # no commit waits for another: b and c end in two of them
    run = here.submit(
        plan_of(
            step("a"), step("b", 0), step("c", 0), step("d", 1, 2, queue="anthropic"), step("e", 2, queue="anthropic")
        )
    )
    here.serve(fleet.mailbox.take())
    fleet.idle()
    while any(post.queue == "openai" for post in fleet.mailbox.waiting):
        place = next(place for place, post in enumerate(fleet.mailbox.waiting) if post.queue == "openai")
        fleet.serving(here, fleet.mailbox.take(place)).join(PATIENCE)
        fleet.idle()
    fleet.expect(fleet.sent(run, 3) == 1, f"a join was sent {fleet.sent(run, 3)} times")
    fleet.ends(run)
    fleet.expect(sorted(fleet.provider.calls) == ["a", "b", "c", "d", "e"], "a step was run twice or never")


def a_message_comes_twice(fleet: Watched) -> None:
    one, other = fleet.processes
    run = one.submit(plan_of(step("a"), step("b", 0)))
    (go,) = fleet.block("a")
    post = fleet.mailbox.take()
    first = fleet.serving(one, post)
    fleet.wait_for("a")
    fleet.serving(other, post).join(PATIENCE)
    fleet.expect(fleet.provider.calls.count("a") == 1, "two workers ran one step at the same time")
    go.set()
    first.join(PATIENCE)
    fleet.ends(run)


def a_laptop_has_died(fleet: Watched) -> None:
    """Nobody but the laptop's own resume touches its run."""
    laptop = Process(fleet.store, fleet.mailbox, fleet.provider, home="laptop", lease=5)
    run = laptop.submit(plan_of(step("a"), step("b")))
    (go,) = fleet.block("a")
    fleet.mailbox.published.clear()
    posts = {post.ids[0] & 0xFFFFF: post for post in [fleet.mailbox.take(), fleet.mailbox.take()]}
    thread = fleet.serving(laptop, posts[0])
    fleet.wait_for("a")
    fleet.elapse(6)
    for process in fleet.processes:
        process.sweep.once()
        fleet.elapse(6)
    fleet.expect(fleet.state(run, 0) is S.RUNNING, "a step of another home was taken from its worker")
    fleet.expect(fleet.mailbox.published == [], "steps of another home were sent")
    fleet.serving(fleet.processes[1], posts[1]).join(PATIENCE)
    fleet.expect("b" not in fleet.provider.calls, "a step of another home was run")
    go.set()
    thread.join(PATIENCE)
    laptop.pool.idle()
    laptop.pool.shutdown()


def a_worker_is_merely_slow(fleet: Watched) -> None:
    slow, other = fleet.processes
    run = slow.submit(plan_of(step("a")))
    (go,) = fleet.block("a")
    thread = fleet.serving(slow, fleet.mailbox.take())
    fleet.wait_for("a")
    fleet.elapse(30)
    other.sweep.once()
    fleet.expect(fleet.state(run, 0) is S.RUNNING, "a step was taken from a living worker")
    fleet.expect(fleet.mailbox.waiting == [], "a step that a living worker holds was sent again")
    go.set()
    thread.join(PATIENCE)
    fleet.ends(run)


def a_wait_is_over(fleet: Watched) -> None:
    """Two sweeps see that a step's time has come."""
    said = iter([True])

    def limited(call: AgentCall) -> str:
        if next(said, False):
            error = RateLimited("later")
            error.retry_after = 60.0
            raise error
        return "done"

    fleet.provider.behaves["limited"] = limited
    run = fleet.processes[0].submit(plan_of(step("a", spec=spec("limited"))))
    fleet.processes[0].serve(fleet.mailbox.take())
    fleet.expect(fleet.state(run, 0) is S.WAITING, "the step does not wait")
    early = [process.store.wake([step_id(run, 0)]) for process in fleet.processes]
    fleet.expect(early == [[], []], "a step was woken before its time")
    fleet.elapse(70)
    woken = [head for process in fleet.processes for head in process.store.wake([step_id(run, 0)])]
    fleet.expect(len(woken) == 1, f"a step was woken {len(woken)} times")
    fleet.processes[0].publisher.publish(woken)
    fleet.ends(run)


def all_messages_are_lost(fleet: Watched) -> None:
    run = fleet.processes[0].submit(plan_of(step("a"), step("b", 0), step("c", 0), step("d", 1, 2)))
    fleet.mailbox.waiting.clear()
    fleet.elapse(6)
    fleet.processes[1].sweep.once()
    fleet.ends(run)


def a_canvas_is_lost(fleet: Watched) -> None:
    """A part of it travels alone from then on, and so does the join that it would have sent, without another sweep."""
    here = fleet.processes[0]
    here.machine.worker.queues.remove(1)
    run = here.submit(plan_of(step("a"), step("b"), step("c", 0, 1, queue="anthropic")))
    here.serve(fleet.mailbox.take())
    fleet.mailbox.waiting.clear()
    fleet.elapse(6)
    fleet.processes[1].sweep.once()
    while fleet.mailbox.waiting:
        fleet.serving(here, fleet.mailbox.take()).join(PATIENCE)
        fleet.idle()
        if fleet.sent(run, 2):
            break
    fleet.expect(fleet.sent(run, 2) == 1, f"the join of a lost canvas was sent {fleet.sent(run, 2)} times")
    fleet.ends(run)


def a_step_kills_its_workers(fleet: Watched) -> None:
    """What stands beside it does not pay for it."""
    desk = Desk(fleet.store)
    run = desk.create([row(0), row(1), row(2)])
    for held in ([0, 1], [0, 1], [0, 2]):
        worker = desk.register(lease=5)
        claimed = desk.claim(run, *held, worker=worker, suspects=True)
        fleet.expect(len(claimed) == len(held), "steps of a dead worker cannot be claimed")
        fleet.elapse(6)
        fleet.store.reap(home="")
    crashes = [desk.step(run, number).crashes for number in range(3)]
    fleet.expect(crashes[0] == 3, f"a step that killed three workers has {crashes[0]} deaths")
    fleet.expect(crashes[2] == 0, "an innocent step was blamed for a death")


def a_branch_is_skipped_while_another_runs(fleet: Watched) -> None:
    """A run ends when all of its steps have."""
    here = fleet.processes[0]
    run = here.submit(plan_of(step("a"), step("b", condition="false"), step("c", 0, 1)))
    here.pool.idle()
    fleet.expect(fleet.status(run) not in (RunStatus.SUCCEEDED, RunStatus.FAILED), "a run ended before its steps")
    fleet.ends(run)
    fleet.expect(fleet.state(run, 0) is S.SUCCEEDED, "a step was left behind by its run")


SCENARIOS: tuple[Callable[[Watched], None], ...] = (
    a_frozen_worker_comes_back,
    a_frozen_worker_comes_back_too_late,
    a_worker_that_was_given_up_gets_a_message,
    steps_end_together,
    steps_end_one_after_another,
    a_message_comes_twice,
    a_laptop_has_died,
    a_worker_is_merely_slow,
    a_wait_is_over,
    all_messages_are_lost,
    a_canvas_is_lost,
    a_step_kills_its_workers,
    a_branch_is_skipped_while_another_runs,
)


def violations(stores: Stores, *scenarios: Callable[[Watched], None]) -> list[str]:
    """Put two processes through the scenarios (all of them); return what was seen that must not be."""
    seen = []
    for scenario in scenarios or SCENARIOS:
        with stores() as made:
            fleet = Watched(made)
            fleet.provider.behaves["work"] = fleet.works
            try:
                scenario(fleet)
                fleet.idle()
            except Exception as error:  # noqa: BLE001  whatever breaks is a violation
                fleet.seen.append(f"it broke: {error!r}")
            finally:
                for waits in fleet.blocks.values():
                    for event in waits:
                        event.set()
                for process in fleet.processes:
                    process.machine.close(0)
                    process.pool.shutdown()
                fleet.mailbox.close()
            seen += [f"{scenario.__name__}: {entry}" for entry in fleet.seen]
    return seen


# The stores that it is put to


@pytest.fixture
def sqlite_stores(sqlite_template: Path, tmp_path: Path) -> Stores:
    @contextlib.contextmanager
    def make() -> Iterator[tuple[Store, Store]]:
        path = tmp_path / f"{time.monotonic_ns()}.db"
        shutil.copy(sqlite_template, path)
        stores = (Store(_database(path)), Store(_database(path)))
        yield stores
        for store in stores:
            store.close()

    return make


def _database(path: Path) -> Any:
    return Database(f"sqlite:///{path}", pool_size=4)


@pytest.fixture(scope="module")
def one_postgres(postgres_admin: str) -> Iterator[tuple[Store, Store]]:
    with servers.fresh_database(postgres_admin) as url:
        stores = open_store(url), open_store(url)
        drop_guards(stores[0])
        yield stores
        for store in stores:
            store.close()


def drop_guards(store: Store) -> None:
    """The faults make transitions that the guard of the other tests would refuse."""
    with store.database.write() as connection:
        for table in ("steps", "runs"):
            connection.exec_driver_sql(f"DROP TRIGGER guard_{table} ON {table}")


@pytest.fixture
def postgres_stores(one_postgres: tuple[Store, Store]) -> Stores:
    @contextlib.contextmanager
    def make() -> Iterator[tuple[Store, Store]]:
        yield one_postgres
        empty(one_postgres[0])

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def stores(request: pytest.FixtureRequest) -> Stores:
    return request.getfixturevalue("sqlite_stores" if request.param == "sqlite" else "postgres_stores")  # type: ignore[no-any-return]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_protocol_holds(stores: Stores, scenario: Callable[[Watched], None]) -> None:
    assert violations(stores, scenario) == []


# The faults: each plants itself


class Rewriting:
    """A SQLite connection whose statements are changed on their way."""

    def __init__(self, db: Any, changes: Sequence[tuple[str, str]], made: set[str]) -> None:
        self.db = db
        self.changes = changes
        self.made = made

    def execute(self, statement: str, *arguments: Any) -> Any:
        for old, new in self.changes:
            if old in statement:
                statement = statement.replace(old, new)
                self.made.add(old)
        return self.db.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


@contextlib.contextmanager
def rewritten(
    stores: Stores, patch: pytest.MonkeyPatch, *, lite: Sequence[tuple[str, str]], post: Sequence[tuple[str, str]]
) -> Iterator[None]:
    """Change the text of the engine's transaction; every change must be found there."""
    with stores() as (store, _):
        is_sqlite = store.database.sqlite
    if is_sqlite:
        made: set[str] = set()
        claim_and_finish = claim_and_finish_sqlite.claim_and_finish
        patch.setattr(
            claim_and_finish_sqlite,
            "claim_and_finish",
            lambda db, *args, **kw: claim_and_finish(Rewriting(db, lite, made), *args, **kw),
        )
        yield
        assert made == {old for old, _ in lite}
        return
    text = functions.source()
    for old, new in post:
        assert old in text, old
        text = text.replace(old, new)
    with stores() as (store, _):
        _replace_tick(store, text)
    try:
        yield
    finally:
        with stores() as (store, _):
            _replace_tick(store, functions.source())


def _replace_tick(store: Store, text: str) -> None:
    with store.database.write() as connection:
        connection.exec_driver_sql(text.replace("%", "%%"))


def seen_by(stores: Stores, *scenarios: Callable[[Watched], None]) -> list[str]:
    found = violations(stores, *scenarios)
    assert found, "the fault was not seen"
    return found


def test_no_fence(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finish is accepted from whoever says it, as often as it is said."""
    kept = "SELECT p.step_id, p.status, p.attempts, p.started_at, p.finished_at, p.output, p.detail FROM passed p"
    lite = [
        ("AND token = ? AND status IN (1, 2)", "AND ? IS NOT NULL"),
        ("INSERT INTO checkpoints", "INSERT OR REPLACE INTO checkpoints"),
    ]
    post = [
        ("AND s.token = tokens[array_position(ids, s.id)] AND s.status IN (1, 2)", ""),
        (kept, f"{kept} ON CONFLICT (step_id) DO UPDATE SET output = excluded.output"),
    ]
    with rewritten(stores, monkeypatch, lite=lite, post=post):
        seen_by(stores, a_frozen_worker_comes_back)
        seen_by(stores, a_frozen_worker_comes_back_too_late)


def test_no_token(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim does not raise the token, so that the one before cannot be told from it."""
    lite = [("SET status = 2, token = token + 1, owner = ?", "SET status = 2, owner = ?")]
    post = [("SET status = 2, token = s.token + 1, owner", "SET status = 2, owner")]
    with rewritten(stores, monkeypatch, lite=lite, post=post):
        seen_by(stores, a_frozen_worker_comes_back)


def test_a_claim_without_a_lease(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    lite = [("NOT reaped AND lease_until > gorgon_now(0)", "1")]
    post = [("NOT w.reaped AND w.lease_until > clock_timestamp()", "true")]
    with rewritten(stores, monkeypatch, lite=lite, post=post):
        seen_by(stores, a_worker_that_was_given_up_gets_a_message)


def test_a_claim_of_what_another_one_runs(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    lite = [("AND status = 1 AND (crashes", "AND status IN (1, 2) AND (crashes")]
    post = [("AND s.status = 1 AND (s.crashes", "AND s.status IN (1, 2) AND (s.crashes")]
    with rewritten(stores, monkeypatch, lite=lite, post=post):
        seen_by(stores, a_message_comes_twice)


def test_publish_before_commit(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = machine_module.StepRunner._commit_finishes

    def early(self: Any, job: Any, finishes: Sequence[Finish]) -> list[Claimed]:
        for finish in finishes:
            run = self.knowledge.run(finish.step.run)
            after = [number for number in run.successors[finish.step.node] if run.plan.nodes[number].queue]
            self.publisher.publish(
                [
                    ReadyStep(step_id(finish.step.run, number), number, Weight.SLOW, run.shape(number)[1])
                    for number in after
                ]
            )
        return commit(self, job, finishes)

    monkeypatch.setattr(machine_module.StepRunner, "_commit_finishes", early)
    found = seen_by(stores, steps_end_one_after_another)
    assert any("not ready in the database" in entry for entry in found)


def test_lost_decrement(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ends at the same time one is not counted."""

    class Once(dict[int, int]):
        def __missing__(self, key: int) -> int:
            return 0

        def __setitem__(self, key: int, value: int) -> None:
            super().__setitem__(key, 1)

    monkeypatch.setattr(claim_and_finish_sqlite, "Counter", Once)
    with rewritten(stores, monkeypatch, lite=(), post=[("count(*)::int AS n", "1 AS n")]):
        seen_by(stores, steps_end_together)


def test_double_dispatch_of_a_join(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends a predecessor sends the join."""
    decrement = claim_and_finish_sqlite._Taker._decrement

    def each(self: Any, key: int, times: int) -> list[tuple[Any, ...]]:
        out = decrement(self, key, times)
        columns = "id, token, node, weight, queue, attempt, parent, position, crashes"
        left = self.db.execute(f"SELECT {columns} FROM steps WHERE id = ? AND deps_left > 0", (key,)).fetchone()
        return out if left is None or out else [(2, *left)]

    monkeypatch.setattr(claim_and_finish_sqlite._Taker, "_decrement", each)
    with rewritten(stores, monkeypatch, lite=(), post=[("FROM moved m WHERE m.free AND (", "FROM moved m WHERE (")]):
        seen_by(stores, steps_end_one_after_another)


def test_a_sweep_that_adopts_another_homes_run(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    reap = Store.reap

    def everyone(self: Store, *, home: str, **fields: Any) -> Recovered:
        found = [reap(self, home=name, **fields) for name in ("laptop", home)]
        return Recovered([head for entry in found for head in entry.again])

    monkeypatch.setattr(Store, "reap", everyone)
    found = seen_by(stores, a_laptop_has_died)
    assert any("was taken from its worker" in entry for entry in found)


def test_a_sweep_that_sends_another_homes_steps(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    overdue = Store.overdue

    def everyone(self: Store, *, home: str, **fields: Any) -> Any:
        late, sleepers = overdue(self, home=home, **fields)
        more, others = overdue(self, home="laptop", **fields)
        return late + more, sleepers + others

    monkeypatch.setattr(Store, "overdue", everyone)
    found = seen_by(stores, a_laptop_has_died)
    assert any("were sent" in entry for entry in found)


def test_a_claim_of_another_homes_step(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    lite = [("r.active AND r.target = ? AND r.home = ?)", "r.active AND r.target = ? AND ? IS NOT NULL)")]
    post = [
        (
            "AND r.id = s.id >> 20 AND r.active AND r.target = p_target AND r.home = p_home",
            "AND r.id = s.id >> 20 AND r.active AND r.target = p_target",
        )
    ]
    with rewritten(stores, monkeypatch, lite=lite, post=post):
        seen_by(stores, a_laptop_has_died)


def test_a_sweep_that_takes_from_the_living(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    reap = Store.reap

    def anyone(self: Store, **fields: Any) -> Recovered:
        with self.database.write() as connection:
            connection.execute(update(workers).values(lease_until=db_now(-1)))
        return reap(self, **fields)

    monkeypatch.setattr(Store, "reap", anyone)
    seen_by(stores, a_worker_is_merely_slow)


def test_a_wake_that_does_not_look(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    wake = Store.wake

    def again(self: Store, ids: Sequence[int]) -> list[ReadyStep]:
        return wake(self, ids) or [ReadyStep(key, key & 0xFFFFF, Weight.SLOW, 0) for key in ids]

    monkeypatch.setattr(Store, "wake", again)
    seen_by(stores, a_wait_is_over)


def test_carried_is_never_cleared(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "detach", lambda self, ids: [])
    seen_by(stores, a_canvas_is_lost)


def test_a_sweep_that_finds_nothing(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "overdue", lambda self, **fields: ([], []))
    seen_by(stores, all_messages_are_lost)


def test_all_are_blamed_for_a_death(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deaths, "SUSPECT_DEATHS", 99)
    seen_by(stores, a_step_kills_its_workers)


def test_skips_that_do_not_wait(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A skip is passed on to what waits for a step that is still running."""

    def hasty(self: Run, of: Claimed, *, failed: bool) -> dict[int, str]:
        found: dict[int, str] = {}
        queue = [of.node]
        while queue:
            cause = queue.pop()
            for number in self.successors[cause]:
                after = self.plan.nodes[number]
                if after.join is Join.ALL_SUCCESS and after.kind is Kind.AGENT and Dep(cause) in after.deps:
                    found[number] = "skipped"
                    queue.append(number)
        return found

    monkeypatch.setattr(Run, "descendants", hasty)
    seen_by(stores, a_branch_is_skipped_while_another_runs)
