"""What a piece of work will use: low, expected, p95 and worst, by playing it many times with seeded chance.

The work is a tree of tasks; what is uncertain about each is a Guess, learned from past calls or assumed.  Low, expected
and p95 come from the plays (2.5 % quantile, mean, 95 % quantile); worst is no play but arithmetic: every attempt and
repair round is used up, every map is full, every loop goes all its rounds, every reply is as long as it may be.

What nothing is known of is None.  A sum of something unknown is None too, with the sum of the rest beside it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from gorgon_common.costs.estimate import least_output, worst_cost
from gorgon_common.costs.usage import Usage

HISTORY, KIN, ASSUMED = "history", "similar calls", "assumption"
"""Where a guess comes from: past calls of the same step; of the same role and model elsewhere; nowhere."""

REPAIR_ROUNDS = 2
REPAIR_TOKENS = 8_500
"""The most that a round of repair says beside the last reply: 20 violations of 300 characters, a token a byte."""
REREAD = 4.0
"""How many tokens a token of a reply may be when it is read again: indented as JSON, under another tokenizer."""
CALL_TOKENS = 1_000
"""The most that a provider adds to a call of its own: the turn's frame, the words around a schema."""

BURST_SECONDS = 3.0
"""What a bucket holds when the work begins: so many seconds' worth (the limiter's burst)."""

_DRAWS = 60_000
_FEWEST, _MOST = 60, 400
_ITEMS = 12
_PRIOR_SPREAD, _PRIOR_WEIGHT = 0.35, 3.0
_COMMON = {HISTORY: 0.08, KIN: 0.25, ASSUMED: 0.55}
"""How far all guesses of one kind may be wrong together (one standard deviation of the logarithm)."""
_PACE = {HISTORY: 0.30, KIN: 0.35, ASSUMED: 0.55}
"""The same for times: a slow hour is slow for all calls."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A quantity that is about `median`, with `spread` the standard deviation of its logarithm.

    `count`: how many observations stand behind it.
    """

    median: float
    spread: float
    source: str
    count: int = 0

    def draw(self, chance: random.Random, common: Mapping[str, float]) -> float:
        """Return one value; `common` is what all guesses of a source are off by in this play."""
        if not self.median:
            return 0.0
        return self.median * math.exp(common.get(self.source, 0.0) + self.spread * chance.gauss(0.0, 1.0))


def learned(values: Iterable[float], source: str = HISTORY) -> Guess | None:
    """Return what the next value will be like: a log-normal prediction, wider the fewer values there are."""
    logs = [math.log(value) for value in values if value > 0]
    if not logs:
        return None
    mean = fmean(logs)
    squares = sum((entry - mean) ** 2 for entry in logs)
    spread = (squares + _PRIOR_WEIGHT * _PRIOR_SPREAD**2) / (len(logs) + _PRIOR_WEIGHT)
    return Guess(math.exp(mean), math.sqrt(spread * (1 + 1 / len(logs))), source, len(logs))


@dataclass(frozen=True, slots=True)
class Part:
    """Input tokens that come from what another task returns: `tokens` where that one is as long as expected."""

    task: int
    tokens: float


@dataclass(frozen=True, slots=True)
class Call:
    """One conversation with a model.

    `models`: (provider, model) in the order they are tried.  `fixed`: input tokens that are known, `error` how far that
    may be off (relative).  `parts`: input that other tasks write.  `input` replaces both where only the past tells.
    `unsized`: something in the input has a size that nobody knows.  `most_input`: the most tokens of input, None where
    only the context window bounds it; `bound`: what budgets take the expected input for.  `extra`: further calls to
    one, on average (repairs, retries).  `cached`: the share of input that is read from the provider's cache.  Times in
    seconds.
    """

    models: tuple[tuple[str, str], ...]
    max_tokens: int
    fixed: float
    error: float
    output: Guess
    seconds: Guess | None
    timeout: float
    parts: tuple[Part, ...] = ()
    input: Guess | None = None
    unsized: bool = False
    most_input: int | None = None
    bound: int = 0
    extra: float = 0.02
    cached: float = 0.0


