"""Runs many calls in parallel: each provider within its limits, each call after the calls that it depends on.

    executor = RateLimitedParallelExecutor(max_concurrent={"openai": 3, "anthropic": 2}, adaptive_backoff=True)
    results = await executor.execute_parallel(tasks=[step_a, step_b, step_c], dependencies={"step_c": ["step_a"]})

No engine is involved: the limiter is the one that workers use (`ratelimit.local`), pauses follow the retry policy
(`engine.retry`), and `graphlib` determines the order.  Nothing is stored: work that must survive this process belongs
in a workflow.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

from gorgon_common.engine import limits, retry
from gorgon_common.engine.limits import Answer, Ask, Grant, Limiter, LimitKey, Never, Quota, Settlement
from gorgon_common.errors import InputInvalid, OverLimit, RateLimited
from gorgon_common.ids import new_id
from gorgon_common.library.tasks import Arguments, Given, ParallelTask, arguments_of, read_dependencies, read_tasks
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.ratelimit.local import Memory, StoredLimiter
from gorgon_common.workflow.plan import Retry

__all__ = ["ParallelResult", "ParallelTask", "RateLimitedParallelExecutor"]

_UNBOUNDED = 1_000_000
_DIMENSIONS = (Dimension("requests", whole=1),)
_MOST_THREADS = 256
_BACKOFF = Retry(initial=0.5, cap=30.0)


@dataclass(frozen=True, slots=True)
class ParallelResult(Mapping[str, Any]):
    """The results by task id, as a mapping; `errors`: task id → exception of each task that failed.

    `skipped`: tasks that depend on a failed task.  `refusals`: the number of 429s.
    """

    results: Mapping[str, Any]
    errors: Mapping[str, BaseException] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    refusals: int = 0

    @property
    def ok(self) -> bool:
        """True if every task has returned."""
        return not self.errors and not self.skipped

    def __getitem__(self, task: str) -> Any:
        return self.results[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


class _Quotas:
    """The limits of one executor, in the form that the limiter reads."""

    def __init__(self, concurrent: Mapping[str, int], per_minute: Mapping[str, int]) -> None:
        self._concurrent = concurrent
        self._per_minute = per_minute

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        requests = self._per_minute.get(gate.provider)
        given = Quota(
            requests=None if requests is None else float(requests),
            concurrency=self._concurrent.get(gate.provider, _UNBOUNDED),
        )
        return given, given

    def weight(self, team: str) -> float:
        return 1.0


class RateLimitedParallelExecutor:
    """Runs calls in parallel.

    `max_concurrent`: provider → maximum number of calls in flight.  `requests_per_minute`: provider → maximum number of
    calls per minute.  A provider that is not named has no such limit.  `adaptive_backoff`: after a 429 the executor
    waits and calls again, at most `max_refusals` times (`Retry-After` applies to every call to that provider); without
    it, a 429 is a failure.  `limiter`: a limiter shared with other processes, which replaces the limits of this
    executor.  Raises InputInvalid for a limit below 1, and for limits given together with a `limiter`.
    """

    def __init__(
        self,
        max_concurrent: Mapping[str, int] | None = None,
        *,
        requests_per_minute: Mapping[str, int] | None = None,
        adaptive_backoff: bool = True,
        max_refusals: int = 20,
        limiter: Limiter | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        for name, given in (("max_concurrent", max_concurrent), ("requests_per_minute", requests_per_minute)):
            if given and limiter is not None:
                raise InputInvalid(f"{name} has no effect beside a `limiter`.", hint="Give one of the two.")
            for provider, limit in (given or {}).items():
                if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                    raise InputInvalid(f"{name} of {provider!r} is {limit!r}.", hint="Give a whole number, 1 or more.")
        self.adaptive_backoff = adaptive_backoff
        self.max_refusals = max_refusals
        self.providers = tuple(sorted({*(max_concurrent or {}), *(requests_per_minute or {})}))
        self._own = limiter is None
        self._limiter: Limiter = limiter or StoredLimiter(
            Memory(),
            _Quotas(max_concurrent or {}, requests_per_minute or {}),
            worker=new_id("lib"),
            lease=86_400.0,
            dimensions=lambda _: _DIMENSIONS,
        )
        self._chance = chance

    async def execute_parallel(
        self, tasks: Sequence[Given], dependencies: Mapping[str, Sequence[str]] | None = None
    ) -> ParallelResult:
        """Run the tasks, each as soon as the tasks that it depends on have returned; returns when all have ended.

        A task is a function or a coroutine function, named by its `__name__`; a mapping with `call` and optionally
        `id`, `provider`, `model`; or a ParallelTask.  `dependencies`: task id → ids of the tasks before it.  A failure
        skips the tasks that depend on it; all others run.  Before any call, raises InputInvalid for duplicates, unknown
        names, cycles, functions without a name, and functions that require other arguments.
        """
        known = read_tasks(tasks)
        needs = read_dependencies(known, dependencies or {})
        arguments = {name: arguments_of(task, needs.get(name, ())) for name, task in known.items()}
        for task in known.values():
            if task.provider is None and not self._own:
                raise InputInvalid(
                    f"Task {task.id!r} names no provider, so a shared limiter cannot know which limits apply.",
                    hint="Give {'call': function, 'provider': …}.",
                )
        return await _Execution(self, known, needs, arguments).run()

    def gates(self, task: ParallelTask) -> list[LimitKey]:
        """Return the limits that a task counts against, in a fixed order, so that two tasks cannot deadlock."""
        if self._own:  # the executor's own limits are per provider, whatever the model
            providers = self.providers if task.provider is None else (task.provider,)
            return [LimitKey("library", provider, "default", "*") for provider in providers]
        return [LimitKey("library", str(task.provider), "default", task.model)]

    async def acquire(self, request: Ask) -> Answer:
        """Ask the limiter, in a thread if it is shared with other processes, because that call may block."""
        return self._limiter.acquire(request) if self._own else await asyncio.to_thread(self._limiter.acquire, request)

    async def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Report to the limiter how a call ended."""
        if self._own:
            self._limiter.settle(grant, settlement)
        else:
            await asyncio.to_thread(self._limiter.settle, grant, settlement)

    def pause(self, refusals: int) -> float:
        """Return the seconds to wait after a 429 without a stated delay."""
        return retry.delay(_BACKOFF, refusals, self._chance)


