"""Budgets while runs are under way: a real worker, the real SDKs, a sandbox process that keeps a bill of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import func, select

from gorgon_common import metrics
from gorgon_common.costs.budgets import Balance
from gorgon_common.costs.ledger import replay
from gorgon_common.costs.prices import GenaiPricer, read_overrides
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.budget import BudgetWait, StepBudget
from gorgon_common.engine.context import Run
from gorgon_common.engine.ports import AgentCall, Message
from gorgon_common.engine.records import Claimed, step_id
from gorgon_common.persistence.settling import abandon_orphans, tell
from gorgon_common.persistence.tables import budget_periods, conversations, ledger, reservations
from gorgon_common.settings import EMBEDDED_BROKER, Settings
from gorgon_worker.embedded import embedded
from gorgon_worker.process_owner import new_home
from tests.support.running import Lab, eventually, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.services import build

__all__ = ["sandbox", "sandbox_process"]

ASK = "provider: openai, model: gpt-6.1-terra"
"""One micro-dollar an input token, five an output token."""
USED = '[[sandbox: usage={"input": 100, "output": 900} text=done]]'
COST = 100 + 900 * 5


@pytest.fixture
def lab(sandbox: Sandbox, tmp_path: Path) -> Iterator[Lab]:
    """A worker on an empty database; whatever a test does, the accounts are what the ledger says, and never over."""
    with laboratory(tmp_path, sandbox) as made:
        yield made
        check(made)


@pytest.fixture
def either(sandbox: Sandbox, tmp_path: Path, database_url: str) -> Iterator[Lab]:
    """The same on both databases."""
    with laboratory(tmp_path, sandbox, database_url=database_url) as made:
        yield made
        check(made)


def check(lab: Lab) -> None:
    balances = lab.services.budgets.balances()
    told = replay(lab.services.budgets.postings())
    for number, balance in balances.items():
        assert replace(balance, usd_limit=None, token_limit=None) == told.get(number, Balance())
        assert balance.usd_overrun == 0
        assert balance.usd_limit is None or balance.usd_spent <= balance.usd_limit
        assert balance.usd_reserved == 0


def bill(lab: Lab) -> int:
    """Return the sandbox's own count at our prices, in micro-dollars."""
    total = 0
    for providers in lab.sandbox.bill().values():
        for provider, models in providers.items():
            for model, kinds in models.items():
                usage = Usage(input_tokens=kinds.get("input", 0), output_tokens=kinds.get("output", 0))
                total += GenaiPricer().price(provider, model, usage) or 0
    return total


def paid(lab: Lab) -> int:
    with lab.services.database.read() as connection:
        return int(connection.scalar(select(func.coalesce(func.sum(ledger.c.cost_micro), 0))) or 0)


def spent(lab: Lab) -> list[int]:
    return sorted(balance.usd_spent for balance in lab.services.budgets.balances().values() if balance.usd_spent)


def sent(lab: Lab) -> list[int]:
    """Return the longest reply of each reservation."""
    with lab.services.database.read() as connection:
        return list(connection.scalars(select(reservations.c.max_tokens)))


def steps(*prompts: str, head: str = "", **fields: Any) -> str:
    more = "".join(f", {name}: {value}" for name, value in fields.items())
    lines = "\n".join(f"  - {{id: s{place}, {ASK}{more}, prompt: '{text}'}}" for place, text in enumerate(prompts))
    return f"name: spend\nteam: blue\n{head}\nsteps:\n{lines}\n"


def test_a_call_counts_on_every_level(lab: Lab) -> None:
    lab.services.set_budget("org", period="month", usd="1")
    lab.services.set_budget("team:blue", period="day", usd="1")
    lab.services.set_budget("workflow:spend", period="run", usd="1")
    lab.services.set_budget("team:red", period="day", usd="0")
    ran = lab.run(steps(USED, head="limits: {budget_usd: 1}", budget_usd=0.5))
    assert ran.status == "succeeded"
    assert spent(lab) == [COST] * 5
    assert paid(lab) == bill(lab) == COST


