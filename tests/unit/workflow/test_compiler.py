"""From a file to its Plan: golden plans, and every refusal with its place.

`UPDATE_GOLDEN=1 python -m pytest tests/unit/workflow/test_compiler.py` writes the golden files anew; look at
the difference before it is committed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_common.errors import InputInvalid, Problem, WorkflowInvalid
from gorgon_common.operations.catalogue import load_operations
from gorgon_common.roles.catalogue import close_schema, load_roles
from gorgon_common.workflow.compiler import Compiled, check_inputs, compile_workflow, try_compile
from gorgon_common.workflow.loader import load
from gorgon_common.workflow.plan import Join, Kind, Node, Plan, Ref
from gorgon_common.workflow.schema import Workflow

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*.yaml"))


@dataclass(frozen=True)
class SmallRole:
    """A role with little text, so that golden plans change with the compiler alone."""

    output_schema: dict[str, Any]
    provider: str = "anthropic"
    system: str = "You are brief."
    task: str = "Do your part."
    tier: str = "standard"
    effort: str = "medium"
    max_tokens: int = 1000
    allowed_tools: tuple[str, ...] = ()


def schema(**fields: Any) -> dict[str, Any]:
    return close_schema({"type": "object", "properties": fields})


TASK = schema(id={"type": "string"}, title={"type": "string"})
ROLES = {
    "planner": SmallRole(
        schema(summary={"type": "string"}, tasks={"type": "array", "items": TASK}, approved={"type": "boolean"}),
        tier="strong",
        allowed_tools=("github.get_issue",),
    ),
    "builder": SmallRole(schema(summary={"type": "string"}, code={"type": "string"})),
    "tester": SmallRole(schema(report={"type": "string"}, passed={"type": "boolean"})),
    "analyst": SmallRole(schema(summary={"type": "string"})),
    "reviewer": SmallRole(schema(findings={"type": "string"}, approved={"type": "boolean"})),
}
OPERATIONS = load_operations()


def compiled(text: str) -> Compiled:
    source = load(text, file="flow.yaml", roles=ROLES, operations=OPERATIONS)
    return try_compile(source, roles=ROLES, operations=OPERATIONS)


def plan_of(steps: str, head: str = "") -> Plan:
    made = compiled(f"name: t\n{head}steps:\n{steps}")
    assert made.plan is not None, made.problems
    return made.plan


def problems_of(steps: str, head: str = "") -> list[Problem]:
    made = compiled(f"name: t\n{head}steps:\n{steps}")
    assert made.plan is None
    return [problem for problem in made.problems if problem.severity == "error"]


def node(plan: Plan, name: str) -> Node:
    (found,) = [entry for entry in plan.nodes if entry.id == name]
    return found


def before(plan: Plan, name: str) -> set[str]:
    return {plan.nodes[dep.node].id for dep in node(plan, name).deps}


# ── golden plans ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    made = compiled(path.read_text(encoding="utf-8"))
    assert made.plan is not None, made.problems
    current = json.loads(made.plan.to_json())
    golden = path.with_suffix(".json")
    if os.environ.get("UPDATE_GOLDEN") == "1":
        golden.write_text(json.dumps(current, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    assert current == json.loads(golden.read_text(encoding="utf-8"))


def test_there_are_enough_golden_plans() -> None:
    assert len(FILES) >= 10
    assert {path.stem for path in FILES} == {path.stem for path in GOLDEN.glob("*.json")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_plan_holds_together(path: Path) -> None:
    plan = compiled(path.read_text(encoding="utf-8")).plan
    assert plan is not None
    assert Plan.from_json(plan.to_json()) == plan
    assert [entry.id for entry in plan.nodes[plan.top - 3 : plan.top]] == ["$gate", "$finally", "$end"]
    assert len({entry.id for entry in plan.nodes}) == len(plan.nodes)
    body_of = {
        index: number for number, entry in enumerate(plan.nodes) for body in entry.bodies.values() for index in body
    }
    for index, entry in enumerate(plan.nodes):
        assert entry.container == body_of.get(index)
        assert (entry.container is None) == (index < plan.top)
        for dep in entry.deps:
            assert plan.nodes[dep.node].container == entry.container
            assert dep.node != index
        for ref in entry.refs.values():
            assert ref.kind in {
                "input",
                "step",
                "published",
                "item",
                "index",
                "results",
                "steps",
                "run",
                "error",
                "secret",
            }
            if ref.node is not None:
                assert ref.node < len(plan.nodes)
    done: set[int] = set()
    remaining = set(range(len(plan.nodes)))
    while remaining:
        ready = {index for index in remaining if all(dep.node in done for dep in plan.nodes[index].deps)}
        assert ready, "a circle"
        done |= ready
        remaining -= ready


def test_everything_ends_before_the_gate() -> None:
    plan = compiled((GOLDEN / "phases.yaml").read_text(encoding="utf-8")).plan
    assert plan is not None
    assert before(plan, "$gate") == {"more"}
    assert before(plan, "explain") == {"$gate"}
    assert before(plan, "$finally") == {"shorten"}
    assert before(plan, "note") == {"$finally"}
    assert before(plan, "$end") == {"note"}
    assert all(dep.order for dep in node(plan, "explain").deps)
    assert node(plan, "$gate").join is Join.ALL_DONE
    assert [entry.phase for entry in plan.nodes[:5]] == ["main", "main", "on_error", "on_error", "finally"]


# ── the three snippets, with the roles as they ship ──────────────────────────────────────────────────────────────────


def test_the_snippets_compile_with_the_bundled_roles() -> None:
    roles = load_roles()
    for name in ("snippet_feature_build", "snippet_review", "full_example"):
        text = (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")
        if name == "full_example":
            assert compile_workflow(load(text, roles=roles), roles=roles).top == 11
            continue
        plan = compile_workflow(load(text, roles=roles, operations=OPERATIONS), roles=roles, operations=OPERATIONS)
        assert plan.unavailable == ()


def test_a_role_without_a_prompt_gets_its_task_and_what_came_before() -> None:
    plan = compiled((GOLDEN / "snippet_feature_build.yaml").read_text(encoding="utf-8")).plan
    assert plan is not None
    build = node(plan, "build")
    assert build.spec["prompt"] is None
    assert build.spec["standing"] == "Do your part."
    assert build.spec["context"] == ["plan"]
    assert build.refs == {"plan": Ref("step", 0)}
    assert build.condition == {"field": "plan.approved", "operator": "equals", "value": True, "on_missing": "error"}


def test_the_context_of_a_standing_task_holds_inputs_and_the_item() -> None:
    head = "inputs: {x: string}\n"
    plan = plan_of(
        "- {id: plan, role: planner}\n"
        '- {id: build, role: builder, map: {over: "{{plan.tasks}}", as: task, reduce: {role: reviewer}}}\n',
        head,
    )
    assert node(plan, "build[]").spec["given"] == ["inputs", "task"]
    assert node(plan, "build[]").spec["context"] == ["plan"]
    assert node(plan, "build[]").refs["task"] == Ref("item", 1)
    assert node(plan, "build.reduce").spec["given"] == ["inputs", "results"]


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_the_modifiers_of_a_map_go() -> None:
    plan = plan_of(
        "- {id: plan, role: planner}\n"
        "- id: work\n"
        '  map: {over: "{{plan.tasks}}", as: task}\n'
        '  prompt: "Do {{task.title}}"\n'
        "  when: plan.approved\n"
        "  on_failure: skip\n"
        "  max_retries: 4\n"
        "  timeout: 9s\n"
    )
    outer, inner = node(plan, "work"), node(plan, "work[]")
    assert (outer.kind, inner.kind) == (Kind.MAP, Kind.AGENT)
    assert (outer.condition, inner.condition) == ("plan.approved", None)
    assert (outer.on_failure.action, inner.on_failure.action) == ("skip", "abort")
    assert (outer.retry.max, inner.retry.max) == (0, 4)
    assert (outer.timeout, inner.timeout) == (None, 9.0)
    assert (outer.queue, inner.queue) == (None, "anthropic")


def test_retries_by_kind() -> None:
    plan = plan_of(
        '- {id: a, prompt: "x"}\n- {id: b, run: [ls]}\n'
        "- {id: c, uses: github.list_issues}\n- {id: d, uses: slack.post_message}\n"
        "- {id: e, run: [ls], on_failure: retry}\n- {id: f, run: [ls], retry: {max: 1, initial: 1s}}\n"
    )
    assert [node(plan, name).retry.max for name in "abcdef"] == [2, 0, 2, 0, 3, 1]
    assert node(plan, "f").retry.initial == 1.0


def test_what_a_step_says_of_its_retries_leaves_the_rest_to_the_defaults() -> None:
    plan = plan_of(
        "- {id: a, prompt: p, max_retries: 3}\n- {id: b, prompt: p, retry: {initial: 1s, jitter: full}}\n",
        "defaults: {retry: {max: 5, initial: 10ms, jitter: none, on: [timeout]}}\n",
    )
    first, second = node(plan, "a").retry, node(plan, "b").retry
    assert (first.max, first.initial, first.jitter, first.on) == (3, 0.01, "none", ("timeout",))
    assert (second.max, second.initial, second.jitter, second.on) == (5, 1.0, "full", ("timeout",))


def test_queues() -> None:
    plan = compiled((GOLDEN / "not_yet.yaml").read_text(encoding="utf-8")).plan
    assert plan is not None
    queues = {entry.id: entry.queue for entry in plan.nodes[: plan.top]}
    assert queues["draft"] == "anthropic"
    assert queues["ask"] == queues["sub"] == "control"
    assert queues["nap"] is None
    assert queues["call"] == "http"
    assert queues["issues"] == "github"
    assert queues["$gate"] is None


def test_what_cannot_run_yet_is_said_once_for_each_step() -> None:
    made = compiled((GOLDEN / "not_yet.yaml").read_text(encoding="utf-8"))
    assert made.plan is not None
    assert "step `issues` uses github.list_issues: integrations are not available yet" in made.plan.unavailable
    assert "step `tool` uses mcp.call: MCP is not available yet" in made.plan.unavailable
    assert len(made.plan.unavailable) == 5
    assert sorted(problem.message for problem in made.problems) == sorted(made.plan.unavailable)
    assert {problem.severity for problem in made.problems} == {"warning"}


@pytest.mark.parametrize(
    ("written", "provider", "model", "models"),
    [
        ("", "anthropic", "", None),
        ("provider: openai", "openai", "", None),
        ("model: gpt-6", "openai", "gpt-6", ["openai:gpt-6"]),
        ("model: claude-opus", "anthropic", "claude-opus", ["anthropic:claude-opus"]),
        ("provider: openai, model: llama3:8b", "openai", "llama3:8b", ["openai:llama3:8b"]),
        ("models: [claude-opus, 'openai:x']", "anthropic", "claude-opus", ["anthropic:claude-opus", "openai:x"]),
        ("models: ['openai:x', claude-opus]", "openai", "x", ["openai:x", "anthropic:claude-opus"]),
    ],
)
def test_models(written: str, provider: str, model: str, models: list[str] | None) -> None:
    comma = ", " if written else ""
    made = node(plan_of(f"- {{id: a, prompt: hi{comma}{written}}}\n"), "a")
    assert (made.queue, made.spec["provider"], made.spec["model"]) == (provider, provider, model)
    assert made.spec.get("models") == models


def test_a_group_waits_for_what_its_steps_need_and_is_waited_for() -> None:
    plan = compiled((GOLDEN / "loops_and_groups.yaml").read_text(encoding="utf-8")).plan
    assert plan is not None
    assert before(plan, "polish") == {"outline"}
    assert before(plan, "both") == {"outline", "polish"}
    assert before(plan, "after") == {"both"}
    assert before(plan, "third") == {"left", "right"}
    assert before(plan, "judge") == {"write"}
    inner = [entry.id for entry in plan.nodes].index("polish#")
    assert node(plan, "write").refs["polish"] == Ref("step", inner)


def test_the_own_id_in_until_is_the_last_iteration() -> None:
    plan = plan_of('- {id: a, prompt: "x", loop: {until: "a.output.contains(\'y\')"}}\n')
    body = node(plan, "a").bodies["body"][0]
    assert node(plan, "a").refs == {"a": Ref("step", body)}
    assert node(plan, "a").deps == ()


# ── older files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def older(text: str) -> Plan:
    made = compiled(text)
    assert made.plan is not None, made.problems
    return made.plan


def test_older_edges_only_wait() -> None:
    plan = older((GOLDEN / "older_review.yaml").read_text(encoding="utf-8"))
    assert plan.lenient
    assert all(dep.order for entry in plan.nodes if not entry.id.startswith("$") for dep in entry.deps)
    assert before(plan, "style") == {"security-review"}
    assert {"security-review", "style", "par", "fin", "mr", "lp"} == before(plan, "summary")


def test_older_agents_are_asked_for_every_name_but_the_first() -> None:
    plan = older((GOLDEN / "older_review.yaml").read_text(encoding="utf-8"))
    review = node(plan, "security-review")
    assert review.publishes == ("security_findings", "severity")
    assert list(review.spec["schema"]["properties"]) == ["findings", "approved", "severity"]
    assert review.spec["schema"]["required"] == ["findings", "approved", "severity"]
    assert list(node(plan, "style").spec["schema"]["properties"]) == ["style_findings", "style_score"]
    assert plan.outputs["nothing"] is None


def test_older_shell_exports_what_it_names() -> None:
    plan = older((GOLDEN / "older_review.yaml").read_text(encoding="utf-8"))
    one = node(plan, "one")
    assert one.spec["exports"] == {"review_focus": "review_focus", "style_findings": "style_findings"}
    assert one.refs == {
        "review_focus": Ref("input", field="review_focus"),
        "style_findings": Ref("published", 1, "style_findings"),
    }
    assert before(plan, "par") == {"style"}


def test_a_published_name_of_a_step_in_a_loop_is_the_iteration_before() -> None:
    plan = older((GOLDEN / "older_review.yaml").read_text(encoding="utf-8"))
    index = [entry.id for entry in plan.nodes].index("l1")
    assert plan.nodes[index].refs == {"verdict": Ref("published", index, "verdict")}
    assert node(plan, "lp").refs == {"verdict": Ref("published", index, "verdict")}


def test_auto_parallel_waits_for_references_alone() -> None:
    plan = older((GOLDEN / "older_auto_parallel.yaml").read_text(encoding="utf-8"))
    assert before(plan, "a") == before(plan, "b") == set()
    assert before(plan, "c") == {"a", "b"}
    assert plan.limits["max_parallel"] == 4


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = [
    # (steps, head, message, hint, line, column)
    ('- {id: a, prompt: "{{b.output}}"}\n', "", "there is nothing called `b`", "Known: a, inputs", 3, 22),
    (
        '- {id: plan, role: planner}\n- {id: b, prompt: "{{paln.summary}}"}\n',
        "",
        "nothing called `paln`",
        "`plan`",
        4,
        22,
    ),
    ('- {id: a, prompt: "{{inputs.nam}}"}\n', "inputs: {name: string}\n", "no input `nam`", "`name`", 4, 29),
    (
        '- {id: a, prompt: "{{name}}"}\n',
        "inputs: {name: string}\n",
        "nothing called `name`",
        "write `inputs.name`",
        4,
        22,
    ),
    ('- {id: a, role: planner}\n- {id: b, prompt: "{{a.aproved}}"}\n', "", "no field `aproved`", "`approved`", 4, 24),
    ('- {id: a, prompt: hi}\n- {id: b, prompt: "{{a.title}}"}\n', "", "no field `title`", "`output:` schema", 4, 24),
    ("- {id: a, prompt: hi}\n- {id: b, prompt: x, when: \"a.output == 'yes'\"}\n", "", "free text", "contains", 4, 29),
    (
        "- {id: a, prompt: hi}\n- {id: b, prompt: x, condition: {field: a.output, operator: equals, value: done}}\n",
        "",
        "free text of a model",
        "output:",
        4,
        41,
    ),
    ("- {id: a, prompt: hi, depends_on: [zz]}\n", "", "no step `zz` to depend on", "", 3, 36),
    ("- {id: a, prompt: hi, depends_on: a}\n", "", "`a` depends on itself", "Remove", 3, 35),
    ('- {id: a, prompt: "{{a.output}}"}\n', "", "refers to itself", "loop", 3, 22),
    ('- {id: a, prompt: "{{ 1 + }}"}\n', "", "ends too early", "", 3, 27),
    ('- {id: a, prompt: "{{ x"}\n', "", "not closed", "", 3, 20),
    ('- {id: a, prompt: "{{secrets.T}}"}\n', "secrets: [T]\n", "would put a secret where it can be read", "env", 4, 22),
    (
        '- {id: a, run: [ls], env: {T: "{{secrets.U}}"}}\n',
        "secrets: [T]\n",
        "secret `U` is not declared",
        "Known: T",
        4,
        34,
    ),
    ("- {id: a, approval: ok}\n", "", "depends on nothing", "depends_on", 3, 21),
    ('- {id: a, prompt: "{{error.message}}"}\n', "", "on_error, finally and fallback", "", 3, 22),
    ('- {id: a, prompt: "{{results}}"}\n', "", "only available in a map's `reduce:`", "", 3, 22),
    ('- {id: a, prompt: "{{steps[inputs.x].output}}"}\n', "inputs: {x: string}\n", "needs the id of a step", "", 4, 22),
    ("- {id: a, prompt: \"{{steps['b'].output}}\"}\n", "", "no step `b`", "a", 3, 22),
    (
        '- {id: a, run: ["{{inputs.x}}"]}\n',
        "inputs: {x: string}\n",
        "program of a command must be written out",
        "",
        4,
        17,
    ),
    ('- {id: a, run: [bash, -c, "ls {{inputs.x}}"]}\n', "inputs: {x: string}\n", "part of a program", "stdin", 4, 27),
    ('- {id: a, run: "echo $LD_PRELOAD"}\n', "inputs: {LD_PRELOAD: string}\n", "may not be exported", "Rename", 4, 16),
    (
        '- {id: a, prompt: x, map: {over: "{{inputs.s}}"}}\n',
        "inputs: {s: string}\n",
        "`over` needs a list",
        "lines",
        4,
        34,
    ),
    (
        '- {id: p, role: planner}\n- {id: a, prompt: "{{t.nope}}", map: {over: "{{p.tasks}}", as: t}}\n',
        "",
        "`t` has no field `nope`",
        "id, title",
        4,
        24,
    ),
    (
        '- {id: p, role: planner}\n- {id: a, prompt: x, when: "t.id == \'x\'", map: {over: "{{p.tasks}}", as: t}}\n',
        "",
        "`t` is not known here",
        "filter",
        4,
        29,
    ),
    (
        '- {id: g, map: {over: [1]}, steps: [{id: i, prompt: x}]}\n- {id: b, prompt: "{{i.output}}"}\n',
        "",
        "runs once for each item of `g`",
        "`g.output`",
        4,
        22,
    ),
    ('- {id: g, steps: [{id: i, prompt: "{{g.output}}"}]}\n', "", "the step that it is part of", "", 3, 38),
    (
        "- {id: g, when: \"i.status == 'x'\", steps: [{id: i, prompt: x}]}\n",
        "",
        "cannot wait for its own inner",
        "",
        3,
        18,
    ),
    (
        "- {id: a, role: planner, tools: [github.create_issue]}\n",
        "",
        "may not use `github.create_issue`",
        "get_issue",
        3,
        34,
    ),
    (
        "- {id: a, prompt: x, map: {over: plan.tasks}}\n",
        "",
        "needs a list, and this is a text",
        "{{plan.tasks}}",
        3,
        34,
    ),
    ("- {id: a, prompt: x, map: {over: [1], as: run}}\n", "", "`run` already means something", "", 3, 43),
    ("- {id: a, prompt: x, map: {over: [1], as: b}}\n- {id: b, prompt: x}\n", "", "id of a step", "Choose", 3, 43),
    ("- {id: a, prompt: x, map: {over: ['{{zz}}', 1]}}\n", "", "nothing called `zz`", "", 3, 38),
    ("- {id: a, prompt: \"{{1 + 'x'}}\"}\n", "", "cannot join an integer and text", "string(x)", 3, 24),
]


@pytest.mark.parametrize(
    ("steps", "head", "message", "hint", "line", "column"), REFUSED, ids=lambda value: str(value)[:40]
)
def test_refused(steps: str, head: str, message: str, hint: str, line: int, column: int) -> None:
    found = problems_of(steps, head)
    assert len(found) == 1, [str(problem) for problem in found]
    problem = found[0]
    assert message in problem.message
    assert hint in problem.hint
    assert (problem.file, problem.line, problem.column) == ("flow.yaml", line, column)


def test_circles_are_named() -> None:
    (problem,) = problems_of(
        "- {id: z, prompt: hi}\n"
        '- {id: a, prompt: "{{c.output}} {{z.output}}"}\n- {id: b, prompt: "{{a.output}}"}\n'
        "- {id: c, prompt: x, depends_on: b}\n"
    )
    assert problem.message == "the steps wait for each other in a circle: a → c → b → a"
    assert problem.line == 4


def test_circles_inside_a_group_are_named() -> None:
    (problem,) = problems_of('- {id: g, steps: [{id: a, prompt: "{{b.output}}"}, {id: b, prompt: "{{a.output}}"}]}\n')
    assert "a → b → a" in problem.message


def test_a_circle_inside_a_loop_tells_of_the_round_before() -> None:
    (problem,) = problems_of(
        "- {id: g, loop: {until: 'true'}, steps: [{id: a, prompt: '{{b.output}}'}, {id: b, prompt: '{{a.output}}'}]}\n"
    )
    assert "`default(g.output.b, '')`" in problem.hint


def test_the_exit_code_of_a_command_that_may_not_fail_is_a_warning() -> None:
    steps = "[{id: a, run: [ls]}, {id: b, prompt: x, when: a.exit_code == 0}]"
    (problem,) = compiled(f"name: t\nsteps: {steps}\n").problems
    assert (problem.severity, problem.line, problem.column) == ("warning", 2, 54)
    assert "allow_failure: true" in problem.hint
    assert compiled(f"name: t\nsteps: {steps.replace('[ls]', '[ls], allow_failure: true')}\n").problems == []


def test_a_circle_through_a_group() -> None:
    (problem,) = problems_of(
        '- {id: g, steps: [{id: a, prompt: "{{out.output}}"}]}\n- {id: out, prompt: "{{a.output}}"}\n'
    )
    assert "g → out → g" in problem.message


def test_everything_is_told_at_once_in_the_order_of_the_file() -> None:
    found = problems_of(
        '- {id: a, prompt: "{{x}} {{y}}"}\n- {id: b, prompt: hi, depends_on: [q]}\n- {id: c, prompt: "{{a.z}}"}\n'
    )
    assert [problem.line for problem in found] == [3, 3, 4, 5]
    source = load('name: t\nsteps: [{id: a, prompt: "{{x}} {{y}}"}]\n')
    with pytest.raises(WorkflowInvalid) as caught:
        compile_workflow(source, roles=ROLES)
    assert len(caught.value.problems) == 2


def test_on_error_cannot_be_waited_for() -> None:
    made = compiled('name: t\nsteps: [{id: a, prompt: "{{b.output}}"}]\non_error: [{id: b, prompt: x}]\n')
    assert "runs in `on_error:`" in made.problems[0].message


def test_a_field_hidden_by_the_step_is_a_warning() -> None:
    made = compiled("name: t\nsteps: [{id: a, prompt: x, output: {status: string}}]\n")
    assert made.plan is not None
    assert [problem.severity for problem in made.problems] == ["warning"]
    assert "a.output.status" in made.problems[0].hint


def test_a_concurrency_key_knows_inputs_alone() -> None:
    head = 'concurrency: {key: "{{a.output}}"}\n'
    (problem,) = problems_of("- {id: a, prompt: x}\n", head)
    assert "cannot be part of the key" in problem.message


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ('"{{secrets.TOKEN}}"', "cannot be part of the key"),
        ('"{{run.id}}"', "differs from run to run"),
        ('"{{run.started_at}}"', "differs from run to run"),
        ('"{{run}}"', "differs from run to run"),
        ('"{{inputs.nothing}}"', "nothing"),
        ('"{{inputs.x"', ""),
        ('" "', "is empty"),
    ],
)
def test_a_bad_concurrency_key_is_told_at_load(key: str, words: str) -> None:
    (problem,) = problems_of("- {id: a, prompt: x}\n", f"inputs: {{x: string}}\nconcurrency: {{key: {key}}}\n")
    assert problem.line == 3
    assert words in problem.message


def test_a_concurrency_key_is_in_the_plan_without_a_warning() -> None:
    made = compiled(
        'name: t\ninputs: {x: string}\nconcurrency: "{{run.workflow}}/{{inputs.x}}"\nsteps: [{id: a, prompt: x}]\n'
    )
    assert made.problems == []
    assert made.plan is not None
    assert made.plan.concurrency == {"key": "{{run.workflow}}/{{inputs.x}}", "max": 1, "on_conflict": "queue"}


def test_a_bare_workflow_compiles_too() -> None:
    source = load('name: t\nsteps: [{id: a, prompt: "{{x}}"}]\n')
    made = try_compile(source.spec, roles=ROLES)
    assert made.problems[0].path == "steps[0].prompt"


def test_a_large_workflow_compiles_in_time_linear_in_its_size() -> None:
    lines = [f'- {{id: s{i}, prompt: "{{{{s{i - 1}.output}}}}"}}' if i else "- {id: s0, prompt: x}" for i in range(900)]
    plan = plan_of("\n".join(lines) + "\n")
    assert plan.top == 903
    assert before(plan, "$gate") == {"s899"}


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

INPUTS = """inputs:
  name: {type: string, required: true, description: who}
  count: {type: integer, default: 3}
  ratio: {type: number, default: 1}
  tags: {type: array, items: {type: string}, max_items: 2}
  box: {type: object, properties: {w: {type: number, required: true}}}
