"""Estimates what a run would use, before anything is spent: the document of `gorgon plan --json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from gorgon_common.costs import forecast as forecasts
from gorgon_common.costs.budgets import micro_dollars
from gorgon_common.costs.forecast import Allowance, Estimate, Forecast, Line, Quantiles, Quota, Task, Work
from gorgon_common.costs.history import History
from gorgon_common.costs.tokens import TokenEstimator, family_of
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.limits import Quota as Limits
from gorgon_common.engine.ports import Pricer
from gorgon_common.engine.workload import Workload, outlook
from gorgon_common.workflow.plan import Kind, Node, Plan

WINDOW = 2_000_000
"""Assumed maximum of tokens per call for a model with an unknown context window."""
FINISHING_SECONDS = 60.0
STARTUP_SECONDS = 0.8
"""Additional seconds for the first call to a provider in a new process, which has to load the SDK."""

_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})


class Prices(Pricer, Protocol):
    """Prices that also know the maximum size of a call."""

    def window(self, provider: str, model: str) -> int | None:
        """Return the model's context window in tokens, or None if it is unknown."""
        ...


def estimate(
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    target: str,
    history: History,
    estimator: TokenEstimator,
    prices: Prices,
    quota: Callable[[str, str], tuple[Limits, Limits]] = lambda _provider, _model: (Limits(), Limits()),
    budgets: Sequence[Allowance] = (),
    latency: float | None = None,
    slots: int = 50,
) -> dict[str, Any]:
    """Return what a run of a plan would use.

    `inputs` must already be validated.  `quota`: (provider, model) → the assumed limits and the configured ones
    (`QuotaBook.quota`).  `budgets`: what is left of the budgets that the run would be charged to; the worst cost is
    capped at the smallest of them.  `latency`: the sandbox's, in seconds, if set. docs/costs.md describes the result.
    """
    seen = outlook(plan, inputs, history=history, estimator=estimator, target=target, latency=latency)
    priced = lru_cache(maxsize=None)(prices.price)
    own = plan.limits.get("budget_usd"), plan.limits.get("tokens")
    allowances = [*budgets]
    if any(limit is not None for limit in own):
        allowances.append(Allowance("limits of the workflow", own[0], own[1]))
    caps = [max(0.0, allowance.usd) for allowance in allowances if allowance.usd is not None]
    models = {task.call.models[0] for task in seen.tasks if task.call is not None}
    work = Work(
        tasks=seen.tasks,
        top=seen.top,
        price=lambda provider, model, usage: priced(provider, model, usage),
        window=lambda provider, model: prices.window(provider, model) or WINDOW,
        slots=slots,
        startup=Estimate(0.0 if history.seconds else STARTUP_SECONDS * len(seen.providers), 1.2, forecasts.ASSUMED),
        past_seconds=history.seconds,
        quotas={model: _minute(*quota(*model)) for model in models},
        allowances=allowances,
        most_usd=min(caps, default=None),
        most_seconds=_deadline(plan, seen.tasks),
        seed=int(plan.hash()[:8], 16),
    )
    found = forecasts.forecast(work)
    return {
        "workflow": plan.name,
        "hash": plan.hash(),
        "target": target,
        "total": _amounts(found.total),
        "known": {"cost_usd": found.known_usd.to_dict(6), "time_s": found.known_seconds.to_dict(3)},
        "unknown": {
            "cost": [_name(seen.tasks[index]) for index in found.unknown_cost],
            "time": [_name(seen.tasks[index]) for index in found.unknown_time],
        },
        "steps": [
            _step(plan, seen, found.lines[index])
            for index in range(len(plan.nodes))
            if plan.nodes[index].kind not in _ENGINE
        ],
        "critical_path": [
            {"step": _name(seen.tasks[index]), "seconds": round(seconds, 3)}
            for index, seconds in found.path
            if plan.nodes[index].kind not in _ENGINE
        ],
        "models": _models(found, estimator, priced),
        "binding_quota": found.binding,
        "budgets": list(found.budgets),
        "history": {"runs": history.runs},
        "assumptions": seen.said,
        "price_version": prices.version,
        "trials": found.trials,
        "unavailable": list(plan.unavailable),
    }


def _minute(assumed: Limits, given: Limits) -> Quota:
    """Return what may be used per minute: the lower of the two limits for each dimension."""
    names = ("requests", "input_tokens", "output_tokens", "tokens")
    both = ([quota.limits[name] for quota in (assumed, given) if name in quota.limits] for name in names)
    return Quota(*(min(limits, default=None) for limits in both))


