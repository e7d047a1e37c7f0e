"""From a plan and its inputs to the work that is forecast: what is known before a run, and what is only expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gorgon_common.costs.forecast import ASSUMED, HISTORY, SIMILAR, Call, Task
from gorgon_common.costs.history import History, StepHistory
from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.tokens import TokenEstimator
from gorgon_common.engine.estimate import capped, estimate, left
from gorgon_common.engine.workload import Workload, example, outlook
from gorgon_common.errors import InputInvalid
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow import catalogue
from gorgon_common.workflow.compiler import check_inputs, try_compile
from gorgon_common.workflow.loader import load
from gorgon_common.workflow.plan import Plan

PRICES = GenaiPricer()
NO_PAST = History()


def plan_of(text: str) -> Plan:
    made = try_compile(load(text, roles=load_roles()), roles=load_roles())
    assert made.plan is not None, made.problems
    return made.plan


def seen(text: str, inputs: Mapping[str, Any] | None = None, history: History = NO_PAST, **given: Any) -> Workload:
    plan = plan_of(text)
    options: dict[str, Any] = {"estimator": TokenEstimator(), "target": "live", **given}
    return outlook(plan, check_inputs(plan, inputs or {}), history=history, **options)


def task(found: Workload, name: str) -> Task:
    return next(entry for entry in found.tasks if entry.id == name)


def call(found: Workload, name: str) -> Call:
    made = task(found, name).call
    assert made is not None
    return made


ITEMS = """
name: items
inputs: {things: {type: array, items: {type: string}, default: [a, b, c]}}
steps:
  - {id: look, prompt: "Look at {{thing}}", map: {over: "{{inputs.things}}", as: thing, max_items: 40}}
  - {id: sum, prompt: "Sum up {{look.output}}"}
"""
PLANNED = """
name: planned
steps:
  - {id: plan, role: planner, prompt: "Plan it"}
  - {id: build, role: builder, prompt: "{{task.title}}", map: {over: "{{plan.tasks}}", as: task, max_items: 12}}
  - {id: both, aggregate: {from: "{{build.output}}", how: json}}
  - {id: report, prompt: "Report {{both.output}}"}
"""


def test_items_of_an_input_are_counted_exactly() -> None:
    repeat = task(seen(ITEMS, {"things": ["x"] * 17}), "look").repeat
    assert repeat is not None
    assert (repeat.exact, repeat.most) == (True, 17)


def test_a_prompt_of_inputs_is_measured_item_by_item() -> None:
    short = call(seen(ITEMS, {"things": ["x"]}), "look[]")
    mixed = call(seen(ITEMS, {"things": ["x", "word " * 1000]}), "look[]")
    assert mixed.fixed > 200 + short.fixed
    assert mixed.most_input is not None
    assert mixed.most_input >= 5000
    assert mixed.bound >= 5000


def test_items_of_a_step_are_assumed_and_it_is_said() -> None:
    found = seen(PLANNED)
    repeat = task(found, "build").repeat
    assert repeat is not None
    assert (repeat.times.source, repeat.most, repeat.exact) == (ASSUMED, 12, False)
    assert any("`build` is assumed to have about 3 items (at most 12)" in sentence for sentence in found.said)


def test_items_and_replies_follow_the_past() -> None:
    past = StepHistory(output=[500.0] * 5, seconds=[3.0] * 5, calls=5, executions=5)
    found = seen(PLANNED, history=History(5, (), {"build": StepHistory(counts=[7] * 5), "build[]": past}))
    repeat = task(found, "build").repeat
    assert repeat is not None
    assert repeat.times.source == HISTORY
    assert repeat.times.median == pytest.approx(7.0)
    assert call(found, "build[]").output.median == pytest.approx(500.0)
    assert call(found, "build[]").seconds is not None
    assert call(found, "plan").output.source == ASSUMED


def test_calls_of_the_same_role_and_model_elsewhere_are_better_than_nothing() -> None:
    like = StepHistory(output=[800.0] * 4, seconds=[2.0] * 4, calls=4, executions=4)
    models = call(seen(PLANNED), "plan").models
    found = seen(PLANNED, history=History(0, (), {}, {("planner", *models[0]): like}))
    assert call(found, "plan").output.source == SIMILAR
    assert call(found, "plan").output.median == pytest.approx(800.0)


def test_input_follows_the_steps_that_write_it_through_aggregates_too() -> None:
    found = seen(PLANNED)
    report = call(found, "report")
    assert [found.tasks[part.task].id for part in report.parts] == ["both"]
    assert [found.tasks[number].id for number in task(found, "both").of] == ["build"]
    assert report.parts[0].tokens > 300
    assert report.most_input is not None
    build = call(found, "build[]")
    assert report.most_input >= 12 * build.max_tokens


def test_the_last_output_stands_in_for_the_next() -> None:
    long = History(1, (), {"plan": StepHistory(sample={"tasks": [{"title": "word " * 2000}]})})
    assert sum(part.tokens for part in call(seen(PLANNED, history=long), "build[]").parts) > 1500


def test_a_condition_on_inputs_is_decided_before_the_run_and_passed_on() -> None:
    text = """
