"""The work to forecast: a tree of tasks with uncertain quantities."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from gorgon_common.costs.usage import Usage

HISTORY, SIMILAR, ASSUMED = "history", "similar calls", "assumption"
"""Where an estimate comes from: past calls of the same step, past calls of the same role and model, or a default."""

_PRIOR_SPREAD, _PRIOR_WEIGHT = 0.35, 3.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """An uncertain quantity, log-normal: `median`, and `spread`, the standard deviation of its logarithm.

    `count`: how many observations it is based on.
    """

    median: float
    spread: float
    source: str
    count: int = 0

    def draw(self, chance: random.Random, common: Mapping[str, float]) -> float:
        """Return one value; `common`: source → the error that all its estimates share in this trial."""
        if not self.median:
            return 0.0
        return self.median * math.exp(common.get(self.source, 0.0) + self.spread * chance.gauss(0.0, 1.0))


def learned(values: Iterable[float], source: str = HISTORY) -> Estimate | None:
    """Return a log-normal prediction of the next value, None without values; the fewer values, the wider."""
    logs = [math.log(value) for value in values if value > 0]
    if not logs:
        return None
    mean = fmean(logs)
    squares = sum((entry - mean) ** 2 for entry in logs)
    spread = (squares + _PRIOR_WEIGHT * _PRIOR_SPREAD**2) / (len(logs) + _PRIOR_WEIGHT)
    return Estimate(math.exp(mean), math.sqrt(spread * (1 + 1 / len(logs))), source, len(logs))


@dataclass(frozen=True, slots=True)
class Part:
    """Input tokens from the output of another task: `tokens` if that output has its expected length."""

    task: int
    tokens: float


@dataclass(frozen=True, slots=True)
class Call:
    """One conversation with a model.

    `models`: (provider, model) in the order they are tried.  `fixed`: known input tokens, `error` their relative error.
    `parts`: input from the outputs of other tasks.  `input` replaces both where only past calls give the size.
    `unsized`: part of the input has an unknown size.  `most_input`: the upper bound of input tokens, None where only
    the context window bounds it.  `bound`: the input tokens that a budget reserves.  `extra`: further calls per
    conversation, on average (repairs, retries).  `cached`: the share of input that is read from the provider's cache.
    Times in seconds.
    """

    models: tuple[tuple[str, str], ...]
    max_tokens: int
    fixed: float
    error: float
    output: Estimate
    seconds: Estimate | None
    timeout: float
    parts: tuple[Part, ...] = ()
    input: Estimate | None = None
    unsized: bool = False
    most_input: int | None = None
    bound: int = 0
    extra: float = 0.02
    cached: float = 0.0


@dataclass(frozen=True, slots=True)
class Repeat:
    """How often a body runs: a map's items (at most `parallel` at a time) or a loop's rounds (`in_turn`)."""

    times: Estimate
    most: int
    parallel: int | None = None
    in_turn: bool = False
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One step, or the template of one.  `needs` are tasks of the same body.

    `body`: its members; with `repeat` the body runs several times, and `after` runs once afterwards.  `seconds`: how
    long it takes in addition to its calls and its body, None where unknown; `most_seconds`: the same at worst.
    `chance`: the probability that it runs; `never`: it certainly does not.  `attempts`: the maximum.  `pauses`: the
    seconds between all attempts at worst.  `fallback`: tasks that run only after it has failed.
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
    seconds: Estimate | None = Estimate(0.0, 0.0, ASSUMED)
    most_seconds: float | None = 0.0
    chance: float = 1.0
    never: bool = False
    attempts: int = 1
    pauses: float = 0.0
    of: tuple[int, ...] = ()
    """For an aggregate: the tasks whose output sizes determine its own."""
    opaque: bool = False
    """Its cost cannot be known before it runs (a sub-workflow)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits per minute; None is no limit."""

    requests: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a budget that the work would be charged to; None: no limit of that kind."""

    name: str
    usd: float | None = None
    tokens: int | None = None


Price = Callable[[str, str, Usage], int | None]
"""(provider, model, usage) → micro-dollars, None where there is no price."""


@dataclass(slots=True)
class Work:
    """The input of a forecast.

    `price` and `window` (provider, model → the context window in tokens) describe the models.  `slots`: how many calls
    run at the same time.  `startup`: seconds before the first call.  `quotas`: (provider, model) or (provider, `*`).
    """

    tasks: Sequence[Task]
    top: Sequence[int]
    price: Price
    window: Callable[[str, str], int]
    slots: int = 50
    startup: Estimate = Estimate(0.0, 0.0, ASSUMED)
    quotas: Mapping[tuple[str, str], Quota] = field(default_factory=dict)
    allowances: Sequence[Allowance] = ()
    most_usd: float | None = None
    """An enforced limit in US dollars: it caps the worst cost."""
    most_seconds: float | None = None
    past_seconds: Sequence[float] = ()
    """How long past runs of the same work took: corrects the simulated times for everything not modelled."""
    seed: int = 0


@dataclass(slots=True)
class Sums:
    """What one task uses in one trial, or at worst."""

    calls: float = 0.0
    input: float = 0.0
    output: float = 0.0
    micros: float = 0.0
    seconds: float = 0.0
    runs: float = 0.0

    def add(self, other: Sums, times: float = 1.0) -> None:
        """Add the usage of another, without its time."""
        self.calls += other.calls * times
        self.input += other.input * times
        self.output += other.output * times
        self.micros += other.micros * times


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