class _Execution:
    """One set of tasks in progress."""

    def __init__(
        self,
        executor: RateLimitedParallelExecutor,
        tasks: Mapping[str, ParallelTask],
        needs: Mapping[str, tuple[str, ...]],
        arguments: Mapping[str, Arguments],
    ) -> None:
        self.executor = executor
        self.tasks = tasks
        self.needs = needs
        self.arguments = arguments
        self.results: dict[str, Any] = {}
        self.errors: dict[str, BaseException] = {}
        self.skipped: list[str] = []
        self.refusals = 0
        self.settled = asyncio.Event()
        # asyncio's default pool has only a few threads per core, which would limit the calls further than requested
        self.threads = ThreadPoolExecutor(max(1, min(len(tasks), _MOST_THREADS)), thread_name_prefix="gorgon-call")

    async def run(self) -> ParallelResult:
        order = TopologicalSorter({name: self.needs.get(name, ()) for name in self.tasks})
        order.prepare()
        running: dict[asyncio.Task[None], str] = {}
        try:
            while order.is_active():
                for name in order.get_ready():
                    if any(need not in self.results for need in self.needs.get(name, ())):
                        self.skipped.append(name)
                        order.done(name)
                    else:
                        running[asyncio.create_task(self._run_task(self.tasks[name]))] = name
                if running:
                    ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                        order.done(running.pop(task))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self.threads.shutdown(wait=False, cancel_futures=True)
        return ParallelResult(self.results, self.errors, tuple(self.skipped), self.refusals)

    async def _run_task(self, task: ParallelTask) -> None:
        try:
            self.results[task.id] = await self._with_backoff(task)
        except Exception as error:  # noqa: BLE001  the error of a task is its outcome; the others go on
            self.errors[task.id] = error

    async def _with_backoff(self, task: ParallelTask) -> Any:
        refusals = 0
        ticket = new_id("lib")
        while True:
            grants: list[Grant] = []
            settlement = Settlement(limits.NEUTRAL)
            try:
                for gate in self.executor.gates(task):
                    grants.append(await self._granted(task, gate, ticket))
                result = await self._call(task)
                settlement = Settlement(limits.OK)
                return result
            except Exception as error:
                refused, after = _refusal(error)
                if not refused:
                    raise
                settlement = Settlement(limits.RATE_LIMITED, retry_after=after)
                self.refusals += 1
                refusals += 1
                if not self.executor.adaptive_backoff or refusals > self.executor.max_refusals:
                    raise
                wait = self.executor.pause(refusals) if after is None else 0.0
            finally:
                for grant in grants:
                    await self.executor.settle(grant, settlement)
                self.settled.set()
            await asyncio.sleep(wait)

    async def _granted(self, task: ParallelTask, gate: LimitKey, ticket: str) -> Grant:
        """Wait until the limiter admits the call."""
        while True:
            request = Ask(new_id("call"), gate, task.tokens_in, task.tokens_out, ticket=ticket)
            self.settled.clear()
            answer = await self.executor.acquire(request)
            if isinstance(answer, Grant):
                return answer
            if isinstance(answer, Never):
                raise OverLimit(f"Task {task.id!r} can never be called: {answer.why}.", hint="Lower what it needs.")
            try:  # a call that ends may admit this one earlier than the limiter could predict
                await asyncio.wait_for(self.settled.wait(), max(0.001, answer.seconds))
            except TimeoutError:
                continue

    async def _call(self, task: ParallelTask) -> Any:
        positional, keywords = self.arguments[task.id](self.results)
        if inspect.iscoroutinefunction(task.call):
            return await task.call(*positional, **keywords)
        work = functools.partial(contextvars.copy_context().run, task.call, *positional, **keywords)
        result = await asyncio.get_running_loop().run_in_executor(self.threads, work)
        return await result if inspect.isawaitable(result) else result


def _refusal(error: Exception) -> tuple[bool, float | None]:
    """Return whether an error is a 429, from Gorgon or an SDK, and the delay in seconds that the provider asks for."""
    if isinstance(error, RateLimited):
        return True, error.retry_after
    if getattr(error, "status_code", None) != 429:
        return False, None
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return True, max(0.0, float(str(headers.get("retry-after"))))
    except (TypeError, ValueError):
        return True, None
