"""Files of the earlier formats, unchanged, on a real worker: each step type that can run, and both JSON forms.

The sandbox looks at every prompt in full: none may hold an expression that was not rendered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import Lab, Ran, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]


@pytest.fixture(scope="module")
def worker(sandbox_process: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("lab"), sandbox_process) as lab:
        yield lab


@pytest.fixture
def lab(worker: Lab, sandbox: Sandbox) -> Iterator[Lab]:
    """The worker; afterwards: no prompt that the sandbox was sent had an expression left in it."""
    for marker in ("${", "{{", "None", "MISSING"):
        sandbox.faults({"contains": marker, "text": marker, "times": 0})
    yield worker
    rules = sandbox.ask("GET", "/_faults")["faults"]
    found = {rule["contains"]: rule["matched"] for rule in rules if rule.get("text") == rule.get("contains", "")}
    assert found == {"${": 0, "{{": 0, "None": 0, "MISSING": 0}


def prompts(lab: Lab) -> list[str]:
    return [entry["prompt"] for entry in lab.sandbox.log(status=200)]


def run(lab: Lab, text: str, inputs: Mapping[str, Any] | None = None) -> Ran:
    ran = lab.run(text, inputs)
    assert ran.status == "succeeded", json.dumps(ran.document["error"])
    return ran


REVIEW = """
name: Code review
version: "1.0"
description: Reviews code from several sides
token_budget: 150000
timeout_seconds: 1800
inputs:
  code_path: {type: string, required: true, description: What to review}
  review_focus: {type: string, default: all}
outputs: [review_summary, approved, never_published]
steps:
  - id: gather
    type: shell
    params: {command: 'echo "code of ${code_path}"', allow_failure: true}
    outputs: [code]
  - id: style
    type: claude_code
    params: {role: reviewer, prompt: "Style of ${code}", estimated_tokens: 4000}
    condition: {field: review_focus, operator: in, value: [all, style]}
    outputs: [style_notes]
  - id: security
    type: claude_code
    params: {role: security_auditor, prompt: "Security of ${code}"}
    condition: {field: review_focus, operator: in, value: [all, security]}
    outputs: [security_notes]
  - id: performance
    type: openai
    params: {role: analyst, prompt: "Speed of ${code}", max_tokens: 900}
    condition: {field: review_focus, operator: equals, value: performance}
    outputs: [performance_notes]
  - id: summarise
    type: claude_code
    params:
      role: reviewer
      prompt: "Sum up style [${style_notes}] security [${security_notes}] speed [${performance_notes}]"
    outputs: [review_summary, approved]
"""


class TestReview:
    @pytest.mark.parametrize(
        ("focus", "skipped"),
        [
            ("all", {"performance"}),
            ("style", {"security", "performance"}),
            ("security", {"style", "performance"}),
            ("performance", {"style", "security"}),
        ],
    )
    def test_what_is_not_wanted_is_skipped_and_what_follows_is_not(
        self, focus: str, skipped: set[str], lab: Lab
    ) -> None:
        shown = {"style": "style []", "security": "security []", "performance": "speed []"}
        lab.sandbox.faults(*({"contains": text, "key": name, "times": 0} for name, text in shown.items()))
        ran = run(lab, REVIEW, {"code_path": "a.py", "review_focus": focus})
        states = ran.states()
        assert {name for name, state in states.items() if state == "skipped"} == skipped
        assert all("its condition is false" in ran.step(name)["reason"] for name in skipped)
        assert states["summarise"] == "succeeded"
        rules = {rule.get("key"): rule["matched"] for rule in lab.sandbox.ask("GET", "/_faults")["faults"]}
        assert {name for name in shown if rules[name]} == skipped, "a skipped step renders as nothing"

    def test_every_declared_output_is_filled(self, lab: Lab) -> None:
        ran = run(lab, REVIEW, {"code_path": "a.py"})
        assert ran.outputs["approved"] is True
        assert ran.outputs["review_summary"]
        assert ran.outputs["never_published"] is None
        assert "Style of code of a.py" in prompts(lab)[0] + prompts(lab)[1]

    def test_the_order_is_that_of_the_file(self, lab: Lab) -> None:
        run(lab, REVIEW, {"code_path": "a.py", "review_focus": "all"})
        assert [entry["role"] for entry in lab.sandbox.log()] == ["reviewer", "security", "reviewer"]

    def test_defaults(self, lab: Lab) -> None:
        plan, warnings = lab.services.read(REVIEW)
        nodes = {node.id: node for node in plan.nodes}
        assert (nodes["style"].retry.max, nodes["style"].timeout) == (3, 300.0)
        assert (plan.limits["tokens"], plan.limits["timeout"]) == (150_000, 1800.0)
        assert any("never_published" in warning.message for warning in warnings)


EVERYTHING = """
name: Every type that runs
inputs:
  topic: {type: string, required: true}
  files: {type: list, default: [a.py, b.py, c.py]}
  depth: {type: integer, default: 2}
