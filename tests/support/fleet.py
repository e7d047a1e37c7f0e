"""Worker processes simulated in one process: real stores, step runners and sweeps around a broker that is a list.

The real canvas adapter creates the messages.  The list replaces Redis, so a test can lose, repeat and reorder them.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from celery.canvas import Signature, _chain, chord, group
from sqlalchemy import select

from gorgon_common import messages
from gorgon_common.canvas import lowering
from gorgon_common.canvas.celery import CeleryCanvas, make_app
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.costs.usage import Usage
from gorgon_common.engine import rows
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.kinds.base import StepServices
from gorgon_common.engine.ports import AgentCall, AgentReply, CommandCall, CommandResult, Lowered
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import step_id
from gorgon_common.engine.states import FINISHED_RUN, FINISHED_STEP, RunStatus, StepStatus
from gorgon_common.engine.step import Executor
from gorgon_common.engine.submit import submit
from gorgon_common.engine.sweep import Sweep
from gorgon_common.engine.worker_loop import StepRunner
from gorgon_common.errors import Unavailable
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.tables import runs
from gorgon_common.workflow.plan import Plan
from tests.support.engine import NOW, elapse, new_run, open_store

FOREVER = 1e6
"""A lease that does not expire while a test lets time pass."""


@dataclass
class Post:
    """One message; `then` is what its canvas does after it has been served."""

    ids: list[int]
    queue: str
    task: str
    then: Callable[[], None] | None = None
    sent: float = 0.0


class Mailbox(CeleryCanvas):
    """The canvas adapter with a list as its broker."""

    def __init__(self) -> None:
        super().__init__(make_app("gmem://test"), "gmem://test", "sandbox")
        self.waiting: list[Post] = []
        self.published: list[Post] = []
        self.away = False
        self.mark: str | None = "epoch"
        self.canvases: list[Any] = []
        self._posting = threading.RLock()

    def send(self, lowered: Lowered) -> None:
        if self.away:
            raise Unavailable("The broker cannot be reached.")
        for signature in lowered.canvas:
            self.canvases.append(signature)
            self._post(signature, None)

    def _post(self, signature: Any, then: Callable[[], None] | None) -> None:
        if isinstance(signature, chord):
            header = signature.tasks.tasks if isinstance(signature.tasks, group) else list(signature.tasks)
            left = [len(header)]

            def counted() -> None:
                with self._posting:
                    left[0] -= 1
                    if left[0] == 0:
                        self._post(signature.body, then)

            for member in header:
                self._post(member, counted)
        elif isinstance(signature, _chain):
            first, *rest = signature.tasks
            after = then
            for part in reversed(rest):
                after = lambda part=part, after=after: self._post(part, after)  # noqa: E731
            self._post(first, after)
        elif isinstance(signature, group):
            for member in signature.tasks:
                self._post(member, then)
        else:
            assert isinstance(signature, Signature)
            ids, sent = signature.args
            queue = signature.options["queue"].removeprefix("sandbox.")
            post = Post(list(ids), queue, signature.task, then, sent)
            with self._posting:
                self.waiting.append(post)
                self.published.append(post)

    def take(self, place: int = 0) -> Post:
        with self._posting:
            return self.waiting.pop(place)

    def depth(self, queue: int) -> int:
        if self.away:
            raise Unavailable("The broker cannot be reached.")
        name = rows.queues.ALL[queue]
        with self._posting:
            return sum(post.queue == name for post in self.waiting)

    def epoch(self) -> str | None:
        if self.away:
            raise Unavailable("The broker cannot be reached.")
        return self.mark

    def close(self) -> None:
        self.app.close()


class Scripted:
    """A provider controlled by the step's prompt: `behaves[prompt]` is called; a text is returned as the reply."""

    name = "openai"

    def __init__(self, behaves: Mapping[str, Any] | None = None) -> None:
        self.behaves = dict(behaves or {})
        self.calls: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        with self._lock:
            self.calls.append(call.label)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            found = self.behaves.get(call.messages[0].content, call.messages[0].content)
            text = found(call) if callable(found) else found
            return AgentReply(str(text), Usage(input_tokens=1, output_tokens=1), call.model)
        finally:
            with self._lock:
                self.at_once -= 1

    def close(self) -> None:
        pass


class NoCommands:
    def run(self, call: CommandCall, cancelled: Callable[[], bool]) -> CommandResult:
        return CommandResult(0, " ".join(call.argv), "")


class Free:
    version = "test"

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        return 1


