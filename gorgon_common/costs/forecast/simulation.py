"""One simulated execution of the work: what each task uses and how long everything takes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from gorgon_common.costs.forecast.work import (
    ASSUMED,
    HISTORY,
    SIMILAR,
    Call,
    Repeat,
    Sums,
    Task,
    Work,
    learned,
    ordered,
)
from gorgon_common.costs.usage import Usage

ITEMS = 12
_COMMON = {HISTORY: 0.08, SIMILAR: 0.25, ASSUMED: 0.55}
"""The error that all estimates from one source share (one standard deviation of the logarithm)."""
PACE = {HISTORY: 0.30, SIMILAR: 0.35, ASSUMED: 0.55}
"""The same for times: in a slow hour all calls are slow."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Micro-dollars per token, near the expected size of a call."""

    input: float
    cached: float
    output: float


class Trial:
    """One trial of the work."""

    def __init__(self, work: Work, rates: Mapping[int, Rates | None], chance: random.Random) -> None:
        self.work = work
        self.rates = rates
        self.chance = chance
        self.common = {source: spread * chance.gauss(0.0, 1.0) for source, spread in _COMMON.items()}
        self.pace = {source: spread * chance.gauss(0.0, 1.0) for source, spread in PACE.items()}
        self.off = {model: chance.gauss(0.0, 1.0) for model in sorted(_first_models(work.tasks))}
        self.own = [Sums() for _ in work.tasks]
        """What each task has used in all its executions, bodies included; `seconds` is that of the longest one."""
        self.models: dict[tuple[str, str], Sums] = {}
        self.size: dict[int, float] = {}
        self.busy = 0.0

    def run(self) -> Sums:
        """Simulate the whole work once; returns what it used."""
        total, seconds = self._body(self.work.top, 1.0)
        total.seconds = seconds + self.work.startup.draw(self.chance, self.pace)
        return total

    def _body(self, members: Sequence[int], weight: float) -> tuple[Sums, float]:
        """Simulate tasks in order; returns what they use and the seconds of the longest path through them."""
        total, ends = Sums(), dict[int, float]()
        for index in ordered(self.work.tasks, members):
            begin = max((ends[need] for need in self.work.tasks[index].needs if need in ends), default=0.0)
            used = self._task(index, weight)
            total.add(used)
            ends[index] = begin + used.seconds
        return total, max(ends.values(), default=0.0)

    def _task(self, index: int, weight: float) -> Sums:
        """Simulate one task; `weight` is the number of executions that this one stands for."""
        task = self.work.tasks[index]
        used = Sums()
        if task.never or (task.chance < 1.0 and self.chance.random() >= task.chance):
            self.size.setdefault(index, 0.0 if task.never else 1.0)
            return used
        used.runs = 1.0
        if task.seconds is not None:
            used.seconds += task.seconds.draw(self.chance, self.pace)
        if task.call is not None:
            self._call(index, task.call, used, weight)
        elif task.repeat is not None:
            self._repeat(index, task, task.repeat, used, weight)
        elif task.body:
            inside, seconds = self._body(task.body, weight)
            used.add(inside)
            used.seconds += seconds
            self.size[index] = fmean(self.size.get(child, 1.0) for child in task.body)
        else:
            self.size[index] = fmean([self.size.get(other, 1.0) for other in task.of] or [1.0])
        mine = self.own[index]
        mine.add(used, weight)
        mine.runs += weight
        mine.seconds = max(mine.seconds, used.seconds)
        return used

    def _repeat(self, index: int, task: Task, repeat: Repeat, used: Sums, weight: float) -> None:
        times = repeat.most if repeat.exact else round(repeat.times.draw(self.chance, {}))
        times = min(repeat.most, max(1 if repeat.in_turn else 0, times))
        simulated = min(times, ITEMS)
        share = times / simulated if simulated else 0.0
        turns, sizes = [], []
        for _ in range(simulated):
            inside, seconds = self._body(task.body, weight * share)
            used.add(inside, share)
            turns.append(seconds)
            sizes += [self.size.get(child, 1.0) for child in task.body]
        expected = max(1.0, repeat.times.median)
        self.size[index] = fmean(sizes or [1.0]) * (1.0 if repeat.in_turn else times / expected)
        if turns:
            lanes = 1 if repeat.in_turn else min(repeat.parallel or times, times, self.work.slots)
            # Each item takes the next free lane, so the map takes at least its longest item and an even share of all.
            used.seconds += max(max(turns), fmean(turns) * times / lanes)
        if task.after and times:
            inside, seconds = self._body(task.after, weight)
            used.add(inside)
            used.seconds += seconds
            self.size[index] = fmean(self.size.get(child, 1.0) for child in task.after)

    def _call(self, index: int, call: Call, used: Sums, weight: float) -> None:
        output = min(float(call.max_tokens), call.output.draw(self.chance, self.common))
        self.size[index] = output / call.output.median if call.output.median else 1.0
        if call.input is not None:
            tokens = call.input.draw(self.chance, self.common)
        else:
            tokens = call.fixed + sum(part.tokens * self.size.get(part.task, 1.0) for part in call.parts)
            tokens *= math.exp(call.error * self.off[call.models[0]])
        calls = 1.0
        while call.extra and self.chance.random() < call.extra / (1 + call.extra) and calls < 10:
            calls += 1.0
        tokens *= calls
        used.calls += calls
        used.input += tokens
        used.output += output * calls
        if call.seconds is not None:
            seconds = min(call.timeout, call.seconds.draw(self.chance, self.pace)) * calls
            used.seconds += seconds
            self.busy += seconds * weight
        rates = self.rates[index]
        if rates is not None:
            cached = tokens * call.cached
            used.micros += (tokens - cached) * rates.input + cached * rates.cached + output * calls * rates.output
        first = self.models.setdefault(call.models[0], Sums())
        first.add(Sums(calls, tokens, output * calls), weight)


def _first_models(tasks: Sequence[Task]) -> set[tuple[str, str]]:
    return {task.call.models[0] for task in tasks if task.call is not None}


def correct_times(work: Work, trials: Sequence[tuple[Trial, Sums]]) -> None:
    """Scale the times of the trials by the ratio of past times to their mean."""
    mean = fmean(sums.seconds for _, sums in trials)
    ratio = learned(seconds / mean for seconds in work.past_seconds) if mean else None
    if ratio is not None:
        for trial, sums in trials:
            sums.seconds *= ratio.draw(trial.chance, {})


def rates_of(work: Work, call: Call) -> Rates | None:
    """Return the first model's price per token near the expected size, as long inputs may cost more per token."""
    provider, model = call.models[0]
    tokens = round(call.input.median if call.input else call.fixed + sum(part.tokens for part in call.parts))
    tokens = max(1_000, tokens)
    plain = work.price(provider, model, Usage(input_tokens=tokens))
    cached = work.price(provider, model, Usage(input_tokens=tokens, cache_read_tokens=tokens))
    both = work.price(provider, model, Usage(input_tokens=tokens, output_tokens=10_000))
    if plain is None or both is None:
        return None
    return Rates(plain / tokens, (plain if cached is None else cached) / tokens, (both - plain) / 10_000)
