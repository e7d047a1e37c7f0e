"""What the language promises, feature by feature: real files on a real worker, the real SDKs, a sandbox process.

The worker is the embedded one on SQLite; `test_distributed.py` shows that the other tier gives the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from gorgon_common.errors import NotFound
from gorgon_common.persistence.tables import blobs, checkpoints
from tests.support.running import Lab, Ran, eventually, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

QUICK = "defaults: {retry: {max: 2, initial: 10ms, jitter: none}}\n"
"""Retries that do not keep a test waiting."""


@pytest.fixture(scope="module")
def worker(sandbox_process: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("lab"), sandbox_process) as lab:
        yield lab


@pytest.fixture
def lab(worker: Lab, sandbox: Sandbox) -> Lab:
    """The worker, with a sandbox that has seen nothing."""
    return worker


def when(step: dict[str, Any], which: str = "started_at") -> datetime:
    return datetime.fromisoformat(step[which])


def seconds(ran: Ran) -> float:
    start, end = (datetime.fromisoformat(ran.document[name]) for name in ("started_at", "finished_at"))
    return (end - start).total_seconds()


class TestSnippets:
    FIRST = """
name: Feature Build
steps:
  - id: plan
    role: planner
    prompt: "Analyze feature requirements"
  - id: build
    role: builder
    depends_on: [plan]
    condition:
      field: plan.approved
      operator: equals
      value: true
"""

    def test_the_first_to_the_letter(self, lab: Lab) -> None:
        ran = lab.run(self.FIRST)
        assert ran.states() == {"plan": "succeeded", "build": "succeeded"}
        assert ran.output("plan")["approved"] is True
        (plan, build) = lab.sandbox.log()
        assert plan["prompt"] == "Analyze feature requirements"
        assert (plan["role"], build["role"]) == ("planner", "builder")

    def test_build_is_given_its_standing_task_and_the_plan(self, lab: Lab) -> None:
        lab.sandbox.faults({"role": "builder", "contains": "## plan", "text": '{"summary": "x"}', "times": 0})
        ran = lab.run(self.FIRST)
        (rule,) = lab.sandbox.ask("GET", "/_faults")["faults"]
        assert rule["matched"] == 1, "the builder's prompt holds the plan's output under its name"
        assert ran.outputs == {}

    def test_a_plan_that_is_not_approved_is_not_built(self, lab: Lab) -> None:
        refused = {"summary": "No.", "tasks": [], "risks": [], "success_criteria": [], "questions": []}
        lab.sandbox.faults({"role": "planner", "json": {**refused, "approved": False}})
        ran = lab.run(self.FIRST)
        assert ran.status == "succeeded"
        assert ran.states() == {"plan": "succeeded", "build": "skipped"}
        assert "plan.approved" in ran.step("build")["reason"]
        assert lab.calls(role="builder") == 0

    def test_the_second_and_the_third_as_modifiers_of_a_step(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: review
defaults: {retry: {initial: 10ms, jitter: none}}
steps:
  - {id: build, role: builder, prompt: Build a counter}
  - {id: tests, role: tester, prompt: "Test {{build.output}}"}
  - id: review
    role: reviewer
    prompt: "Review the code from {{build.output}}"
    condition: {field: tests.passed, operator: equals, value: true}
    max_retries: 3
    on_failure: retry
"""
        )
        assert set(ran.states().values()) == {"succeeded"}
        summary = ran.output("build")["summary"]
        assert lab.sandbox.log(role="reviewer")[0]["prompt"].startswith("Review the code from {")
        assert summary[:20] in lab.sandbox.log(role="reviewer")[0]["prompt"]

    def test_the_third_retries_three_times(self, lab: Lab) -> None:
        lab.sandbox.faults({"role": "reviewer", "status": 500})
        ran = lab.run(
            """
name: review
defaults: {retry: {initial: 10ms, jitter: none}}
steps:
  - {id: review, role: reviewer, prompt: Review it, max_retries: 3, on_failure: retry}
"""
        )
        assert ran.status == "failed"
        assert lab.calls(role="reviewer", status=500) == 4


