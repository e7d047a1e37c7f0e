"""As a library: many calls side by side, each provider within its limits, in the order that they need each other.

    executor = RateLimitedParallelExecutor(max_concurrent={"openai": 3, "anthropic": 2}, adaptive_backoff=True)
    done = await executor.execute_parallel(tasks=[…], dependencies={"report": ["orders", "refunds"]})

There is no engine in here: who may call is decided by the limiter that the workers ask too (`ratelimit.stored`), pauses
are those of the retry policy (`engine.retry`), and the order is `graphlib`'s.  Nothing is stored: what has to survive
this process is a workflow.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from gorgon_common.engine import limits, retry
from gorgon_common.engine.limits import Ask, Gate, Grant, Limiter, Never, Quota, Settlement
from gorgon_common.errors import InputInvalid, OverLimit, RateLimited
from gorgon_common.ids import new_id
from gorgon_common.ratelimit.stored import Memory, StoredLimiter
from gorgon_common.workflow.plan import Retry

_UNBOUNDED = 1_000_000
_BACKOFF = Retry(initial=0.5, cap=30.0)
_HINT = "A task is {'id': …, 'provider': …, 'call': function}, or a ParallelTask."


@dataclass(frozen=True, slots=True)
class ParallelTask:
    """One call.

    `call` is a function or a coroutine function; where it takes an argument it gets `{task id: result}` of the tasks
    that it depends on.  `provider` names whose limits it uses; `tokens_in` and `tokens_out` what it will need of them.
    """

    id: str
    provider: str
    call: Callable[..., Any]
    model: str = "*"
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True, slots=True)
class ParallelResult(Mapping[str, Any]):
    """What the tasks returned, by id; `errors` of those that failed, `skipped`: those that needed one of them.

    `refusals` counts the times that a provider said 429.
    """

    results: Mapping[str, Any]
    errors: Mapping[str, BaseException] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    refusals: int = 0

    @property
    def ok(self) -> bool:
        """Whether every task has returned."""
        return not self.errors and not self.skipped

    def __getitem__(self, task: str) -> Any:
        return self.results[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


class _Quotas:
    """The limits that the executor was given."""

    def __init__(self, concurrent: Mapping[str, int], per_minute: Mapping[str, int]) -> None:
        self._concurrent = concurrent
        self._per_minute = per_minute

    def quota(self, gate: Gate) -> tuple[Quota, Quota]:
        requests = self._per_minute.get(gate.provider)
        given = Quota(
            requests=None if requests is None else float(requests),
            concurrency=self._concurrent.get(gate.provider, _UNBOUNDED),
        )
        return given, given

    def weight(self, team: str) -> float:
        return 1.0


class RateLimitedParallelExecutor:
    """Runs calls side by side.

    `max_concurrent`: provider → calls in flight at most; one that is not named has no limit of that kind.
    `requests_per_minute`: the same for requests.  `adaptive_backoff`: a 429 is waited out (`Retry-After` holds for all
    calls to that provider) and the call made again, `max_refusals` times at most; without it a 429 is a failure.
    `limiter`: one that is shared with other processes; without it the limits hold within this executor.
    Raises InputInvalid for a limit below 1.
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
            for provider, limit in (given or {}).items():
                if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                    raise InputInvalid(f"{name} of {provider!r} is {limit!r}.", hint="Give a whole number from 1 on.")
        self.adaptive_backoff = adaptive_backoff
        self.max_refusals = max_refusals
        self._own = limiter is None
        self._limiter: Limiter = limiter or StoredLimiter(
            Memory(), _Quotas(max_concurrent or {}, requests_per_minute or {}), worker=new_id("lib"), lease=86_400.0
        )
        self._chance = chance

    async def execute_parallel(
        self,
        tasks: Sequence[ParallelTask | Mapping[str, Any]],
        dependencies: Mapping[str, Sequence[str]] | None = None,
    ) -> ParallelResult:
        """Run the tasks, each as soon as those that it depends on have returned; returns when none is left.

        `dependencies`: task id → ids of the tasks before it.  A failure skips what depends on it and nothing else.
        Raises InputInvalid for unknown names, doubles and cycles, before anything is called.
        """
        known = _by_id(tasks)
        needs = {name: tuple(before) for name, before in (dependencies or {}).items()}
        _check(known, needs)
        return await _Execution(self, known, needs).run()

    async def ask(self, question: Ask) -> Any:
        """Ask the limiter; one that is not in this process must not stop the others."""
        return (
            self._limiter.acquire(question) if self._own else await asyncio.to_thread(self._limiter.acquire, question)
        )

    async def tell(self, grant: Grant, settlement: Settlement) -> None:
        """Tell the limiter what became of a call."""
        if self._own:
            self._limiter.settle(grant, settlement)
        else:
            await asyncio.to_thread(self._limiter.settle, grant, settlement)

    def pause(self, refusals: int) -> float:
        """Return the seconds after a 429 that does not say how long."""
        return retry.delay(_BACKOFF, refusals, self._chance)