def test_a_call_that_does_not_fit_is_not_made(lab: Lab) -> None:
    ran = lab.run(steps("go", head="limits: {budget_usd: 0.001}"))
    assert ran.error["kind"] == "budget"
    assert ran.error["message"].startswith(
        "The limit of the run is $0.001: $0.00 spent, $0.00 reserved. The next call may"
    )
    assert "is left." in ran.error["message"]
    assert lab.calls() == 0


@pytest.mark.parametrize("limits", ["budget_usd: 0", "tokens: 1"])
def test_a_budget_of_nothing(lab: Lab, limits: str) -> None:
    assert lab.run(steps("go", head=f"limits: {{{limits}}}")).error["kind"] == "budget"
    assert lab.calls() == 0


def test_a_shorter_reply_makes_it_fit(lab: Lab) -> None:
    ran = lab.run(steps("go", head="limits: {tokens: 3000}", max_tokens=4000))
    assert ran.status == "succeeded"
    (longest,) = sent(lab)
    assert 2000 <= longest < 3000


def test_never_shorter_than_half(lab: Lab) -> None:
    ran = lab.run(steps("go", head="limits: {tokens: 3000}", max_tokens=6000))
    assert ran.error["kind"] == "budget"


def test_a_step_waits_while_others_hold_what_it_needs(lab: Lab) -> None:
    """Room for two at a time, for all three in the end."""
    ran = lab.run(steps(USED, USED, USED, head="limits: {budget_usd: 0.0195}", max_tokens=1024))
    assert ran.status == "succeeded"
    assert paid(lab) == bill(lab) == 3 * COST
    assert {step["attempts"] for step in ran.document["steps"]} == {1}


def test_one_too_many_is_refused_when_the_others_have_ended(lab: Lab) -> None:
    ran = lab.run(steps(USED, USED, USED, head="limits: {budget_usd: 0.0125}", max_tokens=1024, on_failure="skip"))
    assert sorted(ran.states().values()) == ["skipped", "succeeded", "succeeded"]
    assert paid(lab) == 2 * COST


def test_who_waits_for_the_next_period_goes_on_when_the_limit_is_raised(lab: Lab) -> None:
    lab.services.set_budget("team:blue", period="day", usd="0.006")
    assert lab.run(steps(USED, max_tokens=1024)).status == "succeeded"
    run = lab.start(steps(USED, max_tokens=1024, on_budget="wait"))
    waiting = lab.until(run, "s0", "waiting")
    assert "It waits until" in str(waiting["reason"])
    lab.services.set_budget("team:blue", period="day", usd="0.012")
    ran = lab.wait(run)
    assert ran.status == "succeeded"
    assert ran.step("s0")["attempts"] == 1


def test_a_limit_of_the_file_cannot_be_waited_for(lab: Lab) -> None:
    ran = lab.run(steps("go", head="limits: {budget_usd: 0.001, on_budget: wait}"))
    assert ran.error["kind"] == "budget"


def test_a_period_that_would_not_be_enough_is_not_waited_for(lab: Lab) -> None:
    lab.services.set_budget("team:blue", period="day", usd="0.001")
    ran = lab.run(steps("go", on_budget="wait"))
    assert "the budget of team blue per day" in ran.error["message"].lower()


def test_approval_of_money_denies_until_there_is_somebody_to_ask(lab: Lab) -> None:
    ran = lab.run(steps("go", head="limits: {budget_usd: 0.001, on_budget: approve}"))
    assert ran.error["kind"] == "budget"
    assert "acts as `deny`" in ran.error["hint"]


def test_what_a_step_does_when_it_fails_holds_for_money_too(lab: Lab) -> None:
    text = steps("go", head="limits: {budget_usd: 0.001}", on_failure="continue_with_default", default_output="none")
    assert lab.run(text).output("s0") == "none"


