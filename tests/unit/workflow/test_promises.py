"""Whatever loads is done: a key that could do nothing where it stands, or a text that is not filled in, is told."""

from __future__ import annotations

import pytest

from gorgon_common.errors import Problem, WorkflowInvalid
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow.plan import Plan
from gorgon_common.workflow.source import read_workflow


def read(text: str) -> tuple[Plan, list[Problem]]:
    return read_workflow(text, file="f.yaml", roles=load_roles(), operations=load_operations())


def problems(text: str) -> list[Problem]:
    with pytest.raises(WorkflowInvalid) as caught:
        read(text)
    return caught.value.problems


def flow(*steps: str, head: str = "") -> str:
    listed = "".join(f"  - {step}\n" for step in steps)
    return f"name: w\ninputs: {{x: {{type: string, default: a}}}}\n{head}steps:\n{listed}"


PLAN = "{id: plan, prompt: hi}"


@pytest.mark.parametrize(
    ("step", "place", "told"),
    [
        ("steps: [{id: b, run: [ls]}], max_retries: 3", "retry", "retries have no meaning in a step with `steps:`"),
        ("steps: [{id: b, run: [ls]}], on_failure: retry", "retry", "retries have no meaning"),
        ("aggregate: {from: [plan]}, retry: 2", "retry", "retries have no meaning in a step with `aggregate:`"),
        ("steps: [{id: b, run: [ls]}], timeout: 5m", "timeout", "`timeout` has no meaning in a step with `steps:`"),
        ("checkpoint: x, timeout: 5m", "timeout", "`timeout` has no meaning"),
        ("steps: [{id: b, run: [ls]}], deadline: 5m", "deadline", "`deadline` has no meaning in a step with `steps:`"),
        ("run: [ls], map: {over: [1]}, deadline: 5m", "deadline", "`deadline` has no meaning beside `map:`"),
        ("run: [ls], budget_usd: 1", "budget_usd", "`budget_usd` has no meaning in a step with `run:`"),
        ("checkpoint: x, tokens: 5", "tokens", "`tokens` has no meaning"),
        (
            "run: [ls], on_failure: fallback, fallback: {type: model, model: gpt-5}",
            "fallback.type",
            "another model has no meaning in a step with `run:`",
        ),
        ("run: [ls], retry: {initial: 1s}", "retry", "`retry` has no effect: it does not say how often"),
        ("run: [ls], retry: {max: 2, on: [server]}", "retry.on", "never fails in these ways"),
        ("prompt: hi, retry: {on: [exit_code]}", "retry.on", "never fails in these ways"),
        ("prompt: hi, provider: openai, model: claude-opus", "models", "`claude-opus` is a model of anthropic"),
        ("prompt: hi, provider: anthropic, models: [claude-opus, gpt-5]", "models[1]", "`gpt-5` is a model of openai"),
        ('prompt: hi, model: "{{inputs.x}}"', "models[0]", "an expression is not read here"),
        (
            'prompt: hi, on_failure: continue_with_default, default_output: {a: "{{plan.output}}"}',
            "fallback.value.a",
            "an expression is not read here",
        ),
    ],
)
def test_a_key_that_could_do_nothing_is_refused(step: str, place: str, told: str) -> None:
    (found,) = [entry for entry in problems(flow(PLAN, f"{{id: a, {step}}}")) if entry.severity == "error"]
    assert told in found.message
    assert found.path == f"steps[1].{place}"
    assert found.line == 5


@pytest.mark.parametrize(
    "step",
    [
        "prompt: hi, provider: openai, model: openai:claude-opus",
        "prompt: hi, provider: openai, model: anthropic:claude-opus",
        "prompt: hi, provider: openai, model: my-own-model",
        "prompt: hi, model: claude-opus",
        "run: [ls], retry: {max: 2, on: [exit_code]}",
        "run: [ls], map: {over: [1], reduce: {prompt: hi}}, budget_usd: 1",
        "steps: [{id: b, prompt: hi}], budget_usd: 1",
        "run: [ls], deadline: 5m",
    ],
)
def test_a_key_with_a_meaning_loads(step: str) -> None:
    assert not read(flow(PLAN, f"{{id: a, {step}}}"))[1]


@pytest.mark.parametrize("key", ["cache: 5m", "effect: once", "on_doubt: ask", "trust: reviewed", "on_budget: approve"])
def test_a_key_that_does_nothing_yet_is_a_warning(key: str) -> None:
    (warning,) = read(flow(f"{{id: a, prompt: hi, {key}}}"))[1]
    assert warning.severity == "warning"
    assert warning.path == f"steps[0].{key.partition(':')[0]}"


def test_defaults_that_contradict_themselves_are_refused() -> None:
    (found,) = problems(flow(PLAN, head="defaults: {provider: openai, model: claude-opus}\n"))
    assert "`claude-opus` is a model of anthropic" in found.message


