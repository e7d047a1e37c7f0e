"""What a piece of work will use: low, expected, p95 and worst, by playing it many times with seeded chance.

The work is a tree of tasks; what is uncertain about each is a Guess, learned from past calls or assumed.  Low, expected
and p95 come from the plays (2.5 % quantile, mean, 95 % quantile); worst is no play but arithmetic: every attempt and
repair round is used up, every map is full, every loop goes all its rounds, every reply is as long as it may be.

What nothing is known of is None.  A sum of something unknown is None too, with the sum of the rest beside it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon_common.costs.forecast.bands import Band, Line, line_of, unknown_tasks
from gorgon_common.costs.forecast.plays import ITEMS, Play, correct_times, rates_of
from gorgon_common.costs.forecast.quotas import binding_quota, quota_seconds
from gorgon_common.costs.forecast.refusals import rooms_needed, verdict
from gorgon_common.costs.forecast.work import (
    ASSUMED,
    HISTORY,
    KIN,
    Allowance,
    Call,
    Guess,
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
    "KIN",
    "REPAIR_TOKENS",
    "REREAD",
    "Allowance",
    "Band",
    "Call",
    "Forecast",
    "Guess",
    "Line",
    "Part",
    "Price",
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
    """The whole of it.  `path`: (task, expected seconds) of the longest way.  `binding`: see `binding_quota`."""

    lines: tuple[Line, ...]
    total: Line
    unknown_cost: tuple[int, ...]
    unknown_time: tuple[int, ...]
    known_usd: Band
    known_seconds: Band
    path: tuple[tuple[int, float], ...]
    models: Mapping[tuple[str, str], Mapping[str, float]]
    binding: Mapping[str, Any] | None
    budgets: tuple[Mapping[str, Any], ...]
    plays: int


def forecast(work: Work) -> Forecast:
    """Return what the work will use."""
    rates = {index: rates_of(work, task.call) for index, task in enumerate(work.tasks) if task.call is not None}
    first = Play(work, rates, random.Random(work.seed))
    first.play()
    turns = max(1.0, sum(min(sums.runs, ITEMS) for sums in first.own))
    plays = int(min(_MOST, max(_FEWEST, _DRAWS / turns)))
    played: list[tuple[Play, Sums]] = []
    for number in range(plays):
        play = Play(work, rates, random.Random(work.seed * 1_000_003 + number))
        played.append((play, play.play()))
    correct_times(work, played)
    for play, sums in played:
        sums.seconds = max(sums.seconds, play.busy / work.slots, quota_seconds(work, play.models))
    worst = Worst(work)
    most = worst.all()
    no_cost, no_time = unknown_tasks(work, rates)
    lines = tuple(
        line_of(work, index, [play.own[index] for play, _ in played], worst.own[index], no_cost, no_time, worst)
        for index in range(len(work.tasks))
    )
    totals = [sums for _, sums in played]
    known = line_of(work, None, totals, most, set(), set(), worst)
    total = line_of(work, None, totals, most, no_cost, no_time, worst)
    rooms = rooms_needed(work, lines)
    models = _models(work, [play.models for play, _ in played])
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
        budgets=tuple(verdict(allowance, total, known, rooms) for allowance in work.allowances),
        plays=plays,
    )


def _models(work: Work, played: Sequence[Mapping[tuple[str, str], Sums]]) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return (provider, model) → expected calls, input and output tokens."""
    found: dict[tuple[str, str], Mapping[str, float]] = {}
    for key in sorted({key for models in played for key in models}):
        sums = Sums()
        for models in played:
            sums.add(models.get(key, Sums()), 1 / len(played))
        found[key] = {"calls": sums.calls, "input": sums.input, "output": sums.output}
    return found


def _path(work: Work, lines: Sequence[Line]) -> tuple[tuple[int, float], ...]:
    """Return the longest way through the tasks at the top, by expected seconds; composites are followed inside."""

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
        way: list[int] = []
        current: int | None = max(ends, key=lambda index: ends[index][0], default=None)
        while current is not None:
            way.append(current)
            current = ends[current][1]
        return way[::-1]

    return tuple((index, expected(index)) for index in longest(work.top) if expected(index) > 0)