"""


def test_inputs_get_their_defaults() -> None:
    plan = plan_of("- {id: a, prompt: x}\n", INPUTS)
    made = check_inputs(plan, {"name": "Ada", "box": {"w": 2}})
    assert made == {"name": "Ada", "count": 3, "ratio": 1.0, "tags": None, "box": {"w": 2.0}}
    assert isinstance(made["ratio"], float)
    assert isinstance(made["box"]["w"], float)


def test_everything_that_is_wrong_with_inputs_is_told() -> None:
    plan = plan_of("- {id: a, prompt: x}\n", INPUTS)
    with pytest.raises(InputInvalid) as caught:
        check_inputs(plan, {"count": "x", "tags": ["a", "b", "c"], "nam": 1, "box": {}})
    message = caught.value.message
    for part in (
        "`name` is missing (who)",
        "`count`: 'x' is not of type 'integer'",
        "`tags`",
        "Did you mean `name`",
        "`box`",
    ):
        assert part in message
    assert "name (string)" in caught.value.hint
    with pytest.raises(InputInvalid, match="takes no inputs"):
        check_inputs(plan_of("- {id: a, prompt: x}\n"), {"x": 1})


# ── any graph ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_edges_are_what_is_written_and_what_is_referred_to(data: st.DataObject) -> None:
    """Any DAG of steps, in any order in the file, by reference, by index or by `depends_on`, inside groups or not."""
    size = data.draw(st.integers(1, 9))
    edges = {index: data.draw(st.sets(st.integers(0, index - 1))) if index else set() for index in range(size)}
    grouped = data.draw(st.sets(st.integers(0, size - 1)))
    steps: list[dict[str, Any]] = []
    for index in data.draw(st.permutations(range(size))):
        texts, written = ["x"], []
        for before_it in sorted(edges[index]):
            way = data.draw(st.sampled_from(["reference", "index", "written"]))
            if way == "written":
                written.append(f"s{before_it}")
            else:
                texts.append(
                    f"{{{{s{before_it}.output}}}}" if way == "reference" else f'{{{{steps["s{before_it}"].status}}}}'
                )
        step = {"id": f"s{index}", "prompt": " ".join(texts), "depends_on": written}
        steps.append({"id": f"g{index}", "steps": [step]} if index in grouped else step)
    plan = compile_workflow(Workflow.model_validate({"name": "t", "steps": steps}), roles=ROLES)
    outer = {index: f"g{index}" if index in grouped else f"s{index}" for index in range(size)}
    for index in range(size):
        assert before(plan, outer[index]) == {outer[other] for other in edges[index]}
        if index in grouped:
            assert before(plan, f"s{index}") == set()
    ends = set(outer.values()) - {outer[other] for others in edges.values() for other in others}
    assert before(plan, "$gate") == ends
    assert Plan.from_json(plan.to_json()).hash() == plan.hash()


@given(st.lists(st.sampled_from([f"s{i}" for i in range(5)]), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_circle_is_found_whatever_its_length(targets: list[str]) -> None:
    """Five steps, each waiting for one of them: there is always a circle, and the message names one that is there."""
    steps = [{"id": f"s{i}", "prompt": "x", "depends_on": target} for i, target in enumerate(targets)]
    made = try_compile(Workflow.model_validate({"name": "t", "steps": steps}), roles=ROLES)
    assert made.plan is None
    circles = [p.message.rpartition(": ")[2].split(" → ") for p in made.problems if "in a circle" in p.message]
    for ring in circles:
        assert all(targets[int(one[1:])] == two for one, two in pairwise(ring))
    alone = [p for p in made.problems if "depends on itself" in p.message]
    assert circles or alone
