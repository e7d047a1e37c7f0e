"""Tasks as a reader of the documentation writes them: plain functions, named by their `__name__`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import gorgon
from gorgon import InputInvalid, ParallelResult, ParallelTask, RateLimitedParallelExecutor
from gorgon_common.engine.limits import Ask, Grant, Settlement


def run(
    tasks: Sequence[Any], dependencies: Any = None, executor: RateLimitedParallelExecutor | None = None
) -> ParallelResult:
    executor = executor or RateLimitedParallelExecutor({"openai": 3, "anthropic": 2})
    return asyncio.run(asyncio.wait_for(executor.execute_parallel(tasks=tasks, dependencies=dependencies), 30))


def test_the_snippet_of_the_case_study() -> None:
    order: list[str] = []

    async def step_a() -> str:
        order.append("a")
        await asyncio.sleep(0)
        return "from a"

    def step_b() -> str:
        return "from b"

    async def step_c() -> str:
        order.append("c")
        return "from c"

    async def main() -> ParallelResult:
        executor = gorgon.RateLimitedParallelExecutor(
            max_concurrent={"openai": 3, "anthropic": 2}, adaptive_backoff=True
        )
        return await executor.execute_parallel(
            tasks=[step_a, step_b, step_c],
            dependencies={"step_c": ["step_a"]},
        )

    results = asyncio.run(main())
    assert dict(results) == {"step_a": "from a", "step_b": "from b", "step_c": "from c"}
    assert results.ok
    assert order == ["a", "c"]


def test_functions_mappings_and_tasks_can_be_mixed() -> None:
    def plain() -> int:
        return 1

    def named() -> int:
        return 2

    tasks = [plain, {"call": named, "provider": "openai"}, ParallelTask("third", "anthropic", lambda: 3)]
    assert dict(run(tasks)) == {"plain": 1, "named": 2, "third": 3}


class Method:
    def step(self) -> str:
        return "of a method"


def test_a_method_has_the_name_of_its_function() -> None:
    assert run([Method().step])["step"] == "of a method"


def two(first: int, second: int) -> int:
    return first * 10 + second


def keyword(*, first: int) -> int:
    return first


def every(results: Mapping[str, int]) -> int:
    return sum(results.values())


def positional(results: Mapping[str, int], /) -> int:
    return sum(results.values())


def both(first: int, results: Mapping[str, int]) -> int:
    return first * 100 + sum(results.values())


def neither(factor: int = 7) -> int:
    return factor


@pytest.mark.parametrize(
    ("call", "result"), [(two, 12), (keyword, 1), (every, 3), (positional, 3), (both, 103), (neither, 7)]
)
def test_a_function_gets_the_results_it_depends_on(call: Callable[..., int], result: int) -> None:
    def first() -> int:
        return 1

    async def second() -> int:
        return 2

    done = run([first, second, call], {call.__name__: ["first", "second"]})
    assert done[call.__name__] == result


def step() -> None:
    """Do nothing."""


def needs_two(this: int, that: int) -> int:
    return this + that


async def coroutine() -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("tasks", "dependencies", "told"),
    [
        ([step, step], None, "Two tasks are named 'step'"),
        ([lambda: 1], None, r"tasks\[0\] is a lambda, which has no name"),
        ([step, functools.partial(step)], None, r"tasks\[1\] is a partial, which has no name"),
        ([{"call": lambda: 1}], None, r"tasks\[0\] is a lambda"),
        (["step"], None, r"tasks\[0\] is str, which is not a task"),
        ([{"call": step, "povider": "openai"}], None, "unexpected keyword argument 'povider'"),
        ([{"call": step, "id": ""}], None, r"The `id` of tasks\[0\] is ''"),
        ([step], {"step": ["stop"]}, "`dependencies` names 'stop', but no task has this name"),
        ([step], {"stop": ["step"]}, "`dependencies` names 'stop'"),
        ([step], {"step": ["step"]}, "cycle: step → step"),
        ([step, coroutine], {"step": "coroutine"}, "the string 'coroutine'"),
        ([needs_two], None, "requires `this` and `that`, but it gets only the results"),
    ],
)
def test_mistakes_are_reported_before_anything_is_called(tasks: list[Any], dependencies: Any, told: str) -> None:
    called: list[str] = []

    def witness() -> None:
        called.append("witness")

    with pytest.raises(InputInvalid, match=told) as caught:
        run([witness, *tasks] if "[" not in told else [*tasks, witness], dependencies)
    assert called == []
    assert caught.value.hint


def test_a_coroutine_instead_of_its_function_is_explained_and_closed() -> None:
    started = coroutine()
    with pytest.raises(InputInvalid, match=r"tasks\[0\] is a coroutine, not a function"):
        run([started])
    assert inspect.getcoroutinestate(started) == inspect.CORO_CLOSED


class Gauge:
    """How many calls are in flight, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.numbers = itertools.count()

    def tasks(self, count: int, **fields: Any) -> list[dict[str, Any]]:
        return [{"id": str(next(self.numbers)), "call": self.call, **fields} for _ in range(count)]

    async def call(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(5):
            await asyncio.sleep(0)
        self.now -= 1


def test_a_task_without_a_provider_counts_against_each() -> None:
    """It may call any of them, and no provider may get more calls than its limit."""
    gauge = Gauge()
    assert run(gauge.tasks(12)).ok
    assert gauge.most == 2


def test_tasks_with_and_without_a_provider_share_its_limit() -> None:
    gauge = Gauge()
    executor = RateLimitedParallelExecutor({"openai": 3, "anthropic": 9})
    assert run([*gauge.tasks(8, provider="openai"), *gauge.tasks(8)], executor=executor).ok
    assert gauge.most == 3


def test_a_limit_is_the_providers_not_the_models() -> None:
    gauge = Gauge()
    tasks = [task for model in "abc" for task in gauge.tasks(4, provider="openai", model=model)]
    assert run(tasks, executor=RateLimitedParallelExecutor({"openai": 2})).ok
    assert gauge.most == 2


def test_without_limits_functions_run_all_at_once() -> None:
    barrier = threading.Barrier(40)

    def meet() -> int:
        return barrier.wait(20)

    done = run([{"id": str(number), "call": meet} for number in range(40)], executor=RateLimitedParallelExecutor())
    assert sorted(done.values()) == list(range(40))


class Shared:
    """A limiter of other processes; it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def acquire(self, ask: Ask) -> Grant:
        self.asked.append(str(ask.gate))
        return Grant(ask.id, ask.gate)

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        self.asked.append(settlement.outcome)


def test_a_shared_limiter_is_asked_for_the_model() -> None:
    limiter: Any = Shared()
    executor = RateLimitedParallelExecutor(limiter=limiter)
    assert run([{"call": step, "provider": "openai", "model": "m"}], executor=executor).ok
    assert limiter.asked == ["library:openai:default:m", "ok"]
    with pytest.raises(InputInvalid, match="names no provider"):
        run([step], executor=executor)


def test_limits_beside_a_shared_limiter_are_refused() -> None:
    limiter: Any = Shared()
    with pytest.raises(InputInvalid, match="max_concurrent has no effect"):
        RateLimitedParallelExecutor({"openai": 3}, limiter=limiter)