class TestConditions:
    @pytest.mark.parametrize(
        ("condition", "runs"),
        [
            ("{field: inputs.n, operator: equals, value: 3}", True),
            ("{field: inputs.n, operator: not_equals, value: 3}", False),
            ("{field: inputs.n, operator: greater_than, value: 2.5}", True),
            ("{field: inputs.n, operator: less_than, value: 3}", False),
            ("{field: inputs.n, operator: greater_or_equal, value: 3}", True),
            ("{field: inputs.n, operator: less_or_equal, value: 2}", False),
            ("{field: inputs.n, operator: in, value: [1, 2, 3]}", True),
            ("{field: inputs.word, operator: contains, value: ea}", True),
            ("{field: inputs.list, operator: contains, value: b}", True),
            ("{field: inputs.list, operator: contains, value: c}", False),
            ("{field: inputs.word, operator: matches, value: '^t.a$'}", True),
            ("{field: inputs.list, operator: not_empty}", True),
            ("{field: inputs.nothing, operator: is_empty}", True),
            ("{field: inputs.word, operator: exists}", True),
            ("{field: inputs.gone, operator: exists}", False),
            ("{field: inputs.gone, operator: equals, value: x, on_missing: false}", False),
            ("{all: [{field: inputs.n, operator: equals, value: 3}, {field: inputs.word, operator: not_empty}]}", True),
            ("{any: [{field: inputs.n, operator: equals, value: 4}, {field: inputs.word, operator: equals, value: x}]}",
             False),
            ("{not: {field: inputs.n, operator: equals, value: 4}}", True),
        ],
    )  # fmt: skip
    def test_every_operator(self, lab: Lab, condition: str, runs: bool) -> None:
        ran = lab.run(
            f"""
name: operators
inputs:
  n: {{type: integer, default: 3}}
  word: {{type: string, default: tea}}
  list: {{type: array, items: {{type: string}}, default: [a, b]}}
  nothing: {{type: array, default: []}}
  gone: {{type: string}}
steps:
  - {{id: it, checkpoint: here, condition: {condition}}}
outputs: {{status: "{{{{it.status}}}}"}}
"""
        )
        assert ran.outputs["status"] == ("succeeded" if runs else "skipped")
        assert (ran.step("it")["reason"] or "").startswith("its condition is false:" if not runs else "")

    def test_a_missing_field_is_an_error_unless_it_says_otherwise(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: missing
inputs: {gone: {type: string}}
steps: [{id: it, checkpoint: here, condition: {field: inputs.gone, operator: equals, value: x}}]
"""
        )
        assert ran.error["step"] == "it"
        assert "inputs.gone" in ran.error["message"]
        assert "on_missing" in ran.error["hint"]

    def test_a_skip_is_passed_on_with_its_reason_as_the_joins_say(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: skips
inputs: {go: {type: boolean, default: false}}
steps:
  - {id: a, prompt: A, when: inputs.go}
  - {id: b, prompt: "B {{a.output}}"}
  - {id: c, prompt: C, depends_on: b}
  - {id: free, prompt: F}
  - {id: none_failed, prompt: "N {{default(a.output, 'nothing')}}", depends_on: c, join: none_failed}
  - {id: any_success, prompt: X, depends_on: [a, free], join: any_success}
  - {id: no_success, prompt: X, depends_on: [a, b], join: any_success}
  - {id: all_done, prompt: D, depends_on: [a, c], join: all_done}
"""
        )
        assert ran.status == "succeeded"
        assert ran.states() == {
            "a": "skipped",
            "b": "skipped",
            "c": "skipped",
            "free": "succeeded",
            "none_failed": "succeeded",
            "any_success": "succeeded",
            "no_success": "skipped",
            "all_done": "succeeded",
        }
        assert ran.step("b")["reason"] == "`a` was skipped"
        assert ran.step("c")["reason"] == "`b` was skipped"
        assert "its condition is false" in ran.step("a")["reason"]
        assert "has succeeded" in ran.step("no_success")["reason"]
        assert {entry["prompt"] for entry in lab.sandbox.log()} == {"F", "N nothing", "X", "D"}

    def test_joins_after_a_failure(self, lab: Lab) -> None:
        """`on_failure: skip` is no failure; a failure inside a group without fail_fast is, and its joins see it."""
        ran = lab.run(
            """
name: joins
steps:
  - {id: bad, prompt: "[[sandbox: status=400]] bad", on_failure: skip}
  - {id: good, prompt: good}
  - {id: strict, prompt: S, depends_on: [bad, good]}
  - {id: lenient, prompt: "L {{default(bad.output, 'none')}}", depends_on: [bad, good], join: none_failed}
  - {id: done, prompt: D, depends_on: [bad, good], join: all_done}
"""
        )
        assert ran.states() == {
            "bad": "skipped",
            "good": "succeeded",
            "strict": "skipped",
            "lenient": "succeeded",
            "done": "succeeded",
        }
        assert ran.step("bad")["reason"].startswith("it failed:")
        assert ran.step("bad")["error"]["kind"] == "rejected"

    def test_when_reads_an_exit_code(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: codes
steps:
  - {id: good, run: ["true"], allow_failure: true}
  - {id: bad, run: [sh, -c, "exit 3"], allow_failure: true}
  - {id: yes_step, checkpoint: a, when: good.exit_code == 0}
  - {id: no_step, checkpoint: b, when: bad.exit_code == 0}
  - {id: three, checkpoint: "code {{bad.exit_code}}", when: bad.exit_code == 3}
"""
        )
        assert ran.states()["yes_step"] == "succeeded"
        assert ran.states()["no_step"] == "skipped"
        assert ran.output("three") == "code 3"


class TestRetries:
    def test_backoff_until_it_works(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: retries
steps:
  - id: it
    prompt: "[[sandbox: status=500 times=2 key=backoff]] go"
    retry: {max: 2, initial: 100ms, backoff: exponential, jitter: none}
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("it")["attempts"] == 3
        assert ran.kinds("it").count("step.retry") == 2
        assert [entry["status"] for entry in lab.sandbox.log()] == [500, 500, 200]
        first, second, third = (entry["time"] for entry in lab.sandbox.log())
        assert 0.09 < second - first < 0.9, "100 ms"
        assert 0.19 < third - second < 1.5, "200 ms"

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [("status=500", "server"), ("status=529", "overloaded"), ("malformed", "invalid_output"),
         ("reset", "connection"), ("drop", "connection"), ("truncate", "invalid_output|connection")],
    )  # fmt: skip
    @pytest.mark.parametrize("provider", ["openai", "anthropic"])
    def test_what_may_pass_is_tried_again(self, lab: Lab, provider: str, fault: str, kind: str) -> None:
        ran = lab.run(
            f"""
name: passing
{QUICK}
steps: [{{id: it, provider: {provider}, prompt: "[[sandbox: {fault} times=1 key=k]] go"}}]
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("it")["attempts"] == 2
        assert lab.calls() == 2
        again = lab.run(
            f"""
name: passing
steps: [{{id: it, provider: {provider}, max_retries: 0, prompt: "[[sandbox: {fault}]] go"}}]
"""
        )
        assert again.error["kind"] in kind.split("|")

    @pytest.mark.parametrize(("fault", "kind"), [("status=400", "rejected"), ("refuse", "refused")])
    def test_what_cannot_pass_is_not(self, lab: Lab, fault: str, kind: str) -> None:
        ran = lab.run(f'name: final\n{QUICK}steps: [{{id: it, prompt: "[[sandbox: {fault}]] go"}}]\n')
        assert ran.error["kind"] == kind
        assert lab.calls() == 1
        assert ran.step("it")["attempts"] == 1

    def test_only_what_the_policy_names_is_tried_again(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: on
steps:
  - {id: it, prompt: "[[sandbox: status=500]] go", retry: {max: 3, initial: 10ms, on: [timeout, connection]}}
"""
        )
        assert ran.error["kind"] == "server"
        assert lab.calls() == 1

    def test_a_rate_limit_is_no_attempt(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: limited
steps:
  - id: it
    provider: openai
    prompt: "[[sandbox: status=429 retry_after=150ms times=3 key=limit]] go"
    max_retries: 0
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("it")["attempts"] == 1
        assert [entry["status"] for entry in lab.sandbox.log()] == [429, 429, 429, 200]

    def test_real_limits_are_waited_for(self, lab: Lab) -> None:
        """Twelve calls against a bucket of four with one more each 100 ms: all are served, none counts as a retry."""
        lab.sandbox.limits({"provider": "anthropic", "model": "*", "requests": 600, "burst": 0.0067})
        ran = lab.run(
            """
name: bucket
steps:
  - {id: many, map: {over: ["1","2","3","4","5","6","7","8","9","10","11","12"], as: n}, prompt: "Go {{n}}",
     max_retries: 0}
"""
        )
        assert ran.status == "succeeded"
        assert lab.calls(status=200) == 12
        times = [entry["time"] for entry in lab.sandbox.log(status=200)]
        assert max(times) - min(times) > 0.7, "eight of them had to wait for the bucket, 100 ms each"
        assert {step["attempts"] for step in ran.items("many")} == {1}

    def test_commands_are_not_repeated_unless_they_say_so(self, lab: Lab, tmp_path: Any) -> None:
        ran = lab.run(f'name: c\nsteps: [{{id: it, run: [sh, -c, "echo x >> {tmp_path}/once; exit 1"]}}]\n')
        assert ran.error["kind"] == "command"
        assert (tmp_path / "once").read_text() == "x\n"
        assert "status 1" in ran.error["message"]


class TestOnFailure:
    BAD = 'prompt: "[[sandbox: status=400]] bad"'

    def test_abort_starts_nothing_new_and_lets_calls_in_flight_finish(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: abort
steps:
  - {id: bad, prompt: "[[sandbox: status=400 delay=200ms]] bad"}
  - {id: slow, prompt: "[[sandbox: delay=600ms]] slow"}
  - {id: after_bad, prompt: "B {{bad.output}}"}
  - {id: after_slow, prompt: "S {{slow.output}}"}
"""
        )
        assert ran.status == "failed"
        assert ran.error["step"] == "bad"
        assert ran.states() == {
            "bad": "failed",
            "slow": "succeeded",
            "after_bad": "cancelled",
            "after_slow": "cancelled",
        }
        assert lab.calls() == 2

    def test_skip(self, lab: Lab) -> None:
        ran = lab.run(f"name: skip\nsteps:\n  - {{id: bad, {self.BAD}, on_failure: skip}}\n")
        assert ran.status == "succeeded"
        assert ran.step("bad")["status"] == "skipped"
        assert ran.step("bad")["reason"].startswith("it failed:")

    def test_outputs_that_a_skip_leaves_empty_name_the_failure_behind_it(self, lab: Lab) -> None:
        ran = lab.run(
            f"""
name: skip
steps:
  - {{id: bad, {self.BAD}, on_failure: skip}}
  - {{id: last, prompt: "More: {{{{bad.output}}}}"}}
outputs: {{text: "{{{{last.status == 'succeeded' ? 1 : last.output}}}}"}}
"""
        )
        message = ran.error["message"]
        assert "step `last` has no output: it is skipped (`bad` was skipped).  Before that, `bad` failed: " in message
        assert message.endswith(str(ran.step("bad")["error"]["message"]))

    @pytest.mark.parametrize(
        "way",
        [
            "on_failure: fallback, fallback: {type: default_value, value: {n: 4}}",
            "on_failure: continue_with_default, default_output: {n: 4}",
        ],
    )
    def test_a_default(self, lab: Lab, way: str) -> None:
        ran = lab.run(
            f"""
name: default
steps:
  - {{id: bad, {self.BAD}, output: {{n: integer}}, {way}}}
outputs: {{n: "{{{{bad.n}}}}", status: "{{{{bad.status}}}}"}}
"""
        )
        assert ran.outputs == {"n": 4, "status": "succeeded"}

    def test_another_step(self, lab: Lab) -> None:
        ran = lab.run(
            f"""
name: alternate
steps:
  - id: bad
    {self.BAD}
    on_failure: fallback
    fallback: {{type: alternate_step, step: {{id: other, run: [echo, "instead of {{{{error.step}}}}"]}}}}
  - {{id: next, checkpoint: "got {{{{bad.output}}}}"}}
"""
        )
        assert ran.status == "succeeded"
        assert ran.output("next").strip() == "got instead of bad"
        assert ran.step("bad")["status"] == "succeeded"

    def test_another_step_that_fails_too(self, lab: Lab) -> None:
        ran = lab.run(
            f"""
name: alternate
steps:
  - id: bad
    {self.BAD}
    on_failure: fallback
    fallback: {{type: alternate_step, step: {{id: other, run: ["false"]}}}}
  - {{id: next, checkpoint: "got {{{{bad.output}}}}"}}
"""
        )
        assert ran.status == "failed"
        assert ran.states()["next"] == "cancelled"

    def test_another_model(self, lab: Lab) -> None:
        lab.sandbox.faults({"provider": "anthropic", "status": 400})
        ran = lab.run(
            """
name: model
steps:
  - {id: it, provider: anthropic, prompt: go, on_failure: fallback, fallback: {type: model, model: openai:gpt-6}}
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("it")["provider"] == "openai"
        assert [entry["provider"] for entry in lab.sandbox.log()] == ["anthropic", "openai"]

    def test_retry_then_skip(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: then
defaults: {retry: {initial: 10ms, jitter: none}}
steps:
  - {id: it, prompt: "[[sandbox: status=500]] go", on_failure: retry, max_retries: 1, then: skip}
  - {id: next, prompt: "N", depends_on: it, join: none_failed}
"""
        )
        assert ran.states() == {"it": "skipped", "next": "succeeded"}
        assert lab.calls(status=500) == 2

    def test_models_in_their_order(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: models
steps:
  - {id: it, prompt: go, models: [anthropic:unknown-model, openai:gpt-6]}
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("it")["provider"] == "openai"
        assert [(entry["provider"], entry["status"]) for entry in lab.sandbox.log()] == [
            ("anthropic", 404),
            ("openai", 200),
        ]

    def test_a_refusal_says_what_the_model_said(self, lab: Lab) -> None:
        ran = lab.run('name: refusal\nsteps: [{id: it, prompt: "[[sandbox: refuse]] go"}]\n')
        assert ran.error["kind"] == "refused"
        assert "declined" in ran.error["message"]
        assert ran.error["hint"]


class TestMap:
    def test_results_are_in_order_and_lanes_slide(self, lab: Lab) -> None:
        """The first item is slow; with two lanes the other lane goes through the rest meanwhile."""
        ran = lab.run(
            """
name: lanes
steps:
  - id: each
    map: {over: "{{['delay=1s', 'probability=0', 'probability=0', 'probability=0', 'probability=0']}}",
          as: fault, max_parallel: 2}
    prompt: "[[sandbox: {{fault}}]] say {{fault}} {{index}}"
outputs: {each: "{{each.output}}"}
"""
        )
        items = ran.items("each")
        assert [step["item"] for step in items] == [0, 1, 2, 3, 4]
        assert ran.outputs["each"] == [step["output"] for step in items]
        slow = when(items[0], "finished_at")
        assert all(when(step) < slow for step in items[1:4]), "batches of two would wait for the first"
        assert max_at_once(items) == 2

    def test_max_parallel_of_the_workflow(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: limits
limits: {max_parallel: 3}
steps:
  - {id: each, map: {over: "{{[1,2,3,4,5,6,7]}}", as: n}, prompt: "[[sandbox: delay=60ms]] {{n}}"}
"""
        )
        assert ran.status == "succeeded"
        assert max_at_once(ran.items("each")) == 3

    def test_an_item_that_fails_fails_the_map(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: fail
steps:
  - id: each
    map: {over: [a, "[[sandbox: status=400]]", c], as: x}
    prompt: "{{x}}"
  - {id: next, prompt: "{{each.output}}"}
"""
        )
        assert ran.status == "failed"
        assert ran.error["step"] == "each"
        assert "item failed" in ran.error["message"]
        assert ran.states()["next"] == "cancelled"

    def test_continue_gives_failed_items_a_shape(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: shape
steps:
  - id: each
    map: {over: [a, "[[sandbox: status=400 message=kaputt]]", c], as: x, on_item_failure: continue}
    prompt: "{{x}}"
outputs: {each: "{{each.output}}", ok: "{{each.output.filter(r, !(type(r) == 'map')).size()}}"}
"""
        )
        first, second, third = ran.outputs["each"]
        assert isinstance(first, str)
        assert isinstance(third, str)
        assert second["failed"] is True
        assert "kaputt" in second["error"]
        assert set(second) == {"failed", "error"}
        assert ran.outputs["ok"] == 2

    @pytest.mark.parametrize(("share", "status"), [("60%", "succeeded"), ("0.7", "failed"), ("100%", "failed")])
    def test_min_success(self, lab: Lab, share: str, status: str) -> None:
        ran = lab.run(
            f"""
name: enough
steps:
  - id: each
    map: {{over: [a, "[[sandbox: status=400]]", c], as: x, on_item_failure: continue, min_success: {share}}}
    prompt: "{{{{x}}}}"
"""
        )
        assert ran.status == status
        if status == "failed":
            assert "2 of 3 items succeeded, but 3 must" in ran.error["message"]

    def test_reduce_reads_the_results_and_is_the_value(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: reduce
steps:
  - id: each
    map:
      over: [a, b]
      as: x
      reduce: {run: [cat], stdin: "{{results}}"}
    run: [printf, "<%s>", "{{x}}"]
outputs: {each: "{{each.output}}"}
"""
        )
        assert json.loads(ran.outputs["each"]) == ["<a>", "<b>"]

    def test_a_reduce_by_a_model_is_sent_once(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: reduce
steps:
  - id: each
    map: {over: [a, b, c, d, e], as: x, max_parallel: 2, reduce: {role: reporter, prompt: "Join {{results}}"}}
    prompt: "Say {{x}}"
outputs: {each: "{{each.output}}"}
"""
        )
        assert lab.calls(role="reporter") == 1
        assert lab.calls() == 6
        assert ran.outputs["each"] == ran.output("each.reduce")

    def test_over_a_mapping_an_empty_list_and_the_output_of_a_step(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: overs
steps:
  - {id: pairs, map: {over: "{{ {'a': 1, 'b': 2} }}", as: p}, checkpoint: "{{p.key}}={{p.value}}"}
  - {id: none, map: {over: "{{[]}}", as: p, reduce: {prompt: "{{results}}"}}, prompt: "{{p}}"}
  - {id: plan, role: planner, prompt: Plan it}
  - {id: tasks, map: {over: "{{plan.tasks}}", as: task}, checkpoint: "{{task.id}}"}
  - {id: words, run: [printf, 'x\\ny\\n']}
  - {id: each, map: {over: "{{lines(words.output)}}", as: w}, checkpoint: "{{index}}:{{w}}"}
outputs: {pairs: "{{pairs.output}}", none: "{{none.output}}", tasks: "{{tasks.output}}", each: "{{each.output}}"}
"""
        )
        assert ran.outputs["pairs"] == ["a=1", "b=2"]
        assert ran.outputs["none"] == []
        assert ran.outputs["tasks"] == [task["id"] for task in ran.output("plan")["tasks"]]
        assert ran.outputs["each"] == ["0:x", "1:y"]

    def test_too_many_items_say_so(self, lab: Lab) -> None:
        ran = lab.run("name: many\nsteps: [{id: each, map: {over: '{{[1,2,3]}}', max_items: 2}, checkpoint: x}]\n")
        assert ran.error["kind"] == "too_many_items"
        assert "3 items" in ran.error["message"]
        assert "max_items" in ran.error["hint"]

    def test_on_failure_is_of_the_whole_map(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: skipped
steps:
  - id: each
    map: {over: ["[[sandbox: status=400]] a", b], as: x}
    on_failure: skip
    prompt: "{{x}}"
  - {id: next, checkpoint: "{{each.output}}"}
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("each")["status"] == "skipped"
        assert ran.step("each")["reason"].startswith("it failed: An item failed:")
        assert ran.step("next")["reason"] == "`each` was skipped"

    def test_the_item_that_failed_is_named_and_not_those_that_were_cancelled_for_it(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: one of many
steps:
  - id: each
    map: {over: ["[[sandbox: status=500]] waits to be tried again", "[[sandbox: delay=300ms status=400]] bad"], as: x}
    prompt: "{{x}}"
    retry: {max: 1, initial: 30s, jitter: none}
"""
        )
        assert ran.error["kind"] == "child_failed"
        assert ran.error["message"].startswith("An item failed: each[1]: ")
        assert "400" in ran.error["message"]

    def test_retries_of_items_are_their_own(self, lab: Lab) -> None:
        ran = lab.run(
            f"""
name: items
{QUICK}
steps:
  - id: each
    map: {{over: [a, "[[sandbox: status=500 times=2 key=item]]"], as: x}}
    prompt: "{{{{x}}}} go"
"""
        )
        assert ran.status == "succeeded"
        assert [step["attempts"] for step in ran.items("each")] == [1, 3]

    def test_a_hundred_items_in_ten_lanes(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: hundred
steps:
  - {id: each, map: {over: "{{inputs.n}}", as: n, max_parallel: 10}, prompt: "Item {{n}}"}
inputs: {n: {type: array, items: {type: integer}, required: true}}
outputs: {n: "{{each.output.size()}}"}
""",
            {"n": list(range(100))},
        )
        assert ran.outputs["n"] == 100
        assert sorted(int(entry["prompt"].split()[1]) for entry in lab.sandbox.log()) == list(range(100))


def max_at_once(steps: list[dict[str, Any]]) -> int:
    """Return how many of the steps ran at the same time."""
    marks = [(when(step), 1) for step in steps] + [(when(step, "finished_at"), -1) for step in steps]
    running = most = 0
    for _, change in sorted(marks):
        running += change
        most = max(most, running)
    return most


class TestLoops:
    def test_until_a_condition_holds(self, lab: Lab) -> None:
        lab.sandbox.faults({"role": "reviewer", "json": verdict(approved=False), "times": 2})
        ran = lab.run(
            """
name: loop
steps:
  - id: work
    loop: {until: check.approved, max: 5}
    steps:
      - {id: draft, role: documenter, prompt: "Write, last score {{default(work.output.check.score, 'none')}}"}
      - {id: check, role: reviewer, prompt: "Review {{draft.content}}"}
outputs: {approved: "{{work.output.check.approved}}", rounds: "{{work.output.check.score}}"}
"""
        )
        assert ran.outputs["approved"] is True
        assert len(ran.items("work")) == 3
        prompts = [entry["prompt"] for entry in lab.sandbox.log(role="documenter")]
        assert prompts == ["Write, last score none", "Write, last score 7", "Write, last score 7"]
        assert ran.output("work") == ran.items("work")[-1]["output"]

    def test_max_ends_it_with_the_last_value(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: loop
steps:
  - {id: count, loop: {until: "count.output == 'never'", max: 3}, run: [printf, "%s", "{{index}}"]}
outputs: {last: "{{count.output}}"}
"""
        )
        assert ran.outputs["last"] == "2"
        assert [step["output"] for step in ran.items("count")] == ["0", "1", "2"]

    def test_an_iteration_that_fails_fails_the_loop_and_a_resume_goes_on_there(self, lab: Lab) -> None:
        text = """
name: loop
steps:
  - {id: turn, loop: {until: turn.approved, max: 4}, role: reviewer, prompt: "Turn {{index}}"}
"""
        lab.sandbox.faults(
            {"role": "reviewer", "contains": "Turn 2", "status": 400},
            {"role": "reviewer", "json": verdict(approved=False), "contains": "Turn 0"},
            {"role": "reviewer", "json": verdict(approved=False), "contains": "Turn 1"},
        )
        ran = lab.run(text)
        assert ran.error["step"].startswith("turn")
        lab.sandbox.reset()
        again = lab.resume(ran.id)
        assert again.status == "succeeded"
        assert [entry["prompt"] for entry in lab.sandbox.log()] == ["Turn 2"]

    def test_a_loop_in_a_group_and_a_map_of_groups(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: nested
steps:
  - id: outer
    steps:
      - {id: first, run: [printf, one]}
      - {id: again, depends_on: first, loop: {until: "again.output == 'one-1'", max: 3},
         run: [printf, "%s-%s", "{{first.output}}", "{{index}}"]}
  - id: each
    map: {over: [a, b, c], as: x, max_parallel: 2}
    steps:
      - {id: left, run: [printf, "L%s", "{{x}}"]}
      - {id: right, run: [printf, "R%s", "{{left.output}}"]}
outputs: {outer: "{{outer.output.again}}", each: "{{each.output}}"}
"""
        )
        assert ran.outputs["outer"] == "one-1"
        assert ran.outputs["each"] == [{"left": f"L{x}", "right": f"RL{x}"} for x in "abc"]

    def test_a_map_in_a_map_in_a_loop(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: deep
steps:
  - id: rounds
    loop: {until: "size(rounds.output.grid) == 9", max: 2}
    steps:
      - id: grid
        map: {over: [a, b], as: x}
        steps:
          - {id: row, map: {over: ["1", "2", "3"], as: y}, run: [printf, "%s%s%s", "{{index}}", "{{x}}", "{{y}}"]}
outputs: {last: "{{rounds.output.grid}}"}
"""
        )
        assert ran.outputs["last"] == [{"row": ["0a1", "1a2", "2a3"]}, {"row": ["0b1", "1b2", "2b3"]}]


def verdict(*, approved: bool) -> dict[str, Any]:
    return {"findings": [], "summary": "Not yet.", "score": 7, "approved": approved}


class TestGroups:
    def test_inner_order_and_value(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: group
steps:
  - id: both
    steps:
      - {id: left, run: [printf, L]}
      - {id: right, run: [printf, R]}
      - {id: joined, run: [printf, "%s%s", "{{left.output}}", "{{right.output}}"]}
  - {id: after, checkpoint: "{{both.output.joined}}"}
outputs: {both: "{{both.output}}"}
"""
        )
        assert ran.outputs["both"] == {"left": "L", "right": "R", "joined": "LR"}
        assert ran.output("after") == "LR"
        assert {step["parent"] for step in ran.document["steps"] if step["id"] in ("left", "right")} == {"both"}

    def test_a_failure_inside_fails_the_group_once(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: group
steps:
  - id: both
    on_failure: skip
    steps:
      - {id: bad, run: ["false"]}
      - {id: next, run: [printf, "%s", "{{bad.output}}"]}
  - {id: after, checkpoint: ok, depends_on: both, join: all_done}
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("both")["status"] == "skipped"
        assert ran.step("bad")["status"] == "failed"
        assert ran.output("after") == "ok"

    def test_a_skipped_group_starts_nothing(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: group
inputs: {go: {type: boolean, default: false}}
steps:
  - {id: both, when: inputs.go, steps: [{id: left, run: [printf, L]}]}
  - {id: after, checkpoint: "{{both.output.left}}"}
"""
        )
        assert ran.states() == {"both": "skipped", "after": "skipped"}


class TestAggregate:
    @pytest.mark.parametrize(
        ("how", "parts", "value"),
        [
            ("concat", "[a, b]", "a\n\nb"),
            ("json", "[a, b]", ["a", "b"]),
            ("first", "['', b]", "b"),
            ("vote", "[b, a, b]", "b"),
            ("merge", "[{x: 1, y: 1}, {y: 2}]", {"x": 1, "y": 2}),
            ("merge", "[[1], [2, 3]]", [1, 2, 3]),
        ],
    )
    def test_every_way(self, lab: Lab, how: str, parts: str, value: Any) -> None:
        ran = lab.run(
            f"""
name: aggregate
inputs: {{parts: {{type: array, default: {parts}}}}}
steps: [{{id: it, aggregate: {{from: "{{{{inputs.parts}}}}", how: {how}}}}}]
outputs: {{it: "{{{{it.output}}}}"}}
"""
        )
        assert ran.outputs["it"] == value

    def test_it_joins_the_items_of_a_map(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: aggregate
steps:
  - {id: each, map: {over: [a, b], as: x}, run: [printf, "%s", "{{x}}"]}
  - {id: it, aggregate: {from: "{{each.output}}", how: concat}}
"""
        )
        assert ran.output("it") == "a\n\nb"


class TestPhases:
    TEXT = """
name: phases
steps:
  - {id: work, prompt: "TRIGGER work"}
  - {id: more, prompt: "{{work.output}}"}
on_error:
  - {id: tell, checkpoint: "{{error.step}}: {{error.message}} / {{error.summary}}"}
finally:
  - {id: tidy, run: [sh, -c, 'sleep 0.7; printf "tidied after %s" "$1"', sh, "{{work.status}}"]}
"""

    def test_after_success(self, lab: Lab) -> None:
        ran = lab.run(self.TEXT)
        assert ran.status == "succeeded"
        assert ran.states()["tell"] == "skipped"
        assert ran.step("tell")["reason"] == "no step has failed"
        assert ran.output("tidy") == "tidied after succeeded"

    def test_after_failure(self, lab: Lab) -> None:
        ran = lab.run(self.TEXT.replace("TRIGGER", "[[sandbox: status=400 message=boo]]"))
        assert ran.error["step"] == "work"
        assert ran.output("tell").startswith("work: ")
        assert "boo" in ran.output("tell")
        assert ran.output("tidy") == "tidied after failed"
        assert ran.states()["more"] == "cancelled"

    def test_after_cancel(self, lab: Lab) -> None:
        run_id = lab.start(self.TEXT.replace("TRIGGER", "[[sandbox: delay=20s]]"))
        lab.until(run_id, "work", "running")
        eventually(lambda: lab.calls() or lab.sandbox.ask("GET", "/_faults"), what="the call")
        lab.services.cancel(run_id)
        ran = lab.wait(run_id, within=5)
        assert ran.status == "cancelled"
        assert ran.output("tidy") == "tidied after cancelled"
        assert ran.states() == {"work": "cancelled", "more": "cancelled", "tell": "skipped", "tidy": "succeeded"}

    def test_a_finally_step_that_fails_fails_the_run(self, lab: Lab) -> None:
        ran = lab.run('name: f\nsteps: [{id: a, checkpoint: x}]\nfinally: [{id: tidy, run: ["false"]}]\n')
        assert ran.error["step"] == "tidy"


class TestTimeouts:
    def test_of_an_attempt_at_a_model(self, lab: Lab) -> None:
        ran = lab.run(
            'name: t\nsteps: [{id: it, prompt: "[[sandbox: delay=20s]] go", timeout: 300ms, max_retries: 0}]\n'
        )
        assert ran.error["kind"] == "timeout"
        assert seconds(ran) < 3
        assert ran.error["hint"]

    @pytest.mark.parametrize("provider", ["openai", "anthropic"])
    def test_the_second_attempt_may_be_in_time(self, lab: Lab, provider: str) -> None:
        ran = lab.run(
            f"""
name: t
{QUICK}
steps: [{{id: it, provider: {provider}, timeout: 500ms, prompt: "[[sandbox: delay=20s times=1 key=slow]] go"}}]
"""
        )
        assert ran.status == "succeeded"
        assert ran.step("it")["attempts"] == 2

    def test_of_a_command(self, lab: Lab) -> None:
        ran = lab.run('name: t\nsteps: [{id: it, run: [sleep, "20"], timeout: 200ms}]\n')
        assert ran.error["kind"] == "timeout"
        assert seconds(ran) < 3

    def test_of_the_run(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: t
limits: {timeout: 300ms}
steps:
  - {id: slow, prompt: "[[sandbox: delay=20s]] go"}
  - {id: next, prompt: "{{slow.output}}"}
finally: [{id: tidy, prompt: "[[sandbox: delay=1s]] tidy"}]
"""
        )
        assert ran.error["kind"] == "timeout"
        assert "limit of 0.3 s" in ran.error["message"]
        assert ran.states() == {"slow": "cancelled", "next": "cancelled", "tidy": "succeeded"}


class TestCommands:
    def test_argv_stdin_env_and_stderr(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: commands
inputs: {nasty: {type: string, default: "a b; echo $(id) 'q' \\"d\\" *"}}
steps:
  - {id: argv, run: [printf, "%s|", "{{inputs.nasty}}", "{{inputs.nasty}}"]}
  - {id: stdin, run: [cat], stdin: "{{inputs.nasty}}"}
  - {id: env, run: [sh, -c, 'printf %s "$VALUE"'], env: {VALUE: "{{inputs.nasty}}"}}
  - {id: err, run: [sh, -c, 'echo out; echo err >&2; exit 4'], allow_failure: true}
outputs:
  argv: "{{argv.output}}"
  stdin: "{{stdin.stdout}}"
  env: "{{env.output}}"
  err: "{{err.stdout}}{{err.stderr}}{{err.exit_code}}"
"""
        )
        nasty = "a b; echo $(id) 'q' \"d\" *"
        assert ran.outputs == {"argv": f"{nasty}|{nasty}|", "stdin": nasty, "env": nasty, "err": "out\nerr\n4"}

    def test_a_text_is_run_by_a_shell_with_the_inputs_in_its_environment(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: shell
inputs: {word: {type: string, default: "a; touch /tmp/never"}, count: {type: integer, default: 2}}
steps:
  - {id: it, run: 'for i in $(seq ${count}); do printf "%s." "${word}"; done'}
outputs: {it: "{{it.output}}"}
"""
        )
        assert ran.outputs["it"] == "a; touch /tmp/never." * 2

    def test_secrets_reach_the_environment_of_the_command_alone(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEPLOY_TOKEN", "s3cret-value")
        ran = lab.run(
            """
name: secrets
secrets: [DEPLOY_TOKEN]
steps:
  - {id: with_it, run: [sh, -c, 'printf %s "${#TOKEN}"'], env: {TOKEN: "{{secrets.DEPLOY_TOKEN}}"}}
  - {id: without, run: [sh, -c, 'printf %s "${DEPLOY_TOKEN-nothing}"']}
outputs: {with_it: "{{with_it.output}}", without: "{{without.output}}"}
"""
        )
        assert ran.outputs == {"with_it": "12", "without": "nothing"}
        assert "s3cret" not in json.dumps([ran.document, ran.events])
        with lab.services.database.read() as connection:
            for row in connection.execute(checkpoints.select()):
                assert "s3cret" not in f"{row.output}{row.detail}"

    def test_a_secret_that_is_not_set_is_named(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: secrets
secrets: [NOBODY_SET_THIS]
steps: [{id: it, run: [env], env: {TOKEN: "{{secrets.NOBODY_SET_THIS}}"}}]
"""
        )
        assert "NOBODY_SET_THIS" in ran.error["message"]
        assert "environment variable" in ran.error["hint"]

    def test_cancel_kills_the_whole_process_group(self, lab: Lab, tmp_path: Any) -> None:
        marker = tmp_path / "alive"
        run_id = lab.start(
            f"""
name: cancel
steps: [{{id: it, run: [sh, -c, "(while :; do date +%s%N > {marker}; sleep 0.05; done) & wait"]}}]
"""
        )
        eventually(marker.exists)
        lab.services.cancel(run_id)
        assert lab.wait(run_id, within=5).status == "cancelled"
        before = marker.read_text()
        lab.run('name: pause\nsteps: [{id: it, run: [sleep, "0.2"]}]\n')
        assert marker.read_text() == before


class TestOutputs:
    def test_large_ones_travel_by_reference(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: large
steps:
  - {id: big, prompt: "[[sandbox: huge=200kB]] go"}
  - {id: small, run: [wc, -c], stdin: "{{big.output}}"}
outputs: {size: "{{small.output}}", big: "{{big.output}}"}
"""
        )
        assert int(ran.outputs["size"]) == len(ran.outputs["big"].encode()) >= 200_000
        with lab.services.database.read() as connection:
            stored = [row.body for row in connection.execute(blobs.select())]
            assert any(len(body) >= 200_000 for body in stored)
            number = lab.services.views.number(ran.id)
            for row in connection.execute(checkpoints.select().where(checkpoints.c.step_id >= number << 20)):
                assert len(row.output or "") < 70_000

    @pytest.mark.parametrize(
        "action",
        ['prompt: "[[sandbox: huge=11MB]] go"', "run: [sh, -c, 'head -c 11000000 /dev/zero | tr \"\\\\0\" x']"],
    )
    def test_over_10_mb_is_an_error_that_says_so(self, lab: Lab, action: str) -> None:
        ran = lab.run(f"name: huge\nsteps:\n  - id: it\n    {action}\n")
        assert ran.error["kind"] == "output_too_large"
        assert "10 MB" in ran.error["message"] + ran.error["hint"]
        assert ran.error["hint"]

    def test_default_and_missing_values(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: default
inputs: {given: {type: string}, go: {type: boolean, default: false}}
steps:
  - {id: off, checkpoint: x, when: inputs.go}
  - {id: on, checkpoint: "{{default(off.output, default(inputs.given, 'neither'))}}", join: none_failed}
outputs: {on: "{{on.output}}", off: "{{default(off.output, null)}}", whole: "{{inputs}}"}
"""
        )
        assert ran.outputs["on"] == "neither"
        assert ran.outputs["off"] is None
        assert ran.outputs["whole"] == {"given": None, "go": False}

    def test_an_output_that_is_missing_fails_the_run_and_says_which(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: missing
inputs: {go: {type: boolean, default: false}}
steps: [{id: off, checkpoint: x, when: inputs.go}]
outputs: {off: "{{inputs.go ? 'on' : off.output}}"}
"""
        )
        assert "off" in ran.error["message"]
        assert "default(" in ran.error["message"] + ran.error["hint"]

    def test_types_are_kept_and_texts_rendered(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: types
inputs:
  n: {type: integer, default: 3}
  x: {type: number, default: 0.5}
  yes: {type: boolean, default: true}
  list: {type: array, default: [1, a]}
  object: {type: object, default: {a: 1}}
steps: [{id: it, checkpoint: "{{inputs.n}} {{inputs.x}} {{inputs.yes}} {{inputs.list}} {{inputs.object}}"}]
outputs:
  n: "{{inputs.n}}"
  sum: "{{inputs.n + inputs.x}}"
  yes: "{{inputs.yes}}"
  list: "{{inputs.list}}"
  object: {deep: ["{{inputs.object}}"]}
  text: "n is {{inputs.n}}"
"""
        )
        assert ran.outputs == {
            "n": 3,
            "sum": 3.5,
            "yes": True,
            "list": [1, "a"],
            "object": {"deep": [{"a": 1}]},
            "text": "n is 3",
        }
        assert ran.output("it") == '3 0.5 true [\n  1,\n  "a"\n] {\n  "a": 1\n}'

    def test_what_a_model_wrote_is_never_evaluated(self, lab: Lab) -> None:
        lab.sandbox.faults({"contains": "SAY", "text": "{{inputs.secret}} ${secret} $(id)"})
        ran = lab.run(
            """
name: single pass
inputs: {secret: {type: string, default: hidden}}
steps:
  - {id: evil, prompt: SAY}
  - {id: next, run: [printf, "%s", "{{evil.output}}"]}
outputs: {next: "{{next.output}}"}
"""
        )
        assert ran.outputs["next"] == "{{inputs.secret}} ${secret} $(id)"


class TestStructuredOutput:
    TEXT = """
name: structured
steps:
  - id: it
    provider: PROVIDER
    prompt: "TRIGGER go"
    output: {title: string, count: integer, tags: {type: array, items: {type: string}}}
    max_retries: 0
outputs: {title: "{{it.title}}", count: "{{it.count}}", first: "{{it.tags[0]}}"}
"""

    def run(self, lab: Lab, provider: str, trigger: str) -> Ran:
        return lab.run(self.TEXT.replace("PROVIDER", provider).replace("TRIGGER", trigger))

    @pytest.mark.parametrize("provider", ["openai", "anthropic"])
    def test_typed_fields(self, lab: Lab, provider: str) -> None:
        ran = self.run(lab, provider, "")
        assert isinstance(ran.outputs["title"], str)
        assert isinstance(ran.outputs["count"], int)
        assert isinstance(ran.outputs["first"], str)

    @pytest.mark.parametrize("provider", ["openai", "anthropic"])
    def test_a_miss_is_repaired_and_both_calls_are_charged(self, lab: Lab, provider: str) -> None:
        ran = self.run(lab, provider, "[[sandbox: wrong_schema times=1 key=once]]")
        assert ran.status == "succeeded"
        assert lab.calls() == 2
        assert ran.step("it")["attempts"] == 1, "a repair is no attempt"
        assert spent(ran) == billed(lab)

    @pytest.mark.parametrize("provider", ["openai", "anthropic"])
    def test_two_rounds_are_the_most(self, lab: Lab, provider: str) -> None:
        ran = self.run(lab, provider, "[[sandbox: wrong_schema]]")
        assert ran.error["kind"] == "invalid_output"
        assert lab.calls() == 3
        assert "after 2 rounds of repair" in ran.error["message"]
        assert ran.error["hint"]
        assert spent(ran) == billed(lab), "what failed is charged all the same"


def spent(ran: Ran) -> tuple[int, int]:
    """Return a run's tokens, in and out."""
    return ran.document["tokens"]["input"], ran.document["tokens"]["output"]


def billed(lab: Lab) -> tuple[int, int]:
    """Return the tokens that the sandbox has charged for, in its own count."""
    models = [model for account in lab.sandbox.bill().values() for provider in account.values() for model in
              provider.values()]  # fmt: skip
    return sum(model.get("input", 0) for model in models), sum(model.get("output", 0) for model in models)


class TestCosts:
    def test_sums_are_those_of_the_bill(self, lab: Lab) -> None:
        ran = lab.run(
            f"""
name: costs
{QUICK}
steps:
  - {{id: plan, role: planner, prompt: Plan a thing}}
  - {{id: build, map: {{over: "{{{{plan.tasks}}}}", as: task}}, role: builder, prompt: "Build {{{{task.title}}}}"}}
  - {{id: odd, provider: openai, prompt: "[[sandbox: status=500 times=1 key=o]] [[sandbox: drop nth=2 key=p]] go"}}
  - {{id: review, role: reviewer, prompt: "Review {{{{build.output}}}} {{{{odd.output}}}}"}}
"""
        )
        assert ran.status == "succeeded"
        steps = ran.document["steps"]
        assert sum(step["tokens"]["input"] for step in steps) == ran.document["tokens"]["input"]
        assert sum(step["tokens"]["output"] for step in steps) == ran.document["tokens"]["output"]
        assert ran.step("odd")["cost_usd"] is None, "nobody knows what the lost reply cost"
        assert ran.document["cost_usd"] is None

    def test_tokens_and_dollars_of_a_whole_run(self, lab: Lab) -> None:
        ran = lab.run(
            """
name: costs
steps:
  - {id: plan, role: planner, prompt: Plan a thing}
  - {id: build, map: {over: "{{plan.tasks}}", as: task}, role: builder, prompt: "Build {{task.title}}"}
  - {id: tests, role: tester, provider: openai, prompt: "Test {{build.output}}"}
  - {id: review, role: reviewer, prompt: "Review {{build.output}}"}
"""
        )
        assert spent(ran) == billed(lab)
        assert ran.document["cost_usd"] > 0
        total = sum(step["cost_usd"] for step in ran.document["steps"])
        assert total == pytest.approx(ran.document["cost_usd"], abs=1e-9)


class TestResume:
    TEXT = """
name: resume
steps:
  - {id: one, role: planner, prompt: Plan it}
  - {id: two, role: builder, prompt: "Build {{one.summary}}"}
  - {id: three, role: tester, prompt: "Test {{two.summary}}"}
  - {id: side, run: [sh, -c, "date +%s%N"]}
outputs: {plan: "{{one.output}}", side: "{{side.output}}"}
"""

    def failed(self, lab: Lab) -> Ran:
        lab.sandbox.faults({"role": "tester", "status": 400})
        ran = lab.run(self.TEXT)
        assert ran.status == "failed"
        lab.sandbox.reset()
        return ran

    def test_after_a_failure_what_is_finished_is_not_paid_again(self, lab: Lab) -> None:
        before = self.failed(lab)
        again = lab.resume(before.id)
        assert [entry["role"] for entry in lab.sandbox.log()] == ["tester"]
        assert again.outputs["plan"] == before.output("one")
        assert again.outputs["side"] == before.output("side"), "a finished command is not run again"
        assert again.step("one")["cost_usd"] == 0
        assert again.step("one")["adopted_from"]
        assert spent(again) == billed(lab)
        assert again.id != before.id

    def test_after_an_edit_only_what_it_touches_is_paid(self, lab: Lab) -> None:
        before = self.failed(lab)
        again = lab.resume(before.id, self.TEXT.replace("Build {{", "Build carefully {{"))
        assert again.status == "succeeded"
        assert [entry["role"] for entry in lab.sandbox.log()] == ["builder", "tester"]

    def test_an_edit_that_changes_nothing_of_a_step_keeps_it(self, lab: Lab) -> None:
        before = self.failed(lab)
        more = self.TEXT.replace("steps:\n", "steps:\n  - {id: zero, checkpoint: new}\n")
        again = lab.resume(before.id, more)
        assert again.status == "succeeded"
        assert [entry["role"] for entry in lab.sandbox.log()] == ["tester"]

    def test_a_resume_of_a_resume(self, lab: Lab) -> None:
        before = self.failed(lab)
        lab.sandbox.faults({"role": "tester", "status": 400})
        second = lab.resume(before.id)
        assert second.status == "failed"
        lab.sandbox.reset()
        third = lab.resume(second.id)
        assert third.status == "succeeded"
        assert [entry["role"] for entry in lab.sandbox.log()] == ["tester"]

    def test_items_of_a_map_that_are_finished_are_not_paid_again(self, lab: Lab) -> None:
        lab.sandbox.faults({"contains": "Item 3", "status": 400}, {"contains": "Item", "delay": "50ms"})
        text = """
name: half
steps:
  - {id: each, map: {over: "{{[0,1,2,3,4,5]}}", as: n, max_parallel: 1}, prompt: "Item {{n}}"}
outputs: {n: "{{each.output.size()}}"}
"""
        before = lab.run(text)
        assert before.status == "failed"
        assert [entry["prompt"] for entry in lab.sandbox.log(status=200)] == ["Item 0", "Item 1", "Item 2"]
        lab.sandbox.reset()
        again = lab.resume(before.id)
        assert again.outputs["n"] == 6
        assert [entry["prompt"] for entry in lab.sandbox.log()] == ["Item 3", "Item 4", "Item 5"]

    def test_of_a_run_that_was_cancelled(self, lab: Lab) -> None:
        lab.sandbox.faults({"role": "builder", "delay": 20})
        run_id = lab.start(self.TEXT)
        lab.until(run_id, "two", "running")
        lab.services.cancel(run_id)
        before = lab.wait(run_id, within=5)
        assert before.status == "cancelled"
        lab.sandbox.reset()
        again = lab.resume(run_id)
        assert again.status == "succeeded"
        assert [entry["role"] for entry in lab.sandbox.log()] == ["builder", "tester"]

    def test_of_a_run_that_is_not_there(self, lab: Lab) -> None:
        with pytest.raises(NotFound):
            lab.resume("run_gone")
