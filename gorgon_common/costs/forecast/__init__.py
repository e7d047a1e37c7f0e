"""Forecasts what a piece of work will use (low, expected, p95 and worst) by seeded Monte Carlo simulation.

The work is a tree of tasks.  Each uncertain quantity is an Estimate, learned from past calls or assumed.  Low, expected
and p95 come from the trials (2.5 % quantile, mean, 95 % quantile).  Worst is computed, not simulated: every attempt and
repair round is used up, every map is full, every loop runs all its rounds, every reply is as long as it may be.

An unknown quantity is None.  A sum with an unknown part is None too; the sum of the known parts is given beside it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon_common.costs.forecast.budget_check import budget_needed, check_budget
from gorgon_common.costs.forecast.quantiles import Line, Quantiles, line_of, unknown_tasks
from gorgon_common.costs.forecast.quotas import binding_quota, quota_seconds
from gorgon_common.costs.forecast.simulation import ITEMS, Trial, correct_times, rates_of
from gorgon_common.costs.forecast.work import (
    ASSUMED,
    HISTORY,
    SIMILAR,
    Allowance,
    Call,
    Estimate,
    Part,
    Price,
    Quota,
    Repeat,
    Sums,
    Task,
    Work,
    learned,
    ordered,
)
from gorgon_common.costs.forecast.worst import CALL_TOKENS, REPAIR_TOKENS, REREAD, Worst

__all__ = [
    "ASSUMED",
    "CALL_TOKENS",
    "HISTORY",
    "REPAIR_TOKENS",
    "REREAD",
    "SIMILAR",
    "Allowance",
    "Call",
    "Estimate",
    "Forecast",
    "Line",
    "Part",
    "Price",
    "Quantiles",
    "Quota",
    "Repeat",
    "Task",
    "Work",
    "forecast",
    "learned",
    "ordered",
]

_DRAWS = 60_000
_FEWEST, _MOST = 60, 400


@dataclass(frozen=True, slots=True)
class Forecast:
    """The whole forecast.  `path`: (task, expected seconds) of the critical path.  `binding`: see `binding_quota`.

    `trials`: how many trials were simulated.
    """

    lines: tuple[Line, ...]
    total: Line
    unknown_cost: tuple[int, ...]
    unknown_time: tuple[int, ...]
    known_usd: Quantiles
    known_seconds: Quantiles
    path: tuple[tuple[int, float], ...]
    models: Mapping[tuple[str, str], Mapping[str, float]]
    binding: Mapping[str, Any] | None
    budgets: tuple[Mapping[str, Any], ...]
    trials: int


def forecast(work: Work) -> Forecast:
    """Return the forecast of the work."""
    rates = {index: rates_of(work, task.call) for index, task in enumerate(work.tasks) if task.call is not None}
    first = Trial(work, rates, random.Random(work.seed))
    first.run()
    turns = max(1.0, sum(min(sums.runs, ITEMS) for sums in first.own))
    count = int(min(_MOST, max(_FEWEST, _DRAWS / turns)))
    trials: list[tuple[Trial, Sums]] = []
    for number in range(count):
        trial = Trial(work, rates, random.Random(work.seed * 1_000_003 + number))
        trials.append((trial, trial.run()))
    correct_times(work, trials)
    for trial, sums in trials:
        sums.seconds = max(sums.seconds, trial.busy / work.slots, quota_seconds(work, trial.models))
    worst = Worst(work)
    most = worst.all()
    no_cost, no_time = unknown_tasks(work, rates)
    lines = tuple(
        line_of(work, index, [trial.own[index] for trial, _ in trials], worst.own[index], no_cost, no_time, worst)
        for index in range(len(work.tasks))
    )
    totals = [sums for _, sums in trials]
    known = line_of(work, None, totals, most, set(), set(), worst)
    total = line_of(work, None, totals, most, no_cost, no_time, worst)
    needed = budget_needed(work, lines)
    models = _models(work, [trial.models for trial, _ in trials])
    return Forecast(
        lines=lines,
        total=total,
        unknown_cost=tuple(sorted(no_cost)),
        unknown_time=tuple(sorted(no_time)),
        known_usd=known.usd,
        known_seconds=known.seconds,
        path=_path(work, lines),
        models=models,
        binding=binding_quota(work, models, known.seconds.expected or 0.0),
        budgets=tuple(check_budget(allowance, total, known, needed) for allowance in work.allowances),
        trials=count,
    )


def _models(work: Work, trials: Sequence[Mapping[tuple[str, str], Sums]]) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return (provider, model) → expected calls, input and output tokens."""
    found: dict[tuple[str, str], Mapping[str, float]] = {}
    for key in sorted({key for models in trials for key in models}):
        sums = Sums()
        for models in trials:
            sums.add(models.get(key, Sums()), 1 / len(trials))
        found[key] = {"calls": sums.calls, "input": sums.input, "output": sums.output}
    return found


def _path(work: Work, lines: Sequence[Line]) -> tuple[tuple[int, float], ...]:
    """Return the critical path through the top-level tasks, by expected seconds."""

    def expected(index: int) -> float:
        band = lines[index].seconds
        return band.low if band.expected is None else band.expected

    def longest(members: Sequence[int]) -> list[int]:
        ends: dict[int, tuple[float, int | None]] = {}
        for index in ordered(work.tasks, members):
            begin, before = max(
                ((ends[need][0], need) for need in work.tasks[index].needs if need in ends), default=(0.0, None)
            )
            ends[index] = (begin + expected(index), before)
        path: list[int] = []
        current: int | None = max(ends, key=lambda index: ends[index][0], default=None)
        while current is not None:
            path.append(current)
            current = ends[current][1]
        return path[::-1]

    return tuple((index, expected(index)) for index in longest(work.top) if expected(index) > 0)