def test_a_cheaper_model_may_fit(lab: Lab) -> None:
    models = '["openai:gpt-6-astra", "openai:gpt-6-luna"]'
    it = f"{{id: it, models: {models}, prompt: go, max_tokens: 2048}}"
    text = f"name: a\nlimits: {{budget_usd: 0.003}}\nsteps:\n  - {it}\n"
    ran = lab.run(text)
    assert ran.status == "succeeded"
    assert ran.step("it")["model"] == "gpt-6-luna"


def test_what_is_held_lasts_over_a_short_wait_in_place(lab: Lab) -> None:
    """The step asks again under the same claim, and once more for another model."""
    ran = lab.run(steps("go"))
    run = lab.services.knowledge.run(lab.services.number(ran.id))
    run = Run(run.knowledge, run.info, replace(run.plan, limits={"tokens": 4000}))
    step = Claimed(step_id(run.info.id, 0), 99, 0, 2, 0, 1, None, None, 0)
    call = AgentCall("gpt-6-luna", (Message("user", "go"),), max_tokens=5000)

    def purse() -> StepBudget:
        return StepBudget(lab.services.budgets, GenaiPricer(), run, step)

    first = purse()
    asked, held = first.reserve("openai", call, 1)
    assert held
    assert asked.max_tokens < 4000
    again = purse()
    assert again.reserve("openai", call, 1) == (asked, True)
    with pytest.raises(BudgetWait):
        purse().reserve("openai", replace(call, model="gpt-6-astra"), 1)
    assert (first.held, again.held) == ([1], [1])
    lab.services.budgets.settle(
        [{"step_id": step.id, "token": 99, "ordinal": 1, "state": 2, "usd": None, "tokens": None}]
    )


def test_a_map_is_checked_as_a_whole(lab: Lab) -> None:
    text = f"""
name: many
limits: {{budget_usd: 0.02}}
steps:
  - id: each
    provider: openai
    model: gpt-6.1-terra
    max_tokens: 1024
    map: {{over: "{{{{[1, 2, 3, 4, 5]}}}}", as: x, max_parallel: 1}}
    prompt: '{USED} {{{{x}}}}'
"""
    ran = lab.run(text)
    assert "The limit of the run is $0.02" in ran.error["message"]
    assert "The 5 items of `each` may cost" in ran.error["message"]
    assert lab.calls() == 0
    ran = lab.run(text.replace("0.02", "0.04"))
    assert ran.status == "succeeded"
    assert spent(lab) == [5 * COST]


def test_all_items_share_the_limit_of_their_step(lab: Lab) -> None:
    text = f"""
name: many
steps:
  - id: each
    provider: openai
    model: gpt-6.1-terra
    max_tokens: 1024
    budget_usd: 0.03
    map: {{over: "{{{{[1, 2, 3]}}}}", as: x}}
    prompt: '{USED} {{{{x}}}}'
  - id: again
    depends_on: [each]
    provider: openai
    model: gpt-6.1-terra
    max_tokens: 1024
    budget_usd: 0.011
    loop: {{max: 5, until: "false"}}
    prompt: '{USED}'
"""
    ran = lab.run(text)
    assert ran.error["message"].startswith("again")
    assert "the limit of step again" in ran.error["message"].lower()
    assert spent(lab) == [2 * COST, 3 * COST]


def test_a_resumed_run_keeps_its_spend(lab: Lab) -> None:
    def text(limit: str) -> str:
        return f"""
name: two
limits: {{budget_usd: {limit}}}
steps:
  - {{id: one, {ASK}, max_tokens: 1024, prompt: '{USED} a'}}
  - {{id: two, {ASK}, max_tokens: 1024, prompt: '{USED} b', depends_on: [one]}}
"""

    first = lab.run(text("0.008"))
    assert "$0.0046 spent" in first.error["message"]
    second = lab.resume(first.id)
    assert "$0.0046 spent" in second.error["message"]
    third = lab.resume(first.id, text("0.012"))
    assert third.status == "succeeded"
    assert lab.calls() == 2
    assert spent(lab) == [2 * COST]


