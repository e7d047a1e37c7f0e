"""The loop of one worker process: claim the steps that messages name, run them, commit, continue with their successors.

Two techniques keep a step cheap:

* Group commit without a timer: the thread that holds the commit lock also commits what the other threads have queued.
* Hand-over: a successor that becomes ready in such a commit, belongs to this worker's queues and finds a free slot is
  claimed in the same transaction and run here, without a message.

A message is complete only when all the work it led to in this process is complete; a canvas relies on that.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import ParamSpec, Protocol, TypeVar, assert_never

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine import reporting
from gorgon_common.engine.budget import UNSENT
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.group_commit import GroupCommit
from gorgon_common.engine.outage import Outage
from gorgon_common.engine.outcomes import RETRY, ConditionMet, Done, Expanded, Failed, Outcome, RunFinished, Snoozed
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import (
    ROW_BITS,
    Buried,
    Children,
    ClaimCapacity,
    Claimed,
    Finish,
    ReadyStep,
    Refusal,
    Released,
    Result,
    RunClosed,
    TransitionResult,
    Waiting,
    Weight,
    step_id,
)
from gorgon_common.engine.short_steps import BusyShare, LateSteps, Line
from gorgon_common.engine.slots import ReadyQueue
from gorgon_common.engine.states import StepStatus
from gorgon_common.engine.store_ports import Member, Steps
from gorgon_common.engine.timer import Timer
from gorgon_common.errors import ConfigurationError, GorgonError, PlanTooNew, Unavailable
from gorgon_common.logs import get_logger

KEEP_FAST = 64
BATCH = 256
BATCH_SECONDS = 0.002
TURN_SECONDS = 0.005
"""How long results of slow steps wait for the results of the steps behind them."""
SLEEP_IN_PLACE = 0.3
"""A step sleeps through shorter waits in its slot; for longer ones it is parked."""
TIMER_SECONDS = 5.0
"""Shorter waits end with a timer of the worker, longer ones with the sweep: thousands of steps may wait for a quota."""
CROWDED_SECONDS = 0.1
"""Seconds without pulls from the backlog after a step had to wait long: another step would only wait as well."""
CROWDED_PULL = 2
LONG_WAIT = 1.0
COMMIT_RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses while the database is unavailable; the last one repeats.  Each is shortened at random by up to half."""
SLOT_SECONDS = 0.5
"""How long a message waits for a slot before its steps go to the backlog."""
DOUBTS = 15
Given = ParamSpec("Given")
Got = TypeVar("Got")

log = get_logger(__name__)


class Executes(Protocol):
    """Runs a step; implemented by `step.Executor`."""

    def execute(self, step: Claimed) -> Outcome:
        """Return the step's outcome."""
        ...


@dataclass(slots=True)
class Job:
    """A message, or work that belongs to no message here.  It is complete when `open`, its count of steps, is 0."""

    open: int = 0
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Request:
    claims: Sequence[int]
    finishes: Sequence[Finish]
    job: Job
    suspects: bool = False
    slots: bool = False
    """Its claims take slots; claims without a free slot are moved to `later`."""
    later: Sequence[int] = ()
    vacated: Sequence[int] = ()
    """Runs with `max_parallel` of which a step has stopped running without having ended."""
    counted: Sequence[int] = ()
    """Its claims that belong to such runs."""
    suspected: Sequence[int] = ()
    """Its claims that are suspects and must be claimed one at a time."""
    mine: list[Claimed] = field(default_factory=list)
    ready: list[ReadyStep] = field(default_factory=list)


