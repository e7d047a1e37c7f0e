"""Rate limits from the workflow's side: steps wait without an attempt, a call or a slot; the breaker; what is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gorgon_common.cli import build, terminal
from gorgon_common.clock import parse_time
from gorgon_common.errors import Conflict
from gorgon_common.persistence.limits import LimitRules
from gorgon_common.persistence.reports import Reports
from gorgon_common.ratelimit import quotas
from gorgon_common.roles.models import resolve_model
from tests.support.running import Lab, eventually, laboratory
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
    # Otherwise the first call waits for the import of the SDK while others are let in, and all are sent at once.
    lab.run("name: warm\nsteps: [{id: ask, provider: openai, model: gpt-5, prompt: Hello}]\n")
    lab.sandbox.clear_log()
    ran = lab.run(many(6))
    assert ran.status == "succeeded"
    assert {step["attempts"] for step in ran.items("ask")} == {1}
    assert (lab.calls(status=200), lab.calls(status=429)) == (6, 0)
    waits = [event for event in ran.events if event["kind"] == "step.waiting"]
    assert waits
    assert waits[0]["message"] == f"openai {MODEL}: no room under the rate limit for requests"
    assert {event["data"]["why"] for event in waits} == {"requests"}
    assert all(parse_time(event["data"]["until"]) > parse_time(event["at"]) for event in waits)
    times = [entry["time"] for entry in lab.sandbox.log()]
    assert times[-1] - times[0] >= 1.5


def test_a_repair_that_has_to_wait_is_parked_and_nothing_is_paid_twice(lab: Lab) -> None:
    """One call each two seconds: the second round waits elsewhere, and takes up the conversation where it was."""
    LimitRules(lab.services.database).set("openai", "gpt-5", {"requests": 30})
    ran = lab.run("""
name: repair
steps:
  - {id: it, provider: openai, model: gpt-5, prompt: "[[sandbox: wrong_schema times=1 key=once]] Go",
     output: {a: string}, max_retries: 0}
""")
    assert ran.status == "succeeded"
    assert ran.step("it")["attempts"] == 1
    assert [event["data"]["why"] for event in ran.events if event["kind"] == "step.waiting"] == ["requests"]
    assert lab.calls() == 2
    calls = lab.services.calls(only={"run": ran.id})["items"]
    assert sorted(call["outcome"] for call in calls) == ["invalid", "ok"]


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
    assert "it needs 500 tokens, but the limit is 100" in ran.error["message"]
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
    assert any((event["data"] or {}).get("why") == "breaker" for event in ran.events)


TWO = """
name: fallback
steps:
  - {id: ask, models: ["openai:gpt-5", "anthropic:claude-sonnet-5"], prompt: "Go", max_retries: 0}
"""


def refusal(provider: str, seconds: float, **fields: Any) -> dict[str, Any]:
    return {"provider": provider, "status": 429, "retry_after": f"{seconds:g}s", **fields}


def test_a_provider_that_asks_for_a_long_pause_is_passed_over(lab: Lab) -> None:
    """The first call is refused for two minutes and goes on to the second model; the next ones do not even ask."""
    lab.sandbox.faults(refusal("openai", 120))
    for _ in range(2):
        ran = lab.run(TWO)
        assert ran.step("ask")["model"] == "claude-sonnet-5"
        assert ran.step("ask")["attempts"] == 1
    assert (lab.calls(provider="openai"), lab.calls(provider="anthropic", status=200)) == (1, 2)


def test_a_short_pause_is_waited_for(lab: Lab) -> None:
    lab.sandbox.faults(refusal("openai", 0.6, times=1))
    ran = lab.run(TWO)
    assert ran.step("ask")["model"] == "gpt-5"
    assert ran.step("ask")["attempts"] == 1
    assert lab.calls(provider="anthropic") == 0
    (wait, *_) = (event for event in ran.events if event["kind"] == "step.waiting")
    assert wait["data"]["why"] == "retry_after"


def test_when_the_requests_of_a_day_are_used_up_the_next_model_is_asked(lab: Lab) -> None:
    LimitRules(lab.services.database).set("openai", "gpt-5", {"requests_per_day": 10})
    models = [lab.run(TWO).step("ask")["model"] for _ in range(3)]
    assert models == ["gpt-5", "claude-sonnet-5", "claude-sonnet-5"]
    assert lab.calls(provider="openai") == 1


def test_a_line_is_no_reason_to_take_another_model(lab: Lab) -> None:
    """120 requests a minute: eight calls wait for some seconds rather than cost what the other model does."""
    parts = json.dumps([str(number) for number in range(8)])
    ran = lab.run(f"""
