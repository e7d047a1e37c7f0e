"""Whether a budget would refuse the work, and how likely that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common.costs.estimate import least_output, worst_cost
from gorgon_common.costs.forecast.quantiles import Line, Quantiles
from gorgon_common.costs.forecast.work import Allowance, Task, Work, ordered

_NAMES = ("low", "expected", "p95", "worst")


def budget_needed(work: Work, lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Return low, expected, p95 → (US dollars, tokens) that a budget must have left when the work begins.

    Each call reserves its upper bound (with the shortest reply that it may be limited to), and the items of a map
    reserve together.  A budget therefore needs more than the final cost: what was spent before a call, plus the bound
    of that call.
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


def _known(band: Quantiles, name: str) -> float:
    value = getattr(band, name)
    return band.low if value is None else float(value)


def _reserved(work: Work, index: int, *, at_once: bool) -> tuple[float, float]:
    """Return (US dollars, tokens) that a task reserves at one time; `at_once`: it is part of a map's item."""
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


def check_budget(
    allowance: Allowance, total: Line, known: Line, needed: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Return whether a budget would refuse: never, at worst, maybe (p95 exceeds it), likely, certainly or unknown."""
    checks = []
    if allowance.usd is not None:
        checks.append((allowance.usd, _raised(total.usd, needed, 0), _raised(known.usd, needed, 0)))
    if allowance.tokens is not None:
        both = [Quantiles(*(_sum(first, second) for first, second in _pairs(line))) for line in (total, known)]
        checks.append((float(allowance.tokens), _raised(both[0], needed, 1), _raised(both[1], needed, 1)))
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


def _raised(band: Quantiles, needed: Mapping[str, tuple[float, float]], place: int) -> Quantiles:
    """Return what a budget must have left: the cost, or more where more is reserved at some moment."""
    values = (getattr(band, name) for name in _NAMES[:3])
    low, expected, p95 = (
        None if value is None else max(value, needed[name][place])
        for name, value in zip(_NAMES[:3], values, strict=True)
    )
    return Quantiles(low or 0.0, expected, p95, band.worst)


def _pairs(line: Line) -> list[tuple[float | None, float | None]]:
    return [(getattr(line.input, name), getattr(line.output, name)) for name in _NAMES]


def _sum(first: float | None, second: float | None) -> Any:
    return None if first is None or second is None else first + second


def _word(left: float, band: Quantiles, known: Quantiles) -> str:
    if known.low > left:
        return "certainly"
    if band.expected is None:
        return "unknown"
    if band.expected > left:
        return "likely"
    if band.p95 is not None and band.p95 > left:
        return "maybe"
    return "never" if band.worst is not None and band.worst <= left else "at worst"