class StepRunner:
    """Runs steps for one worker process."""

    def __init__(
        self,
        store: Steps,
        knowledge: RunCache,
        worker: Member,
        executor: Executes,
        publisher: Publisher,
        *,
        slots: int,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
        next_up: ReadyQueue | None = None,
    ) -> None:
        self.next_up = next_up or ReadyQueue(slots)
        self.store = store
        self.knowledge = knowledge
        self.worker = worker
        self.executor = executor
        self.publisher = publisher
        self.slots = slots
        self.sleep = sleep
        self.chance = chance
        self.held: dict[int, Claimed] = {}
        """The steps that this process holds, by id."""
        self.backlog_seen = False
        self.renew: Callable[[], None] = lambda: None
        """Renews this worker's lease; called when a claim finds that the lease has expired."""
        self.worked: Callable[[], None] = lambda: None
        """Called after each transaction that claims or ends steps, in the committing thread; it must not block."""
        self._crowded = 0.0
        """When a step last had to wait for a quota, on the monotonic clock."""
        self.doubts = 0
        """How many more times `reconcile` must check, after a lost database reply or an internal error."""
        self._stray: dict[int, int] = {}
        self._running = 0  # incremented only by commits, or while they are paused
        self._free = threading.Condition()
        self.commits = GroupCommit(self._round, alone=_alone, patience=self._patience)
        self._suspect = threading.Lock()
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="gorgon-step")
        self._alarm = Timer(self._wake)
        self._late = LateSteps()
        self.busy = BusyShare()
        self._executing: set[int] = set()
        """Slow steps that have begun; others of this process wait for their turn."""
        self.closing = False
        """Take no new work; steps that are held may end."""
        self.outage = Outage(leaves=bool(worker.home))
        """Of the database.  A process that runs only its own run gives up if the database's file cannot be used."""
        self._ended = False
        """The process is ending: nothing waits for the database any more."""

    # Messages

    def handle(self, ids: Sequence[int], *, fast: bool = False) -> None:
        """Serve a message: claim its steps that are ready and fit, then run them and their successors.

        Steps that do not fit go back to the publisher.  `fast`: the steps take no slots.
        """
        job = self._serve(ids, fast=fast)
        if job.open:
            job.over.wait()

    def _serve(self, ids: Sequence[int], *, fast: bool) -> Job:
        job = Job()
        if not fast and not self._room():
            self.publisher.give_back(ids)
            return job
        request = self._claim_and_finish(_Request(ids, (), job, slots=not fast))
        if request.later:
            self.publisher.give_back(request.later)
        self._publish(request.ready)
        self._go_on(job, request.mine)
        self._suspects(job, request.suspected, fast=fast)
        return job

    def _room(self) -> bool:
        """Tell whether a slot is free, after waiting briefly for one."""
        with self._free:
            self._free.wait_for(lambda: self._running < self.slots or self.closing, SLOT_SECONDS)
            return self._running < self.slots and not self.closing

    def _suspects(self, job: Job, ids: Sequence[int], *, fast: bool) -> None:
        """Claim steps whose owners died twice, one at a time; if this worker dies too, the culprit is known."""
        for key in ids:
            with self._suspect:
                request = self._claim_and_finish(_Request([key], (), job, suspects=True, slots=not fast))
                if request.later:
                    self.publisher.give_back(request.later)
                self._publish(request.ready)
                self._go_on(job, request.mine)  # a single step runs in this thread, so it has ended by now

    def run_here(self, heads: Sequence[ReadyStep]) -> None:
        """Take over ready steps that need no provider, without a message."""
        if heads and not self.closing:
            self._pool.submit(self._guarded, [head.id for head in heads])

    def _guarded(self, ids: Sequence[int]) -> None:
        try:
            self._serve(ids, fast=True)  # does not wait: its slow steps need the threads of this pool
        except Exception as error:  # noqa: BLE001  a pool thread has no caller to raise to; the sweep finds the steps
            log.error("steps were not taken over", error=str(error))

    # Running

    def _go_on(self, job: Job, mine: Sequence[Claimed]) -> None:
        """Run steps and their successors in this thread, and additional slow steps in other threads."""
        local = list(mine)
        while local:
            slow = [step for step in local if step.weight == Weight.SLOW]
            fast = [step for step in local if step.weight != Weight.SLOW]
            if fast:
                self._elsewhere(job, slow)
                local = self._batch(job, fast)
            elif len(slow) > 1 and self.busy.high:
                local = self._in_turn(job, slow)
            else:
                self._elsewhere(job, slow[1:])
                local = self._one(job, slow[0])

    def _elsewhere(self, job: Job, steps: Sequence[Claimed]) -> None:
        """Run slow steps in other threads: in one if they mainly compute, else each in its own."""
        if steps and self.busy.high:
            self._pool.submit(self._slow, job, steps)
            return
        for step in steps:
            self._pool.submit(self._slow, job, [step])

    def _give_up(self, job: Job, steps: Sequence[Claimed], why: BaseException) -> None:
        """Release steps after an internal error; otherwise this worker's lease would hold them forever.

        The error counts like the death of a worker, or a step that breaks its workers would be retried forever.
        """
        crashed = None if isinstance(why, Unavailable) else repr(why)[:500]
        lost = [step for step in steps if self._holds(step)]
        for step in lost:
            try:
                self._given_back(self.store.release(step, crashed=crashed))
            except GorgonError as error:
                self.doubts = DOUBTS
                if self.outage.final is None:  # else the process ends with what is the matter
                    log.error(
                        "a step could not be given back", error=error.message, **reporting.named(self.knowledge, step)
                    )
        self._left(job, lost)

    def _given_back(self, answer: Released | Buried | Refusal) -> None:
        match answer:
            case Released(head):
                self._publish([head])
            case Buried(ready):
                self._publish(ready)
            case Refusal():
                pass  # the step's current owner continues it
            case _:
                assert_never(answer)

    def _slow(self, job: Job, steps: Sequence[Claimed]) -> None:
        try:
            self._go_on(job, steps)
        except Exception as error:  # noqa: BLE001  a pool thread has no caller to raise to
            log.error("steps were given up", error=str(error), **reporting.named(self.knowledge, steps[0]))

    def _one(self, job: Job, step: Claimed) -> list[Claimed]:
        try:
            return self._fold(job, step, self._executed(step))
        except PlanTooNew as error:  # a worker of that version will run it
            self._give_up(job, [step], error)
            return []
        except BaseException as error:
            self._give_up(job, [step], error)
            raise

    def _executed(self, step: Claimed) -> Outcome:
        """Run a slow step, which leaves its slot afterwards; return its outcome."""
        self._executing.add(step.id)
        since, computed, beside = time.perf_counter(), time.thread_time(), len(self._executing)
        try:
            outcome = self.executor.execute(step)
            while isinstance(outcome, Snoozed) and outcome.seconds <= SLEEP_IN_PLACE and not _made(outcome.calls):
                self.sleep(outcome.seconds)
                outcome = self.executor.execute(step)
            return outcome
        finally:
            seconds = time.perf_counter() - since
            self.next_up.measured(seconds)
            self.busy.measured(seconds, time.thread_time() - computed, beside)
            self._executing.discard(step.id)
            self._free_slot(step)

    def _in_turn(self, job: Job, steps: Sequence[Claimed]) -> list[Claimed]:
        """Run slow steps that mainly compute one after another, and commit them together."""
        line = Line(steps)
        with self._late.watching(line, lambda waiting: self._elsewhere(job, waiting)):
            finishes, mine = self._run(job, line, self._executed, TURN_SECONDS)
        return self._commit_run(job, finishes, mine)

    def _batch(self, job: Job, steps: Sequence[Claimed]) -> list[Claimed]:
        """Run fast steps and commit them together."""
        finishes, mine = self._run(job, Line(steps), self.executor.execute, BATCH_SECONDS)
        return self._commit_run(job, finishes, mine)

    def _run(
        self, job: Job, line: Line, execute: Callable[[Claimed], Outcome], seconds: float
    ) -> tuple[list[Finish], list[Claimed]]:
        """Run the steps of a line for about `seconds`; return what to commit, and the steps to continue with."""
        finishes: list[Finish] = []
        mine: list[Claimed] = []
        until = time.perf_counter() + seconds
        while (step := line.next()) is not None:
            try:
                outcome = execute(step)
                if isinstance(outcome, Done) and not outcome.skipped:
                    finishes.append(Finish(step, outcome.result))
                else:
                    mine += self._fold(job, step, outcome)
            except Exception as error:  # noqa: BLE001  the other steps of the batch continue
                log.error("a step was given up", error=repr(error), **reporting.named(self.knowledge, step))
                self._give_up(job, [step], error)
            except BaseException as error:
                self._give_up(job, [*(finish.step for finish in finishes), step, *mine, *line.rest()], error)
                raise
            if len(finishes) >= BATCH or time.perf_counter() > until:
                mine += line.rest()
                break
        return finishes, mine

    def _commit_run(self, job: Job, finishes: Sequence[Finish], mine: Sequence[Claimed]) -> list[Claimed]:
        try:
            return [*mine, *(self._commit_finishes(job, finishes) if finishes else ())]
        except BaseException as error:
            self._give_up(job, [*(finish.step for finish in finishes), *mine], error)
            raise

    def _fold(self, job: Job, step: Claimed, outcome: Outcome) -> list[Claimed]:
        """Commit the outcome; return the steps that this thread continues with."""
        mine = self._folded(job, step, outcome)
        if not isinstance(outcome, Done):  # the slot was freed without a commit that could have refilled it
            self.send_kept()
        if isinstance(outcome, (Snoozed, Expanded, Failed)) and step.weight == Weight.SLOW and self._limited(step.run):
            other = Job()
            request = self._claim_and_finish(_Request((), (), other, vacated=(step.run,)))
            self._publish(request.ready)
            self._elsewhere(other, request.mine)
        return mine

    def _limited(self, run: int) -> bool:
        """Tell whether a run limits how many of its steps are in progress at once."""
        return self.knowledge.run(run).plan.limits.get("max_parallel") is not None

    def _folded(self, job: Job, step: Claimed, outcome: Outcome) -> list[Claimed]:
        match outcome:
            case Done(result, skipped):
                return self._commit_finishes(job, [Finish(step, result, skipped)])
            case ConditionMet():
                return self._passed(job, step)
            case Snoozed():
                return self._park(job, step, outcome)
            case Expanded():
                return self._expand(job, step, outcome)
            case Failed(result, container, run_fails):
                run = self.knowledge.run(step.run)
                advance = self._stored(
                    self.store.fail,
                    self.worker,
                    ClaimCapacity(KEEP_FAST),
                    Finish(step, result, {}),
                    container=container,
                    keeps=run.keeps if run_fails else frozenset(),
                    run_fails=run_fails,
                )
                reporting.ended(self.knowledge, [Finish(step, result)], advance.refused)
                return self._absorb(job, step, advance)
            case RunFinished(result, status, outputs, error):
                finish = Finish(step, result)
                answer = self._stored(
                    self.store.finish_run, self.worker, finish, status=status, outputs=outputs, error=error
                )
                self._left(job, [step])
                if isinstance(answer, RunClosed):
                    self._publish(answer.ready)
                return []

    def _commit_finishes(self, job: Job, finishes: Sequence[Finish]) -> list[Claimed]:
        request = self._claim_and_finish(_Request((), finishes, job))
        self._left(job, [finish.step for finish in finishes])
        self._publish(request.ready)
        return request.mine

    def _absorb(self, job: Job, step: Claimed, advance: TransitionResult) -> list[Claimed]:
        """Apply the result of a transaction that was made outside the group commit."""
        self._take(advance.mine, job)
        self._left(job, [step])
        self._publish(advance.ready)
        return advance.mine

    def _passed(self, job: Job, step: Claimed) -> list[Claimed]:
        """Run a step whose condition holds: here if the queue is ours and a slot is free, else through a message."""
        if step.queue in self.worker.queues and not self._limited(step.run) and self._slot():
            # It was claimed as an inline step, so the journal does not yet record that it has started.
            started = {"attempt": step.attempt}
            try:
                self._stored(self.store.tell, step.run, step.row, "step.started", None, started)
            except BaseException:
                self._free_slot(replace(step, weight=int(Weight.SLOW)))
                raise
            return [self._now(step)]
        answer = self._stored(self.store.release, step, weight=Weight.SLOW)
        self._left(job, [step])
        self._given_back(answer)
        return []

    def _slot(self) -> bool:
        """Take a slot if one is free."""
        with self.commits.paused(), self._free:
            if self._running >= self.slots or self.closing:
                return False
            self._running += 1
            return True

    def _now(self, step: Claimed) -> Claimed:
        slow = replace(step, weight=int(Weight.SLOW))
        self.held[step.id] = slow
        return slow

    def _park(self, job: Job, step: Claimed, outcome: Snoozed) -> list[Claimed]:
        answer = self._stored(self.store.park, step, outcome)
        if answer is Refusal.STOPPED:
            return self._stopped(job, step, f"the run stopped while it waited: {outcome.message}")
        self._left(job, [step])
        if isinstance(answer, Waiting):
            reporting.parked(self.knowledge, step, outcome)
        else:
            reporting.fenced(self.knowledge, step)
        if outcome.reason != RETRY and outcome.seconds > LONG_WAIT:
            self._crowded = time.monotonic()
        if isinstance(answer, Waiting) and not self.closing:
            self.publisher.departed(step)
            if outcome.room is not None or outcome.seconds > TIMER_SECONDS:
                return []  # it is woken when the budget has room, or by the sweep
            self._alarm.set(outcome.seconds, step.id)
        return []

    def _stopped(self, job: Job, step: Claimed, reason: str) -> list[Claimed]:
        """End a step as cancelled: its claim holds, but its run has stopped."""
        return self._commit_finishes(job, [Finish(step, Result(StepStatus.CANCELLED, reason=reason))])

    def _wake(self, keys: Sequence[int]) -> None:
        try:
            self._publish(self.store.wake(keys))
        except GorgonError as error:
            log.warning("waiting steps are left to the sweep", steps=len(keys), error=error.message)

    def _expand(self, job: Job, step: Claimed, outcome: Expanded) -> list[Claimed]:
        answer = self._stored(
            self.store.expand,
            step,
            outcome.rows,
            phase=outcome.phase,
            round=outcome.round,
            items=outcome.items,
            window=outcome.window,
            reduce=outcome.reduce,
            calls=outcome.result.calls if outcome.result else (),
        )
        match answer:
            case Refusal.STOPPED:
                return self._stopped(job, step, "the run stopped before it began")
            case Refusal.LOST:  # the step is ready again or claimed elsewhere; any report on it here would be wrong
                reporting.fenced(self.knowledge, step)
                self._left(job, [step])
                return []
            case Children(heads, base):
                reporting.expanded(self.knowledge, step, outcome)
                self.knowledge.run(step.run).learn_places(base, outcome.rows)
                return self._expanded(job, step, heads, None if outcome.reduce is None else base + outcome.reduce)
            case _:
                assert_never(answer)

    def _expanded(self, job: Job, step: Claimed, heads: Sequence[ReadyStep], reduce: int | None) -> list[Claimed]:
        inline = [head.id for head in heads if head.weight == Weight.INLINE]
        sent = [head for head in heads if head.weight != Weight.INLINE]
        mine: list[Claimed] = []
        if inline:
            begun = self._claim_and_finish(_Request(inline, (), job))
            mine = begun.mine
            self._publish(begun.ready)
        self._left(job, [step])
        if sent:
            self.publisher.publish(sent, join=None if reduce is None else step_id(step.run, reduce))
        return mine

    def _publish(self, heads: Sequence[ReadyStep]) -> None:
        """Send ready steps, or keep them for the next slots if all are taken and steps are short."""
        if self.closing or self._running < self.slots:
            self._send(heads)
            return
        self._send(self.next_up.keep(heads, self.worker.queues))
        if self._running < self.slots:  # a slot became free in the meantime, and its commit may have missed them
            self.send_kept()

    def _send(self, heads: Sequence[ReadyStep]) -> None:
        if not heads:
            return
        try:
            self.publisher.publish(heads)
        except Unavailable as error:
            log.warning("messages are left to the sweep", steps=len(heads), error=error.message)

    def send_kept(self) -> None:
        """Send the ready steps that wait for a slot here: every few seconds, and when a slot might not become free."""
        self._send(self.next_up.take())

    # Accounting

    def _take(self, mine: Sequence[Claimed], job: Job) -> None:
        slow = 0
        for step in mine:
            self.held[step.id] = step
            slow += step.weight == Weight.SLOW
            self.knowledge.begin(step.run)
        reporting.claimed(self.knowledge, mine)
        with self._free:
            self._running += slow
            job.open += len(mine)
            if job.open:
                job.over.clear()

    def _free_slot(self, step: Claimed) -> None:
        if step.weight == Weight.SLOW:
            with self._free:
                self._running -= 1
                self._free.notify()

    def _left(self, job: Job, steps: Sequence[Claimed]) -> None:
        for step in steps:
            if self._holds(step):
                del self.held[step.id]
        with self._free:
            job.open -= len(steps)
            if job.open == 0:
                job.over.set()
            if self.closing:
                self._free.notify_all()

    def _holds(self, step: Claimed) -> bool:
        """Tell whether this exact claim is held; this process may hold a newer claim of the same step."""
        held = self.held.get(step.id)
        return held is not None and held.token == step.token

    # Group commit

    def _claim_and_finish(self, request: _Request) -> _Request:
        """Commit the request together with all queued ones; returns it when it has been served.  Raises its error."""
        return self.commits.do(request)

    def _patience(self) -> float:
        """Return how long a commit waits for other steps that are about to end."""
        return self.next_up.patience if self._running else 0.0

    def _round(self, batch: Sequence[_Request]) -> Sequence[_Request]:
        """Commit some requests in one transaction."""
        try:
            pulls = self.backlog_seen or _frees_a_slot(batch)
            advance = self._committed(batch, pulls=pulls)
            self._share(batch, advance, alone=len(batch) == 1 and not pulls and not advance.counted)
        except Exception:
            self.doubts = DOUBTS
            raise
        finally:
            self.worked()
        return batch

    def _committed(self, batch: Sequence[_Request], *, pulls: bool) -> TransitionResult:
        slots = free = 0 if self.closing else max(0, self.slots - self._running)
        for request in batch:
            if request.slots:
                request.claims, request.later = request.claims[:free], [*request.claims[free:], *request.later]
                free -= len(request.claims)
        claims = [key for request in batch for key in request.claims]
        finishes = [finish for request in batch for finish in request.finishes]
        vacated = {run for request in batch for run in request.vacated}
        waiting = [head.id for head in self.next_up.take(free)]
        claims += waiting
        free -= len(waiting)
        if not claims and not finishes:
            advance = TransitionResult()
            self._claim_limited(advance, vacated, slots, suspects=False)
            return advance
        keep = ClaimCapacity(0 if self.closing else KEEP_FAST, free, self._pull(free) if pulls else 0)
        suspects = any(request.suspects for request in batch)
        advance = self._stored(
            self.store.claim_and_finish, self.worker, keep, claims=claims, finishes=finishes, suspects=suspects
        )
        if advance.lapsed and not self.closing:
            self._stored(self.renew)
            self._retake(advance, claims, suspects=suspects)
        if advance.doubtful:
            self.doubts = DOUBTS
        reporting.ended(self.knowledge, finishes, advance.refused)
        for request in batch:
            request.suspected = [key for key in request.claims if key in advance.suspects]
        ended = {finish.step.run for finish in finishes if finish.step.weight == Weight.SLOW}
        vacated |= {run for run in ended if self._limited(run)}
        if vacated or advance.counted:
            for request in batch:
                request.counted = advance.counted
            taken = sum(step.weight == Weight.SLOW for step in advance.mine)
            self._claim_limited(advance, vacated, slots - taken, suspects=suspects)
        return advance

    def _retake(self, advance: TransitionResult, claims: Sequence[int], *, suspects: bool) -> None:
        """Repeat the claims after the lease was renewed; adds the result to `advance`."""
        again = self._stored(
            self.store.claim_and_finish, self.worker, ClaimCapacity(0), claims=claims, suspects=suspects
        )
        advance.mine += again.mine
        advance.counted += again.counted
        advance.suspects += again.suspects
        advance.lapsed = again.lapsed
        advance.doubtful |= again.doubtful

    def _claim_limited(self, advance: TransitionResult, vacated: set[int], free: int, *, suspects: bool) -> None:
        """Claim steps of runs with `max_parallel` as far as they have room; adds the result to `advance`."""
        wanted: dict[int, list[int]] = {run: [] for run in vacated}
        for key in advance.counted:
            wanted.setdefault(key >> ROW_BITS, []).append(key)
        for run in sorted(wanted):
            follows = {head.id for head in advance.ready if head.id >> ROW_BITS == run and head.weight == Weight.SLOW}
            admitted = self._stored(
                self.store.claim_limited,
                self.worker,
                run,
                wanted[run],
                follows=list(follows),
                free=max(0, free),
                suspects=suspects,
            )
            advance.ready = [*(head for head in advance.ready if head.id not in follows), *admitted.ready]
            advance.mine += admitted.mine
            free -= len(admitted.mine)
            if admitted.held and not self.closing:
                self._pool.submit(self._held, admitted.held)

    def _held(self, ids: Sequence[int]) -> None:
        try:
            self.publisher.held(ids)
        except GorgonError as error:
            log.warning("what follows waiting steps is left to the sweep", steps=len(ids), error=error.message)

    def _pull(self, free: int) -> int:
        """Return how many steps to pull from the backlog: few if recent steps only had to wait."""
        since = time.monotonic() - self._crowded
        if since < CROWDED_SECONDS:
            return 0
        return min(free, CROWDED_PULL) if since < 20 * CROWDED_SECONDS else free

    def _stored(self, call: Callable[Given, Got], *args: Given.args, **kwargs: Given.kwargs) -> Got:
        """Run a transaction, and repeat it while the database is unavailable.  Raises Unavailable only if this process
        ends.

        Repeating is safe: either nothing was committed, or the reply was lost and the fence refuses the duplicate.
        """
        since: float | None = None
        for pause in chain(COMMIT_RETRY_SECONDS, repeat(COMMIT_RETRY_SECONDS[-1])):
            try:
                answer = call(*args, **kwargs)
            except (Unavailable, ConfigurationError) as error:
                self.doubts = DOUBTS
                since = self.outage.failed(error, since=since)
                self.closing |= self.outage.final is not None
                if self._ended or self.outage.final is not None or isinstance(error, ConfigurationError):
                    raise
                self.sleep(pause * (1 - self.chance() / 2))
            else:
                self.outage.passed()
                return answer
        raise AssertionError("unreachable")

    def reconcile(self) -> None:
        """Release steps that the store assigns to this worker but that nothing here runs.  Call it every few seconds.

        A step is released when two checks in a row find it; after the first, it may still be on its way here.
        """
        self.send_kept()
        if not self.doubts:
            return
        self.doubts -= 1
        owned = {step.id: step for step in self.store.owned(self.worker)}
        held = {key: step.token for key, step in list(self.held.items())}
        stray = {key: step.token for key, step in owned.items() if held.get(key) != step.token}
        lost = [owned[key] for key, token in stray.items() if self._stray.get(key) == token]
        self._stray = stray
        for step in lost:
            log.warning("a step was ours and nobody ran it", **reporting.named(self.knowledge, step))
            reporting.recovered(self.knowledge, [step], "stray")
            self._given_back(self.store.release(step))

    def _share(self, batch: Sequence[_Request], advance: TransitionResult, *, alone: bool) -> None:
        """Distribute the result of a batch among its requests; `alone`: its one request gets everything."""
        # Only requests with finishes publish the steps that have become ready.
        first = next((request for request in batch if request.finishes), batch[0])
        if alone:
            self._take(advance.mine, first.job)
            first.mine, first.ready = advance.mine, advance.ready
            return
        first.ready = advance.ready
        claimed = {key: request for request in batch for key in request.claims}
        follows = self._follows(batch)
        strays: list[Claimed] = []
        for step in advance.mine:
            owner = (
                claimed.get(step.id)
                or follows.get((step.run, step.row))
                or follows.get((step.run, -(step.parent or 0)))
            )
            if owner is None:
                strays.append(step)
            else:
                self._take([step], owner.job)
                owner.mine.append(step)
        if strays:  # no message here waits for them
            job = Job()
            self._take(strays, job)
            self._elsewhere(job, strays)

    def _follows(self, batch: Sequence[_Request]) -> dict[tuple[int, int], _Request]:
        """Map (run, row) to the request whose finish may have readied it; a negative row stands for its children."""
        found: dict[tuple[int, int], _Request] = {}
        for request in batch:
            for finish in request.finishes:
                step = finish.step
                run = self.knowledge.run(step.run)
                if step.parent is not None:
                    found[step.run, step.parent] = request
                    found[step.run, -step.parent] = request
                base = 0 if step.parent is None else step.row - step.node
                for successor in run.successors[step.node]:
                    found[step.run, base + successor] = request
        return found

    # Ending

    def drain(self, seconds: float) -> bool:
        """Take no new work and wait for all held steps, whatever brought them in.  Returns whether all have ended."""
        until = time.monotonic() + seconds
        self.closing = True
        self.publisher.here = None  # steps that become ready from now on go to other workers
        self.send_kept()
        with self._free:
            self._free.notify_all()
        with self.commits.paused(max(0.0, seconds)) as paused:
            if not paused:
                return False  # a transaction that began earlier may still claim steps
        with self._free:
            return self._free.wait_for(lambda: not self.held, max(0.0, until - time.monotonic()))

    def give_back(self) -> None:
        """Release the steps that are still running.  Their results count until another worker has started them."""
        for step in list(self.held.values()):
            try:
                self._given_back(self.store.release(step))
            except GorgonError as error:
                log.warning("a step is left to its lease", step=step.id, error=error.message)
                return  # the database is unavailable, and each further release would take as long to fail

    def close(self, seconds: float) -> bool:
        """Take no new work, wait for held steps, then release the rest.  Returns whether all have ended."""
        ended = self.drain(seconds)
        self._ended = True
        if not ended:
            self.give_back()
        self._alarm.close()
        self._late.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return ended


def _frees_a_slot(batch: Sequence[_Request]) -> bool:
    """Tell whether a slow step has ended: its slot may serve steps on a backlog that this process has not seen yet."""
    return any(finish.step.weight == Weight.SLOW for request in batch for finish in request.finishes)


def _made(calls: Sequence[CallRecord]) -> bool:
    """Tell whether any call was made.  Reservations alone do not count: they remain for the next try in place."""
    return any(call.outcome != UNSENT for call in calls)


def _alone(request: _Request) -> bool:
    return request.suspects or any(finish.skipped for finish in request.finishes)