outputs: [plan, tasks, test_output, style_notes, reviews, all_reviews, summary, report, chosen, verdict, last]
steps:
  - id: make-plan
    type: claude_code
    params:
      {role: planner, prompt: "Plan ${topic} in ${depth} parts", model: claude-sonnet, max_tokens: 2000,
       system_prompt: You plan.}
    outputs: [plan, tasks]
    max_retries: 1
    timeout_seconds: 60
  - id: run-tests
    type: shell
    params: {command: 'for f in ${files}; do printf "<%s>" "$f"; done; echo "${topic} ${UNKNOWN_NAME}."; exit 2',
             allow_failure: true}
    outputs: [test_output]
  - id: both
    type: parallel
    params:
      strategy: threading
      max_workers: 2
      fail_fast: true
      steps:
        - id: style
          type: openai
          params: {role: reviewer, prompt: "Style of ${tasks} in ${test_output}"}
          outputs: [style_notes]
        - id: security
          type: claude_code
          params: {role: security_auditor, prompt: "Security of ${topic}"}
          condition: {field: depth, operator: greater_than, value: 5}
          outputs: [security_notes]
  - {id: saved, type: checkpoint, params: {message: "Both for ${topic}"}}
  - id: each
    type: fan_out
    params:
      items: ${files}
      max_concurrent: 2
      fail_fast: false
      step_template: {type: claude_code, max_retries: 0, params: {role: reviewer, prompt: "Review ${item} (${index})"}}
    outputs: [reviews]
  - {id: gathered, type: fan_in, params: {input: "${reviews}", aggregation: concat}, outputs: [all_reviews]}
  - id: summed
    type: fan_in
    params: {input: "${reviews}", aggregation: claude_code, aggregate_prompt: "Gather ${items} and ${security_notes}"}
    outputs: [summary]
  - id: mapped
    type: map_reduce
    params:
      items: ${files}
      max_concurrent: 2
      map_step: {type: openai, params: {role: analyst, prompt: "Look at ${item}"}}
      reduce_step: {type: claude_code, params: {role: reporter, prompt: "Join ${map_results}"}}
    outputs: [report]
  - id: choose
    type: branch
    params:
      condition: {field: depth, operator: equals, value: 2}
      then: [{id: deep, type: shell, params: {command: "printf deep"}, outputs: [chosen]}]
      else: [{id: flat, type: shell, params: {command: "printf flat"}, outputs: [chosen]}]
  - id: again
    type: loop
    params:
      max_iterations: 4
      condition: {field: verdict, operator: not_equals, value: "stop"}
      steps:
        - {id: try_it, type: claude_code, params: {role: builder, prompt: "Try ${topic}"}}
        - {id: judge, type: shell, params: {command: "printf stop"}, outputs: [verdict]}
  - id: finish
    type: claude_code
    params: {role: documenter, prompt: "Finish ${chosen} ${verdict} after ${summary}"}
    outputs: [last]
"""


@pytest.fixture(scope="module")
def seen(worker: Lab, sandbox_process: Sandbox) -> tuple[Ran, list[dict[str, Any]]]:
    """The run of EVERYTHING, and what the sandbox saw of it."""
    sandbox_process.reset()
    sandbox_process.faults(*({"contains": marker, "text": "x", "times": 0} for marker in ("${", "{{")))
    ran = worker.run(EVERYTHING, {"topic": "tea"})
    assert ran.status == "succeeded", ran.document["error"]
    rules = sandbox_process.ask("GET", "/_faults")["faults"]
    assert [rule["matched"] for rule in rules] == [0, 0], "every prompt is fully rendered"
    return ran, sandbox_process.log()


class TestEverything:
    def test_every_declared_output_is_filled(self, seen: tuple[Ran, Any]) -> None:
        outputs = seen[0].outputs
        assert set(outputs) == {
            "plan", "tasks", "test_output", "style_notes", "reviews", "all_reviews", "summary", "report", "chosen",
            "verdict", "last",
        }  # fmt: skip
        assert all(value not in (None, "", [], {}) for value in outputs.values()), outputs
        assert isinstance(outputs["tasks"], list)
        assert isinstance(outputs["reviews"], list)
        assert len(outputs["reviews"]) == 3
        assert outputs["chosen"] == "deep"
        assert outputs["verdict"] == "stop"

    def test_values_reach_the_shell_as_its_variables(self, seen: tuple[Ran, Any]) -> None:
        assert seen[0].output("run-tests").endswith("tea .\n")
        assert "a.py" in seen[0].output("run-tests")
        assert seen[0].step("run-tests")["exit_code"] == 2

    def test_skipped_steps(self, seen: tuple[Ran, Any]) -> None:
        states = seen[0].states()
        skipped = {name for name, state in states.items() if state == "skipped"}
        assert "security" in skipped
        assert states.get("flat", "skipped") == "skipped"
        assert {states[name] for name in ("both", "summed", "finish", "deep", "choose", "saved")} == {"succeeded"}
        assert seen[0].output("saved") == "Both for tea"

    def test_prompts(self, seen: tuple[Ran, Any]) -> None:
        sent = [entry["prompt"] for entry in seen[1]]
        assert sent[0] == "Plan tea in 2 parts"
        assert {"Review a.py (0)", "Review b.py (1)", "Review c.py (2)"} <= set(sent)
        assert {"Look at a.py", "Look at b.py", "Look at c.py"} <= set(sent)
        assert sent.count("Try tea") == 1
        assert sum(prompt.startswith("Gather [") for prompt in sent) == 1
        assert sent[-1].startswith("Finish deep stop after ")

    def test_providers_and_models(self, seen: tuple[Ran, Any]) -> None:
        by_prompt = {entry["prompt"]: entry for entry in seen[1]}
        assert by_prompt["Plan tea in 2 parts"]["provider"] == "anthropic"
        assert "sonnet" in by_prompt["Plan tea in 2 parts"]["model"]
        assert by_prompt["Look at a.py"]["provider"] == "openai"
        assert by_prompt["Review a.py (0)"]["provider"] == "anthropic"


class TestFailure:
    def test_each_mode(self, lab: Lab) -> None:
        ran = run(
            lab,
            """