def test_repairs_retries_and_refusals_are_paid(lab: Lab) -> None:
    """The sum of the ledger is the sandbox's own bill, to the micro-dollar."""
    lab.services.set_budget("org", period="month", usd="10")
    text = f"""
name: trouble
defaults: {{retry: {{max: 2, initial: 10ms, jitter: none}}}}
steps:
  - {{id: repaired, {ASK}, prompt: "[[sandbox: wrong_schema times=1 key=r]] go", output: {{a: string}}}}
  - {{id: hopeless, {ASK}, prompt: "[[sandbox: wrong_schema]] go", output: {{a: string}}, max_retries: 1,
      on_failure: skip}}
  - {{id: retried, {ASK}, prompt: "[[sandbox: status=500 times=1 key=s]] go"}}
  - {{id: cut, {ASK}, prompt: "[[sandbox: stop=max_tokens]] go", max_retries: 1, on_failure: skip}}
  - {{id: refused, {ASK}, prompt: "[[sandbox: refuse]] go", on_failure: skip}}
"""
    ran = lab.run(text)
    assert ran.status == "succeeded"
    assert lab.calls() == 2 + 6 + 2 + 2 + 1
    assert paid(lab) == bill(lab) > 0
    assert spent(lab) == [paid(lab)]


def test_a_call_of_which_nobody_knows_costs_all_that_was_reserved(lab: Lab) -> None:
    lab.services.set_budget("org", period="month", usd="10")
    ran = lab.run(steps("[[sandbox: drop]] go", on_failure="skip", max_retries=0))
    assert ran.status == "succeeded"
    (balance,) = [entry for entry in lab.services.budgets.balances().values() if entry.usd_spent]
    assert balance.usd_spent >= 4096 * 5 > bill(lab)


def test_a_cancelled_call_costs_all_that_was_reserved(either: Lab) -> None:
    either.services.set_budget("org", period="month", usd="10")
    run = either.start(steps("[[sandbox: hang]] go", max_tokens=1024))
    eventually(lambda: _asked(either), what="the call")
    either.services.cancel(run)
    assert either.wait(run).status == "cancelled"
    (balance,) = [entry for entry in either.services.budgets.balances().values() if entry.usd_spent]
    assert 1024 * 5 < balance.usd_spent < 1024 * 6
    assert calls_on_ledger(either) == ["cancelled"]


def test_a_model_without_a_price_is_not_called_where_dollars_are_limited(lab: Lab) -> None:
    text = "name: a\n{}\nsteps:\n  - {{id: it, provider: openai, model: house-model, prompt: go, max_tokens: 100}}\n"
    ran = lab.run(text.format("limits: {budget_usd: 100}"))
    assert ran.error["kind"] == "unpriced"
    assert "openai:house-model has no price" in ran.error["message"]
    assert lab.calls() == 0
    assert lab.run(text.format("limits: {tokens: 5000}")).status == "succeeded"
    assert lab.run(text.format("")).status == "succeeded"


@pytest.mark.parametrize("own", [False, True])
def test_a_model_without_a_price_is_never_called_for_real_money(sandbox: Sandbox, tmp_path: Path, own: bool) -> None:
    """Unless the operator gives it one."""
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "- {provider: openai, model: house-model, from: 2020-01-01, reason: ours, prices: {input: 1, output: 2}}"
    )
    settings = Settings(
        _env_file=None,
        home=tmp_path,
        database_url=f"sqlite:///{tmp_path}/gorgon.db",
        broker_url=EMBEDDED_BROKER,
        openai_base_url=sandbox.openai_url,
        openai_api_key="key",
        prices=prices if own else None,
    )
    home = new_home()
    with (
        contextlib.closing(build(settings)) as services,
        embedded(services, queues=["openai"], slots=4, home=home, target="live"),
    ):
        plan, _ = services.read("name: a\nsteps:\n  - {id: it, provider: openai, model: house-model, prompt: go}\n")
        ran = Lab(services, sandbox, home).wait(services.submit(plan, {}, target="live", home=home).run_id)
    assert ran.status == ("succeeded" if own else "failed"), ran.document
    if own:
        assert ran.document["cost_usd"] > 0
    else:
        assert "the cost of the call would be unknown" in ran.error["message"]
        assert "GORGON_PRICES" in ran.error["hint"]
        entry = next(line for line in ran.error["hint"].splitlines() if line.startswith("- {"))
        (made,) = read_overrides(entry)
        assert (made.provider, made.model) == ("openai", "house-model"), "the hint can be copied into the file"
        assert sandbox.log() == []