def _deadline(plan: Plan, tasks: Sequence[Task]) -> float | None:
    """Return the seconds until the run's own limit has ended it, including its final steps."""
    limit = plan.limits.get("timeout")
    if limit is None:
        return None
    rest = FINISHING_SECONDS
    for node, task in zip(plan.nodes[: plan.top], tasks, strict=False):
        if node.phase == "main" or node.kind in _ENGINE:
            continue
        if task.most_seconds is None:
            return None
        timeout = task.call.timeout if task.call is not None else task.most_seconds
        rest += timeout * task.attempts + task.pauses
    return float(limit) + rest


def _name(task: Task) -> str:
    return task.id.removesuffix("[]").removesuffix("#")


def _amounts(line: Line) -> dict[str, Any]:
    return {
        "calls": _whole(line.calls),
        "tokens": {"input": _whole(line.input), "output": _whole(line.output)},
        "cost_usd": line.usd.to_dict(6),
        "time_s": line.seconds.to_dict(3),
    }


def _whole(band: Quantiles) -> dict[str, Any]:
    return band.to_dict(0)


def _step(plan: Plan, seen: Workload, line: Line) -> dict[str, Any]:
    """Return one step; the figures of a composite include its children's."""
    task, node = seen.tasks[line.task], plan.nodes[line.task]
    models = [f"{provider}:{model}" for provider, model in task.call.models] if task.call is not None else []
    return {
        "id": _name(task),
        "kind": task.kind,
        "parent": None if task.parent is None else _name(seen.tasks[task.parent]),
        "phase": node.phase,
        "role": node.spec.get("role"),
        "models": models,
        "runs": "never" if task.never else "always" if task.chance == 1.0 else round(task.chance, 3),
        "times": _times(task),
        **_amounts(line),
        "basis": list(line.sources),
        "past_calls": task.call.output.count if task.call is not None else 0,
        "max_tokens": task.call.max_tokens if task.call is not None else None,
        "attempts": task.attempts,
        "needs": _needs(plan, node),
    }


def _times(task: Task) -> dict[str, Any] | None:
    """Return how many items or rounds there are; None for a step that runs once."""
    if task.repeat is None:
        return None
    times = task.repeat.times
    return {
        "expected": round(times.median, 1),
        "worst": task.repeat.most,
        "basis": "inputs" if task.repeat.exact else times.source,
    }


def _needs(plan: Plan, node: Node) -> list[str]:
    return [plan.nodes[dep.node].id for dep in node.deps if plan.nodes[dep.node].kind not in _ENGINE]


def _models(found: Forecast, estimator: TokenEstimator, price: Callable[..., int | None]) -> list[dict[str, Any]]:
    rows = []
    probe = Usage(input_tokens=1000, output_tokens=1000)
    for (provider, model), used in found.models.items():
        ratio = estimator.ratio(provider, model)
        rows.append(
            {
                "provider": provider,
                "model": model,
                "priced": price(provider, model, probe) is not None,
                "calls": round(used["calls"], 1),
                "tokens": {"input": round(used["input"]), "output": round(used["output"])},
                "estimator": {
                    "family": family_of(model).name,
                    "ratio": round(ratio.factor, 4),
                    "error": round(ratio.error, 4),
                    "calls": ratio.calls,
                },
            }
        )
    return rows


def capped(plan: Plan, usd: Any) -> Plan:
    """Return the plan with its run's cost limited to the lower of its own limit and this one, in US dollars.

    The limit is part of the plan, so it still applies after the run is resumed elsewhere.  Raises InputInvalid if `usd`
    is not an amount.
    """
    limit = micro_dollars(usd, "--max-cost") / 1e6
    own = plan.limits.get("budget_usd")
    return replace(plan, limits={**plan.limits, "budget_usd": limit if own is None else min(own, limit)})


def left(listed: Sequence[Mapping[str, Any]], *, team: str, workflow: str, target: str) -> list[Allowance]:
    """Return what is left of the budgets that a run would be charged to; `listed`: `Budgets.listing()`."""
    found = []
    for entry in listed:
        if entry["scope"] != "org" and entry["name"] != (team if entry["scope"] == "team" else workflow):
            continue
        accounts = [account for account in entry["accounts"] if account["target"] == target]
        # A per-run budget starts afresh; the accounts of other runs do not matter.
        used = accounts if entry["period"] != "run" else []
        name = f"{entry['scope']} {entry['name']}".strip()
        found.append(
            Allowance(
                f"{name} per {entry['period']}",
                _rest(entry["usd_limit"], used, "usd", 1e6),
                None if (rest := _rest(entry["token_limit"], used, "token", 1)) is None else int(rest),
            )
        )
    return found


def _rest(limit: int | None, accounts: Sequence[Mapping[str, Any]], kind: str, unit: float) -> float | None:
    if limit is None:
        return None
    used = sum(int(account[f"{kind}_spent"]) + int(account[f"{kind}_reserved"]) for account in accounts)
    return (limit - used) / unit