@dataclass(frozen=True, slots=True)
class Repeat:
    """How often a task's body is done: a map's items (side by side, `parallel` at most) or a loop's rounds."""

    times: Guess
    most: int
    parallel: int | None = None
    in_turn: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One step, or the template of one.  `needs` are tasks of the same body.

    `body`: what it is made of; with `repeat` the body is done several times, and `after` once when all are done.
    `seconds`: how long it takes beside its calls and its body, None where nobody knows; `most_seconds` at worst.
    `chance`: how likely it runs; `never` where it is certain that it does not.  `attempts`: the most.
    `pauses`: seconds between all attempts at worst.  `fallback`: tasks that are only done when it has failed.
    """

    id: str
    kind: str
    needs: tuple[int, ...] = ()
    call: Call | None = None
    repeat: Repeat | None = None
    body: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    fallback: tuple[int, ...] = ()
    parent: int | None = None
    seconds: Guess | None = Guess(0.0, 0.0, ASSUMED)
    most_seconds: float | None = 0.0
    chance: float = 1.0
    never: bool = False
    attempts: int = 1
    pauses: float = 0.0
    of: tuple[int, ...] = ()
    """Tasks whose returned size its own follows (an aggregate)."""
    opaque: bool = False
    """Nobody can tell what it costs before it runs (a sub-workflow)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What may be used in a minute; None is no limit."""

    requests: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """A budget that the work would be charged to, and what is left of it; None: no limit of that kind."""

    name: str
    usd: float | None = None
    tokens: int | None = None


Price = Callable[[str, str, Usage], int | None]
"""(provider, model, usage) → micro-dollars, None where there is no price."""


@dataclass(slots=True)
class Work:
    """What is to be forecast.

    `price` and `window` (provider, model → the most tokens of input) describe the models; `slots` is how many calls run
    at the same time; `startup` is spent once, before the first call.  `quotas`: (provider, model) or (provider, `*`).
    """

    tasks: Sequence[Task]
    top: Sequence[int]
    price: Price
    window: Callable[[str, str], int]
    slots: int = 50
    startup: Guess = Guess(0.0, 0.0, ASSUMED)
    quotas: Mapping[tuple[str, str], Quota] = field(default_factory=dict)
    allowances: Sequence[Allowance] = ()
    most_usd: float | None = None
    """A limit on money that is enforced: the worst cost is no more."""
    most_seconds: float | None = None
    past_seconds: Sequence[float] = ()
    """How long the same work took before: it corrects what its parts suggest, for all that is not in the parts."""
    seed: int = 0


@dataclass(slots=True)
class _Sums:
    """What one task has used in one play, or at worst."""

    calls: float = 0.0
    input: float = 0.0
    output: float = 0.0
    micros: float = 0.0
    seconds: float = 0.0
    runs: float = 0.0

    def add(self, other: _Sums, times: float = 1.0) -> None:
        """Add what something else has used, time left out."""
        self.calls += other.calls * times
        self.input += other.input * times
        self.output += other.output * times
        self.micros += other.micros * times


@dataclass(frozen=True, slots=True)
class _Rates:
    """Micro-dollars for a token near the expected size of a call."""

    input: float
    cached: float
    output: float


class _Play:
    """One play of the work."""

    def __init__(self, work: Work, rates: Mapping[int, _Rates | None], chance: random.Random) -> None:
        self.work = work
        self.rates = rates
        self.chance = chance
        self.common = {source: spread * chance.gauss(0.0, 1.0) for source, spread in _COMMON.items()}
        self.pace = {source: spread * chance.gauss(0.0, 1.0) for source, spread in _PACE.items()}
        self.off = {model: chance.gauss(0.0, 1.0) for model in sorted(_first_models(work.tasks))}
        self.own = [_Sums() for _ in work.tasks]
        """What each task has used in all its turns, bodies included; seconds are those of its longest turn."""
        self.models: dict[tuple[str, str], _Sums] = {}
        self.size: dict[int, float] = {}
        self.busy = 0.0

    def play(self) -> _Sums:
        """Do everything once."""
        total, seconds = self._body(self.work.top, 1.0)
        total.seconds = seconds + self.work.startup.draw(self.chance, self.pace)
        return total

    def _body(self, members: Sequence[int], weight: float) -> tuple[_Sums, float]:
        """Do tasks in their order; returns what they use and the longest way through them."""
        total, ends = _Sums(), dict[int, float]()
        for index in ordered(self.work.tasks, members):
            begin = max((ends[need] for need in self.work.tasks[index].needs if need in ends), default=0.0)
            used = self._task(index, weight)
            total.add(used)
            ends[index] = begin + used.seconds
        return total, max(ends.values(), default=0.0)

    def _task(self, index: int, weight: float) -> _Sums:
        """Do one task; `weight` is how many turns of it this one stands for."""
        task = self.work.tasks[index]
        used = _Sums()
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

    def _repeat(self, index: int, task: Task, repeat: Repeat, used: _Sums, weight: float) -> None:
        times = repeat.most if repeat.exact else round(repeat.times.draw(self.chance, {}))
        times = min(repeat.most, max(1 if repeat.in_turn else 0, times))
        played = min(times, _ITEMS)
        share = times / played if played else 0.0
        turns, sizes = [], []
        for _ in range(played):
            inside, seconds = self._body(task.body, weight * share)
            used.add(inside, share)
            turns.append(seconds)
            sizes += [self.size.get(child, 1.0) for child in task.body]
        expected = max(1.0, repeat.times.median)
        self.size[index] = fmean(sizes or [1.0]) * (1.0 if repeat.in_turn else times / expected)
        if turns:
            lanes = 1 if repeat.in_turn else min(repeat.parallel or times, times, self.work.slots)
            # Items go to whichever lane is free: no better than the longest, and than an even share of all.
            used.seconds += max(max(turns), fmean(turns) * times / lanes)
        if task.after and times:
            inside, seconds = self._body(task.after, weight)
            used.add(inside)
            used.seconds += seconds
            self.size[index] = fmean(self.size.get(child, 1.0) for child in task.after)

    def _call(self, index: int, call: Call, used: _Sums, weight: float) -> None:
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
        first = self.models.setdefault(call.models[0], _Sums())
        first.add(_Sums(calls, tokens, output * calls), weight)


def _first_models(tasks: Sequence[Task]) -> set[tuple[str, str]]:
    return {task.call.models[0] for task in tasks if task.call is not None}


def ordered(tasks: Sequence[Task], members: Sequence[int]) -> list[int]:
    """Return the members so that each comes after what it needs (Kahn's algorithm, stable)."""
    inside = set(members)
    left = {index: sum(1 for need in set(tasks[index].needs) if need in inside) for index in members}
    waiting: dict[int, list[int]] = {}
    for index in members:
        for need in set(tasks[index].needs) & inside:
            waiting.setdefault(need, []).append(index)
    ready = [index for index in members if not left[index]]
    found: list[int] = []
    while ready:
        index = ready.pop(0)
        found.append(index)
        for successor in waiting.get(index, ()):
            left[successor] -= 1
            if not left[successor]:
                ready.append(successor)
    return found


class _Worst:
    """The most that each task can use."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.own = [_Sums() for _ in work.tasks]
        self.unpriced: set[int] = set()
        self.endless: set[int] = set()

    def all(self) -> _Sums:
        """Return the most of everything.  At worst all calls wait for their quota and take their time as well."""
        total = self._body(self.work.top, 1)
        models: dict[tuple[str, str], _Sums] = {}
        for task, used in zip(self.work.tasks, self.own, strict=True):
            for model in task.call.models if task.call is not None else ():
                models.setdefault(model, _Sums()).add(used, 1 / len(task.call.models if task.call else (model,)))
        total.seconds += _upper(self.work.startup) + _quota_seconds(self.work, models)
        return total

    def _body(self, members: Sequence[int], weight: int) -> _Sums:
        total, ends = _Sums(), dict[int, float]()
        for index in ordered(self.work.tasks, members):
            begin = max((ends[need] for need in self.work.tasks[index].needs if need in ends), default=0.0)
            used = self._task(index, weight)
            total.add(used)
            ends[index] = begin + used.seconds
        total.seconds = max(ends.values(), default=0.0)
        return total

    def _task(self, index: int, weight: int) -> _Sums:
        task = self.work.tasks[index]
        used = _Sums()
        if task.never:
            return used
        if task.most_seconds is None:
            self.endless.add(index)
        if task.opaque:
            self.unpriced.add(index)
        used.seconds = (task.most_seconds or 0.0) * task.attempts + task.pauses
        if task.call is not None:
            self._call(index, task, task.call, used)
        if task.body:
            times = task.repeat.most if task.repeat is not None else 1
            inside = self._body(task.body, weight * times)
            used.add(inside, times)
            lanes = 1
            if task.repeat is not None and not task.repeat.in_turn:
                lanes = max(1, min(task.repeat.parallel or times, self.work.slots))
            used.seconds += inside.seconds * math.ceil(times / lanes)
        for more in (task.after, task.fallback):
            if more:
                inside = self._body(more, weight)
                used.add(inside)
                used.seconds += inside.seconds
        mine = self.own[index]
        mine.add(used, weight)
        mine.runs += weight
        mine.seconds = max(mine.seconds, used.seconds)
        return used

    def _call(self, index: int, task: Task, call: Call, used: _Sums) -> None:
        """Every attempt asks every model, and each conversation needs all its rounds of repair."""
        rounds = 1 + REPAIR_ROUNDS
        for provider, model in call.models:
            window = self.work.window(provider, model)
            asked = window if call.most_input is None else min(window, call.most_input + CALL_TOKENS)
            again = min(window, asked + math.ceil(call.max_tokens * REREAD) + REPAIR_TOKENS)
            tokens = asked + REPAIR_ROUNDS * again
            used.calls += rounds * task.attempts
            used.input += tokens * task.attempts
            used.output += call.max_tokens * rounds * task.attempts
            used.seconds += call.timeout * task.attempts
            costs = [self._price(provider, model, size, call.max_tokens) for size in (asked, again)]
            if costs[0] is None or costs[1] is None:
                self.unpriced.add(index)
            else:
                used.micros += (costs[0] + REPAIR_ROUNDS * costs[1]) * task.attempts

    def _price(self, provider: str, model: str, tokens: int, output: int) -> int | None:
        return worst_cost(lambda usage: self.work.price(provider, model, usage), tokens, output)


def _upper(guess: Guess) -> float:
    """Return what a guess will hardly exceed."""
    return guess.median * math.exp(4 * (guess.spread + _PACE.get(guess.source, 0.0)))


@dataclass(frozen=True, slots=True)
class Band:
    """Low, expected, p95 and worst of a quantity; None where it is not known."""

    low: float
    expected: float | None
    p95: float | None
    worst: float | None

    def to_dict(self, digits: int) -> dict[str, float | int | None]:
        """Return the four, rounded: low downwards, p95 and worst upwards."""
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
    """What one task is forecast to use, in all its turns together; `seconds` of one turn of a template."""

    task: int
    calls: Band
    input: Band
    output: Band
    usd: Band
    seconds: Band
    runs: Band
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The whole of it.  `path`: (task, expected seconds) of the longest way.  `binding`: see `_binding`."""

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
    rates = {index: _rates(work, task.call) for index, task in enumerate(work.tasks) if task.call is not None}
    first = _Play(work, rates, random.Random(work.seed))
    first.play()
    turns = max(1.0, sum(min(sums.runs, _ITEMS) for sums in first.own))
    plays = int(min(_MOST, max(_FEWEST, _DRAWS / turns)))
    played: list[tuple[_Play, _Sums]] = []
    for number in range(plays):
        play = _Play(work, rates, random.Random(work.seed * 1_000_003 + number))
        played.append((play, play.play()))
    _correct(work, played)
    for play, sums in played:
        sums.seconds = max(sums.seconds, play.busy / work.slots, _quota_seconds(work, play.models))
    worst = _Worst(work)
    most = worst.all()
    no_cost, no_time = _unknown(work, rates)
    lines = tuple(
        _line(work, index, [play.own[index] for play, _ in played], worst.own[index], no_cost, no_time, worst)
        for index in range(len(work.tasks))
    )
    totals = [sums for _, sums in played]
    known = _line(work, None, totals, most, set(), set(), worst)
    total = _line(work, None, totals, most, no_cost, no_time, worst)
    rooms = _rooms(work, lines)
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
        binding=_binding(work, models, known.seconds.expected or 0.0),
        budgets=tuple(_verdict(allowance, total, known, rooms) for allowance in work.allowances),
        plays=plays,
    )


