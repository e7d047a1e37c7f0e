"""The conversation, with a provider that says what the test tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from gorgon_common import errors
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.agent import MAX_REPLY_BYTES, AgentResult, Earlier, converse
from gorgon_common.engine.ports import AgentCall, AgentReply, Message
from tests.support.calls import Rounds, chain_to, conversation

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3},
        "tasks": {
            "type": "array",
            "items": {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}},
        },
    },
    "required": ["title", "tasks"],
    "additionalProperties": False,
}
GOOD = {"title": "Plan", "tasks": [{"id": "t1"}]}
USED = Usage(input_tokens=100, output_tokens=10)


class HandClock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 11, 22, tzinfo=UTC)

    def monotonic(self) -> float:
        return self.seconds


class TokenPricer:
    """One micro-dollar a token; `unpriced` has no price."""

    version = "test-1"

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        unpriced = all(name.startswith("unpriced") for name in (model, asked or model))
        return None if unpriced else usage.input_tokens + usage.output_tokens


@dataclass
class Script:
    """An AgentProvider that gives one answer after the other; each call takes `takes` seconds."""

    answers: list[Any]
    clock: HandClock
    takes: float = 0.25
    name: str = "scripted"
    calls: list[AgentCall] = field(default_factory=list)

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        self.calls.append(call)
        self.clock.seconds += self.takes
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, AgentReply):
            return answer
        text = answer if isinstance(answer, str) else json.dumps(answer)
        data = None if isinstance(answer, str) else answer
        return AgentReply(text=text, usage=USED, model=call.model, data=data, request_id="req_1", service_tier="flex")

    def close(self) -> None:
        pass


@dataclass
class Bench:
    """Runs a conversation and keeps what came of it."""

    script: Script
    records: list[CallRecord] = field(default_factory=list)
    earlier: Earlier | None = None
    kept: list[Earlier] = field(default_factory=list)

    def run(self, *, schema: Any = SCHEMA, rounds: int = 2, **changes: Any) -> AgentResult:
        call = AgentCall(model="m", messages=[Message("user", "Plan it.")], schema=schema, role="planner", **changes)
        chain = chain_to(self.script, TokenPricer(), self.records.append, clock=self.script.clock)
        return converse(chain, call, repair_rounds=rounds, memory=Rounds(self.earlier, self.kept))

    @property
    def outcomes(self) -> list[str]:
        return [record.outcome for record in self.records]


def bench(*answers: Any, takes: float = 0.25) -> Bench:
    return Bench(Script(list(answers), HandClock(), takes))


def test_a_reply_that_fits() -> None:
    run = bench(GOOD)
    result = run.run()
    assert result.data == GOOD
    assert (result.usage, result.cost_micro) == (USED, 110)
    assert run.records == [
        CallRecord("openai", "m", "planner", 1, USED, 110, "test-1", 250, "ok", request_id="req_1", service_tier="flex")
    ]
    assert result.calls == tuple(run.records)


def test_free_text_is_not_checked() -> None:
    result = bench("Once upon a time").run(schema=None)
    assert (result.text, result.data) == ("Once upon a time", None)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_conversation_goes_on_where_it_was_broken_off(broken: int) -> None:
    """It sends what it would have sent, and has as many rounds as it would have had."""
    bad = [{"title": "A", "tasks": []}, {"title": "B", "tasks": []}]
    whole = bench(*bad, GOOD)
    whole.run()
    first = bench(*bad[:broken], errors.Retryable("away"))
    with pytest.raises(errors.Retryable):
        first.run()
    assert [said.rounds for said in first.kept] == [1, 2][:broken]
    second = bench(*bad[broken:], GOOD)
    second.earlier = first.kept[-1]
    assert second.run().data == GOOD
    assert [call.messages for call in second.script.calls] == [call.messages for call in whole.script.calls[broken:]]
    last = bench(*bad[broken:], bad[0])
    last.earlier = first.kept[-1]
    with pytest.raises(errors.Malformed):
        last.run()


def test_a_repair_names_what_is_wrong() -> None:
    bad = {"title": "A", "tasks": [{"id": "t1"}, {}], "extra": 1}
    run = bench(bad, GOOD)
    assert run.run().data == GOOD
    assert run.outcomes == ["invalid", "ok"]
    first, second = run.script.calls
    assert second.messages[0] == first.messages[0]
    assert second.messages[1] == Message("assistant", json.dumps(bad))
    complaint = second.messages[2].content
    assert "title: 'A' is too short" in complaint
    assert "tasks[1]: 'id' is a required property" in complaint
    assert "'extra' was unexpected" in complaint
    assert run.records[1].ordinal == 2


def test_the_second_repair_sees_the_last_reply_only() -> None:
    run = bench("no JSON", {"title": "Plan"}, GOOD)
    result = run.run()
    assert [len(call.messages) for call in run.script.calls] == [1, 3, 3]
    assert "the reply is not JSON" in run.script.calls[1].messages[2].content
    assert run.script.calls[2].messages[1].content == '{"title": "Plan"}'
    assert (result.usage.input_tokens, result.cost_micro) == (300, 330)


def test_after_two_rounds_it_is_malformed() -> None:
    run = bench({}, {}, {"tasks": []})
    with pytest.raises(errors.Malformed) as caught:
        run.run()
    assert "'title' is a required property" in str(caught.value)
    assert "2 rounds" in str(caught.value)
    assert run.outcomes == ["invalid"] * 3
    assert sum(record.cost_micro or 0 for record in run.records) == 330


def test_no_rounds() -> None:
    run = bench({})
    with pytest.raises(errors.Malformed):
        run.run(rounds=0)
    assert len(run.script.calls) == 1


def test_text_that_the_adapter_could_not_parse_may_still_be_json() -> None:
    assert bench(json.dumps(GOOD)).run().data == GOOD


def test_json_null() -> None:
    run = bench("null")
    assert run.run(schema={"type": ["string", "null"]}).data is None
    assert run.outcomes == ["ok"]


def test_an_empty_reply_is_sent_back_as_something() -> None:
    run = bench("", GOOD)
    run.run()
    assert run.script.calls[1].messages[1].content == "(empty)"


def test_many_and_long_violations_are_cut() -> None:
    run = bench(
        {"title": "Plan", "tasks": [{"id": index} for index in range(40)]}, {"title": ["x" * 5000], "tasks": []}, GOOD
    )
    run.run()
    many = run.script.calls[1].messages[2].content
    assert many.count("\n- ") == 21
    assert "… and 20 more" in many
    long = run.script.calls[2].messages[2].content
    assert len(long) < 800
    assert "is not of type 'string'" in long


@pytest.mark.parametrize("reference", ["https://example.invalid/schema.json", "#/$defs/missing"])
def test_a_reference_that_leads_nowhere(reference: str) -> None:
    """Nothing is fetched, nothing is asked twice, and the call is in the ledger."""
    run = bench({"a": 1})
    with pytest.raises(errors.Final) as caught:
        run.run(schema={"$ref": reference})
    assert reference.lstrip("#") in str(caught.value)
    assert [(r.outcome, r.cost_micro) for r in run.records] == [("invalid", 110)]


def test_a_refusal_is_paid() -> None:
    reply = AgentReply("I cannot.", USED, "m-2", stop_reason="refusal")
    run = bench(reply)
    with pytest.raises(errors.Refused, match="I cannot"):
        run.run()
    assert [(r.outcome, r.cost_micro, r.model) for r in run.records] == [("refused", 110, "m-2")]


@pytest.mark.parametrize(
    ("stop", "hint"), [("max_tokens", "max_tokens"), ("context", "larger context"), ("pause", "again")]
)
def test_cut_off(stop: str, hint: str) -> None:
    run = bench(AgentReply('{"title": ', USED, "m", stop_reason=stop))
    with pytest.raises(errors.Malformed) as caught:
        run.run(max_tokens=77)
    assert hint in caught.value.hint
    assert run.outcomes == ["invalid"]
    assert run.records[0].cost_micro == 110
    if stop == "max_tokens":
        assert "77" in str(caught.value)


def test_a_reply_of_eleven_megabytes() -> None:
    run = bench("é" * (MAX_REPLY_BYTES // 2 + 1))
    with pytest.raises(errors.OutputTooLarge, match="10 MB"):
        run.run(schema=None)
    assert [(r.outcome, r.cost_micro) for r in run.records] == [("invalid", 110)]


def test_a_reply_of_ten_megabytes() -> None:
    assert len(bench("x" * MAX_REPLY_BYTES).run(schema=None).text) == MAX_REPLY_BYTES


def failure(error: errors.ProviderError, usage: Usage | None) -> errors.ProviderError:
    error.usage = usage
    return error


@pytest.mark.parametrize(
    ("error", "usage", "outcome", "cost"),
    [
        (errors.RateLimited("slow down"), Usage(), "rate_limited", 0),
        (errors.Retryable("late", kind="timeout"), None, "timeout", None),
        (errors.Retryable("gone", kind="connection"), Usage(), "connection", 0),
        (errors.Final("no such model", kind="unknown_model"), Usage(), "unknown_model", 0),
        (errors.Malformed("not readable"), None, "invalid_output", None),
        (errors.Refused("no"), USED, "refused", 110),
    ],
)
def test_a_failed_call_is_recorded(
    error: errors.ProviderError, usage: Usage | None, outcome: str, cost: int | None
) -> None:
    run = bench(failure(error, usage))
    with pytest.raises(type(error)) as caught:
        run.run()
    assert caught.value is error
    assert [(r.outcome, r.cost_micro) for r in run.records] == [(outcome, cost)]


def test_a_repair_that_fails_keeps_the_first_call_in_the_ledger() -> None:
    run = bench({}, failure(errors.Retryable("HTTP 500"), Usage()))
    with pytest.raises(errors.Retryable):
        run.run()
    assert [(r.ordinal, r.outcome, r.cost_micro) for r in run.records] == [(1, "invalid", 110), (2, "server", 0)]


def test_cancelled() -> None:
    run = bench(errors.Cancelled())
    with pytest.raises(errors.Cancelled):
        run.run()
    assert [(r.outcome, r.cost_micro) for r in run.records] == [("cancelled", None)]


def test_a_reply_that_the_transport_gave_up_on() -> None:
    run = bench(errors.OutputTooLarge("64 MB"))
    with pytest.raises(errors.OutputTooLarge):
        run.run()
    assert [(r.outcome, r.cost_micro) for r in run.records] == [("invalid", None)]


def test_the_timeout_is_for_all_rounds_together() -> None:
    run = bench({}, {}, GOOD, takes=4.0)
    run.run(timeout=10.0)
    assert [call.timeout for call in run.script.calls] == [10.0, 6.0, 2.0]


def test_no_time_for_a_repair() -> None:
    run = bench({}, takes=11.0)
    with pytest.raises(errors.Retryable) as caught:
        run.run(timeout=10.0)
    assert caught.value.kind == "timeout"
    assert run.outcomes == ["invalid"]


def test_unpriced_is_unknown_not_free() -> None:
    run = bench(AgentReply("text", USED, "unpriced-1"))
    # The model that was asked for has a price, the one that answered has none yet.
    assert run.run(schema=None).cost_micro == 110
    run = bench(AgentReply("text", USED, "unpriced-1"))
    run.script.name = "x"
    call = AgentCall(model="unpriced", messages=[Message("user", "?")])
    result = conversation(run.script, call, TokenPricer(), run.records.append)
    assert result.cost_micro is None
    assert result.usage == USED