name: line
steps:
  - id: ask
    models: ["openai:{MODEL}", "anthropic:claude-sonnet-5"]
    map: {{over: {parts}, as: n}}
    prompt: "Go {{{{n}}}}"
""")
    assert {step["model"] for step in ran.items("ask")} == {MODEL}
    assert lab.calls(provider="anthropic") == 0


def test_where_none_can_serve_it_waits_for_the_first_that_opens(lab: Lab) -> None:
    lab.sandbox.faults(refusal("openai", 900), refusal("anthropic", 300))
    run = lab.start(TWO)
    step = lab.until(run, "ask", "waiting")
    assert step["waits"]["why"] == "retry_after"
    (told,) = lab.services.explain(run)["waiting"]
    assert (told["why"], told["reason"]) == ("quota", "retry_after")
    left = (parse_time(told["until"]) - parse_time(told["since"])).total_seconds()
    assert 290 <= left <= 310
    lab.services.cancel(run)
    lab.wait(run)


def test_a_worker_begins_with_the_token_counts_of_the_one_before(sandbox: Sandbox, tmp_path: Path) -> None:
    """What calls had is stored when a worker ends; the next one reserves by it from its first call on."""
    text = f'name: one\nsteps: [{{id: it, provider: openai, model: {MODEL}, prompt: "{"word " * 400}"}}]\n'
    with laboratory(tmp_path, sandbox) as lab:
        lab.run(text)
        database = lab.services.database
        assert Reports(database, lab.services.knowledge.plan).ratios("sandbox") == {}
    with laboratory(tmp_path, sandbox) as lab:
        ratio = lab.services.reports.ratios("sandbox")["openai", MODEL]
        assert ratio.calls == 1
        # the sandbox takes four bytes for a token, the estimator five and a half letters: a word of four is one
        assert ratio.factor == pytest.approx(1.08, abs=0.1)


class Shell:
    """`gorgon limits …` in a home of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """Return what `gorgon limits` says, on stdout and stderr."""
        return self.gorgon("limits", *words, code=code)

    def gorgon(self, *words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            build()(list(words), prog_name="gorgon")
        assert ended.value.code == code
        found = self.capsys.readouterr()
        return found.out + found.err


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.setenv("GORGON_HOME", str(tmp_path))
    monkeypatch.setattr(quotas, "REFRESH", 0.0)
    return Shell(capsys)


def test_plan_says_how_far_off_token_counts_are(sandbox: Sandbox, tmp_path: Path, say: Shell) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(f'name: one\nsteps: [{{id: it, provider: openai, model: {MODEL}, prompt: "Hello"}}]\n')
    assert "typical error ±30 % (not yet compared with a real count)" in say.gorgon("plan", str(file))
    with laboratory(tmp_path, sandbox) as lab:
        lab.run(file.read_text())
    (estimate,) = json.loads(say("ls", "--json"))["estimates"]
    corrected = f"estimate corrected ×{estimate['ratio']:.2f}, typical error ±{100 * estimate['error']:.0f} %"
    told = f"tokens of {MODEL}: {corrected} (from 1 past call)"
    assert told in say.gorgon("plan", str(file))


def test_the_command_line(sandbox: Sandbox, tmp_path: Path, say: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No model was called recently" in say("ls")
    told = say("set", "openai", MODEL, "--requests", "60", "--tokens", "90000", "--concurrency", "3")
    assert "at most 60 requests and 90,000 tokens per minute, 3 calls in flight" in told
    with laboratory(tmp_path, sandbox) as lab:
        lab.run(f'name: one\nsteps: [{{id: it, provider: openai, model: {MODEL}, prompt: "Hello"}}]\n')
    shown = json.loads(say("ls", "--json"))
    (rule,) = shown["rules"]
    assert rule == {
        "provider": "openai",
        "model": MODEL,
        "limits": {"concurrency": 3, "requests": 60, "tokens": 90000},
    }
    (gate,) = shown["gates"]
    assert (gate["levels"]["requests"]["limit"], gate["levels"]["requests"]["set"], gate["granted"]) == (60, True, 1)
    (estimate,) = shown["estimates"]
    assert (estimate["target"], estimate["model"], estimate["calls"]) == ("sandbox", MODEL, 1)
    assert 0 < estimate["error"] < 1
    piped = say("ls")
    assert f"openai\t{MODEL}\tsandbox\trequests\t" in piped
    assert "\t60\tset\t0\t0\t95%\tavailable" in piped
    assert f"input tokens of openai {MODEL} (sandbox): estimate corrected ×{estimate['ratio']:.2f}, typical" in piped
    monkeypatch.setattr(terminal, "interactive", lambda: True)
    read = say("ls")
    assert f"openai {MODEL} (sandbox): available\n  0 calls in flight, 0 waiting, at 95% of the allowed speed" in read
    assert max(len(line) for line in read.splitlines()) < 110
    assert "your limits are removed" in say("set", "openai", MODEL, "--clear")
    assert "no limits were set" in say("set", "openai", MODEL, "--clear")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["openai"], "No limit is given"),
        (["openai", "--requests", "0"], "requests is 0; it has to be a number above 0"),
        (["openai", "--tokens", "-5"], "tokens is -5; it has to be a number above 0"),
        (["openai", "--requests", "nan"], "requests is nan"),
        (["openai", "--requests", "inf"], "requests is inf"),
        (["openai", "--requests", "many"], "valid number"),
        (["openai", "--concurrency", "2.5"], "concurrency is 2.5; it has to be a whole number of calls"),
        (["opnai", "--requests", "5"], "There is no model provider 'opnai'.\nDid you mean openai?"),
        (["google", "--requests", "5"], "There is no model provider 'google'.\nThere are openai, anthropic."),
    ],
)
def test_nonsense_is_refused_with_a_hint_and_nothing_is_set(say: Shell, words: list[str], said: str) -> None:
    assert said in "\n".join(line.rstrip() for line in say("set", *words, code=2).splitlines())
    assert json.loads(say("ls", "--json"))["rules"] == []


