from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gorgon_common.errors import WorkflowInvalid
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow import legacy
from gorgon_common.workflow.loader import LoadedWorkflow, load
from gorgon_common.workflow.schema import Step, StepBody
from gorgon_common.workflow.source import read_workflow

OLDER = Path(__file__).parent / "files" / "older"
ROLES, OPERATIONS = load_roles(), load_operations()


def loaded(data: dict[str, Any] | str) -> LoadedWorkflow:
    text = data if isinstance(data, str) else json.dumps(data, indent=1, ensure_ascii=False)
    return load(text, file="old.yaml", roles=ROLES, operations=OPERATIONS)


def one(kind: str, /, *, step: dict[str, Any] | None = None, **params: Any) -> Step:
    """The only step of an older file."""
    made = loaded({"name": "a", "steps": [{"id": "s", "type": kind, "params": params, **(step or {})}]})
    assert made.legacy
    assert made.spec.lenient
    return made.spec.steps[0]


def refused(data: dict[str, Any]) -> list[str]:
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(data)
    return [problem.message for problem in caught.value.problems if problem.severity == "error"]


def every() -> dict[str, StepBody]:
    spec = loaded((OLDER / "every-step-type.yaml").read_text()).spec
    return {step.id: step for _, step in spec.walk() if step.id}


# Recognition


@pytest.mark.parametrize(
    "data",
    [
        {"name": "a", "steps": [{"id": "s", "prompt": "x"}]},
        {"name": "a", "steps": [{"id": "s", "type": "agent", "prompt": "x"}]},
        {"name": "a", "steps": []},
        {"name": "a"},
        {"name": "a", "steps": [{"id": "s", "output": {"type": "string"}}]},
        [],
    ],
)
def test_the_present_form_is_not_taken_for_an_older_one(data: Any) -> None:
    assert not legacy.detect(data)


@pytest.mark.parametrize(
    "data",
    [
        {"steps": [{"id": "s", "prompt": "x"}, {"id": "t", "type": "shell"}]},
        {"steps": [{"id": "s", "type": "unheard", "params": {}}]},
        {"steps": [{"step_id": "s", "step_type": "openai"}]},
        {"nodes": [], "edges": []},
    ],
)
def test_older_forms_are_recognised(data: Any) -> None:
    assert legacy.detect(data)


@pytest.mark.parametrize("path", sorted(OLDER.iterdir()), ids=lambda path: path.name)
def test_every_older_file_loads_and_plans(path: Path) -> None:
    plan, problems = read_workflow(path.read_text(), file=path.name, roles=ROLES, operations=OPERATIONS)
    assert plan.lenient
    assert plan.top > 3
    assert {problem.severity for problem in problems} <= {"warning"}


# Step types


@pytest.mark.parametrize(("kind", "provider"), [("claude_code", "anthropic"), ("openai", "openai")])
def test_agents(kind: str, provider: str) -> None:
    made = one(
        kind, role="planner", prompt="Plan ${x}", model="m", max_tokens=9, system_prompt="You plan", estimated_tokens=7
    )
    assert (made.action, made.provider, made.role, made.prompt) == ("prompt", provider, "planner", "Plan ${x}")
    assert (made.models, made.max_tokens, made.system) == (["m"], 9, "You plan")
    assert made.legacy is not None
    assert made.legacy.estimated_tokens == 7


def test_defaults_of_older_steps() -> None:
    made = one("claude_code", prompt="x")
    assert made.retry is not None
    assert (made.retry.max, made.timeout, made.on_failure) == (3, 300.0, "abort")
    made = one("claude_code", prompt="x", step={"max_retries": 0, "timeout_seconds": 5})
    assert made.retry is not None
    assert (made.retry.max, made.timeout) == (0, 5.0)


def test_shell_is_a_text_for_the_shell_as_it_stands() -> None:
    made = one("shell", command='echo "${name}" {{.State}}', allow_failure=True)
    assert (made.action, made.shell, made.run, made.allow_failure) == ("run", 'echo "${name}" {{.State}}', None, True)


def test_shell_with_a_list_is_an_argv() -> None:
    assert one("shell", command=["ls", "-l"]).run == ["ls", "-l"]