def _correct(work: Work, played: Sequence[tuple[_Play, _Sums]]) -> None:
    """Scale the plays' times by how past times compare with their mean."""
    mean = fmean(sums.seconds for _, sums in played)
    ratio = learned(seconds / mean for seconds in work.past_seconds) if mean else None
    if ratio is not None:
        for play, sums in played:
            sums.seconds *= ratio.draw(play.chance, {})


def _rates(work: Work, call: Call) -> _Rates | None:
    """Return the price of a token of the first model near the expected size: long inputs may be dearer."""
    provider, model = call.models[0]
    tokens = round(call.input.median if call.input else call.fixed + sum(part.tokens for part in call.parts))
    tokens = max(1_000, tokens)
    plain = work.price(provider, model, Usage(input_tokens=tokens))
    cached = work.price(provider, model, Usage(input_tokens=tokens, cache_read_tokens=tokens))
    both = work.price(provider, model, Usage(input_tokens=tokens, output_tokens=10_000))
    if plain is None or both is None:
        return None
    return _Rates(plain / tokens, (plain if cached is None else cached) / tokens, (both - plain) / 10_000)


def _unknown(work: Work, rates: Mapping[int, _Rates | None]) -> tuple[set[int], set[int]]:
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


def _line(
    work: Work,
    index: int | None,
    played: Sequence[_Sums],
    most: _Sums,
    no_cost: set[int],
    no_time: set[int],
    worst: _Worst,
) -> Line:
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
        calls=_band([sums.calls for sums in played], most.calls),
        input=_band([sums.input for sums in played], most.input, unknown=_unsized(work, inside)),
        output=_band([sums.output for sums in played], most.output),
        usd=_band([sums.micros / 1e6 for sums in played], top, unknown=cost_unknown),
        seconds=_band([sums.seconds for sums in played], ends, unknown=time_unknown),
        runs=_band([sums.runs for sums in played], most.runs),
        sources=tuple(sorted({source for entry in inside for source in _sources(work.tasks[entry])})),
    )


