"""The summary of a task's trials: a low, expected, p95 and worst value of each quantity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from gorgon_common.costs.forecast.simulation import Rates
from gorgon_common.costs.forecast.work import Sums, Task, Work
from gorgon_common.costs.forecast.worst import Worst


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Low, expected, p95 and worst of a quantity; None where unknown."""

    low: float
    expected: float | None
    p95: float | None
    worst: float | None

    def to_dict(self, digits: int) -> dict[str, float | int | None]:
        """Return the four values, rounded: low down, expected to the nearest, p95 and worst up."""
        return {
            "low": _rounded(self.low, digits, math.floor),
            "expected": _rounded(self.expected, digits, round),
            "p95": _rounded(self.p95, digits, math.ceil),
            "worst": _rounded(self.worst, digits, math.ceil),
        }


def _rounded(value: float | None, digits: int, how: Callable[[float], float]) -> float | int | None:
    if value is None:
        return None
    scaled = how(value * 10**digits * (1 - 1e-12 if how is math.ceil else 1))
    return int(scaled) if not digits else scaled / 10**digits


@dataclass(frozen=True, slots=True)
class Line:
    """The forecast of one task over all its executions; `seconds` is that of one execution."""

    task: int
    calls: Quantiles
    input: Quantiles
    output: Quantiles
    usd: Quantiles
    seconds: Quantiles
    runs: Quantiles
    sources: tuple[str, ...]


def unknown_tasks(work: Work, rates: Mapping[int, Rates | None]) -> tuple[set[int], set[int]]:
    """Return the tasks whose cost is unknown, and those whose duration is unknown."""
    no_cost, no_time = set(), set()
    for index, task in enumerate(work.tasks):
        if task.never or not task.chance:
            continue
        unsized = task.call is not None and task.call.unsized and task.call.input is None
        if task.opaque or unsized or (task.call is not None and rates[index] is None):
            no_cost.add(index)
        if task.seconds is None or (task.call is not None and task.call.seconds is None):
            no_time.add(index)
    return no_cost, no_time


def line_of(
    work: Work,
    index: int | None,
    trials: Sequence[Sums],
    most: Sums,
    no_cost: set[int],
    no_time: set[int],
    worst: Worst,
) -> Line:
    """Return the line of one task, or of the whole work where `index` is None."""
    inside = range(len(work.tasks)) if index is None else _inside(work.tasks, index)
    cost_unknown = any(entry in no_cost for entry in inside)
    time_unknown = any(entry in no_time for entry in inside)
    priced = not any(entry in worst.unpriced for entry in inside)
    timed = not any(entry in worst.endless for entry in inside)
    top = most.micros / 1e6 if priced else None
    ends = most.seconds if timed else None
    if index is None:
        if work.most_usd is not None:
            top = work.most_usd if top is None else min(top, work.most_usd)
        if work.most_seconds is not None:
            ends = work.most_seconds if ends is None else min(ends, work.most_seconds)
    return Line(
        task=-1 if index is None else index,
        calls=_quantiles([sums.calls for sums in trials], most.calls),
        input=_quantiles([sums.input for sums in trials], most.input, unknown=_unsized(work, inside)),
        output=_quantiles([sums.output for sums in trials], most.output),
        usd=_quantiles([sums.micros / 1e6 for sums in trials], top, unknown=cost_unknown),
        seconds=_quantiles([sums.seconds for sums in trials], ends, unknown=time_unknown),
        runs=_quantiles([sums.runs for sums in trials], most.runs),
        sources=tuple(sorted({source for entry in inside for source in _sources(work.tasks[entry])})),
    )


def _unsized(work: Work, inside: Iterable[int]) -> bool:
    tasks = (work.tasks[entry] for entry in inside)
    return any(
        task.call is not None and task.call.unsized and task.call.input is None and task.chance and not task.never
        for task in tasks
    )


def _sources(task: Task) -> set[str]:
    """Return where the estimates of a task come from."""
    found: set[str] = set()
    if task.never:
        return found
    if task.call is not None:
        found.add(task.call.output.source)
    if task.repeat is not None and not task.repeat.exact:
        found.add(task.repeat.times.source)
    return found


def _inside(tasks: Sequence[Task], index: int) -> list[int]:
    found, queue = [], [index]
    while queue:
        current = queue.pop()
        found.append(current)
        queue += [*tasks[current].body, *tasks[current].after, *tasks[current].fallback]
    return found


def _quantiles(values: list[float], worst: float | None, *, unknown: bool = False) -> Quantiles:
    """Return the quantiles of the trials, capped at the worst."""
    values = sorted(value if worst is None else min(value, worst) for value in values)
    low = values[int(0.025 * len(values))]
    if unknown:
        return Quantiles(low, None, None, worst)
    return Quantiles(low, fmean(values), values[min(len(values) - 1, math.ceil(0.95 * len(values)))], worst)