def test_parallel_is_a_group_without_order_of_its_own() -> None:
    steps = every()
    group = steps["both"]
    assert group.legacy is not None
    assert (group.action, group.legacy.max_parallel, group.legacy.fail_fast) == ("steps", 2, True)
    assert (group.retry, group.timeout) == (None, None)
    assert group.steps is not None
    assert [inner.id for inner in group.steps] == ["style", "security"]
    assert [inner.order_after for inner in group.steps] == [[], []]
    condition = group.steps[1].condition
    assert condition is not None
    assert condition.on_missing == "false"


def test_inner_steps_keep_their_own_dependencies() -> None:
    steps = [{"id": "x", "type": "openai", "params": {"prompt": "a"}}]
    steps.append({"id": "y", "type": "openai", "params": {"prompt": "a"}, "depends_on": "x"})  # type: ignore[dict-item]
    made = one("parallel", steps=steps)
    assert made.steps is not None
    assert [inner.depends_on for inner in made.steps] == [[], ["x"]]


def test_checkpoint() -> None:
    assert every()["saved"].checkpoint == "Both reviews are there"
    assert one("checkpoint").checkpoint == ""


def test_fan_out_is_a_map_of_its_template() -> None:
    made = every()["each"]
    assert made.map is not None
    assert (made.action, made.prompt, made.role) == ("prompt", "Review ${item} (${index})", "reviewer")
    assert (made.map.over, made.map.as_, made.map.max_parallel) == ("${files}", "item", 3)
    assert made.map.on_item_failure == "continue"
    assert made.retry is not None
    assert made.retry.max == 0  # the template's own
    assert made.publishes == ["reviews"]


def test_a_template_takes_from_its_step_what_it_does_not_say() -> None:
    template = {"type": "openai", "params": {"prompt": "${item}"}}
    made = one(
        "fan_out", items=[1], step_template=template, fail_fast=True, step={"timeout_seconds": 9, "max_retries": 1}
    )
    assert made.map is not None
    assert made.retry is not None
    assert (made.map.on_item_failure, made.map.max_parallel) == ("fail", 5)
    assert (made.timeout, made.retry.max) == (9.0, 1)


def test_a_template_with_a_condition_or_steps_is_a_group_for_each_item() -> None:
    template: dict[str, Any] = {"type": "openai", "params": {"prompt": "${item}"}}
    template["condition"] = {"field": "item", "operator": "not_empty"}
    made = one("fan_out", items="${x}", step_template=template)
    assert made.condition is None
    assert made.map is not None
    assert made.steps is not None
    assert [(inner.id, inner.condition is not None) for inner in made.steps] == [("s_item", True)]
    group = {"type": "parallel", "id": "both", "params": {"steps": [{"id": "x", **template}]}}
    made = one("fan_out", items="${x}", step_template=group)
    assert made.steps is not None
    assert made.steps[0].steps is not None
    assert made.steps[0].steps[0].id == "x"


def test_map_reduce() -> None:
    made = every()["mapped"]
    assert made.map is not None
    assert made.map.reduce is not None
    assert (made.provider, made.prompt, made.map.on_item_failure) == ("openai", "Look at ${item}", "fail")
    assert (made.map.reduce.provider, made.map.reduce.prompt) == ("anthropic", "Join ${map_results}")
    assert made.on_failure == "skip"


@pytest.mark.parametrize(
    ("how", "meant"), [("concat", "concat"), ("json", "json"), ("collect", "json"), ("vote", "vote")]
)
def test_fan_in_joins_without_a_model(how: str, meant: str) -> None:
    made = one("fan_in", input="${reviews}", aggregation=how)
    assert made.aggregate is not None
    assert (made.aggregate.from_, made.aggregate.how) == ("${reviews}", meant)


def test_fan_in_with_a_model_reads_the_items_where_they_come_from() -> None:
    made = every()["summed"]
    assert (made.action, made.provider, made.prompt, made.role) == (
        "prompt",
        "anthropic",
        "Sum up: ${reviews}",
        "analyst",
    )
    assert made.publishes == ["summary"]
    without = one("fan_in", input="${r}", aggregation="openai", aggregate_prompt="Sum up")
    assert (without.provider, without.prompt) == ("openai", "Sum up\n\n${r}")


