"""The upper bound of the work: every attempt, repair round and item happens, and every reply has its full length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gorgon_common.costs.estimate import worst_cost
from gorgon_common.costs.forecast.quotas import quota_seconds
from gorgon_common.costs.forecast.simulation import PACE
from gorgon_common.costs.forecast.work import Call, Estimate, Sums, Task, Work, ordered

REPAIR_ROUNDS = 2
REPAIR_TOKENS = 8_500
"""The most tokens of a repair request besides the last reply: 20 violations of 300 characters, a token per byte."""
REREAD = 4.0
"""How many input tokens one output token may become when sent back: indented JSON, another tokenizer."""
CALL_TOKENS = 1_000
"""The most tokens that a provider adds to a call: the framing of turns, the text around a schema."""


class Worst:
    """Computes the upper bound of each task."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.own = [Sums() for _ in work.tasks]
        self.unpriced: set[int] = set()
        self.endless: set[int] = set()

    def all(self) -> Sums:
        """Return the upper bound of the whole: every call waits for its quota and uses its full timeout as well."""
        total = self._body(self.work.top, 1)
        models: dict[tuple[str, str], Sums] = {}
        for task, used in zip(self.work.tasks, self.own, strict=True):
            for model in task.call.models if task.call is not None else ():
                models.setdefault(model, Sums()).add(used, 1 / len(task.call.models if task.call else (model,)))
        total.seconds += _upper(self.work.startup) + quota_seconds(self.work, models)
        return total

    def _body(self, members: Sequence[int], weight: int) -> Sums:
        total, ends = Sums(), dict[int, float]()
        for index in ordered(self.work.tasks, members):
            begin = max((ends[need] for need in self.work.tasks[index].needs if need in ends), default=0.0)
            used = self._task(index, weight)
            total.add(used)
            ends[index] = begin + used.seconds
        total.seconds = max(ends.values(), default=0.0)
        return total

    def _task(self, index: int, weight: int) -> Sums:
        task = self.work.tasks[index]
        used = Sums()
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

    def _call(self, index: int, task: Task, call: Call, used: Sums) -> None:
        """Every attempt asks every model, and each conversation uses all its repair rounds."""
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


def _upper(estimate: Estimate) -> float:
    """Return a value that the quantity will hardly exceed (four standard deviations)."""
    return estimate.median * math.exp(4 * (estimate.spread + PACE.get(estimate.source, 0.0)))