name: branch
inputs: {deep: {type: boolean, default: false}}
steps:
  - {id: dig, when: inputs.deep, prompt: "Dig"}
  - {id: after, prompt: "After {{dig.output}}"}
  - {id: always, join: none_failed, prompt: "{{default(dig.output, 'nothing')}}"}
"""
    shallow, deep = seen(text), seen(text, {"deep": True})
    assert [entry.id for entry in shallow.tasks if entry.never] == ["dig", "after"]
    assert not any(entry.never for entry in deep.tasks)
    assert call(shallow, "always").parts == ()
    assert call(deep, "always").parts


def test_a_condition_on_a_reply_is_open_until_the_past_tells() -> None:
    text = """
name: maybe
steps:
  - {id: plan, role: planner, prompt: "Plan"}
  - {id: build, when: plan.approved, prompt: "Build"}
"""
    assert task(seen(text), "build").chance == 1.0
    past = History(10, (), {"build": StepHistory(executions=2, skipped=8)})
    assert 0.1 < task(seen(text, history=past), "build").chance < 0.4


def test_what_a_command_prints_has_no_known_size() -> None:
    text = """
name: command
steps:
  - {id: list, run: [ls]}
  - {id: read, prompt: "Read {{list.stdout}}"}
"""
    found = seen(text)
    assert call(found, "read").unsized
    assert call(found, "read").most_input is None
    assert task(found, "list").seconds is None
    past = History(3, (), {"list": StepHistory(took=[1.0] * 3, sample="a\nb"), "read": StepHistory(input=[40.0] * 3)})
    known = seen(text, history=past)
    assert not call(known, "read").unsized
    assert task(known, "list").seconds is not None


def test_loops_attempts_and_fallbacks() -> None:
    text = """
name: more
steps:
  - id: write
    loop: {until: "write.output.ok", max: 5}
    prompt: "Write"
    output: {ok: boolean}
    retry: {max: 3, initial: 2s}
    on_failure: fallback
    fallback: {type: alternate_step, step: {prompt: "Write anything"}}
"""
    found = seen(text)
    loop = task(found, "write")
    assert loop.repeat is not None
    assert (loop.repeat.in_turn, loop.repeat.most) == (True, 5)
    body = task(found, "write#")
    assert (body.attempts, body.pauses) == (4, 2.0 + 4.0 + 8.0)


def test_models_are_those_that_the_engine_will_try() -> None:
    text = """
name: models
steps:
  - {id: a, prompt: "x", models: ["openai:gpt-luna", "claude-sonnet"]}