def test_branch_is_two_groups_with_opposite_conditions() -> None:
    made = every()["choose"]
    assert made.steps is not None
    then, otherwise = made.steps
    assert then.condition is not None
    assert otherwise.condition is not None
    assert then.condition.plain() == {"field": "depth", "operator": "equals", "value": 2, "on_missing": "false"}
    assert otherwise.condition.plain() == {"not": then.condition.plain()}
    assert [step.id for group in (then, otherwise) for step in group.steps or ()] == ["deep", "flat"]


def test_a_branch_that_names_steps_puts_its_condition_on_them() -> None:
    agent = {"type": "openai", "params": {"prompt": "x"}}
    branch = {"condition": {"field": "ok", "operator": "equals", "value": True}, "then": ["go"], "else": "stop"}
    own = {"field": "y", "operator": "not_empty"}
    steps = [
        {"id": "b", "type": "branch", "params": branch},
        {"id": "go", **agent, "condition": own},
        {"id": "stop", **agent},
    ]
    _, go, stop = loaded({"name": "a", "steps": steps}).spec.steps
    assert go.condition is not None
    assert stop.condition is not None
    assert [entry.field for entry in go.condition.all or ()] == ["ok", "y"]
    assert stop.condition.not_ is not None
    assert stop.condition.not_.field == "ok"
    assert "b" in stop.order_after


def test_a_branch_cannot_name_a_step_that_is_not_there() -> None:
    step = {"id": "b", "type": "branch", "params": {"condition": "x", "then": "nowhere"}}
    assert refused({"name": "a", "steps": [step]}) == ["the branch `b` names a step `nowhere` that does not exist"]


def test_a_parameter_beside_params_is_told_where_it_belongs() -> None:
    step = {"id": "s", "type": "openai", "prompt": "x", "params": {"role": "planner"}}
    problem = loaded({"name": "a", "steps": [step]}).problems[0]
    assert problem.message == "`prompt` is not a key of a step and is ignored"
    assert problem.hint == "In the older format it belongs under `params:`."


def test_a_branch_may_be_an_expression() -> None:
    inner = [{"id": "x", "type": "openai", "params": {"prompt": "x"}}]
    made = one("branch", condition="${a} > 1", then=inner, **{"else": [{**inner[0], "id": "y"}]})
    assert made.steps is not None
    assert [group.when for group in made.steps] == ["${a} > 1", "!(${a} > 1)"]
    made = one("branch", condition="${a}", then=inner)
    assert made.steps is not None
    assert made.steps[0].when == "a"


def test_loop_repeats_a_group_whose_steps_follow_each_other() -> None:
    made = every()["again"]
    assert made.loop is not None
    assert made.steps is not None
    assert made.loop.max == 4
    assert not isinstance(made.loop.until, str)
    assert made.loop.until.not_ is not None
    assert made.loop.until.not_.field == "verdict"
    assert [inner.order_after for inner in made.steps] == [[], ["try_it"]]


@pytest.mark.parametrize(
    ("params", "over"),
    [
        ({"loop_type": "count", "count": 3}, [0, 1, 2]),
        ({"loop_type": "for_each", "collection": "files"}, "${files}"),
        ({"items": "${files}"}, "${files}"),
    ],
)
def test_loops_over_a_list_take_one_at_a_time(params: dict[str, Any], over: Any) -> None:
    made = one("loop", **params, body={"type": "openai", "params": {"prompt": "x"}})
    assert made.map is not None
    assert (made.map.over, made.map.max_parallel) == (over, 1)
    assert made.steps is not None
    assert made.steps[0].id == "s_body"


def test_a_loop_may_say_until() -> None:
    made = one("loop", until="${done}", steps=[{"id": "x", "type": "openai", "params": {"prompt": "x"}}])
    assert made.loop is not None
    assert (made.loop.until, made.loop.max) == ("done", 10)