def test_the_token_budget_of_an_older_file_holds(lab: Lab) -> None:
    text = (
        "name: old\ntoken_budget: {}\nsteps:\n  - id: it\n    type: openai\n    params: {{prompt: go, role: planner}}\n"
    )
    assert "is 50 tokens" in lab.run(text.format(50)).error["message"]
    assert lab.run(text.format(50_000)).status == "succeeded"


def test_half_most_and_all_of_it_are_told(lab: Lab) -> None:
    text = f"""
name: told
limits: {{budget_usd: 0.0058}}
steps:
  - {{id: one, {ASK}, max_tokens: 1024, prompt: '{USED}'}}
"""
    ran = lab.run(text)
    assert [event["message"] for event in ran.events if event["kind"] == "budget.alert"] == [
        "the limit of the run: 50 % is spent"
    ]


# What is paid for is not paid again

TOLL = '[[sandbox: usage={"input": 100, "output": 900}]]'
WRONG = f"[[sandbox: wrong_schema times=1 key=w]]{TOLL}"


def calls_on_ledger(lab: Lab) -> list[str]:
    with lab.services.database.read() as connection:
        return sorted(connection.scalars(select(ledger.c.outcome)))


def test_a_repair_that_waits_for_money_does_not_pay_the_conversation_again(either: Lab) -> None:
    """Both steps' first calls fit, then the repair only when the other one has ended."""
    text = f"""
name: repaired
limits: {{budget_usd: 0.019}}
steps:
  - {{id: long, {ASK}, max_tokens: 2048, prompt: '[[sandbox: delay=1500ms]]{USED}'}}
  - {{id: talk, {ASK}, max_tokens: 1024, prompt: '{WRONG}', output: {{a: string}}}}
"""
    ran = either.run(text)
    assert ran.status == "succeeded", ran.error
    waits = [event for event in ran.events if event["kind"] == "step.waiting" and event["step"] == "talk"]
    assert [event["data"]["why"] for event in waits] == ["budget"]
    assert ran.step("talk")["attempts"] == 1
    assert either.calls() == 3
    assert calls_on_ledger(either) == ["invalid", "ok", "ok"]
    assert spent(either) == [paid(either)] == [bill(either)] == [3 * COST]
    with either.services.database.write() as connection:
        abandon_orphans(connection)
        assert connection.scalar(select(func.count()).select_from(conversations)) == 0


def test_a_repair_that_fails_on_the_way_is_tried_again_without_what_went_before(either: Lab) -> None:
    """With and without a budget."""
    for place, limits in enumerate(("", "limits: {budget_usd: 1}")):
        prompt = f"[[sandbox: wrong_schema times=1 key=w{place}]][[sandbox: status=500 nth=2 key=s{place}]]{TOLL}"
        retry = "retry: {max: 2, initial: 10ms, jitter: none}"
        step = f"{{id: talk, {ASK}, max_tokens: 1024, prompt: '{prompt}', output: {{a: string}}, {retry}}}"
        ran = either.run(f"name: tried\n{limits}\nsteps:\n  - {step}\n")
        assert ran.status == "succeeded"
        assert ran.step("talk")["attempts"] == 2
    assert (either.calls(), either.calls(status=500)) == (6, 2)
    assert calls_on_ledger(either) == sorted(["invalid", "server", "ok"] * 2)
    assert paid(either) == bill(either) == 4 * COST


