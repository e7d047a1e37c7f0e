"""Replies that no documentation promises, in every form: each call has its row, and nothing unknown is free or fine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from gorgon_common import errors
from gorgon_common.costs.prices import GenaiPricer, Override, read_overrides
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.agent import AgentResult
from gorgon_common.engine.ports import AgentCall, Message
from gorgon_worker.providers.anthropic import AnthropicProvider
from gorgon_worker.providers.openai import OpenAIProvider
from tests.support.calls import conversation
from tests.support.model_server import ModelServer, Say, model_server

NAMES = ["responses", "responses-streamed", "chat", "chat-streamed", "anthropic", "anthropic-streamed"]
PRICES = read_overrides(
    "- {provider: anthropic, model: claude-sonnet-5-5, from: 2026-01-01, reason: fixed, prices: {input: 3, output: 15}}"
)
SCHEMA = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}
USED = {"input": 1000, "output": 1000}


@dataclass
class Bench:
    """An adapter, the server that it talks to, and a conversation over both."""

    name: str
    server: ModelServer
    adapter: Any
    records: list[CallRecord] = field(default_factory=list)

    @property
    def form(self) -> str:
        return self.name.partition("-")[0]

    @property
    def streamed(self) -> bool:
        return self.name.endswith("streamed")

    def ask(self, *said: Say, schema: Any = None, own: list[Override] | None = None) -> AgentResult:
        self.server.say(*said)
        self.records = []
        provider = "anthropic" if self.form == "anthropic" else "openai"
        model = "claude-sonnet-5-5" if provider == "anthropic" else "gpt-5"
        made = AgentCall(model=model, messages=[Message("user", "hello")], schema=schema, timeout=20.0)
        return conversation(self.adapter, made, GenaiPricer(own=own or PRICES), self.records.append, name=provider)

    def fails(self, kind: type[errors.StepError], *said: Say, **call: Any) -> Any:
        with pytest.raises(kind) as caught:
            self.ask(*said, **call)
        assert type(caught.value) is kind
        return caught.value

    def counts(self, read: Any, written: Any, **more: Any) -> dict[str, Any]:
        names = ("prompt_tokens", "completion_tokens") if self.form == "chat" else ("input_tokens", "output_tokens")
        return {**dict(zip(names, (read, written), strict=True)), **more}


@pytest.fixture(params=NAMES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    form, _, way = request.param.partition("-")
    with model_server() as server:
        options: dict[str, Any] = {"api_key": "k", "stream_above": 0 if way else 10**9}
        if form == "anthropic":
            adapter: Any = AnthropicProvider(**options, base_url=server.url)
        else:
            adapter = OpenAIProvider(**options, base_url=f"{server.url}/v1", api=form)
        yield Bench(request.param, server, adapter)
        adapter.close()


def test_usage_that_is_none_is_unknown_and_never_free(bench: Bench) -> None:
    wrong: list[Any] = [None, [], "many", 7, {}, bench.counts(0, 0), bench.counts(5, None), bench.counts(None, 5)]
    wrong += [bench.counts(odd, 5) for odd in (-1, "many", 1.5, 10**12, float("nan"), float("inf"), {}, [3])]
    wrong += [bench.counts(5, odd) for odd in (-1, "many", 1.5, 10**12, float("nan"))]
    cached = {"cache_read_input_tokens": -4} if bench.form == "anthropic" else {
        "prompt_tokens_details": {"cached_tokens": 50}, "input_tokens_details": {"cached_tokens": 50}}  # fmt: skip
    wrong.append(bench.counts(5, 5, **cached))
    for usage in wrong:
        result = bench.ask(Say(reply={"text": "fine", "raw_usage": usage}))
        (record,) = bench.records
        assert (result.text, record.outcome) == ("fine", "ok"), usage
        assert (record.cost_micro, record.measured, result.cost_micro) == (None, False, None), usage


def test_usage_that_is_written_otherwise_is_read(bench: Bench) -> None:
    for usage in (bench.counts(1000.0, 1000.0), bench.counts("1000", 1000)):
        bench.ask(Say(reply={"text": "fine", "raw_usage": usage}))
        assert bench.records[0].usage == Usage(input_tokens=1000, output_tokens=1000)
    if bench.form == "anthropic":
        return
    for usage in (bench.counts(1000, 400, total_tokens=2000), bench.counts(1000, None, total_tokens=2000)):
        # Reasoning that only the total counts is paid as output.
        bench.ask(Say(reply={"text": "fine", "raw_usage": usage}))
        assert bench.records[0].usage == Usage(input_tokens=1000, output_tokens=1000)


def test_what_is_free_is_free_without_a_count(bench: Bench) -> None:
    free = read_overrides(
        "- {provider: openai, model: gpt-5, from: 2026-01-01, reason: ok, prices: {input: 0, output: 0}}\n"
        "- {provider: anthropic, model: claude-sonnet-5-5, from: 2026-01-01, reason: ok, prices: {input: 0, output: 0}}"
    )
    assert bench.ask(Say(reply={"text": "fine", "raw_usage": None}), own=free).cost_micro == 0


def test_an_end_that_nobody_knows_is_no_success(bench: Bench) -> None:
    words = ["error", "abort", "tool_calls", "tool_use", "model_length", "something new", None, "", 7]
    for finish in words:
        self_made = Say(reply={"text": "half an ans", "raw_stop": finish, "usage": USED})
        with pytest.raises((errors.Malformed, errors.Retryable)) as caught:
            bench.ask(self_made)
        (record,) = bench.records
        assert record.outcome in ("invalid", "invalid_output", "server"), finish
        assert (record.cost_micro, record.usage.output_tokens) == (bench_cost(bench), 1000), finish
        assert caught.value.retryable


def bench_cost(bench: Bench) -> int:
    return 18_000 if bench.form == "anthropic" else 11_250


def test_an_empty_reply_is_none(bench: Bench) -> None:
    error = bench.fails(errors.Malformed, Say(reply={"text": " \n", "usage": USED}))
    assert "is empty" in error.message
    assert [(record.outcome, record.cost_micro) for record in bench.records] == [("invalid", bench_cost(bench))]


def test_json_that_cannot_be_kept_is_sent_back(bench: Bench) -> None:
    wrong = ["[" * 3000, '{"n": NaN}', '{"n": Infinity}', '{"n": 1e999}', '{"n": "\\ud800"}']
    for text in wrong:
        said = [Say(reply={"text": text, "usage": USED})] * 3
        error = bench.fails(errors.Malformed, *said, schema=SCHEMA)
        assert "is not JSON" in error.message, text[:20]
        assert [record.outcome for record in bench.records] == ["invalid"] * 3
        assert sum(record.cost_micro or 0 for record in bench.records) == 3 * bench_cost(bench)


def test_a_body_that_is_nested_too_deeply(bench: Bench) -> None:
    bench.fails(errors.Malformed, Say(raw=b"[" * 100_000))
    assert [(record.outcome, record.measured) for record in bench.records] == [("invalid_output", False)]
    assert "nested too deeply" in bench.fails(errors.Malformed, Say(raw=b"[" * 100_000)).message


def test_an_error_inside_a_success(bench: Bench) -> None:
    error = {"error": {"code": 429, "message": "upstream quota reached"}}
    limited = bench.fails(errors.RateLimited, Say(raw=json.dumps(error).encode(), headers={"retry-after": "7"}))
    assert ("upstream quota reached" in limited.message, limited.retry_after) == (True, 7.0)
    assert [record.cost_micro for record in bench.records] == [0], "a call that was refused is not charged"
    for body, kind in (
        ({"error": {"code": 503, "message": "no capacity"}}, errors.Retryable),
        ({"error": "no capacity"}, errors.Retryable),
        ({"error": {"code": "invalid_api_key", "message": "no capacity"}}, errors.Final),
        ({"error": {"code": 400, "message": "no capacity", "status": "INVALID_ARGUMENT"}}, errors.Final),
    ):
        assert "no capacity" in bench.fails(kind, Say(raw=json.dumps(body).encode())).message
        assert [record.outcome for record in bench.records] != ["ok"]
    bench.fails(errors.Retryable, Say(raw=json.dumps({"error": {"code": 500, "message": "x"}}).encode()))
    assert [record.cost_micro for record in bench.records] == [None]


def test_names_and_ids_of_other_types(bench: Bench) -> None:
    for odd in (None, 5, ["gpt-5"], {"a": 1}):
        result = bench.ask(Say(reply={"text": "fine", "usage": USED, "raw_more": {"model": odd, "id": odd}}))
        assert result.cost_micro == bench_cost(bench), odd
        assert isinstance(bench.records[0].request_id, (str, type(None)))


def test_the_same_body_costs_the_same_streamed_or_not(bench: Bench) -> None:
    tier = {"anthropic": {}, "chat": {"tier": "priority"}, "responses": {"tier": "priority"}}[bench.form]
    result = bench.ask(Say(reply={"text": "fine", "usage": USED, **tier}))
    assert result.cost_micro == (18_000 if bench.form == "anthropic" else 22_500)
    (record,) = bench.records
    assert record.service_tier == (tier.get("tier") or "standard")
    assert record.request_id in ("chatcmpl-1", "resp_1", "msg_1")


def test_halves_of_characters(bench: Bench) -> None:
    result = bench.ask(Say(reply={"text": "a\ud800b 😀", "usage": USED}))
    assert result.text == "a\ufffdb 😀"


def test_text_in_parts(bench: Bench) -> None:
    if bench.form != "chat":
        return
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "hello"}, "!"]
    assert bench.ask(Say(reply={"raw_text": parts, "usage": USED})).text == "hello!"
    bench.fails(errors.Malformed, Say(reply={"raw_text": 17, "usage": USED}))
    assert [record.cost_micro for record in bench.records] == [11_250]


def test_a_choice_that_failed(bench: Bench) -> None:
    if bench.form != "chat":
        return
    choice = {"index": 0, "finish_reason": "error", "error": {"code": 502, "message": "upstream broke"},
              "delta" if bench.streamed else "message": {"role": "assistant", "content": "half"}}  # fmt: skip
    body = {"id": "c", "model": "gpt-5", "choices": [choice],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 1000}}  # fmt: skip
    raw = json.dumps(body)
    said = f"data: {raw}\n\ndata: [DONE]\n\n" if bench.streamed else raw
    error = bench.fails(errors.Retryable, Say(raw=said.encode()))
    assert "upstream broke" in error.message
    assert [(record.outcome, record.cost_micro) for record in bench.records] == [("server", 11_250)]


def test_a_stream_that_breaks_off_is_unknown(bench: Bench) -> None:
    error = bench.fails(errors.Retryable, Say(reply={"text": "x" * 4000, "usage": USED}, end="truncate"))
    assert error.kind == "connection"
    assert [(record.outcome, record.cost_micro, record.measured) for record in bench.records] == [
        ("connection", None, False)
    ]