def _unsized(work: Work, inside: Iterable[int]) -> bool:
    tasks = (work.tasks[entry] for entry in inside)
    return any(
        task.call is not None and task.call.unsized and task.call.input is None and task.chance and not task.never
        for task in tasks
    )


def _sources(task: Task) -> set[str]:
    """Return where the guesses about a task come from."""
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


def _band(values: list[float], worst: float | None, *, unknown: bool = False) -> Band:
    """Return the quantiles of the plays, none above the worst."""
    values = sorted(value if worst is None else min(value, worst) for value in values)
    low = values[int(0.025 * len(values))]
    if unknown:
        return Band(low, None, None, worst)
    return Band(low, fmean(values), values[min(len(values) - 1, math.ceil(0.95 * len(values)))], worst)


def _models(
    work: Work, played: Sequence[Mapping[tuple[str, str], _Sums]]
) -> dict[tuple[str, str], Mapping[str, float]]:
    """Return (provider, model) → expected calls, input and output tokens."""
    found: dict[tuple[str, str], Mapping[str, float]] = {}
    for key in sorted({key for models in played for key in models}):
        sums = _Sums()
        for models in played:
            sums.add(models.get(key, _Sums()), 1 / len(played))
        found[key] = {"calls": sums.calls, "input": sums.input, "output": sums.output}
    return found


