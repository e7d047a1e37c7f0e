"""The arithmetic of forecasts, on small trees of tasks whose figures can be worked out by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from gorgon_common.costs.forecast import (
    ASSUMED,
    CALL_TOKENS,
    HISTORY,
    REPAIR_TOKENS,
    Allowance,
    Call,
    Estimate,
    Forecast,
    Part,
    Quota,
    Repeat,
    Task,
    Work,
    forecast,
    learned,
    ordered,
)
from gorgon_common.costs.usage import Usage

SURE = Estimate(100.0, 0.0, "sure", 9)
MODEL = ("openai", "m")


def price(provider: str, model: str, usage: Usage) -> int | None:
    """A micro-dollar a token in, ten a token out; `free of price` has none."""
    return None if model == "unpriced" else usage.input_tokens + 10 * usage.output_tokens


def call(**fields: Any) -> Call:
    made = Call(
        models=(MODEL,),
        max_tokens=1000,
        fixed=500.0,
        error=0.0,
        output=SURE,
        seconds=Estimate(2.0, 0.0, "sure"),
        timeout=60.0,
        most_input=2000,
        bound=2000,
        extra=0.0,
    )
    return replace(made, **fields)


def agent(name: str, *needs: int, **fields: Any) -> Task:
    own = {key: fields.pop(key) for key in list(fields) if key in Call.__dataclass_fields__}
    return Task(name, "agent", needs, call=call(**own), **fields)


def simulate(*tasks: Task, top: list[int] | None = None, **fields: Any) -> Forecast:
    inside = {child for task in tasks for child in (*task.body, *task.after, *task.fallback)}
    chosen = top if top is not None else [index for index in range(len(tasks)) if index not in inside]
    return forecast(Work(tasks, chosen, price, lambda *_: 100_000, **fields))


def test_what_is_certain_has_no_spread() -> None:
    done = simulate(agent("a"), agent("b", 0))
    assert (done.total.usd.low, done.total.usd.expected, done.total.usd.p95) == pytest.approx((0.003,) * 3)
    assert done.total.calls.expected == 2
    assert done.total.seconds.expected == pytest.approx(4.0)
    assert [index for index, _ in done.path] == [0, 1]


def test_the_longest_way_counts_not_the_sum() -> None:
    slow = Estimate(9.0, 0.0, "sure")
    done = simulate(agent("a"), agent("b", 0), agent("c", 0, seconds=slow), agent("d", 1, 2))
    assert done.total.seconds.expected == pytest.approx(13.0)
    assert [index for index, _ in done.path] == [0, 2, 3]


def test_input_follows_the_output_it_is_made_of() -> None:
    wide = Estimate(100.0, 0.5, "sure")
    done = simulate(agent("a", output=wide), agent("b", 0, fixed=0.0, parts=(Part(0, 100.0),)))
    first, second = done.lines
    assert second.input.expected == pytest.approx(first.output.expected or 0, rel=0.01)
    assert second.input.p95 == pytest.approx(first.output.p95 or 0, rel=0.01)


def test_a_map_counts_its_items_and_their_lanes() -> None:
    item = agent("m[]", parent=0)
    repeat = Repeat(Estimate(10.0, 0.0, HISTORY), 10, parallel=5, exact=True)
    done = simulate(Task("m", "map", repeat=repeat, body=(1,)), item)
    assert done.lines[0].calls.expected == 10
    assert done.lines[0].usd.expected == pytest.approx(0.015)
    assert done.lines[1].usd.expected == pytest.approx(0.015)
    assert done.total.seconds.expected == pytest.approx(4.0)


def test_a_map_of_uncertain_length_is_full_at_worst() -> None:
    repeat = Repeat(Estimate(4.0, 0.3, ASSUMED), 50)
    done = simulate(Task("m", "map", repeat=repeat, body=(1,)), agent("m[]", parent=0))
    quantiles = done.lines[0].calls
    assert quantiles.low < 4 < (quantiles.p95 or 0) < 50
    assert quantiles.worst == 50 * 3


def test_the_worst_counts_every_attempt_every_model_and_every_repair() -> None:
    done = simulate(agent("a", attempts=3, models=(MODEL, ("anthropic", "n")), pauses=7.0))
    asked = 2000 + CALL_TOKENS
    again = asked + 4000 + REPAIR_TOKENS
    conversations = 3 * 2
    assert done.total.calls.worst == conversations * 3
    assert done.total.output.worst == conversations * 3 * 1000
    assert done.total.input.worst == conversations * (asked + 2 * again)
    assert done.total.usd.worst == pytest.approx(conversations * (asked + 2 * again + 30_000) / 1e6)
    assert done.total.seconds.worst == pytest.approx(3 * 2 * 60 + 7)


def test_only_the_window_bounds_an_input_that_nothing_else_bounds() -> None:
    done = simulate(agent("a", most_input=None))
    assert done.total.input.worst == 3 * 100_000


def test_a_loop_goes_all_its_rounds_at_worst_and_one_after_the_other() -> None:
    repeat = Repeat(Estimate(1.0, 0.0, HISTORY), 4, in_turn=True)
    done = simulate(Task("l", "loop", repeat=repeat, body=(1,)), agent("l#", parent=0))
    assert done.total.calls.expected == 1
    assert done.total.calls.worst == 12
    assert done.total.seconds.worst == pytest.approx(4 * 60)


def test_what_certainly_does_not_run_costs_nothing_even_at_worst() -> None:
    done = simulate(agent("a", never=True))
    assert (done.total.usd.expected, done.total.usd.worst, done.total.calls.worst) == (0, 0, 0)


def test_what_rarely_runs_counts_for_its_share_and_fully_at_worst() -> None:
    done = simulate(agent("a", chance=0.5))
    assert 0.0005 < (done.total.usd.expected or 0) < 0.001
    assert (done.total.calls.worst or 0) > 1


def test_a_fallback_counts_at_worst_only() -> None:
    done = simulate(agent("a", fallback=(1,)), agent("a.fallback", parent=0))
    assert done.total.calls.expected == 1
    assert done.total.calls.worst == 6


def test_a_model_without_a_price_makes_the_cost_unknown_never_zero() -> None:
    done = simulate(agent("a", models=(("openai", "unpriced"),)), agent("b"))
    assert (done.total.usd.expected, done.total.usd.p95, done.total.usd.worst) == (None, None, None)
    assert done.unknown_cost == (0,)
    assert done.known_usd.expected == pytest.approx(0.0015)
    assert done.total.output.expected == pytest.approx(200)


def test_what_nobody_timed_makes_the_time_unknown() -> None:
    done = simulate(Task("c", "command", seconds=None, most_seconds=30.0), agent("a", 0))
    assert (done.total.seconds.expected, done.total.seconds.worst) == (None, 90.0)
    assert done.unknown_time == (0,)
    assert done.known_seconds.expected == pytest.approx(2.0)


def test_an_approval_may_take_for_ever() -> None:
    done = simulate(Task("ok", "approval", seconds=None, most_seconds=None))
    assert done.total.seconds.worst is None


def test_an_input_of_unknown_size_makes_tokens_and_cost_unknown_unless_the_past_tells() -> None:
    assert simulate(agent("a", unsized=True)).total.input.expected is None
    past = simulate(agent("a", unsized=True, input=Estimate(700.0, 0.0, HISTORY, 5)))
    assert past.total.input.expected == pytest.approx(700, rel=0.02)
    assert past.unknown_cost == ()


def test_slots_are_shared() -> None:
    tasks = [agent(f"a{number}") for number in range(10)]
    assert simulate(*tasks, slots=50).total.seconds.expected == pytest.approx(2.0)
    assert simulate(*tasks, slots=2).total.seconds.expected == pytest.approx(10.0)


def test_the_quota_that_binds_is_named_and_makes_the_work_longer() -> None:
    tasks = [agent(f"a{number}") for number in range(100)]
    free = simulate(*tasks, slots=100, quotas={MODEL: Quota(requests=6000)})
    assert free.binding is not None
    assert not free.binding["binds"]
    tight = simulate(*tasks, slots=100, quotas={MODEL: Quota(requests=6000, output_tokens=1000)})
    assert tight.binding is not None
    assert (tight.binding["dimension"], tight.binding["binds"]) == ("output_tokens", True)
    assert tight.total.seconds.expected == pytest.approx(600 - 3, rel=0.01)
    assert simulate(*tasks).binding is None


@pytest.mark.parametrize(("usd", "verdict"), [(1.0, "never"), (0.02, "at worst"), (0.0125, "certainly")])
def test_a_budget_is_told_by_what_is_reserved_on_the_way(usd: float, verdict: str) -> None:
    # Two calls of $0.0015; each is reserved at 2,000 tokens in and 1,000 out: $0.012.
    (told,) = simulate(agent("a"), agent("b", 0), allowances=[Allowance("b", usd=usd)]).budgets
    assert told["refuses"] == verdict
    assert told["needs_usd"] == pytest.approx(0.0015 + 0.012)


def test_a_map_is_reserved_as_a_whole() -> None:
    repeat = Repeat(Estimate(10.0, 0.0, HISTORY), 10, exact=True)
    done = simulate(Task("m", "map", repeat=repeat, body=(1,)), agent("m[]"), allowances=[Allowance("b", usd=0.1)])
    assert done.budgets[0]["needs_usd"] == pytest.approx(10 * 0.012)
    assert done.budgets[0]["refuses"] == "certainly"


def test_tokens_have_budgets_too() -> None:
    done = simulate(agent("a"), allowances=[Allowance("b", tokens=1000)])
    assert (done.budgets[0]["refuses"], done.budgets[0]["needs_tokens"]) == ("certainly", 3000)


def test_an_enforced_limit_is_the_worst() -> None:
    assert simulate(agent("a"), most_usd=0.01).total.usd.worst == 0.01
    assert simulate(agent("a", models=(("openai", "unpriced"),)), most_usd=0.01).total.usd.worst == 0.01


def test_past_runs_correct_the_time_of_the_whole() -> None:
    blind = simulate(agent("a"))
    taught = simulate(agent("a"), past_seconds=[20.0] * 30)
    assert blind.total.seconds.expected == pytest.approx(2.0)
    assert taught.total.seconds.expected == pytest.approx(20.0, rel=0.1)


def test_the_same_seed_says_the_same() -> None:
    tasks = (agent("a", output=Estimate(100.0, 0.5, ASSUMED)),)
    assert simulate(*tasks, seed=3).total == simulate(*tasks, seed=3).total
    assert simulate(*tasks, seed=3).total != simulate(*tasks, seed=4).total


def test_no_trial_is_above_the_worst() -> None:
    wild = Estimate(900.0, 2.0, ASSUMED)
    quantiles = simulate(agent("a", output=wild)).total.output
    assert quantiles.low <= (quantiles.expected or 0) <= (quantiles.p95 or 0) <= (quantiles.worst or 0)
    assert (quantiles.p95 or 0) <= 1000


def test_predictions_narrow_with_observations_and_cover_the_next_value() -> None:
    chance = random.Random(5)
    few, many = learned([100.0, 120.0]), learned([chance.lognormvariate(4.6, 0.2) for _ in range(200)])
    assert few is not None
    assert many is not None
    assert few.spread > many.spread > 0.15
    assert (few.count, many.count) == (2, 200)
    assert learned([]) is None
    assert learned([0.0]) is None
    draws = sorted(many.draw(chance, {}) for _ in range(2000))
    inside = sum(draws[50] <= chance.lognormvariate(4.6, 0.2) <= draws[1950] for _ in range(500))
    assert inside >= 0.9 * 500


def test_tasks_are_done_after_what_they_need() -> None:
    tasks = [Task("c", "x", (1,)), Task("b", "x", (2,)), Task("a", "x")]
    assert ordered(tasks, [0, 1, 2]) == [2, 1, 0]


def test_quantiles_are_rounded_to_the_safe_side() -> None:
    quantiles = simulate(agent("a", output=Estimate(333.0, 0.3, ASSUMED))).total.usd
    shown = quantiles.to_dict(4)
    assert (shown["low"] or 0) <= quantiles.low
    assert (shown["p95"] or 0) >= (quantiles.p95 or 0) - 1e-9
    assert (shown["worst"] or 0) >= (quantiles.worst or 0) - 1e-9
