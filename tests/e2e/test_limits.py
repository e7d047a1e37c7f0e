"""Rate limits from the workflow's side: steps wait without an attempt, a call or a slot; the breaker; what is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gorgon_common.cli import build
from gorgon_common.persistence.limits import LimitRules
from gorgon_common.ratelimit import quotas
from tests.support.running import Lab, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

MODEL = "gpt-5-mini"


@pytest.fixture
def lab(sandbox: Sandbox, tmp_path: Path) -> Iterator[Lab]:
    """A worker that may call one model 120 times a minute: one at once, then one each 525 ms."""
    with laboratory(tmp_path, sandbox) as made:
        LimitRules(made.services.database).set("openai", MODEL, {"requests": 120})
        yield made


def many(count: int) -> str:
    parts = json.dumps([str(number) for number in range(count)])
    return f"""
name: many
steps:
  - {{id: ask, provider: openai, model: {MODEL}, map: {{over: {parts}, as: n, max_parallel: 20}},
     prompt: "Go {{{{n}}}}", max_retries: 0}}
"""


def test_steps_wait_for_the_limit_and_none_of_it_is_an_attempt_or_a_call(lab: Lab) -> None:
    ran = lab.run(many(6))
    assert ran.status == "succeeded"
    assert {step["attempts"] for step in ran.items("ask")} == {1}
    assert (lab.calls(status=200), lab.calls(status=429)) == (6, 0)
    waits = [event for event in ran.events if event["kind"] == "step.waiting"]
    assert waits
    assert waits[0]["message"] == f"openai {MODEL}: rate limit on requests"
    times = [entry["time"] for entry in lab.sandbox.log()]
    assert times[-1] - times[0] >= 1.5


def test_what_waits_holds_no_slot(lab: Lab) -> None:
    """Twenty steps wait for their turn in a worker of sixteen slots; another provider's step goes through at once."""
    waiting = lab.start(many(20))
    lab.until(waiting, "ask", "waiting")
    ran = lab.run('name: other\nsteps: [{id: it, provider: anthropic, prompt: "Hello"}]\n')
    assert ran.status == "succeeded"
    assert lab.services.run(waiting)["status"] == "running"
    lab.services.cancel(waiting)
    lab.wait(waiting)


def test_a_cancelled_run_does_not_wait_on(lab: Lab) -> None:
    waiting = lab.start(many(30))
    lab.until(waiting, "ask", "waiting")
    lab.services.cancel(waiting)
    assert lab.wait(waiting, within=5).status == "cancelled"


def test_a_call_above_the_whole_limit_fails_at_once_and_is_not_made(lab: Lab) -> None:
    LimitRules(lab.services.database).set("openai", "gpt-5", {"tokens": 100})
    ran = lab.run('name: big\nsteps: [{id: it, provider: openai, model: gpt-5, max_tokens: 500, prompt: "Hello"}]\n')
    assert ran.error["kind"] == "over_limit"
    assert "it needs 500 tokens, and the limit is 100" in ran.error["message"]
    assert lab.calls() == 0


def test_an_open_breaker_takes_the_next_model(lab: Lab) -> None:
    """Twenty failures open it for the first model; then steps do not even try it."""
    lab.sandbox.faults({"provider": "openai", "model": "gpt-5", "status": 500})
    parts = json.dumps([str(number) for number in range(24)])
    text = f"""
name: fallback
steps:
  - id: ask
    models: ["openai:gpt-5", "anthropic:claude-sonnet-5"]
    map: {{over: {parts}, as: n, max_parallel: 4}}
    prompt: "Go {{{{n}}}}"
    max_retries: 0
"""
    ran = lab.run(text)
    assert ran.status == "succeeded"
    assert lab.calls(provider="anthropic", status=200) == 24
    assert 20 <= lab.calls(provider="openai") <= 23


def test_an_open_breaker_without_another_model_is_waited_for(lab: Lab) -> None:
    lab.sandbox.faults({"provider": "openai", "model": "gpt-5", "status": 500, "times": 20})
    parts = json.dumps([str(number) for number in range(21)])
    text = f"""
name: wait
steps:
  - {{id: ask, provider: openai, model: gpt-5, map: {{over: {parts}, as: n, max_parallel: 3}}, prompt: "Go {{{{n}}}}",
     retry: {{max: 10, initial: 10ms}}}}
"""
    ran = lab.run(text)
    assert ran.status == "succeeded"
    assert any("circuit breaker" in (event["message"] or "") for event in ran.events)


def test_the_command_line(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path))
    monkeypatch.setattr(quotas, "REFRESH", 0.0)

    def say(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            build()(["limits", *words], prog_name="gorgon")
        assert ended.value.code in (0, 2)
        found = capsys.readouterr()
        return found.out + found.err

    assert "No model was called lately" in say("ls")
    assert "at most 3 concurrency, 60 requests" in say("set", "openai", MODEL, "--requests", "60", "--concurrency", "3")
    assert "No limit is given" in say("set", "openai")
    assert "has to be a number above 0" in say("set", "openai", "--requests", "0")
    with laboratory(tmp_path, sandbox) as lab:
        lab.run(f'name: one\nsteps: [{{id: it, provider: openai, model: {MODEL}, prompt: "Hello"}}]\n')
    shown = json.loads(say("ls", "--json"))
    assert shown["rules"] == [{"provider": "openai", "model": MODEL, "limits": {"concurrency": 3, "requests": 60}}]
    assert shown["gates"][0]["levels"]["requests"]["limit"] == 60
    assert shown["gates"][0]["granted"] == 1
    assert f"openai    {MODEL}" in say("ls").replace("  openai", "openai") or MODEL in say("ls")
    assert "no limits of your own any more" in say("set", "openai", MODEL, "--clear")