def _needs(quota: Quota, calls: float, tokens_in: float, tokens_out: float) -> dict[str, float]:
    """Return dimension → seconds that the quota takes to let this much through."""
    wanted = (
        ("requests", quota.requests, calls),
        ("input_tokens", quota.input_tokens, tokens_in),
        ("output_tokens", quota.output_tokens, tokens_out),
        ("tokens", quota.tokens, tokens_in + tokens_out),
    )
    return {name: 60.0 * amount / limit for name, limit, amount in wanted if limit}


def _quota_of(work: Work, provider: str, model: str) -> Quota | None:
    return work.quotas.get((provider, model)) or work.quotas.get((provider, "*"))


def _quota_seconds(work: Work, models: Mapping[tuple[str, str], _Sums]) -> float:
    """Return how long the quotas alone would make the work take."""
    longest = 0.0
    for (provider, model), sums in models.items():
        quota = _quota_of(work, provider, model)
        if quota is not None:
            needs = _needs(quota, sums.calls, sums.input, sums.output)
            longest = max(longest, max(needs.values(), default=0.0) - BURST_SECONDS)
    return longest


def _binding(
    work: Work, models: Mapping[tuple[str, str], Mapping[str, float]], seconds: float
) -> dict[str, Any] | None:
    """Return the quota that comes nearest to its end, None where no quotas are known.

    `{provider, model, dimension, per_minute, needed, seconds, share, binds}`: `share` is how much of the quota the work
    uses while it lasts; it binds where the quota makes the work take longer.
    """
    found: list[dict[str, Any]] = []
    for (provider, model), used in models.items():
        quota = _quota_of(work, provider, model)
        if quota is None:
            continue
        for name, needed in _needs(quota, used["calls"], used["input"], used["output"]).items():
            limit = getattr(quota, name)
            found.append(
                {
                    "provider": provider,
                    "model": model,
                    "dimension": name,
                    "per_minute": limit,
                    "needed": round(needed / 60.0 * limit),
                    "seconds": round(needed, 1),
                    "share": round(needed / max(60.0, seconds), 4),
                    "binds": needed - BURST_SECONDS > 0 and needed - BURST_SECONDS >= seconds * 0.99,
                }
            )
    return max(found, key=lambda entry: float(entry["share"]), default=None)


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