def test_names_of_models_are_understood_or_questioned(say: Shell) -> None:
    known = resolve_model("openai", "standard")
    assert f"standard stands for {known}" in say("set", "openai", "standard", "--requests", "5")
    assert "Did you mean" in (told := say("set", "openai", f"{known}x", "--requests", "5"))
    assert f"does not know the model '{known}x': the limit applies to calls to exactly that name" in told
    for fine in (known, MODEL, "gpt-*", "*"):
        assert "does not know" not in say("set", "openai", fine, "--requests", "5")
    names = {rule["model"] for rule in json.loads(say("ls", "--json"))["rules"]}
    assert names == {known, f"{known}x", MODEL, "gpt-*", "*"}


def test_who_waits_and_an_open_breaker_are_shown(lab: Lab, say: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = lab.start(many(12))
    lab.until(waiting, "ask", "waiting")
    lab.sandbox.faults({"provider": "anthropic", "status": 500})
    parts = json.dumps([str(number) for number in range(22)])
    failing = lab.start(f"""
name: failing
steps:
  - {{id: bad, provider: anthropic, model: claude-sonnet-5, map: {{over: {parts}, as: n, on_item_failure: continue}},
     prompt: "Go {{{{n}}}}", max_retries: 0}}
""")

    def gate(model: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(say("ls", "--json"))["gates"]
        return next((entry for entry in found if entry["model"] == model), {})

    eventually(lambda: gate("claude-sonnet-5").get("breaker"), what="an open breaker")
    assert gate(MODEL)["teams"].get("default", 0) >= 1
    shown = say("ls")
    assert "the circuit breaker is open" in shown
    assert "(default " in shown
    for run in (waiting, failing):
        with contextlib.suppress(Conflict):  # it may have ended
            lab.services.cancel(run)
        lab.wait(run)