def test_mcp_tool() -> None:
    made = every()["tool"]
    assert (made.uses, made.with_) == (
        "mcp.call",
        {"server": "files", "tool": "read", "arguments": {"path": "${topic}"}},
    )


def test_approval_waits_for_what_it_shows() -> None:
    made = every()["ask"]
    assert made.approval is not None
    assert (made.approval.message, made.approval.preview) == ("Publish?", ["summed", "mapped"])
    assert made.approval.timeout == 86400.0
    assert {"summed", "mapped", "tool"} == set(made.order_after)
    assert (made.retry, made.timeout) == (None, None)


@pytest.mark.parametrize(
    ("kind", "key", "operation", "uses"),
    [
        ("github", "operation", "create_issue", "github.create_issue"),
        ("github", "action", "list_repos", "github.list_repositories"),
        ("notion", "action", "query_database", "notion.query_data_source"),
        ("notion", "operation", "append", "notion.append_blocks"),
        ("gmail", "operation", "list_messages", "gmail.list_messages"),
        ("slack", "action", "send_message", "slack.post_message"),
    ],
)
def test_integrations(kind: str, key: str, operation: str, uses: str) -> None:
    made = one(kind, **{key: operation, "x": "${y}"})
    assert (made.uses, made.with_) == (uses, {"x": "${y}"})


def test_an_unknown_operation_points_at_where_it_is_written() -> None:
    text = "name: a\nsteps:\n  - id: s\n    type: github\n    params:\n      operation: create_isue\n"
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(text)
    problem = caught.value.problems[0]
    assert (problem.line, problem.column) == (6, 18)
    assert problem.hint == "Did you mean `github.create_issue`?"


# Modifiers


def test_failure_modes() -> None:
    steps = every()
    chat, mail = steps["chat"], steps["mail"]
    assert chat.fallback is not None
    assert (chat.on_failure, chat.fallback.value) == ("fallback", {"sent": False})
    assert (chat.depends_on, chat.order_after) == (["summed"], [])
    assert mail.fallback is not None
    assert mail.fallback.step is not None
    assert (mail.fallback.type, mail.fallback.step.uses) == ("alternate_step", "slack.post_message")
    made = one("openai", prompt="x", step={"on_failure": "retry", "max_retries": 2})
    assert made.retry is not None
    assert (made.retry.max, made.on_failure) == (2, "abort")


def test_continue_with_default_without_a_default_gives_an_empty_object() -> None:
    made = one("openai", prompt="x", step={"on_failure": "continue_with_default"})
    assert made.fallback is not None
    assert made.fallback.value == {}


def test_what_has_no_effect_is_told() -> None:
    step = {"id": "s", "type": "openai", "params": {"prompt": "x", "temperature": 1}, "colour": "red"}
    made = loaded({"name": "a", "steps": [{**step, "fallback": {"type": "default_value", "value": 1}}], "extra": 1})
    told = [problem.message for problem in made.problems]
    assert sorted(told) == [
        "`colour` is not a key of a step and is ignored",
        "`extra` is not a key of the older format and is ignored",
        "`fallback` has no effect without `on_failure: fallback`",
        "the parameter `temperature` is ignored",
    ]
    assert all(problem.severity == "warning" and problem.line for problem in made.problems)


def test_published_names_and_order() -> None:
    made = loaded((OLDER / "every-step-type.yaml").read_text())
    steps = every()
    assert steps["make-plan"].publishes == ["plan", "tasks"]
    assert steps["run-tests"].order_after == ["make-plan"]
    assert "security_notes" in made.spec.published
    assert made.spec.outputs == {
        "plan": "${plan}",
        "summary": "${summary}",
        "verdict": "${verdict}",
        "never_published": None,
    }


def test_an_explicit_empty_depends_on_has_no_order() -> None:
    agent = {"type": "openai", "params": {"prompt": "x"}}
    steps = [{"id": "a", **agent}, {"id": "b", **agent, "depends_on": []}, {"id": "c", **agent}]
    made = loaded({"name": "a", "steps": steps}).spec.steps
    assert [step.order_after for step in made] == [[], [], ["b"]]