class Counted(ThreadPoolExecutor):
    """A pool that knows whether it is idle."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.open: set[Future[Any]] = set()

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(*args, **kwargs)
        self.open.add(future)
        future.add_done_callback(self.open.discard)
        return future

    def idle(self) -> None:
        while self.open:
            for future in list(self.open):
                future.result(30)


@dataclass
class Process:
    """One worker process, as far as the engine sees it."""

    store: Store
    mailbox: Mailbox
    provider: Scripted
    slots: int = 4
    queues: Sequence[str] = ("openai", "anthropic", "control")
    home: str = ""
    target: str = "sandbox"
    lease: float = FOREVER
    clock: Callable[[], float] | None = None
    knowledge: RunCache = field(init=False)
    machine: StepRunner = field(init=False)
    publisher: Publisher = field(init=False)
    sweep: Sweep = field(init=False)

    def __post_init__(self) -> None:
        self.knowledge = RunCache(self.store)
        self.publisher = Publisher(self.store, self.knowledge, self.mailbox, target=self.target, home=self.home)
        self.member = self.store.register(
            "test",
            target=self.target,
            home=self.home,
            queues=[rows.QUEUE_NUMBERS[name] for name in self.queues],
            slots=self.slots,
            lease=self.lease,
        )
        self.cancelled: set[int] = set()
        executor = Executor(
            StepServices(
                cache=self.knowledge,
                providers={"openai": self.provider},
                commands=NoCommands(),
                pricer=Free(),
                clock=SYSTEM_CLOCK,
                cancelled=self.cancelled.__contains__,
                chance=lambda: 0.0,
            )
        )
        self.machine = StepRunner(
            self.store, self.knowledge, self.member, executor, self.publisher, slots=self.slots, sleep=lambda _: None
        )
        self.machine._pool.shutdown()
        self.pool = self.machine._pool = Counted(self.slots)
        self.publisher.here = self.machine.run_here
        extra = {} if self.clock is None else {"clock": self.clock}
        name = f"sweep-{self.member.owner}"
        self.sweep = Sweep(self.store, self.knowledge, self.publisher, self.mailbox, name=name, home=self.home, **extra)

    def serve(self, post: Post) -> None:
        """Do what `gorgon_worker.tasks` does with a message."""
        self.machine.handle(post.ids, fast=post.task in messages.FAST)
        if post.then is not None:
            known = self.store.states(post.ids)
            if known and all(StepStatus(status) in FINISHED_STEP for status, _ in known.values()):
                post.then()

    def submit(self, plan: Plan, inputs: Mapping[str, Any] | None = None, **fields: Any) -> int:
        number, _ = submit(
            plan,
            inputs or {},
            store=self.store,
            knowledge=self.knowledge,
            publisher=self.publisher,
            grouped=lowering.grouped(lowering.shape(plan)),
            **{
                "public_id": new_run().public_id,
                "now": NOW,
                "target": self.target,
                "home": self.home,
                "org": 1,
                **fields,
            },
        )
        return number


class Fleet:
    """Processes on one database."""

    def __init__(self, stores: Sequence[Store], provider: Scripted | None = None, **fields: Any) -> None:
        self.mailbox = Mailbox()
        self.provider = provider or Scripted()
        self.processes = [Process(store, self.mailbox, self.provider, **fields) for store in stores]
        self.store = stores[0]

    def elapse(self, seconds: float) -> None:
        for store in {id(process.store): process.store for process in self.processes}.values():
            elapse(store, seconds)
            if not store.database.sqlite:
                break

    def idle(self) -> None:
        for process in self.processes:
            process.pool.idle()

    def drain(self) -> None:
        """Serve every message in order, in this thread, until there are none."""
        self.idle()
        while self.mailbox.waiting:
            self.processes[0].serve(self.mailbox.take())
            self.idle()

    def finish(self, run: int, *, chance: random.Random, lose: float = 0.0, repeat: float = 0.0) -> RunStatus:
        """Serve messages in any order and concurrently, losing and repeating some, until the run has ended."""
        with ThreadPoolExecutor(3 * len(self.processes)) as threads:
            for _ in range(2_000):
                self.idle()
                status = self.status(run)
                if status in FINISHED_RUN:
                    return status
                if not self.mailbox.waiting:
                    self.elapse(6)
                    chance.choice(self.processes).sweep.once()
                    continue
                posts = []
                for _ in range(min(len(self.mailbox.waiting), chance.randint(1, 6))):
                    post = self.mailbox.take(chance.randrange(len(self.mailbox.waiting)))
                    copies = 0 if chance.random() < lose else 2 if chance.random() < repeat else 1
                    posts += [post] * copies
                served = [threads.submit(chance.choice(self.processes).serve, post) for post in posts]
                for future in served:
                    future.result(30)
        raise AssertionError(f"the run did not end: {self.statuses(run)}")

    def status(self, run: int) -> RunStatus:
        return RunStatus(self.row(run).status)

    def row(self, run: int) -> Any:
        with self.store.database.read() as connection:
            return connection.execute(select(runs).where(runs.c.id == run)).one()

    def statuses(self, run: int) -> dict[int, StepStatus]:
        ids = [step_id(run, number) for number in range(self.row(run).next_row)]
        return {key & 0xFFFFF: StepStatus(status) for key, (status, _) in sorted(self.store.states(ids).items())}

    def close(self) -> None:
        for process in self.processes:
            process.machine.close(1)
            process.pool.shutdown()
        self.mailbox.close()
        for store in {id(process.store): process.store for process in self.processes}.values():
            store.close()


@contextmanager
def fleet(url: str, processes: int = 1, provider: Scripted | None = None, **fields: Any) -> Iterator[Fleet]:
    """Run some processes on a database."""
    made = Fleet([open_store(url) for _ in range(processes)], provider, **fields)
    try:
        yield made
    finally:
        made.close()