name: modes
outputs: [a, b, c, d]
steps:
  - {id: a, type: shell, params: {command: "exit 1"}, on_failure: skip, max_retries: 0, outputs: [a]}
  - {id: b, type: shell, params: {command: "exit 1"}, on_failure: continue_with_default, max_retries: 0,
     default_output: {b: instead}, outputs: [b]}
  - id: c
    type: shell
    params: {command: "exit 1"}
    max_retries: 0
    on_failure: fallback
    fallback: {type: default_value, value: {c: fallen}}
    outputs: [c]
  - id: d
    type: claude_code
    params: {role: builder, prompt: "[[sandbox: status=400]] D"}
    on_failure: fallback
    fallback: {type: alternate_step, step: {id: dd, type: shell, params: {command: "printf other"}}}
    outputs: [d]
""",
        )
        assert ran.outputs == {"a": None, "b": "instead", "c": "fallen", "d": "other"}
        assert ran.states()["a"] == "skipped"

    def test_fail_fast_false_goes_on_with_the_rest(self, lab: Lab) -> None:
        ran = run(
            lab,
            """
name: slow
outputs: [found]
steps:
  - id: each
    type: fan_out
    params:
      items: [one, "[[sandbox: status=400]] two", three]
      fail_fast: false
      step_template: {type: openai, max_retries: 0, params: {prompt: "Do ${item}"}}
    outputs: [found]
""",
        )
        first, second, third = ran.outputs["found"]
        assert isinstance(first, str)
        assert second["failed"] is True
        assert isinstance(third, str)

    def test_fail_fast_fails(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: fast
steps:
  - id: each
    type: fan_out
    params:
      items: [one, "[[sandbox: status=400]] two", three]
      fail_fast: true
      step_template: {type: openai, max_retries: 0, params: {prompt: "Do ${item}"}}
"""
        )
        assert ran.status == "failed"
        assert ran.error["step"].startswith("each")

    def test_retries(self, lab: Lab) -> None:
        ran = run(
            lab,
            """
name: again
steps:
  - {id: a, type: openai, params: {prompt: "[[sandbox: status=500 times=1 key=old]] A"}, on_failure: retry}
""",
        )
        assert ran.step("a")["attempts"] == 2