_NAMES = ("low", "expected", "p95", "worst")


def _rooms(work: Work, lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Return low, expected, p95 → (US dollars, tokens) that a budget must have when the work begins.

    A call is reserved at its upper bound (with the shortest reply that it may be held to), the items of a map all
    together, so a budget needs more than what is spent in the end: what was spent before, and the bound of what comes.
    """
    found = dict.fromkeys(_NAMES[:3], (0.0, 0.0))
    before: dict[int, set[int]] = {}
    for index in ordered(work.tasks, work.top):
        needs = [need for need in work.tasks[index].needs if need in before]
        before[index] = {*needs}.union(*(before[need] for need in needs))
        usd, tokens = _reserved(work, index, at_once=False)
        if not tokens:
            continue
        for name, (most_usd, most_tokens) in found.items():
            spent = [_known(lines[other].usd, name) for other in before[index]]
            used = [_known(lines[other].input, name) + _known(lines[other].output, name) for other in before[index]]
            found[name] = max(most_usd, usd + sum(spent)), max(most_tokens, tokens + sum(used))
    return found


def _known(band: Band, name: str) -> float:
    value = getattr(band, name)
    return band.low if value is None else float(value)


def _reserved(work: Work, index: int, *, at_once: bool) -> tuple[float, float]:
    """Return (US dollars, tokens) that are reserved for a task at one time; `at_once`: it is an item of a map."""
    task = work.tasks[index]
    if task.never or not task.chance:
        return 0.0, 0.0
    if task.call is not None:
        output = task.call.max_tokens if at_once else least_output(task.call.max_tokens)
        provider, model = task.call.models[0]
        cost = worst_cost(lambda usage: work.price(provider, model, usage), task.call.bound, output)
        return (cost or 0) / 1e6, float(task.call.bound + output)
    parts = [_reserved(work, child, at_once=at_once or _is_map(task)) for child in task.body]
    if _is_map(task) and task.repeat is not None:
        times = min(task.repeat.most, task.repeat.times.median)
        return times * sum(usd for usd, _ in parts), times * sum(tokens for _, tokens in parts)
    if at_once:
        return sum(usd for usd, _ in parts), sum(tokens for _, tokens in parts)
    return max((usd for usd, _ in parts), default=0.0), max((tokens for _, tokens in parts), default=0.0)


def _is_map(task: Task) -> bool:
    return task.repeat is not None and not task.repeat.in_turn


def _verdict(
    allowance: Allowance, total: Line, known: Line, rooms: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Return whether a budget would refuse: never, at worst, maybe (p95 is above it), likely, certainly or unknown."""
    checks = []
    if allowance.usd is not None:
        checks.append((allowance.usd, _raised(total.usd, rooms, 0), _raised(known.usd, rooms, 0)))
    if allowance.tokens is not None:
        both = [Band(*(_sum(first, second) for first, second in _pairs(line))) for line in (total, known)]
        checks.append((float(allowance.tokens), _raised(both[0], rooms, 1), _raised(both[1], rooms, 1)))
    order = ("never", "at worst", "maybe", "unknown", "likely", "certainly")
    words = [_word(left, band, rest) for left, band, rest in checks] or ["never"]
    verdict = max(words, key=order.index)
    return {
        "budget": allowance.name,
        "left_usd": allowance.usd,
        "left_tokens": allowance.tokens,
        "needs_usd": None if allowance.usd is None else round(_known(checks[0][2], "expected"), 6),
        "needs_tokens": None if allowance.tokens is None else round(_known(checks[-1][2], "expected")),
        "refuses": verdict,
    }


def _raised(band: Band, rooms: Mapping[str, tuple[float, float]], place: int) -> Band:
    """Return what a budget must hold: what is spent, or more where more is reserved on the way."""
    values = (getattr(band, name) for name in _NAMES[:3])
    low, expected, p95 = (
        None if value is None else max(value, rooms[name][place])
        for name, value in zip(_NAMES[:3], values, strict=True)
    )
    return Band(low or 0.0, expected, p95, band.worst)


def _pairs(line: Line) -> list[tuple[float | None, float | None]]:
    return [(getattr(line.input, name), getattr(line.output, name)) for name in _NAMES]


def _sum(first: float | None, second: float | None) -> Any:
    return None if first is None or second is None else first + second


def _word(left: float, band: Band, known: Band) -> str:
    if known.low > left:
        return "certainly"
    if band.expected is None:
        return "unknown"
    if band.expected > left:
        return "likely"
    if band.p95 is not None and band.p95 > left:
        return "maybe"
    return "never" if band.worst is not None and band.worst <= left else "at worst"
