"""The engine's store: the edge, where transactions begin and are committed.

Each operation is a function on a connection in the module of its subject (`runs`, `steps`, `transitions`, …).  It can
be part of a larger transaction of its caller; here it is one of its own.  `claim_and_finish` has one implementation per
database; everything else is SQLAlchemy statements that run on both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, TypeVar

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.poison import POISON_DEATHS
from gorgon_common.engine.records import (
    Activity,
    Buried,
    Checkpoint,
    Children,
    ClaimCapacity,
    Claimed,
    ClaimResult,
    Event,
    Expansion,
    Finish,
    KeyDecision,
    KeyState,
    NewRun,
    ReadyStep,
    Recovered,
    Refusal,
    Released,
    Renewal,
    Row,
    RunClosed,
    RunInfo,
    TransitionResult,
    Waiting,
    Weight,
)
from gorgon_common.engine.states import RunStatus
from gorgon_common.errors import Unavailable
from gorgon_common.persistence import (
    backlog,
    concurrency,
    max_parallel,
    recovery,
    results,
    runs,
    steps,
    transitions,
    waits,
    workers,
)
from gorgon_common.persistence.activity import activity, leads_for
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.hot_path import RETRIED, TRIES, HotPath
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.predicates import LOST_SECONDS
from gorgon_common.persistence.workers import Worker
from gorgon_common.scope import Scope

__all__ = ["Store", "Worker"]

Given = ParamSpec("Given")
Got = TypeVar("Got")


def _tried_again(method: Callable[Concatenate[Store, Given], Got]) -> Callable[Concatenate[Store, Given], Got]:
    """Retry a transaction that PostgreSQL rolled back because of a deadlock or a serialization failure.

    Deadlocks can happen: a child that ends locks itself and then its composite, while stopping a run locks rows in
    ascending order.
    """

    @functools.wraps(method)
    def call(self: Store, /, *args: Given.args, **kwargs: Given.kwargs) -> Got:
        for _ in range(TRIES - 1):
            try:
                return method(self, *args, **kwargs)
            except Unavailable as error:
                if not isinstance(getattr(error.__cause__, "orig", error.__cause__), RETRIED):
                    raise
        return method(self, *args, **kwargs)

    return call


class Store:
    """Rows of runs and steps.  Thread-safe.

    `poison_deaths`: the number of worker deaths that condemns a step, unless chance explains them.
    """

    def __init__(self, database: Database, *, poison_deaths: int = POISON_DEATHS) -> None:
        self.database = database
        self.poison_deaths = poison_deaths
        self._hot = HotPath(database)

    def close(self) -> None:
        """Close the connections."""
        self._hot.close()
        self.database.close()

    # Workers

    def register(self, name: str, *, target: str, home: str, queues: Sequence[int], slots: int, lease: float) -> Worker:
        """See `workers.register`."""
        with self.database.write() as connection:
            return workers.register(connection, name, target=target, home=home, queues=queues, slots=slots, lease=lease)

    def heartbeat(self, worker: Worker, lease: float, watermarks: Mapping[int, float]) -> Renewal:
        """See `workers.heartbeat`."""
        with self.database.write() as connection:
            return workers.heartbeat(connection, worker, lease, watermarks)

    def watermarks(self, *, home: str, target: str | None = None) -> dict[int, float]:
        """See `workers.watermarks`."""
        with self.database.read() as connection:
            return workers.watermarks(connection, home=home, target=target)

    def retire(self, worker: Worker) -> None:
        """See `workers.retire`."""
        with self.database.write() as connection:
            workers.retire(connection, worker)

    def vacate(self, home: str) -> None:
        """See `workers.vacate`."""
        with self.database.write() as connection:
            workers.vacate(connection, home)

    def cancelled(self, run_ids: Iterable[int]) -> set[int]:
        """See `runs.cancelled`."""
        with self.database.read() as connection:
            return runs.cancelled(connection, run_ids)

    def slots(self, target: str, home: str) -> dict[int, int]:
        """See `workers.slots`."""
        with self.database.read() as connection:
            return workers.slots(connection, target, home)

    # Runs

    def create(self, new: NewRun, rows: Sequence[Row], *, scope: Scope | None = None) -> tuple[int, bool]:
        """Insert a run with its steps; see `runs.create`.  Without a scope, the organisation is that of `new`."""
        with self.database.write(scope or Scope(org=new.org)) as connection:
            return runs.create(connection, new, rows)

    # Concurrency keys

    def admission(self, run: int) -> KeyDecision:
        """Return whether a run holds its concurrency key, and which runs have to be cancelled before it can."""
        with self.database.read() as connection:
            return concurrency.admission(connection, run)

    def turns(self, *, home: str, target: str) -> list[KeyState]:
        """Return the pending work for the concurrency keys that runs of a home hold or wait for."""
        with self.database.read() as connection:
            return concurrency.turns(connection, home=home, target=target)

    @_tried_again
    def take_turn(self, key: int, *, home: str) -> list[ReadyStep]:
        """Hand a key to the runs whose turn it is; return first steps of those in `home`; they are owed messages."""
        with self.database.write() as connection:
            return concurrency.take_turn(connection, key, home=home, lost=LOST_SECONDS)

    def info(self, run: int) -> RunInfo:
        """See `runs.info`."""
        with self.database.read() as connection:
            return runs.info(connection, run)

    def begin(self, run: int) -> None:
        """See `runs.begin`."""
        with self.database.write() as connection:
            runs.begin(connection, run)

    def plan_body(self, plan_hash: str) -> str:
        """See `runs.plan_body`."""
        with self.database.read() as connection:
            return runs.plan_body(connection, plan_hash)

    def failure(self, run: int) -> tuple[dict[str, Any] | None, bool]:
        """See `runs.failure`."""
        with self.database.read() as connection:
            return runs.failure(connection, run)

    # The hot path

    def claim_and_finish(
        self,
        worker: Worker,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> TransitionResult:
        """Claim and finish steps in one transaction.

        Steps that become ready are taken over as far as `keep` allows; the others are reported.  A finish with
        `skipped` rows must come alone.  Raises Unavailable; in that case nothing was changed.
        """
        if self.database.sqlite:
            with self.database.write() as connection:
                return transitions.claim_and_finish(
                    connection, worker, keep, claims=claims, finishes=finishes, suspects=suspects
                )
        return self._hot.claim_and_finish(worker, keep, claims=claims, finishes=finishes, suspects=suspects)

    @_tried_again
    def claim_limited(
        self,
        worker: Worker | None,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> ClaimResult:
        """Claim slow steps of a run with `max_parallel` while it has room: `ids` and waiting steps; see `parallel`."""
        with self.database.write() as connection:
            return max_parallel.claim_limited(
                connection, worker, run, ids, follows=follows, free=free, suspects=suspects, lost=LOST_SECONDS
            )

    def held_runs(self, *, home: str, target: str) -> list[int]:
        """Return the runs with `max_parallel` that have waiting steps."""
        with self.database.read() as connection:
            return max_parallel.waiting_runs(connection, home=home, target=target)

    # Other transitions of a claimed step

    def owned(self, worker: Worker) -> list[Claimed]:
        """See `steps.owned`."""
        with self.database.read() as connection:
            return steps.owned(connection, worker)

    def release(
        self, step: Claimed, *, weight: Weight | None = None, crashed: str | None = None
    ) -> Released | Buried | Refusal:
        """See `steps.release`."""
        with self.database.write() as connection:
            return steps.release(connection, step, weight=weight, crashed=crashed, poison_deaths=self.poison_deaths)

    def park(self, step: Claimed, snoozed: Snoozed) -> Waiting | Refusal:
        """See `steps.park`."""
        with self.database.write() as connection:
            return steps.park(connection, step, snoozed)

    def wake(self, ids: Sequence[int]) -> list[ReadyStep]:
        """See `steps.wake`."""
        with self.database.write() as connection:
            return steps.wake(connection, ids)

    @_tried_again
    def send_event(self, run: int, name: str, data: Any) -> list[ReadyStep]:
        """See `runs.send_event`."""
        with self.database.write() as connection:
            return runs.send_event(connection, run, name, data)

    def take_event(self, run: int, name: str, step: int) -> Event | None:
        """Return the event that a step has taken, or takes now; None where none is there."""
        with self.database.write() as connection:
            return waits.take(connection, run, name, step)

    @_tried_again
    def expand(
        self,
        step: Claimed,
        rows: Sequence[Row],
        *,
        phase: str,
        round: int = 0,
        items: Sequence[Any] | None = None,
        window: int | None = None,
        reduce: int | None = None,
        calls: Sequence[CallRecord] = (),
    ) -> Children | Refusal:
        """See `steps.expand`."""
        with self.database.write() as connection:
            return steps.expand(
                connection, step, rows, phase=phase, round=round, items=items, window=window, reduce=reduce, calls=calls
            )

    # Stopping

    @_tried_again
    def fail(
        self,
        worker: Worker,
        keep: ClaimCapacity,
        finish: Finish,
        *,
        container: int,
        keeps: frozenset[int],
        run_fails: bool,
    ) -> TransitionResult:
        """See `transitions.fail`."""
        with self.database.write() as connection:
            return transitions.fail(
                connection, worker, keep, finish, container=container, keeps=keeps, run_fails=run_fails
            )

    @_tried_again
    def stop(
        self, run: int, *, gate: int, keeps: frozenset[int], error: Mapping[str, Any] | None, reason: str
    ) -> list[ReadyStep]:
        """See `runs.stop`."""
        with self.database.write() as connection:
            return runs.stop(connection, run, gate=gate, keeps=keeps, error=error, reason=reason)

    @_tried_again
    def finish_run(
        self,
        worker: Worker,
        finish: Finish,
        *,
        status: RunStatus,
        outputs: Any,
        error: Mapping[str, Any] | None,
    ) -> RunClosed | Refusal:
        """See `runs.finish_run`."""
        with self.database.write() as connection:
            return runs.finish_run(connection, worker, finish, status=status, outputs=outputs, error=error)

    def tell(
        self, run: int, row: int | None, kind: str, message: str | None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Write one entry to the run's journal; `data` is for machines."""
        with self.database.write() as connection:
            tell(connection, run, row, kind, message, data)

    # Reading finished steps

    def checkpoints(self, ids: Sequence[int]) -> dict[int, Checkpoint]:
        """See `results.checkpoints`."""
        with self.database.read() as connection:
            return results.checkpoints(connection, ids)

    def states(self, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
        """See `steps.states`."""
        with self.database.read() as connection:
            return steps.states(connection, ids)

    def adoptable(self, root: int, fingerprint: str) -> Checkpoint | None:
        """See `results.adoptable`."""
        with self.database.read() as connection:
            return results.adoptable(connection, root, fingerprint)

    def expansions(self, step: int) -> list[Expansion]:
        """See `results.expansions`."""
        with self.database.read() as connection:
            return results.expansions(connection, step)

    def place(self, step: int) -> tuple[int, int | None, int | None]:
        """See `steps.place`."""
        with self.database.read() as connection:
            return steps.place(connection, step)

    # The canvas

    def attach(self, ids: Sequence[int]) -> None:
        """See `steps.attach`."""
        with self.database.write() as connection:
            steps.attach(connection, ids)

    def detach(self, ids: Sequence[int]) -> list[ReadyStep]:
        """See `steps.detach`."""
        with self.database.write() as connection:
            return steps.detach(connection, ids)

    def detach_all(self, *, home: str, target: str | None = None) -> None:
        """See `steps.detach_all`."""
        with self.database.write() as connection:
            steps.detach_all(connection, home=home, target=target)

    # The backlog

    def enqueue(self, heads: Sequence[ReadyStep], team: str, *, first: bool = False) -> None:
        """Put ready steps on the backlog, in fair order among teams.  `first`: put them before all others (recovered
        steps).
        """
        if heads:
            with self.database.write() as connection:
                backlog.put(connection, heads, team, first=first)

    def dequeue(self, queue: int, count: int, *, target: str, home: str) -> list[ReadyStep]:
        """Take the next steps of a queue from the backlog; they are owed a message."""
        with self.database.write() as connection:
            return backlog.take(connection, queue, count, target=target, home=home)

    def shelved(self) -> dict[int, int]:
        """Return queue → number of steps on the backlog."""
        with self.database.statements() as connection:
            return backlog.sizes(connection)

    # The sweep

    def lead(self, name: str, owner: str, seconds: float) -> bool:
        """Become or remain the leader for a job, for `seconds`.  Returns whether `owner` is the leader."""
        with self.database.statements() as connection:
            return recovery.lead(connection, name, owner, seconds)

    def leads_for(self, name: str) -> float:
        """Return for how many more seconds a job has a leader; 0 if it has none."""
        with self.database.statements() as connection:
            return leads_for(connection, name)

    def activity(self, *, home: str, target: str) -> Activity:
        """Return the activity in a home's live runs.  One query, which tells whether a sweep has anything to do."""
        with self.database.statements() as connection:
            return activity(connection, home=home, target=target)

    @_tried_again
    def reap(
        self, *, home: str, target: str | None = None, sparing: int | None = None, thorough: bool = True
    ) -> Recovered:
        """See `transitions.reap`."""
        with self.database.write() as connection:
            return transitions.reap(
                connection,
                home=home,
                target=target,
                sparing=sparing,
                thorough=thorough,
                poison_deaths=self.poison_deaths,
            )

    def overdue(
        self, *, home: str, target: str | None = None, limit: int = 2000, all_ready: bool = False
    ) -> tuple[list[tuple[ReadyStep, datetime]], list[int]]:
        """Return ready steps whose message may be lost (with the time since when), and waiting steps that are due to
        wake.

        `all_ready`: return every ready step that was published, however recently, because the broker has lost all
        messages.
        """
        with self.database.read() as connection:
            return recovery.overdue(connection, home=home, target=target, limit=limit, all_ready=all_ready)

    def redispatch(self, ids: Sequence[int]) -> list[int]:
        """Record that the messages of ready steps are sent again; returns the steps that are still ready."""
        with self.database.write() as connection:
            return recovery.redispatch(connection, ids)

    def expired_runs(self, *, home: str, target: str | None = None) -> list[int]:
        """Return the live runs whose deadline has passed."""
        with self.database.read() as connection:
            return recovery.expired(connection, home=home, target=target)

    def finished(self, run: int) -> tuple[bool, list[tuple[int, int]]]:
        """See `runs.finished`."""
        with self.database.read() as connection:
            return runs.finished(connection, run)

    @_tried_again
    def close_orphan(self, run: int, *, cancelled: bool = False) -> bool:
        """See `runs.close_orphan`."""
        with self.database.write() as connection:
            return runs.close_orphan(connection, run, cancelled=cancelled)

    def orphaned(self, run: int) -> bool:
        """See `runs.is_orphaned`."""
        with self.database.read() as connection:
            return runs.is_orphaned(connection, run)