def test_auto_parallel_has_no_order_of_the_file() -> None:
    spec = loaded((OLDER / "auto-parallel.yaml").read_text()).spec
    assert [step.order_after for step in spec.steps] == [[], [], []]
    assert spec.steps[2].depends_on == ["style", "security"]
    assert spec.limits.max_parallel == 3


# The workflow


def test_limits_and_their_defaults() -> None:
    agent = {"id": "s", "type": "openai", "params": {"prompt": "x"}}
    spec = loaded({"name": "a", "version": 2.0, "steps": [agent]}).spec
    assert (spec.limits.tokens, spec.limits.timeout, spec.version) == (100_000, 3600.0, "2.0")
    spec = loaded({"name": "a", "token_budget": 5000, "timeout_seconds": 60, "steps": [agent]}).spec
    assert (spec.limits.tokens, spec.limits.timeout) == (5000, 60.0)


INPUTS: list[tuple[Any, dict[str, Any]]] = [
    ({"x": {"type": "string", "required": True}}, {"x": {"type": "string", "required": True}}),
    ([{"name": "x", "type": "list", "default": [1]}], {"x": {"type": "array", "default": [1], "required": False}}),
    ([{"name": "x", "description": "What"}], {"x": {"description": "What", "required": False}}),
    (
        {"x": {"type": "integer", "required": True, "default": 1}},
        {"x": {"type": "integer", "default": 1, "required": False}},
    ),
    ({"x": {"type": "bool", "default": None}}, {"x": {"type": "boolean", "required": False}}),
    ({"x": {"type": "integer", "default": "many"}}, {"x": {"default": "many", "required": False}}),
    ({"size": {"type": "dict"}}, {"size": {"type": "object", "required": False}}),
    (["x"], {"x": {"type": "string", "required": True}}),
]


@pytest.mark.parametrize(("inputs", "meant"), INPUTS, ids=str)
def test_inputs(inputs: Any, meant: dict[str, Any]) -> None:
    agent = {"id": "s", "type": "openai", "params": {"prompt": "x"}}
    assert loaded({"name": "a", "inputs": inputs, "steps": [agent]}).spec.inputs == meant


def test_problems_of_older_files_point_at_the_file_as_written() -> None:
    text = """\
name: a
steps:
  - id: s
    type: claude_code
    timeout_seconds: soon
    params:
      role: planer
      prompt: 5
  - id: g
    type: parallel
    params:
      steps:
        - id: x
          type: claude
          params: {prompt: hi, max_tokens: many}
        - id: y
          type: nothing
          params: {}
"""
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(text)
    assert [(problem.line, problem.column, problem.message) for problem in caught.value.problems] == [
        (5, 22, "`soon` is not a duration"),
        (7, 13, "there is no role `planer`"),
        (8, 15, "`prompt` must be text"),
        (15, 44, "`max_tokens` must be a whole number, not `many`"),
        (17, 17, "there is no step type `nothing`"),
    ]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "shell", "params": {}}, "a shell step needs `params.command`"),
    ({"type": "openai", "params": {}}, "the step has neither `prompt` nor `role` in its `params`"),
    ({"type": "openai", "params": []}, "`params` must be a mapping"),
    ({"type": "parallel", "params": {}}, "a parallel step needs `params.steps`, a list of steps"),
    ({"type": "fan_out", "params": {"items": []}}, "a fan_out step needs `params.step_template`"),
    ({"type": "fan_in", "params": {"input": "${x}", "aggregation": "custom"}}, "there is no aggregation `custom`"),
    ({"type": "branch", "params": {"then": ["x"]}}, "a branch needs `params.condition`"),
    ({"type": "branch", "params": {"condition": "x"}}, "a branch needs `then` or `else` in its `params`"),
    ({"type": "loop", "params": {}}, "a loop needs `params.steps`, a list of steps"),
    ({"type": "mcp_tool", "params": {"server": "x"}}, "an mcp_tool step needs `params.tool`"),
    ({"type": "github", "params": {}}, "a github step needs `params.operation`"),
    (
        {"type": "openai", "params": {"prompt": "x"}, "on_failure": "fallback", "fallback": {"type": "callback"}},
        "a fallback of type `callback` cannot be run",
    ),
]


