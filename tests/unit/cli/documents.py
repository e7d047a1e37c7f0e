"""Documents as the store and the API give them, for tests of what people see of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

NOW = datetime(2026, 11, 22, 9, 30, 42, tzinfo=UTC)
LONG_NAME = "Quarterly revenue report for the board, all regions"


def at(seconds: float) -> str:
    """Return a time so many seconds before (below 0) or after NOW."""
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def run_id(number: int) -> str:
    return f"run_01KAR6V7Q3M8Z5T2N4H9C1{number:04d}"


def tokens(given: int, made: int) -> dict[str, int]:
    return {"input": given, "output": made}


def run(number: int = 1, status: str = "succeeded", **more: Any) -> dict[str, Any]:
    return {
        "run_id": run_id(number),
        "workflow": "Feature Build",
        "status": status,
        "outputs": None,
        "error": None,
        "cost_usd": 0.0,
        "tokens": tokens(0, 0),
        "team": "default",
        "target": "sandbox",
        "created_at": at(-41),
        "started_at": at(-40.5),
        "finished_at": None if status in ("queued", "running", "paused", "finishing") else at(-2),
        **more,
    }


def step(name: str, status: str = "succeeded", **more: Any) -> dict[str, Any]:
    begun = status not in ("pending", "ready", "skipped")
    return {
        "id": name,
        "item": None,
        "parent": None,
        "kind": "agent",
        "role": None,
        "provider": None,
        "model": None,
        "status": status,
        "reason": None,
        "waits": None,
        "output": None,
        "error": None,
        "attempts": int(begun),
        "tokens": tokens(0, 0),
        "cost_usd": None,
        "started_at": at(-30) if begun else None,
        "finished_at": at(-20) if status in ("succeeded", "failed") else None,
        **more,
    }


def page() -> dict[str, Any]:
    """Return runs in every state, with every kind of value."""
    return {
        "items": [
            run(9, "running", workflow=LONG_NAME, target="live", cost_usd=1204.5, tokens=tokens(1_250_000, 98_765)),
            run(8, "queued", started_at=None, created_at=at(-2)),
            run(7, "running", workflow="Nightly", orphaned=True, cost_usd=0.0123, tokens=tokens(900, 87)),
            run(6, "failed", started_at=at(-7_260), finished_at=at(-3_500), target="live", cost_usd=None),
            run(5, "cancelled", workflow="review", cost_usd=0.00004, tokens=tokens(10, 2)),
            run(4, "succeeded", workflow="commands only"),
        ],
        "next": "MTIzNDU2",
    }


def busy() -> dict[str, Any]:
    """Return a run under way: things that are done, run, wait for various reasons, failed and were skipped."""
    items = [
        step("build", "succeeded" if n < 12 else "waiting" if n < 15 else "running", item=n, parent="build",
             role="builder", model="claude-sonnet-5-5", provider="anthropic",
             tokens=tokens(1_000, 250) if n < 12 else tokens(0, 0), cost_usd=0.0067 if n < 12 else None,
             **({"reason": "The rate limit of anthropic claude-sonnet-5-5 (input tokens per minute) has no room now.",
                 "waits": {"why": "input_tokens", "since": at(-8), "until": at(3.2)}} if 12 <= n < 15 else {}))
        for n in range(30)
    ]  # fmt: skip
    steps = [
        step("plan", role="planner", model="claude-opus-5-5", tokens=tokens(975, 466), cost_usd=0.0132, attempts=2),
        step("build", "running", kind="map", started_at=at(-20)),
        *items,
        step("polish", "running", kind="loop", started_at=at(-6)),
        step("polish", "running", kind="group", item=1, parent="polish"),
        step("critic", "running", item=1, parent="polish", role="critic", model="gpt-6.1-terra", started_at=at(-3)),
        step("a_rather_long_name_of_a_step_that_goes_on", "waiting", attempts=1,
             reason="The next call may cost $0.0255; $0.0226 of the limit of the run is left.",
             waits={"why": "budget", "since": at(-75), "until": None}),
        step("fetch", "waiting", kind="command", attempts=2, reason="The command exited with status 7: no host",
             waits={"why": "retry", "since": at(-2), "until": at(14)}),
        step("publish", "ready", waits={"why": "queue", "since": at(-19), "until": None}),
        step("audit", "failed", role="reviewer", model="claude-opus-5-5", cost_usd=0.0041, tokens=tokens(300, 20),
             error={"message": "The reply does not fit its schema: findings[0].severity must be one of low, high.",
                    "hint": "Give the step a larger `max_tokens:`, or a simpler schema."}),
        step("docs", "skipped", reason="its condition is false: audit.output.passed is false"),
        step("notify", "pending"),
    ]  # fmt: skip
    return run(2, "running", steps=steps, cost_usd=0.0977, tokens=tokens(13_275, 3_486))


def ended(status: str) -> dict[str, Any]:
    """Return a run that has ended, with outputs where it succeeded."""
    steps = [
        step("plan", role="planner", model="claude-opus-5-5", tokens=tokens(975, 466), cost_usd=0.0132),
        step("docs", "skipped", reason="its condition is false: plan.output.approved is false"),
    ]
    if status == "succeeded":
        outputs = {"title": "Dark mode", "report": "# Dark mode\n\n" + "A line of the report.\n" * 12, "score": 0.75}
        return run(3, status, steps=steps, outputs=outputs, cost_usd=0.0132, tokens=tokens(975, 466))
    message = "The model `gpt-9` of openai does not exist, or this key may not use it (404, model_not_found)."
    error = {"step": "audit", "kind": "final", "message": message, "hint": "Models that are known: gpt-5, gpt-5-mini."}
    steps.append(step("audit", "failed", error=error))
    return run(3, status, steps=steps, error=error, cost_usd=0.0132, tokens=tokens(975, 466))


def key_wait() -> dict[str, Any]:
    """Return a run that waits for its concurrency key."""
    what = f"waits for the concurrency key 'deploy', held by {run_id(7)}; 2 runs wait before it"
    holder = {"run_id": run_id(7), "workflow": "Deploy", "status": "running", "since": at(-90), "process_died": False}
    waits = {"key": "deploy", "max": 1, "on_conflict": "queue", "since": at(-31), "ahead": 2, "what": what,
             "held_by": [holder]}  # fmt: skip
    return run(2, "queued", started_at=None, waits_for=waits, steps=[step("deploy", "ready", kind="command")])


def journal() -> list[dict[str, Any]]:
    def event(seq: int, kind: str, name: str | None = None, message: str | None = None) -> dict[str, Any]:
        return {"seq": seq, "at": at(seq - 40), "kind": kind, "step": name, "message": message, "data": None}

    return [
        event(1, "run.queued"),
        event(2, "run.started"),
        event(3, "step.succeeded", "plan"),
        event(4, "step.expanded", "build", "30 steps"),
        event(5, "step.waiting", "build[12]", "The rate limit of anthropic claude-sonnet-5-5 has no room now."),
        event(6, "step.failed", "build[3]", "The reply does not fit its schema: severity must be one of low, high."),
        event(7, "step.stopping", "build", "14 steps will not start: another step of the same part failed"),
        event(8, "run.failed", None, "build: build[3]: The reply does not fit its schema."),
    ]


def explanation(waits_for: dict[str, Any] | None = None) -> dict[str, Any]:
    def wait(name: str, why: str, what: str, **more: Any) -> dict[str, Any]:
        return {"step": name, "item": None, "status": "waiting", "why": why, "reason": None, "what": what,
                "since": None, "until": None, **more}  # fmt: skip

    def call(outcome: str, purpose: str, cost: float | None, attempt: int = 1) -> dict[str, Any]:
        return {
            "attempt": attempt, "call": 1, "for": purpose, "provider": "anthropic", "model": "claude-sonnet-5-5",
            "outcome": outcome, "tokens": tokens(1_000, 200), "cost_usd": cost, "latency_ms": 900, "at": at(-9),
        }  # fmt: skip

    def spent(name: str, calls: list[dict[str, Any]], item: int | None = None) -> dict[str, Any]:
        known = sum(entry["cost_usd"] or 0.0 for entry in calls)
        unknown = sum(entry["cost_usd"] is None for entry in calls)
        return {"step": name, "item": item, "calls": calls, "cost_usd": None if unknown else known,
                "known_cost_usd": known, "unpriced_calls": unknown}  # fmt: skip

    def took(name: str, seconds: float, item: int | None = None) -> dict[str, Any]:
        return {"step": name, "item": item, "seconds": seconds, "queue_s": 0.4, "calls_s": seconds / 2,
                "other_s": seconds / 2 - 0.4, "attempts": 1}  # fmt: skip

    waiting = [
        wait("build", "quota", "The rate limit of anthropic claude-sonnet-5-5 (input tokens per minute) has no room.",
             item=12, since=at(-8), until=at(3.2), reason="input_tokens"),
        wait("a_rather_long_name_of_a_step_that_goes_on", "budget",
             "The next call may cost $0.0255; $0.0226 of the limit of the run is left.", since=at(-75)),
        wait("notify", "dependency", "waits for build, polish", status="pending", since=at(-41), until=at(120)),
        wait("publish", "no_worker", "no worker serves the queue openai; start one with: gorgon worker -q openai",
             status="ready", since=at(-19)),
    ]  # fmt: skip
    money = {
        **spent("", [call("ok", "work", 0.0067), call("ok", "work", None)]),
        "calls": 3,
        "for": {
            "work": {"calls": 1, **spent("", [call("ok", "work", 0.0067)]), "step": None},
            "retry": {"calls": 2, **spent("", [call("ok", "retry", None), call("ok", "retry", 0.002)])},
        },
        "cached_input_tokens": 1_024,
        "adopted": {"steps": ["plan"], "count": 1, "saved_usd": 0.0132},
        "steps": [
            spent("build", [call("rate_limited", "refused", 0.0), call("ok", "retry", 0.0067, 2)], 3),
            spent("a_rather_long_name_of_a_step_that_goes_on", [call("timeout", "work", None)]),
        ],
        "more_steps": 0,
    }
    money["for"]["work"]["calls"], money["for"]["retry"]["calls"] = 1, 2
    time = {"seconds": 40.5, "before_start_s": 0.5, "more_steps": 0,
            "steps": [took("build", 12.5, 3), took("a_rather_long_name_of_a_step_that_goes_on", 8.2)]}  # fmt: skip
    return {
        "run_id": run_id(2), "workflow": LONG_NAME, "team": "web", "target": "live", "status": "running", "step": None,
        "as_of": at(0), "created_at": at(-41), "started_at": at(-40.5), "finished_at": None, "waits_for": waits_for,
        "waiting_for": {"quota": 3, "budget": 1, "dependency": 1, "no_worker": 9}, "waiting": waiting, "money": money,
        "time": time,
    }  # fmt: skip


def band(low: float, expected: float | None, p95: float | None, worst: float | None) -> dict[str, Any]:
    return {"low": low, "expected": expected, "p95": p95, "worst": worst}


def estimate(*, unknown: bool = False) -> dict[str, Any]:
    """Return an estimate; `unknown`: none of its models has a price."""
    nothing = band(0.0, None, None, None)

    def line(name: str, calls: int, cost: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"id": name, "kind": "agent", "parent": None, "role": None, "models": [], "runs": "always",
                "times": None, "calls": band(calls, calls, calls, calls * 9),
                "tokens": {"input": band(900 * calls, 975 * calls, 1_400 * calls, 158_349 * calls),
                           "output": band(200 * calls, 466 * calls, 900 * calls, 36_864 * calls)},
                "cost_usd": cost, "time_s": band(0.2, 12.4 * calls, 30.0 * calls, 1_800.0),
                "basis": ["assumption"], **more}  # fmt: skip

    prices = nothing if unknown else band(0.0094, 0.0132, 0.0281, 3.9)
    steps = [
        line("plan", 1, prices, basis=["history", "similar calls"]),
        line("build", 30, nothing if unknown else band(0.2, 0.412, 0.98, 130.09), kind="map",
             times={"expected": 30.0, "worst": 100, "basis": "inputs"}),
        line("build", 30, nothing, parent="build"),
        line("a_rather_long_name_of_a_step_that_goes_on", 1, nothing),
        line("never", 0, band(0.0, 0.0, 0.0, 0.0), runs="never"),
    ]  # fmt: skip
    known = band(0.0, 0.0, 0.0, 0.0) if unknown else band(0.21, 0.4252, 1.01, 134.0)
    names = ["plan", "build"] if unknown else []
    return {
        "workflow": LONG_NAME,
        "target": "live",
        "total": {
            "calls": band(32, 33, 40, 288),
            "tokens": {"input": band(27_900, 31_200, 44_800, 58_341_246), "output": band(6, 14_912, 28_800, 2_682_000)},
            "cost_usd": band(0.0, None, None, None),
            "time_s": band(61.0, 384.0, 640.0, 3_725.0),
        },
        "known": {"cost_usd": known, "time_s": band(61.0, 384.0, 640.0, 3_725.0)},
        "unknown": {"cost": [*names, "a_rather_long_name_of_a_step_that_goes_on"], "time": []},
        "steps": steps,
        "critical_path": [
            {"step": "plan", "seconds": 12.4},
            {"step": "build", "seconds": 372.0},
            {"step": "a_rather_long_name_of_a_step_that_goes_on", "seconds": 12.4},
        ],
        "models": [
            {"provider": "anthropic", "model": "claude-opus-5-5", "calls": 1.0, "tokens": tokens(975, 466),
             "estimator": {"family": "claude", "ratio": 0.7812, "error": 0.113, "calls": 204}},
            {"provider": "openai", "model": "gpt-6.1-terra", "calls": 1.0, "tokens": tokens(975, 466),
             "estimator": {"family": "gpt", "ratio": 1.0, "error": 0.3, "calls": 0}},
        ],
        "binding_quota": {"provider": "anthropic", "model": "claude-sonnet-5-5", "dimension": "input_tokens",
                          "needed": 29_250, "per_minute": 30_000.0, "seconds": 1.5, "binds": False},
        "budgets": [
            {"budget": "team web per month", "left_usd": 3.2, "left_tokens": None, "refuses": "at worst",
             "needs_usd": 4.71, "needs_tokens": None},
            {"budget": "org per day", "left_usd": 100.0, "left_tokens": 2_000_000, "refuses": "never",
             "needs_usd": None, "needs_tokens": None},
        ],
        "history": {"runs": 3},
        "assumptions": ["`build` is assumed to have about 30 items (at most 100)."],
        "unavailable": [],
    }  # fmt: skip


def costs(*by: str, groups: int = 0) -> dict[str, Any]:
    """Return a report by some dimensions, with a model whose price nobody knows."""
    values = [
        {"provider": "anthropic", "model": "claude-opus-5-5", "workflow": LONG_NAME, "step": "build", "target": "live"},
        {"provider": "openai", "model": "gpt-6.1-terra", "workflow": "review", "step": None, "target": "sandbox"},
        {"provider": "openai", "model": "my-own-model-with-a-long-name-2026-08-06", "workflow": "review",
         "step": "a_rather_long_name_of_a_step_that_goes_on", "target": "live"},
    ]  # fmt: skip
    sums = [
        {"calls": 12_345, "failed_calls": 12, "runs": 31, "cost_usd": 1_204.5, "known_cost_usd": 1_204.5,
         "unpriced_calls": 0, "latency_ms": 900,
         "tokens": {"input": 12_500_000, "cache_read": 98_000, "cache_write": 0, "output": 987_650, "reasoning": 0}},
        {"calls": 1, "failed_calls": 0, "runs": 1, "cost_usd": 0.0004, "known_cost_usd": 0.0004, "unpriced_calls": 0,
         "latency_ms": 900, "tokens": {"input": 168, "cache_read": 0, "cache_write": 0, "output": 156, "reasoning": 0}},
        {"calls": 2, "failed_calls": 0, "runs": 1, "cost_usd": None, "known_cost_usd": 0.0, "unpriced_calls": 2,
         "latency_ms": 900, "tokens": {"input": 20, "cache_read": 0, "cache_write": 0, "output": 360, "reasoning": 0}},
    ]  # fmt: skip
    total = {"calls": 12_348, "failed_calls": 12, "runs": 32, "cost_usd": None, "known_cost_usd": 1_204.5004,
             "unpriced_calls": 2, "latency_ms": 900,
             "tokens": {"input": 12_500_188, "cache_read": 98_000, "cache_write": 0, "output": 988_166,
                        "reasoning": 0}}  # fmt: skip
    rows = [{**{name: value[name] for name in by}, **entry} for value, entry in zip(values, sums, strict=True)]
    return {"by": list(by), "rows": rows, "groups": groups or len(rows), "total": total}


def calls() -> list[dict[str, Any]]:
    def call(**more: Any) -> dict[str, Any]:
        return {
            "at": at(-9), "provider": "anthropic", "model": "claude-opus-5-5", "role": "builder", "team": "web",
            "workflow": "review", "run": run_id(3), "step": "build", "item": 3, "attempt": 1, "call": 1,
            "tokens": {"input": 1_000, "cache_read": 0, "cache_write": 0, "output": 250, "reasoning": 0},
            "cost_usd": 0.0067, "price_version": "1", "latency_ms": 912, "outcome": "ok", "request_id": "req_1",
            "target": "live", **more,
        }  # fmt: skip

    return [
        call(),
        call(step="a_rather_long_name_of_a_step_that_goes_on", item=None, role=None, attempt=2, call=2, cost_usd=None,
             outcome="rate_limited", latency_ms=None),
        call(step=None, item=None, role=None, model="my-own-model-with-a-long-name-2026-08-06", target="library"),
    ]  # fmt: skip


def budgets() -> list[dict[str, Any]]:
    def account(target: str, usd: int, used: int) -> dict[str, Any]:
        return {"target": target, "ends_at": at(86_400 * 8), "usd_spent": usd, "usd_reserved": 25_500,
                "token_spent": used, "token_reserved": 0}  # fmt: skip

    return [
        {"scope": "org", "name": "", "period": "month", "timezone": "UTC", "usd_limit": 100_000_000,
         "token_limit": 2_000_000, "accounts": [account("live", 97_400_000, 1_204_500), account("sandbox", 0, 12)]},
        {"scope": "team", "name": "international-marketing", "period": "day", "timezone": "Europe/Berlin",
         "usd_limit": 500_000, "token_limit": None, "accounts": [account("live", 500_000, 0)]},
        {"scope": "workflow", "name": LONG_NAME, "period": "run", "timezone": "UTC", "usd_limit": 1_000_000,
         "token_limit": None, "accounts": []},
    ]  # fmt: skip


def limits() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return gates in every state, rules, and how well tokens are estimated."""

    def level(limit: float, free: float, **more: Any) -> dict[str, Any]:
        return {"limit": limit, "level": free, "told": None, "learned": False, "set": False, **more}

    def gate(model: str, **more: Any) -> dict[str, Any]:
        return {"target": "live", "provider": "anthropic", "account": "a1b2", "model": model, "levels": {},
                "in_flight": 1, "waiting": 0, "teams": {}, "workers": 1, "rate": 1.0, "closed": 0.0, "breaker": 0.0,
                "half_open": False, **more}  # fmt: skip

    levels = {"requests": level(4_000, 3_987, learned=True), "requests_per_day": level(600_000, 12, set=True),
              "input_tokens": level(400_000_000, 20_000_000)}  # fmt: skip
    gates = [
        gate("claude-opus-5-5", levels=levels, in_flight=12, waiting=31, teams={"web": 30, "ops": 1}, rate=0.96),
        gate("claude-sonnet-5-5", breaker=12.0),
        gate("claude-haiku-5", half_open=True),
        gate("claude-sonnet-5", closed=44.0),
    ]
    rules = [{"provider": "openai", "model": "gpt-5*",
              "limits": {"requests": 500, "tokens": 20_000, "concurrency": 20}}]  # fmt: skip
    seen = [{"target": "live", "provider": "anthropic", "model": "claude-opus-5-5", "family": "claude", "calls": 1,
             "ratio": 0.7812, "error": 0.113}]  # fmt: skip
    return gates, rules, seen