"""
    assert call(seen(text), "a").models == (("openai", "gpt-6-luna"), ("anthropic", "claude-sonnet-5-5"))


def test_an_example_fits_the_shape_of_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "ok": {"type": "boolean"},
            "score": {"type": ["number", "null"]},
            "kind": {"enum": ["bug", "idea"]},
            "list": {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}}}},
        },
    }
    made = example(schema)
    assert (made["ok"], made["score"], made["kind"], len(made["list"])) == (True, 12, "bug", 3)
    assert isinstance(made["list"][0]["text"], str)


# The document


def document(text: str, inputs: Mapping[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    plan = plan_of(text)
    options: dict[str, Any] = {"history": History(), "estimator": TokenEstimator(), "prices": PRICES, **given}
    return estimate(plan, check_inputs(plan, inputs or {}), target=options.pop("target", "live"), **options)


@pytest.mark.parametrize("name", [entry.name for entry in catalogue.entries()])
@pytest.mark.parametrize("target", ["live", "sandbox"])
def test_every_bundled_workflow_can_be_planned(name: str, target: str) -> None:
    made = document(catalogue.source(name), target=target)
    total = made["total"]
    for band in (total["cost_usd"], total["time_s"], total["tokens"]["input"], total["tokens"]["output"]):
        known = [band[part] for part in ("low", "expected", "p95", "worst") if band[part] is not None]
        assert known == sorted(known)
    assert made["total"]["cost_usd"]["worst"] > 0
    ids = {step["id"] for step in made["steps"]}
    assert {step["parent"] for step in made["steps"]} <= ids | {None}
    assert {entry["step"] for entry in made["critical_path"]} <= ids


def test_the_total_is_the_sum_of_the_steps_at_the_top() -> None:
    made = document(PLANNED)
    tops = [step for step in made["steps"] if step["parent"] is None]
    for name in ("expected", "worst"):
        assert sum(step["cost_usd"][name] for step in tops) == pytest.approx(made["total"]["cost_usd"][name], rel=1e-3)
        assert sum(step["calls"][name] for step in tops) == pytest.approx(made["total"]["calls"][name], abs=2)


def test_an_unpriced_model_is_unknown_in_the_document() -> None:
    text = "name: free\nsteps:\n  - {id: a, provider: openai, models: ['openai:my-own'], prompt: hi}\n"
    made = document(text)
    assert made["total"]["cost_usd"]["expected"] is None
    assert made["unknown"]["cost"] == ["a"]


def test_limits_of_the_file_are_a_budget_and_the_worst() -> None:
    made = document(PLANNED.replace("steps:", "limits: {budget_usd: 0.5, timeout: 10m}\nsteps:", 1))
    assert made["total"]["cost_usd"]["worst"] == 0.5
    assert made["total"]["time_s"]["worst"] <= 660
    assert made["budgets"][0]["left_usd"] == 0.5


def test_max_cost_becomes_the_lower_limit_of_the_plan() -> None:
    plan = plan_of(PLANNED)
    assert capped(plan, 0.25).limits["budget_usd"] == 0.25
    assert capped(capped(plan, 0.25), 3).limits["budget_usd"] == 0.25
    assert capped(plan, 0.25).hash() != plan.hash()
    for wrong in (-1, float("nan"), "much"):
        with pytest.raises(InputInvalid):
            capped(plan, wrong)


def test_what_is_left_of_budgets_that_count_the_run() -> None:
    listed = [
        {"scope": scope, "name": name, "period": period, "usd_limit": 10_000_000, "token_limit": None,
         "accounts": [{"target": "live", "usd_spent": 4_000_000, "usd_reserved": 1_000_000,
                       "token_spent": 0, "token_reserved": 0}]}
        for scope, name, period in (("org", "", "month"), ("team", "red", "day"), ("team", "blue", "day"),
                                    ("workflow", "w", "run"))
    ]  # fmt: skip
    found = left(listed, team="red", workflow="w", target="live")
    assert [(entry.name, entry.usd) for entry in found] == [
        ("org per month", 5.0),
        ("team red per day", 5.0),
        ("workflow w per run", 10.0),
    ]
    assert left(listed, team="red", workflow="x", target="sandbox")[0].usd == 10.0
