"""Random histories of a small world of runs, workers and accounts, given to the two databases of `twins`."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import text

from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.budget import UNSENT
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import (
    BudgetRequest,
    Children,
    ClaimCapacity,
    Claimed,
    Finish,
    ReadyStep,
    Recovered,
    Result,
    Weight,
    step_id,
)
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import GorgonError
from gorgon_common.persistence import settling, transitions
from gorgon_common.persistence.store import Worker
from tests.support.engine import row
from tests.support.twins import PERIODS, QUEUES, RUNS, START, Twin, World, plain


class Difference(AssertionError):
    """The two databases did not do the same."""


class History:
    """Random commands for a small world of runs, workers and accounts, given to both databases."""

    def __init__(self, twins: Sequence[Twin], seed: int) -> None:
        self.twins = twins
        self.rng = random.Random(seed)
        self.seed = seed
        self.told: list[str] = []
        self.held: list[Claimed] = []
        self.reserved: list[tuple[int, int, int]] = []
        self.world = World(self.rng)
        self.sizes = dict(self.world.sizes)
        self.calls = 0

    # Both at once

    def run(self, commands: int) -> None:
        """Give both the same world and commands.  Raises Difference."""
        with contextlib.ExitStack() as stack:
            for twin in self.twins:
                stack.enter_context(twin.database.history())
            for twin in self.twins:
                self.world.enter(twin.connection)
            acts = self._acts()
            for _ in range(commands):
                self.rng.choices([act for act, _ in acts], [weight for _, weight in acts])[0]()
            ours, theirs = (twin.tables() for twin in self.twins)
            for name in ours:
                self._same(f"the rows of {name}", ours[name], theirs[name])

    def both(self, told: str, call: Callable[[Twin], Any], *, may_fail: bool = False) -> Any:
        self.told.append(told.replace("y" * 1000, ""))
        answers = []
        for twin in self.twins:
            if not may_fail:
                answers.append(call(twin))
                continue
            savepoint = twin.connection.begin_nested()
            try:
                answers.append(call(twin))
                savepoint.commit()
            except GorgonError as error:
                savepoint.rollback()
                answers.append((type(error), error.message))
        self._same("the answer", *map(plain, answers))
        return answers[0]

    def _same(self, what: str, ours: Any, theirs: Any) -> None:
        if ours == theirs:
            return
        if isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = (
                [entry for entry in one if entry not in other] for one, other in ((ours, theirs), (theirs, ours))
            )
        history = "\n".join(f"  {told}" for told in self.told)
        raise Difference(f"seed {self.seed}: {what} on SQLite and PostgreSQL:\n{ours}\n{theirs}\nafter\n{history}")

    # Commands

    def _acts(self) -> list[tuple[Callable[[], None], int]]:
        return [
            (self.claim, 5),
            (self.finish, 8),
            (self.reserve, 6),
            (self.expand, 3),
            (self.release, 2),
            (self.park, 4),
            (self.limited, 2),
            (self.elapse, 2),
            (self.fail, 1),
            (self.stop, 1),
            (self.reap, 1),
            (self.enqueue, 1),
            (self.attach, 1),
            (self.wake, 1),
            (self.change_limits, 1),
            (self.pause, 1),
        ]

    def _step(self, run: int | None = None) -> int:
        run = run or self.rng.choice(RUNS)
        return step_id(run, self.rng.randrange(self.sizes[run] + 1))

    def _worker(self) -> Worker:
        return self.rng.choices(self.world.workers, [6, 4, 1, 1])[0]

    def _capacity(self) -> ClaimCapacity:
        return ClaimCapacity(
            self.rng.choice([0, 1, 2, 64]), self.rng.choice([0, 1, 2, 3]), self.rng.choice([0, 0, 1, 3])
        )

    def _transition(self, told: str, **given: Any) -> None:
        worker, keep = self._worker(), self._capacity()
        suspects = self.rng.random() < 0.3
        result = self.both(
            f"{told} by {worker.owner} with {keep}, suspects {suspects}: {given}",
            lambda twin: transitions.claim_and_finish(twin.connection, worker, keep, suspects=suspects, **given),
        )
        self.held += result.mine

    def claim(self) -> None:
        ids = [self._step() for _ in range(self.rng.choice([0, 1, 3, 6]))]
        if ids and self.rng.random() < 0.2:
            ids.append(ids[0])
        self._transition("claim", claims=ids)

    def _take(self, count: int) -> list[Claimed]:
        """Return claims to end; some stay, so that they come twice, and some have an older token."""
        found = []
        for _ in range(min(count, len(self.held))):
            step = self.rng.choice(self.held)
            if self.rng.random() < 0.9:
                self.held.remove(step)
            if self.rng.random() < 0.1:
                step = dataclasses.replace(step, token=step.token - 1)
            found.append(step)
        return found

    def _one(self) -> Claimed | None:
        return next(iter(self._take(1)), None)

    def _result(self, step: Claimed, status: StepStatus) -> Result:
        calls = self._calls(step)
        output = self.rng.choice([None, {"a": 1}, "x" * 20, "y" * 70_000])
        detail = {"fingerprint": f"{step.run}:{self.rng.randrange(3)}"} if self.rng.random() < 0.2 else {}
        return Result(status, output=output, detail=detail, calls=calls, started_at=START, finished_at=START)

    def _calls(self, step: Claimed) -> list[CallRecord]:
        mine = [key for key in self.reserved if key[:2] == (step.id, step.token)]
        calls = []
        for key in mine[: self.rng.choice([0, 1, 2])]:
            usage = Usage(input_tokens=self.rng.choice([1, 30, 200]), output_tokens=self.rng.choice([1, 50]))
            outcome = self.rng.choice(["ok", "ok", "ok", UNSENT, "unknown"])
            calls.append(
                CallRecord(
                    "openai", "gpt-5", "r", key[2], usage, self.rng.choice([None, 3, 40, 90]), "1", 5, outcome,
                    reserved=True, measured=self.rng.random() < 0.9,
                )
            )  # fmt: skip
        return calls

    def finish(self) -> None:
        if not self.held:
            return self.claim()
        taken = self._take(self.rng.choice([1, 1, 2, 4]))
        S = StepStatus
        finishes = [
            Finish(step, self._result(step, self.rng.choice([S.SUCCEEDED] * 5 + [S.FAILED, S.SKIPPED, S.CANCELLED])))
            for step in taken
        ]
        if len(finishes) == 1 and self.rng.random() < 0.3:
            others = self.rng.sample(range(self.sizes[taken[0].run]), 2)
            skipped = {number: "skipped" for number in others if number != taken[0].row}
            finishes = [dataclasses.replace(finishes[0], skipped=skipped)]
        claims = [self._step() for _ in range(self.rng.choice([0, 0, 2]))]
        return self._transition("finish", finishes=finishes, claims=claims)

    def release(self) -> None:
        step = self._one()
        if step is None:
            return
        weight = self.rng.choice([None, Weight.FAST, Weight.SLOW])
        crashed = self.rng.choice([None, None, "it broke"])
        self.both(
            f"release {step}, {weight}, {crashed}",
            lambda twin: twin.store.release(step, weight=weight, crashed=crashed),
        )

    def park(self) -> None:
        step = self._one()
        if step is None:
            return
        room = None
        if self.rng.random() < 0.6:
            room = BudgetRequest(
                self.rng.choice(PERIODS[:3])[0], self.rng.choice([1, 30, 120]), self.rng.choice([0, 40, 300]),
                patient=self.rng.random() < 0.2,
            )  # fmt: skip
        event = self.rng.choice([None, None, "go"])
        calls = self._calls(step)
        seconds = self.rng.choice([0, 2, 60])
        snoozed = Snoozed(seconds, "budget", "m", calls, attempt=seconds == 2, room=room, event=event)
        self.both(
            f"park {step} for {room}, {event}, {seconds} s, {calls}",
            lambda twin: twin.store.park(step, snoozed),
        )

    def expand(self) -> None:
        step = self._one()
        if step is None:
            return
        count = self.rng.choice([1, 2, 4])
        window = self.rng.choice([None, 1, 2]) if count > 2 else None
        size = self.sizes[step.run]
        weights = [Weight(self.rng.choice([0, 1, 2, 2])) for _ in range(count)]
        queues = [self.rng.choice(QUEUES) for _ in range(count)]
        rows = [
            row(number, deps=1 if window is not None and number >= window else 0, weight=weights[number],
                queue=queues[number], parent=step.row, position=number, grouped=self.rng.random() < 0.1)
            for number in range(count)
        ]  # fmt: skip
        answer = self.both(
            f"expand {step}: {weights} {queues}, window {window}",
            lambda twin: twin.store.expand(step, rows, phase="item", round=size, window=window),
        )
        if isinstance(answer, Children):
            self.sizes[step.run] = max(self.sizes[step.run], answer.base + count)

    def limited(self) -> None:
        run = self.rng.choice(RUNS)
        ids = [self._step(run) for _ in range(3)]
        follows = [self._step(run) for _ in range(self.rng.choice([0, 2]))]
        worker = self.rng.choice([None, *self.world.workers])
        free = self.rng.choice([0, 1, 3])
        suspects = self.rng.random() < 0.3
        result = self.both(
            f"claim of run {run} with max_parallel by {worker and worker.owner}: {ids}, {follows}, {free} {suspects}",
            lambda twin: twin.store.claim_limited(worker, run, ids, follows=follows, free=free, suspects=suspects),
        )
        self.held += result.mine

    def fail(self) -> None:
        step = self._one()
        if step is None:
            return
        gate = self.world.gates[step.run]
        inside = step.parent is not None and self.rng.random() < 0.5
        container = step.parent if inside else gate
        worker, keep = self._worker(), self._capacity()
        finish = Finish(step, self._result(step, StepStatus.FAILED))
        finish = dataclasses.replace(
            finish, result=dataclasses.replace(finish.result, error={"message": "no", "kind": "k"})
        )
        self.both(
            f"fail {step}, container {container}, {keep}",
            lambda twin: twin.store.fail(
                worker, keep, finish, container=container, keeps=frozenset() if inside else frozenset([gate]),
                run_fails=not inside,
            ),
        )  # fmt: skip

    def stop(self) -> None:
        run = self.rng.choice(RUNS)
        gate = self.world.gates[run]
        error = self.rng.choice([None, {"message": "late"}])
        self.both(
            f"stop {run}: {error}",
            lambda twin: twin.store.stop(run, gate=gate, keeps=frozenset([gate]), error=error, reason="r"),
            may_fail=True,
        )

    def reap(self) -> None:
        thorough = self.rng.random() < 0.5
        sparing = self.rng.choice([None, 1])
        answer = self.both(
            f"reap, thorough {thorough}, sparing {sparing}",
            lambda twin: twin.store.reap(home="", target="sandbox", sparing=sparing, thorough=thorough),
        )
        assert isinstance(answer, Recovered)

    def enqueue(self) -> None:
        runs_ = [self.rng.choice(RUNS) for _ in range(2)]
        ids = sorted({step_id(run, self.rng.randrange(self.sizes[run])) for run in runs_})
        queue = self.rng.choice(QUEUES)
        if self.rng.random() < 0.5:
            heads = [ReadyStep(key, 0, 2, queue) for key in ids]
            first = self.rng.random() < 0.3
            self.both(f"enqueue {heads}", lambda twin: twin.store.enqueue(heads, "t", first=first))
        else:
            self.both(f"dequeue {queue}", lambda twin: twin.store.dequeue(queue, 2, target="sandbox", home=""))

    def attach(self) -> None:
        ids = [self._step(), self._step()]
        name = self.rng.choice(["attach", "detach"])
        self.both(f"{name} {ids}", lambda twin: getattr(twin.store, name)(ids))

    def wake(self) -> None:
        ids = [self._step() for _ in range(6)]
        run = self.rng.choice(RUNS)
        if self.rng.random() < 0.5:
            self.both(f"wake {ids}", lambda twin: twin.store.wake(ids))
        else:
            self.both(f"event of {run}", lambda twin: twin.store.send_event(run, "go", 1), may_fail=True)

    def elapse(self) -> None:
        seconds = self.rng.choice([0.25, 3, 6, 11, 45])
        self.told.append(f"{seconds} s go by")
        for twin in self.twins:
            twin.database.move(seconds)
        if self.rng.random() < 0.5:
            worker = self._worker()
            self.both(f"heartbeat of {worker.owner}", lambda twin: twin.store.heartbeat(worker, 60, {}))

    def pause(self) -> None:
        """Some run becomes active, or is not any more."""
        run, active = self.rng.choice(RUNS), self.rng.random() < 0.6
        self.both(
            f"run {run} active: {active}",
            lambda twin: (
                twin.connection.execute(
                    text("UPDATE runs SET active = :active WHERE id = :id"), {"active": active, "id": run}
                ).rowcount
            ),
        )

    # Budgets

    def _path(self) -> list[int]:
        chosen = self.rng.sample(PERIODS[:3], self.rng.choice([1, 2, 3]))
        if self.rng.random() < 0.05:
            chosen.append(PERIODS[3])
        return [number for number, level in sorted(chosen, key=lambda entry: (-entry[1], entry[0]))]

    def reserve(self) -> None:
        """Reserve for some calls, and post the outcomes of others."""
        asks: dict[tuple[int, int, int], Any] = {}
        for _ in range(self.rng.choice([0, 1, 1, 3])):
            if self.reserved and self.rng.random() < 0.1:
                key = self.rng.choice(self.reserved)
            else:
                step = self.rng.choice(self.held) if self.held else None
                self.calls += 1
                key = (step.id, step.token, self.calls) if step else (self._step(), 1, self.calls)
            asks[key] = (key, self._path(), self.rng.choice([0, 5, 30, 60]), self.rng.choice([0, 10, 80]), 100)
        facts = []
        for _ in range(self.rng.choice([0, 1, 2, 3]) if self.reserved else 0):
            key = self.rng.choice(self.reserved)
            facts.append(
                {"step_id": key[0], "token": key[1], "ordinal": key[2], "state": self.rng.choice([1, 1, 1, 2, 3]),
                 "usd": self.rng.choice([None, 0, 4, 25, 70]), "tokens": self.rng.choice([None, 0, 9, 75, 150])}
            )  # fmt: skip
        if not asks and not facts:
            return
        rows = self.both(
            f"reserve {list(asks.values())} after {facts}",
            lambda twin: [tuple(entry) for entry in twin.exchange(list(asks.values()), facts)],
        )
        self.reserved += [key for key, entry in zip(asks, rows, strict=True) if entry[0] == 1]

    def change_limits(self) -> None:
        period = self.rng.choice(PERIODS[:3])[0]
        usd, tokens = self.rng.choice([None, 20, 150]), self.rng.choice([None, 500])
        self.both(
            f"limits of {period}: {usd}, {tokens}",
            lambda twin: settling.set_limits(twin.connection, [period], usd, tokens),
        )