@pytest.mark.parametrize(("step", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_translated_is_said(step: dict[str, Any], message: str) -> None:
    assert message in refused({"name": "a", "steps": [{"id": "s", **step}]})


def test_a_step_of_the_present_form_among_older_ones_is_refused() -> None:
    agent = {"id": "s", "type": "openai", "params": {"prompt": "x"}}
    assert refused({"name": "a", "steps": [agent, {"id": "t", "prompt": "x"}]}) == ["the step has no `type`"]


# JSON with next_step


def test_json_steps() -> None:
    made = loaded((OLDER / "steps.json").read_text())
    collect, aside, write, send = made.spec.steps
    assert made.spec.name == "weekly-report"
    assert made.spec.inputs["repo"] == {"default": "acme/shop", "required": False}
    assert (collect.uses, collect.with_, collect.publishes) == (
        *("github.list_issues", {"repo": "{{repo}}"}, ["collect_output"]),
    )
    assert aside.shell == "echo ${week} for ${repo}"
    assert [step.order_after for step in (collect, aside, write, send)] == [[], [], ["collect"], ["write"]]
    assert write.prompt == "Write about {{collect_output}} in week {{week}}"


def test_json_steps_by_their_long_names() -> None:
    step = {"step_id": "a", "step_type": "openai", "action": "generate_completion", "parameters": {"prompt": "{{x}}"}}
    made = loaded({"workflow_id": "w", "steps": [step], "variables": {"x": {"type": "list", "default": []}}})
    assert made.spec.name == "w"
    assert (made.spec.steps[0].id, made.spec.steps[0].prompt) == ("a", "{{x}}")
    assert made.spec.inputs["x"]["type"] == "array"


def test_next_step_must_exist() -> None:
    step = {"id": "a", "type": "openai", "params": {"prompt": "x"}, "next_step": "bb"}
    assert refused({"id": "w", "steps": [step, {**step, "id": "b", "next_step": None}]}) == ["there is no step `bb`"]


# Graphs


def test_graph() -> None:
    made = loaded((OLDER / "graph.json").read_text())
    steps = {step.id: step for step in made.spec.steps}
    assert list(steps) == ["look", "bad", "page", "note", "paged", "join", "repeat"]
    assert steps["look"].order_after == []  # the start node is only a point to pass
    assert steps["page"].provider == "openai"
    assert steps["note"].shell == "echo ${severity}"
    assert steps["join"].order_after == ["paged", "note"]
    assert made.spec.inputs["ticket"]["default"] == "It does not start"


def test_the_decision_of_a_branch_goes_as_far_as_its_way() -> None:
    steps = {step.id: step for step in loaded((OLDER / "graph.json").read_text()).spec.steps}
    decided = {name: step.condition.plain() for name, step in steps.items() if step.condition is not None}
    high = {"field": "severity", "operator": "equals", "value": "high", "on_missing": "false"}
    assert decided == {"page": high, "paged": high, "note": {"not": high}}


def test_the_nodes_of_a_loop_are_inside_of_it() -> None:
    made = loaded((OLDER / "graph.json").read_text())
    repeat = made.spec.steps[-1]
    assert repeat.loop is not None
    assert repeat.steps is not None
    assert (repeat.loop.max, [inner.id for inner in repeat.steps]) == (3, ["fix"])


def test_problems_of_a_graph_point_at_its_nodes() -> None:
    nodes = [{"id": "a", "type": "agent", "data": {"prompt": 5}}, {"id": "b", "type": "what", "data": {}}, {"id": "a"}]
    edges = [{"source": "a", "target": "c"}]
    text = json.dumps({"name": "g", "nodes": nodes, "edges": edges})
    with pytest.raises(WorkflowInvalid) as caught:
        loaded(text)
    found = [(problem.message, problem.text) for problem in caught.value.problems]
    assert ("`prompt` must be text", "5") in found
    assert ("there is no step type `what`", '"what"') in found
    assert ("the id `a` is used twice", '"a"') in found
    assert ("there is no node `c`", '{"source": "a", "target": "c"}') in found
