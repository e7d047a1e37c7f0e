"""The work that is forecast: a tree of tasks, and how uncertain each of them is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from gorgon_common.costs.usage import Usage

HISTORY, KIN, ASSUMED = "history", "similar calls", "assumption"
"""Where a guess comes from: past calls of the same step; of the same role and model elsewhere; nowhere."""

_PRIOR_SPREAD, _PRIOR_WEIGHT = 0.35, 3.0


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
class Sums:
    """What one task has used in one play, or at worst."""

    calls: float = 0.0
    input: float = 0.0
    output: float = 0.0
    micros: float = 0.0
    seconds: float = 0.0
    runs: float = 0.0

    def add(self, other: Sums, times: float = 1.0) -> None:
        """Add what something else has used, time left out."""
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