def test_a_repair_that_no_budget_allows_says_what_is_paid(either: Lab) -> None:
    step = f"{{id: talk, {ASK}, max_tokens: 1024, prompt: '{WRONG}', output: {{a: string}}}}"
    ran = either.run(f"name: short\nlimits: {{budget_usd: 0.007}}\nsteps:\n  - {step}\n")
    assert ran.error["kind"] == "budget"
    assert "Calls of this step that are already paid for: 1, $0.0046." in ran.error["hint"]
    assert either.calls() == 1
    assert calls_on_ledger(either) == ["invalid"]


# Budgets that are set while calls are under way


@pytest.mark.parametrize("own", ["", "limits: {budget_usd: 1}"], ids=["nothing-counted-it", "a-limit-counted-it"])
@pytest.mark.parametrize("per", ["day", "run"])
def test_a_new_budget_counts_the_calls_under_way(either: Lab, own: str, per: str) -> None:
    """When `set` returns, what they may cost is reserved; then what they have cost is spent."""
    text = steps(f"[[sandbox: delay=2500ms]]{USED}", head=own, max_tokens=1024)
    run = either.start(text)
    eventually(lambda: _asked(either), what="the call")
    either.services.set_budget("team:blue", period=per, usd="0.006")
    (account,) = [entry for key, entry in _accounts(either).items() if key.startswith("budget:") and ":sandbox:" in key]
    assert account.usd_reserved > 1024 * 5
    assert account.usd_spent == 0
    refused = either.run(steps(USED, max_tokens=1024, on_failure="skip"))
    assert refused.states()["s0"] == ("skipped" if per == "day" else "succeeded")
    assert either.wait(run).status == "succeeded"
    (account,) = [entry for key, entry in _accounts(either).items() if key == account.key]
    assert (account.usd_spent, account.usd_reserved) == (COST, 0)


def _asked(lab: Lab) -> bool:
    """Whether the one call of the first run is under way."""
    with lab.services.database.read() as connection:
        held = connection.scalar(select(func.count()).select_from(reservations))
    return bool(held or len(lab.services.budgets._in_flight))


def _accounts(lab: Lab) -> dict[str, Any]:
    with lab.services.database.read() as connection:
        return {row.key: row for row in connection.execute(select(budget_periods))}


def test_what_was_spent_while_there_was_no_limit_counts_when_there_is_one_again(either: Lab) -> None:
    either.services.set_budget("team:blue", period="day", usd="1")
    for limit in ("none", "0.5"):
        assert either.run(steps(USED, max_tokens=1024)).status == "succeeded"
        either.services.set_budget("team:blue", period="day", usd=None if limit == "none" else limit)
    assert spent(either) == [2 * COST]


# Who watches


def test_alerts_are_logged_and_counted_once(either: Lab) -> None:
    either.services.set_budget("team:blue", period="day", usd="0.0058")
    with structlog.testing.capture_logs() as lines:
        ran = either.run(steps(USED, max_tokens=1024))
        eventually(lambda: lines, what="the alert in the log")
        with either.services.database.write() as connection:
            tell(connection)
    (line,) = [line for line in lines if line.get("kind") == "budget.alert"]
    assert (line["log_level"], line["percent"], line["run_id"]) == ("warning", 50, ran.id)
    assert (line["usd_limit"], line["usd_spent"]) == (0.0058, 0.0046)
    text = metrics.exposition().decode()
    assert 'gorgon_budget_alerts_total{budget="team blue",kind="alert",mark="50"}' in text
    assert 'gorgon_budget_usd{budget="team blue",is="spent",per="day",target="sandbox"} 0.0046' in text
    assert 'gorgon_budget_usd{budget="team blue",is="limit",per="day",target="sandbox"} 0.0058' in text
    either.services.set_budget("team:blue", period="day", usd=None)
    assert 'gorgon_budget_usd{budget="team blue"' not in metrics.exposition().decode()
