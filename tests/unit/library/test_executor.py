"""Calls side by side from a program, without a workflow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from gorgon_common.errors import InputInvalid, RateLimited
from gorgon_common.library.executor import ParallelResult, ParallelTask, RateLimitedParallelExecutor


@dataclass
class Provider:
    """Counts the calls in flight."""

    now: int = 0
    most: int = 0
    order: list[str] = field(default_factory=list)

    def task(self, name: str, provider: str = "openai", result: Any = None) -> dict[str, Any]:
        async def call() -> Any:
            self.now += 1
            self.most = max(self.most, self.now)
            self.order.append(name)
            for _ in range(5):
                await asyncio.sleep(0)
            self.now -= 1
            return name if result is None else result

        return {"id": name, "provider": provider, "call": call}


def run(
    executor: RateLimitedParallelExecutor, tasks: list[Any], dependencies: Mapping[str, list[str]] | None = None
) -> ParallelResult:
    return asyncio.run(asyncio.wait_for(executor.execute_parallel(tasks=tasks, dependencies=dependencies), 20))


def test_the_example_of_the_documentation() -> None:
    provider = Provider()
    executor = RateLimitedParallelExecutor(max_concurrent={"openai": 3, "anthropic": 2}, adaptive_backoff=True)
    tasks = [*(provider.task(f"o{number}") for number in range(9)), provider.task("report", "anthropic")]
    done = run(executor, tasks, {"report": [f"o{number}" for number in range(9)]})
    assert done.ok
    assert provider.most == 3
    assert provider.order[-1] == "report"
    assert done["o4"] == "o4"
    assert len(done) == 10


def test_each_provider_has_its_own_limit() -> None:
    first, second = Provider(), Provider()
    tasks = [*(first.task(f"o{n}") for n in range(6)), *(second.task(f"a{n}", "anthropic") for n in range(6))]
    assert run(RateLimitedParallelExecutor({"openai": 2, "anthropic": 1}), tasks).ok
    assert (first.most, second.most) == (2, 1)


def test_without_a_limit_all_go_at_once() -> None:
    provider = Provider()
    assert run(RateLimitedParallelExecutor(), [provider.task(str(number)) for number in range(20)]).ok
    assert provider.most == 20


def test_results_are_handed_to_those_that_depend_on_them() -> None:
    def add(before: Mapping[str, int]) -> int:
        return sum(before.values())

    tasks = [
        ParallelTask("one", "openai", lambda: 1),
        ParallelTask("two", "openai", lambda: 2),
        ParallelTask("sum", "openai", add),
    ]
    assert run(RateLimitedParallelExecutor({"openai": 1}), tasks, {"sum": ["one", "two"]})["sum"] == 3


def test_a_failure_skips_what_needs_it_and_nothing_else() -> None:
    def fail() -> None:
        raise ValueError("broken")

    tasks = [
        ParallelTask("bad", "openai", fail),
        ParallelTask("after", "openai", lambda: 1),
        ParallelTask("last", "openai", lambda: 1),
        ParallelTask("other", "openai", lambda: 2),
    ]
    done = run(RateLimitedParallelExecutor(), tasks, {"after": ["bad"], "last": ["after"]})
    assert not done.ok
    assert isinstance(done.errors["bad"], ValueError)
    assert done.skipped == ("after", "last")
    assert dict(done) == {"other": 2}


class SdkError(Exception):
    """What the SDKs raise for a 429."""

    status_code = 429

    class response:
        headers = {"retry-after": "0.01"}  # noqa: RUF012


@pytest.mark.parametrize("error", [RateLimited("busy", retry_after=0.01), RateLimited("busy"), SdkError()])
def test_a_refusal_is_waited_out_and_the_call_made_again(error: Exception) -> None:
    left = [error, error]

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    done = run(RateLimitedParallelExecutor({"openai": 1}, chance=lambda: 0.001), [ParallelTask("a", "openai", call)])
    assert (done["a"], done.refusals, left) == ("done", 2, [])


def test_a_refusal_is_a_failure_where_nobody_backs_off() -> None:
    def call() -> None:
        raise RateLimited("busy", retry_after=0.01)

    done = run(RateLimitedParallelExecutor(adaptive_backoff=False), [ParallelTask("a", "openai", call)])
    assert isinstance(done.errors["a"], RateLimited)
    assert done.refusals == 1


def test_a_provider_that_always_refuses_is_given_up() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        raise RateLimited("busy", retry_after=0.0)

    executor = RateLimitedParallelExecutor(max_refusals=3, chance=lambda: 0.0)
    assert not run(executor, [ParallelTask("a", "openai", call)]).ok
    assert calls == 4


def test_an_executor_can_be_used_again() -> None:
    executor = RateLimitedParallelExecutor({"openai": 1})
    for _ in range(3):
        assert run(executor, [ParallelTask("a", "openai", lambda: 1)]).ok


@pytest.mark.parametrize(
    ("tasks", "dependencies", "told"),
    [
        ([{"id": "a", "provider": "openai"}], None, "tasks"),
        ([{"id": "a", "provider": "openai", "call": 3}], None, "cannot be called"),
        ([ParallelTask("a", "openai", print), ParallelTask("a", "openai", print)], None, "Two tasks are named"),
        ([ParallelTask("a", "openai", print)], {"a": ["b"]}, "'b'"),
        (
            [ParallelTask("a", "openai", print), ParallelTask("b", "openai", print)],
            {"a": ["b"], "b": ["a"]},
            "cycle: a → b → a",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_called(tasks: list[Any], dependencies: Any, told: str) -> None:
    with pytest.raises(InputInvalid, match=told):
        run(RateLimitedParallelExecutor(), tasks, dependencies)


@pytest.mark.parametrize("limit", [0, -1, True, 2.5])
def test_a_limit_has_to_be_a_number_of_calls(limit: Any) -> None:
    with pytest.raises(InputInvalid, match="max_concurrent"):
        RateLimitedParallelExecutor({"openai": limit})