@pytest.mark.parametrize(
    ("text", "written", "meant"),
    [
        ("Look at ${plan.output}!", "${plan.output}", "{{plan.output}}"),
        ("${x}", "${x}", "{{inputs.x}}"),
        ("${inputs.x}", "${inputs.x}", "{{inputs.x}}"),
        ("${nothing}", "${nothing}", "{{nothing}}"),
        ("{{plan.output}} and {inputs.x}", "{inputs.x}", "{{inputs.x}}"),
        ("{plan.output}", "{plan.output}", "{{plan.output}}"),
    ],
)
def test_other_notations_are_refused_with_the_right_one(text: str, written: str, meant: str) -> None:
    (found,) = problems(flow(PLAN, f'{{id: a, prompt: "{text}"}}'))
    assert found.message == f"`{written}` is not filled in"
    assert f"Write {meant}." in found.hint
    assert found.column == 22 + text.index(written)
    (found,) = problems(flow(PLAN) + f'outputs: {{o: "{text}"}}\n')
    assert found.message == f"`{written}` is not filled in"


def test_an_expression_is_the_way_to_write_such_a_text() -> None:
    prompt = """{id: a, prompt: '{{ "${x}" }} {{ "{inputs.x}" }} {a: 1} {name} {"k": [0]} $5 {}'}"""
    assert not read(flow(PLAN, prompt))[1]


@pytest.mark.parametrize(
    ("step", "fine"),
    [
        ("run: [sh, -c, 'echo ${HOME} ${T}'], env: {T: '{{plan.output}}'}", True),
        ("run: [sh, -c, 'echo ${plan}'], env: {plan: '{{plan.output}}'}", True),
        ("run: [sh, -c, 'echo ${plan}']", False),
        ("run: [echo, '${plan.output}']", False),
        ("run: [sh], stdin: 'echo ${HOME}'", True),
        ("run: [echo], env: {T: '${HOME}'}", False),
    ],
)
def test_in_a_command_a_name_may_be_the_shells(step: str, fine: bool) -> None:
    text = flow(PLAN, f"{{id: a, {step}}}")
    if fine:
        assert not read(text)[1]
    else:
        assert "is not filled in" in problems(text)[0].message


def test_an_aggregate_joins_steps_by_name() -> None:
    plan, _ = read(flow(PLAN, "{id: b, run: [ls]}", "{id: c, aggregate: {from: [plan, b.stdout]}}"))
    node = plan.nodes[2]
    assert node.spec["from"] == ["{{plan}}", "{{b.stdout}}"]
    assert [dep.node for dep in node.deps] == [0, 1]


def test_literals_of_an_aggregate_are_written_as_such() -> None:
    plan, _ = read(flow(PLAN, """{id: c, aggregate: {from: ['{{ "plan" }}', 3, "{{plan.output}}"], how: json}}"""))
    assert plan.nodes[1].spec["from"] == ['{{ "plan" }}', 3, "{{plan.output}}"]
    assert "there is nothing called `plna`" in problems(flow(PLAN, "{id: c, aggregate: {from: [plna]}}"))[0].message
    (found,) = problems(flow(PLAN, "{id: c, aggregate: {from: [two words]}}"))
    assert found.message == "`two words` is not the name of a step"
    assert '{{ "two words" }}' in found.hint


OLDER = "name: w\nsettings: {auto_parallel: true, colour: red}\nsteps:\n"


def test_what_an_older_file_asks_for_in_vain_is_a_warning() -> None:
    text = OLDER + (
        "- {id: a, type: shell, params: {command: ls}, circuit_breaker_key: k}\n"
        "- {id: b, type: parallel, timeout_seconds: 5,\n"
        "   params: {steps: [{id: c, type: shell, params: {command: ls}}]}}\n"
        "- {id: d, type: loop, params: {body: {type: shell, params: {command: ls}}, until: 'true', speed: 3}}\n"
    )
    told = [entry.message for entry in read(text)[1]]
    for expected in (
        "`colour`",
        "`circuit_breaker_key` has no effect",
        "`timeout` has no meaning",
        "`speed` is ignored",
    ):
        assert any(expected in message for message in told), (expected, told)


def test_an_older_command_is_run_again_where_the_file_asks_for_it() -> None:
    text = OLDER + (
        "- {id: a, type: shell, params: {command: ls}}\n"
        "- {id: b, type: shell, params: {command: ls}, max_retries: 2}\n"
        "- {id: c, type: shell, params: {command: ls}, on_failure: retry}\n"
    )
    nodes = read(text)[0].nodes[:3]
    assert [(node.retry.max, "exit_code" in node.retry.on) for node in nodes] == [(3, False), (2, True), (3, True)]