class TestAutoParallel:
    def test_dependencies_come_from_references_alone(self, lab: Lab) -> None:
        ran = run(
            lab,
            """
name: auto
settings: {auto_parallel: true, auto_parallel_max_workers: 3}
inputs:
  - {name: review_focus, type: string, default: style}
  - {name: files, type: list}
outputs: [{name: summary, description: The whole}]
steps:
  - id: style
    type: claude_code
    params: {role: reviewer, prompt: "[[sandbox: delay=300ms]] Style of ${files}"}
    outputs: [style_notes]
  - id: security
    type: claude_code
    params: {role: security_auditor, prompt: "[[sandbox: delay=300ms]] Security"}
    condition: {field: review_focus, operator: in, value: [all, security]}
    outputs: [security_notes]
  - {id: other, type: openai, params: {prompt: "[[sandbox: delay=300ms]] Other"}, outputs: [other]}
  - id: summary
    type: openai
    params: {role: reporter, prompt: "Sum up ${style_notes} ${security_notes} ${other}"}
    outputs: [summary]
""",
            {"files": ["x", "y"]},
        )
        assert ran.states() == {
            "style": "succeeded",
            "security": "skipped",
            "other": "succeeded",
            "summary": "succeeded",
        }
        style, other = ran.step("style"), ran.step("other")
        assert style["started_at"] < other["finished_at"]
        assert other["started_at"] < style["finished_at"]
        assert ran.outputs["summary"]

    def test_an_optional_input_that_was_not_given_renders_as_nothing(self, lab: Lab) -> None:
        run(
            lab,
            """
name: optional
inputs: [{name: given, type: string, default: here}, {name: gone, type: string}]
steps: [{id: a, type: openai, params: {prompt: "[${given}] [${gone}]"}}]
""",
        )
        assert prompts(lab) == ["[here] []"]


class TestJson:
    def test_steps_with_next_step(self, lab: Lab) -> None:
        ran = run(
            lab,
            json.dumps(
                {
                    "id": "weekly",
                    "name": "Weekly",
                    "variables": {"week": 12, "repo": "acme/shop"},
                    "steps": [
                        {
                            "id": "collect",
                            "type": "shell",
                            "action": "run",
                            "params": {"command": "echo week {{week}} of {{repo}}"},
                            "next_step": "write",
                        },
                        {
                            "id": "write",
                            "type": "openai",
                            "action": "generate_completion",
                            "params": {"prompt": "Write about {{collect_output}} in week {{week}}", "model": "gpt-6"},
                            "next_step": "check",
                        },
                        {
                            "id": "check",
                            "type": "claude_code",
                            "action": "execute_agent",
                            "params": {"role": "reviewer", "prompt": "Check {{write_output}}"},
                        },
                    ],
                }
            ),
        )
        assert ran.states() == {"collect": "succeeded", "write": "succeeded", "check": "succeeded"}
        assert ran.output("collect") == "week 12 of acme/shop\n"
        first, second = prompts(lab)
        assert first.split() == ["Write", "about", "week", "12", "of", "acme/shop", "in", "week", "12"]
        assert second.startswith("Check ## ")

    @pytest.mark.parametrize(("severity", "taken", "left"), [("high", "page", "note"), ("low", "note", "page")])
    def test_a_graph(self, lab: Lab, severity: str, taken: str, left: str) -> None:
        lab.sandbox.faults({"contains": "Look at", "json": {"severity": severity, "summary": "s"}})
        graph = {
            "id": "triage",
            "name": "Triage",
            "variables": {"ticket": "It does not start", "level": severity},
            "nodes": [
                {"id": "begin", "type": "start", "data": {}},
                {"id": "look", "type": "shell", "data": {"params": {"command": "echo ${ticket}"}, "outputs": ["seen"]}},
                {
                    "id": "bad",
                    "type": "branch",
                    "data": {"condition": {"field": "level", "operator": "equals", "value": "high"}},
                },
                {"id": "page", "type": "agent", "data": {"provider": "openai", "prompt": "Page: ${seen}"}},
                {"id": "note", "type": "agent", "data": {"role": "documenter", "prompt": "Note: ${seen}"}},
                {"id": "paged", "type": "checkpoint", "data": {"message": "joined ${level}"}},
                {"id": "done", "type": "end", "data": {}},
            ],
            "edges": [
                {"id": "1", "source": "begin", "target": "look"},
                {"id": "2", "source": "look", "target": "bad"},
                {"id": "3", "source": "bad", "target": "page", "sourceHandle": "true"},
                {"id": "4", "source": "bad", "target": "note", "sourceHandle": "false"},
                {"id": "5", "source": "page", "target": "paged"},
                {"id": "6", "source": "note", "target": "paged"},
                {"id": "7", "source": "paged", "target": "done"},
            ],
        }
        ran = run(lab, json.dumps(graph))
        assert ran.states()[taken] == "succeeded"
        assert ran.states()[left] == "skipped"
        assert ran.output("paged") == f"joined {severity}"
        assert prompts(lab) == [f"{taken.capitalize()}: It does not start\n"] or prompts(lab) == [
            f"{taken.capitalize()}: It does not start"
        ]


def test_the_files_beside_the_unit_tests_run_as_far_as_they_can(lab: Lab) -> None:
    """The graph of the unit tests: an agent, a branch, a shell, a join and a loop back."""
    path = Path(__file__).parents[1] / "unit" / "workflow" / "files" / "older" / "graph.json"
    ran = run(lab, path.read_text())
    states = ran.states()
    assert states["look"] == "succeeded"
    assert {states["page"], states["note"]} == {"succeeded", "skipped"}
    assert states["join"] == "succeeded"