class _Execution:
    """One set of tasks under way."""

    def __init__(
        self,
        executor: RateLimitedParallelExecutor,
        tasks: Mapping[str, ParallelTask],
        needs: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.executor = executor
        self.tasks = tasks
        self.needs = needs
        self.results: dict[str, Any] = {}
        self.errors: dict[str, BaseException] = {}
        self.skipped: list[str] = []
        self.refusals = 0
        self.freed = asyncio.Event()

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
                        running[asyncio.create_task(self._one(self.tasks[name]))] = name
                if running:
                    ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                        order.done(running.pop(task))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return ParallelResult(self.results, self.errors, tuple(self.skipped), self.refusals)

    async def _one(self, task: ParallelTask) -> None:
        try:
            self.results[task.id] = await self._called(task)
        except Exception as error:  # noqa: BLE001  what a task raises is its result; the others go on
            self.errors[task.id] = error

    async def _called(self, task: ParallelTask) -> Any:
        refusals = 0
        ticket = new_id("lib")
        while True:
            grant = await self._granted(task, ticket)
            settlement = Settlement(limits.NEUTRAL)
            try:
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
                await self.executor.tell(grant, settlement)
                self.freed.set()
            await asyncio.sleep(wait)

    async def _granted(self, task: ParallelTask, ticket: str) -> Grant:
        """Wait until the limiter lets the call through."""
        gate = Gate("library", task.provider, "default", task.model)
        while True:
            question = Ask(new_id("call"), gate, task.tokens_in, task.tokens_out, ticket=ticket)
            self.freed.clear()
            answer = await self.executor.ask(question)
            if isinstance(answer, Grant):
                return answer
            if isinstance(answer, Never):
                raise OverLimit(f"Task {task.id!r} can never be called: {answer.why}.", hint="Let it need less.")
            try:  # a call that ends may free what this one waits for, before its time
                await asyncio.wait_for(self.freed.wait(), max(0.001, answer.seconds))
            except TimeoutError:
                continue

    async def _call(self, task: ParallelTask) -> Any:
        given = {name: self.results[name] for name in self.needs.get(task.id, ())}
        arguments = (given,) if _takes_argument(task.call) else ()
        if inspect.iscoroutinefunction(task.call):
            return await task.call(*arguments)
        result = await asyncio.to_thread(task.call, *arguments)
        return await result if inspect.isawaitable(result) else result


def _takes_argument(call: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in parameters
    )


def _by_id(tasks: Sequence[ParallelTask | Mapping[str, Any]]) -> dict[str, ParallelTask]:
    found: dict[str, ParallelTask] = {}
    for position, given in enumerate(tasks):
        if isinstance(given, ParallelTask):
            task = given
        else:
            try:
                task = ParallelTask(**given)
            except TypeError as error:
                raise InputInvalid(f"tasks[{position}] is wrong: {error}.", hint=_HINT) from None
        if not callable(task.call):
            raise InputInvalid(f"The `call` of task {task.id!r} cannot be called.", hint=_HINT)
        if task.id in found:
            raise InputInvalid(f"There are two tasks {task.id!r}.", hint="Each needs an id of its own.")
        found[task.id] = task
    return found


def _check(tasks: Mapping[str, ParallelTask], needs: Mapping[str, Sequence[str]]) -> None:
    for name, before in needs.items():
        for unknown in [entry for entry in (name, *before) if entry not in tasks]:
            raise InputInvalid(
                f"`dependencies` names {unknown!r}, which is no task.", hint=f"Tasks: {', '.join(tasks)}."
            )
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        raise InputInvalid(f"The tasks wait for each other: {' → '.join(error.args[1])}.") from None


def _refusal(error: Exception) -> tuple[bool, float | None]:
    """Return whether an error is a 429, of ours or of an SDK, and the seconds that the provider asks for."""
    if isinstance(error, RateLimited):
        return True, error.retry_after
    if getattr(error, "status_code", None) != 429:
        return False, None
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return True, max(0.0, float(str(headers.get("retry-after"))))
    except (TypeError, ValueError):
        return True, None
