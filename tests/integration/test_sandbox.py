"""The sandbox as a process, through the real SDKs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from jsonschema import validate
from pydantic import BaseModel

from gorgon_common.roles.catalogue import load_roles
from tests.support import sandbox as support
from tests.support.sandbox import ROOT, Sandbox, start_sandbox

sandbox_process = support.sandbox_process
sandbox = support.sandbox

GPT = "gpt-5.4"
CLAUDE = "claude-sonnet-5-5"
REQUEST = "Write a CSV importer for customer addresses"


class Task(BaseModel):
    id: str
    title: str
    depends_on: list[str]


class Plan(BaseModel):
    tasks: list[Task]
    risks: list[str]
    size: Literal["small", "large"]
    approved: bool


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"summary": {"type": "string"}, "passed": {"type": "boolean"}},
    "required": ["summary", "passed"],
    "additionalProperties": False,
}
RATE_LIMITED: Any = (openai.RateLimitError, anthropic.RateLimitError)
OPENAI_FORMAT: Any = {"format": {"type": "json_schema", "name": "verdict", "schema": SCHEMA, "strict": True}}
ANTHROPIC_FORMAT: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}


@pytest.fixture
def gpt(sandbox: Sandbox) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=sandbox.openai_url, api_key="sk-test", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(sandbox: Sandbox) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=sandbox.url, api_key="sk-test", max_retries=0) as client:
        yield client


def ask_gpt(client: openai.OpenAI, prompt: Any = REQUEST, **fields: Any) -> Any:
    return client.responses.create(**{"model": GPT, "input": prompt, **fields})


def ask_claude(client: anthropic.Anthropic, prompt: str = REQUEST, **fields: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    return client.messages.create(**{"model": CLAUDE, "max_tokens": 2000, "messages": messages, **fields})


@dataclass
class Ask:
    """A call to either provider with a prompt."""

    provider: str
    client: Any

    def __call__(self, prompt: str = REQUEST, **fields: Any) -> Any:
        return (ask_gpt if self.provider == "openai" else ask_claude)(self.client, prompt, **fields)


@pytest.fixture(params=["openai", "anthropic"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return Ask(request.param, request.getfixturevalue("gpt" if request.param == "openai" else "claude"))


def text_of(reply: Any) -> str:
    return reply.output_text if hasattr(reply, "output_text") else "".join(b.text for b in reply.content)


def status_of(ask: Ask, prompt: str = REQUEST) -> int:
    try:
        ask(prompt)
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        return error.status_code
    return 200


# replies


def test_plain_replies_speak_of_the_prompt(ask: Ask) -> None:
    assert "importer" in text_of(ask())


def test_a_builder_writes_code(gpt: openai.OpenAI) -> None:
    assert "```python" in ask_gpt(gpt, instructions="Role: builder\n\nYou write code.").output_text


def test_structured_replies_of_openai(gpt: openai.OpenAI) -> None:
    parsed = gpt.responses.parse(model=GPT, instructions="Role: planner", input=REQUEST, text_format=Plan).output_parsed
    assert parsed is not None
    assert parsed.approved
    assert 4 <= len(parsed.tasks) <= 5
    messages: Any = [{"role": "system", "content": "Role: planner"}, {"role": "user", "content": REQUEST}]
    chat = gpt.chat.completions.parse(model=GPT, messages=messages, response_format=Plan).choices[0]
    assert chat.finish_reason == "stop"
    assert chat.message.parsed is not None
    assert chat.message.parsed.tasks[0].id == "t1"


def test_structured_replies_of_anthropic(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": REQUEST}]
    reply = claude.messages.parse(
        model=CLAUDE, max_tokens=4000, system="Role: planner", messages=messages, output_format=Plan
    )
    assert reply.stop_reason == "end_turn"
    assert reply.parsed_output is not None
    assert reply.parsed_output.approved
    assert reply.parsed_output.tasks[0].depends_on == []


@pytest.mark.parametrize("name", sorted(load_roles()))
def test_every_role_gets_what_its_schema_asks_for(name: str, ask: Ask) -> None:
    role = load_roles()[name]
    schema = json.loads(json.dumps(role.output_schema))
    if ask.provider == "openai":
        form = {"format": {"type": "json_schema", "name": "reply", "schema": schema, "strict": True}}
        reply = ask(instructions=role.system, text=form, max_output_tokens=role.max_tokens)
    else:
        form = {"format": {"type": "json_schema", "schema": schema}}
        reply = ask(system=role.system, output_config=form, max_tokens=role.max_tokens)
    data = json.loads(text_of(reply))
    validate(data, schema)
    assert all(data[verdict] is True for verdict in ("approved", "passed", "completed") if verdict in data)


def test_streams_of_the_responses_api(gpt: openai.OpenAI) -> None:
    whole = ask_gpt(gpt)
    with gpt.responses.stream(model=GPT, input=REQUEST) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [e.type for e in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert (final.output_text, final.usage) == (whole.output_text, whole.usage)


def test_streams_of_chat_completions(gpt: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": REQUEST}]
    whole = gpt.chat.completions.create(model=GPT, messages=messages)
    chunks = list(
        gpt.chat.completions.create(model=GPT, messages=messages, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_streams_of_anthropic(claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": REQUEST}]
    thinking: Any = {"type": "adaptive"}
    whole = ask_claude(claude, thinking=thinking)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    with claude.messages.stream(model=CLAUDE, max_tokens=2000, messages=messages, thinking=thinking) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[1].text
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert (final.usage.output_tokens, final.stop_reason) == (whole.usage.output_tokens, "end_turn")
    assert final.usage.output_tokens_details is not None
    assert final.usage.output_tokens_details.thinking_tokens > 0


def test_tools_are_called_once(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    tool = {"type": "function", "name": "look_up", "parameters": SCHEMA}
    call = ask_gpt(gpt, tools=[tool]).output[-1]
    assert (call.type, call.name) == ("function_call", "look_up")
    validate(json.loads(call.arguments), SCHEMA)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "found"}
    assert ask_gpt(gpt, [{"role": "user", "content": REQUEST}, call.to_dict(), result], tools=[tool]).output_text

    block = {"name": "look_up", "input_schema": SCHEMA}
    reply = ask_claude(claude, tools=[block], tool_choice={"type": "tool", "name": "look_up"})
    assert (reply.stop_reason, reply.content[-1].type) == ("tool_use", "tool_use")
    validate(reply.content[-1].input, SCHEMA)
    messages: Any = [{"role": "user", "content": REQUEST}]
    with claude.messages.stream(model=CLAUDE, max_tokens=900, messages=messages, tools=[block]) as stream:  # type: ignore[list-item]
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"


def test_models_and_embeddings(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert GPT in [model.id for model in gpt.models.list()]
    assert CLAUDE in [model.id for model in claude.models.list()]
    assert (gpt.models.retrieve(GPT).id, claude.models.retrieve(CLAUDE).id) == (GPT, CLAUDE)
    texts = ["red apples and green pears", "green pears and red plums", "a database of invoices"]
    reply = gpt.embeddings.create(model="text-embedding-3-small", input=texts, dimensions=256)
    first, near, far = (item.embedding for item in reply.data)
    assert len(first) == 256

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert dot(first, first) == pytest.approx(1.0, abs=1e-5)
    assert dot(first, near) > dot(first, far) + 0.3


# the same call, the same reply


def test_replies_depend_on_seed_and_request_alone() -> None:
    prompts = [f"{REQUEST} number {number}" for number in range(6)]

    def replies(seed: int, order: list[str]) -> dict[str, str]:
        with (
            start_sandbox(seed=seed) as running,
            openai.OpenAI(base_url=running.openai_url, api_key="sk-x", max_retries=0) as client,
        ):
            return {prompt: ask_gpt(client, prompt, text=OPENAI_FORMAT).output_text for prompt in order}

    first = replies(1, prompts)
    assert replies(1, prompts[::-1]) == first
    assert replies(2, prompts) != first
    assert len(set(first.values())) > 1


# usage


def test_tokens_are_counted(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    short, long = ask_gpt(gpt, "word " * 100).usage, ask_gpt(gpt, "word " * 1100).usage
    assert long.input_tokens - short.input_tokens == 1250
    assert short.total_tokens == short.input_tokens + short.output_tokens
    assert ask_gpt(gpt, reasoning={"effort": "high"}).usage.output_tokens_details.reasoning_tokens > 50
    assert ask_gpt(gpt, reasoning={"effort": "none"}).usage.output_tokens_details.reasoning_tokens == 0
    messages: Any = [{"role": "user", "content": REQUEST}]
    counted = claude.messages.count_tokens(model=CLAUDE, messages=messages, system="Be brief.")
    assert ask_claude(claude, system="Be brief.").usage.input_tokens == counted.input_tokens


def test_openai_caches_long_beginnings(gpt: openai.OpenAI) -> None:
    instructions = "Role: builder\n" + "You write code with care. " * 400
    cold, warm = (ask_gpt(gpt, model="gpt-5.6-sol", instructions=instructions).usage for _ in range(2))
    assert (cold.input_tokens_details.cached_tokens, warm.input_tokens_details.cache_write_tokens) == (0, 0)
    assert warm.input_tokens_details.cached_tokens == cold.input_tokens_details.cache_write_tokens > 1024
    assert warm.input_tokens == cold.input_tokens


@pytest.mark.parametrize("ttl", ["5m", "1h"])
def test_anthropic_caches_what_is_marked(claude: anthropic.Anthropic, ttl: str) -> None:
    control = {"type": "ephemeral", "ttl": ttl}
    system = [{"type": "text", "text": f"You write code with care, {ttl}. " * 400, "cache_control": control}]
    cold, warm = (ask_claude(claude, system=system).usage for _ in range(2))
    written = cold.cache_creation_input_tokens
    assert written > 1024
    assert (warm.cache_read_input_tokens, warm.cache_creation_input_tokens) == (written, 0)
    by_ttl = {"5m": cold.cache_creation.ephemeral_5m_input_tokens, "1h": cold.cache_creation.ephemeral_1h_input_tokens}
    assert by_ttl == {"5m": 0, "1h": 0, ttl: written}
    assert cold.input_tokens == warm.input_tokens < 100


def test_usage_can_be_dictated(gpt: openai.OpenAI) -> None:
    usage = ask_gpt(gpt, '[[sandbox: usage={"input": 5000, "cached": 4096, "output": 70, "reasoning": 20}]]').usage
    assert (usage.input_tokens, usage.output_tokens) == (5000, 70)
    assert usage.input_tokens_details.cached_tokens == 4096
    assert usage.output_tokens_details.reasoning_tokens == 20


def test_the_bill_is_what_the_sdks_saw(sandbox: Sandbox, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    seen = [ask_gpt(gpt, f"{REQUEST} {number}").usage for number in range(3)]
    told = ask_claude(claude).usage
    bill = sandbox.bill()["sk-test"]
    assert bill["openai"][GPT]["calls"] == 3
    assert bill["openai"][GPT]["input"] == sum(usage.input_tokens for usage in seen)
    assert bill["openai"][GPT]["output"] == sum(usage.output_tokens for usage in seen)
    assert bill["anthropic"][CLAUDE] == {"calls": 1, "input": told.input_tokens, "output": told.output_tokens}


# how a reply ends


def test_max_tokens_cut_a_reply(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    cut = ask_gpt(gpt, max_output_tokens=20)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.usage.output_tokens <= 20
    with gpt.responses.stream(model=GPT, input=REQUEST, max_output_tokens=20) as stream:
        assert [e.type for e in stream][-1] == "response.incomplete"
    messages: Any = [{"role": "user", "content": REQUEST}]
    chat = gpt.chat.completions.create(model=GPT, messages=messages, max_completion_tokens=5)
    assert chat.choices[0].finish_reason == "length"
    assert ask_claude(claude, max_tokens=7).stop_reason == "max_tokens"


def test_refusals(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    refused = ask_gpt(gpt, "[[sandbox: refuse]]", text=OPENAI_FORMAT).output[-1].content[0]
    assert refused.type == "refusal"
    assert "sorry" in refused.refusal
    messages: Any = [{"role": "user", "content": "[[sandbox: refuse]]"}]
    choice = gpt.chat.completions.create(model=GPT, messages=messages).choices[0]
    assert (choice.message.content, choice.finish_reason) == (None, "stop")
    assert choice.message.refusal
    with gpt.responses.stream(model=GPT, input="[[sandbox: refuse]]") as stream:
        assert "response.refusal.done" in [e.type for e in stream]
    reply = ask_claude(claude, "[[sandbox: refuse]]")
    assert (reply.stop_reason, reply.stop_details.type, reply.content) == ("refusal", "refusal", [])


@pytest.mark.parametrize(("stop", "reason"), [("pause", "pause_turn"), ("context", "model_context_window_exceeded")])
def test_other_stops_of_anthropic(claude: anthropic.Anthropic, stop: str, reason: str) -> None:
    assert ask_claude(claude, f"[[sandbox: stop={stop}]]").stop_reason == reason
    cut = ask_claude(claude, "[[sandbox: text=one two STOP three]]", stop_sequences=["STOP"])
    assert (cut.stop_reason, cut.stop_sequence, cut.content[0].text) == ("stop_sequence", "STOP", "one two ")


# errors


@pytest.mark.parametrize(
    ("key", "prompt", "fields", "kind", "code"),
    [
        ("bad-key", REQUEST, {}, openai.AuthenticationError, "invalid_api_key"),
        ("broke", REQUEST, {}, openai.RateLimitError, "insufficient_quota"),
        ("sk", REQUEST, {"model": "unknown-1"}, openai.NotFoundError, "model_not_found"),
        ("sk", REQUEST, {"max_output_tokens": 3}, openai.BadRequestError, "integer_below_min_value"),
        ("sk", REQUEST, {"extra_body": {"max_tokens": 9}}, openai.BadRequestError, "unknown_parameter"),
        ("sk", REQUEST, {"reasoning": {"effort": "huge"}}, openai.BadRequestError, "invalid_value"),
        ("sk", "x" * 4_200_000, {}, openai.BadRequestError, "context_length_exceeded"),
        ("sk", "[[sandbox: status=429]]", {}, openai.RateLimitError, "rate_limit_exceeded"),
        ("sk", "[[sandbox: status=429 code=insufficient_quota]]", {}, openai.RateLimitError, "insufficient_quota"),
        ("sk", "[[sandbox: status=500]]", {}, openai.InternalServerError, None),
        ("sk", "[[sandbox: status=503]]", {}, openai.InternalServerError, None),
        ("sk", "[[sandbox: status=400 message=no such thing]]", {}, openai.BadRequestError, None),
        ("sk", "[[sandbox: stattus=400]]", {}, openai.BadRequestError, None),
    ],
)
def test_errors_of_openai(
    sandbox: Sandbox, key: str, prompt: str, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str | None
) -> None:
    client = openai.OpenAI(base_url=sandbox.openai_url, api_key=key, max_retries=0)
    with client, pytest.raises(kind) as caught:
        ask_gpt(client, prompt, **fields)
    assert caught.value.code == code
    assert caught.value.request_id
    again = caught.value.status_code >= 429 and code != "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == str(again).lower()
    assert sandbox.log()[-1]["status"] == caught.value.status_code


@pytest.mark.parametrize(
    ("key", "prompt", "fields", "kind", "status"),
    [
        ("bad-key", REQUEST, {}, "authentication_error", 401),
        ("broke", REQUEST, {}, "billing_error", 402),
        ("sk", REQUEST, {"model": "unknown-1"}, "not_found_error", 404),
        ("sk", REQUEST, {"extra_body": {"maximum": 9}}, "invalid_request_error", 400),
        ("sk", REQUEST, {"max_tokens": 0}, "invalid_request_error", 400),
        ("sk", REQUEST, {"output_config": {"effort": "huge"}}, "invalid_request_error", 400),
        ("sk", REQUEST, {"extra_headers": {"anthropic-version": ""}}, "invalid_request_error", 400),
        ("sk", "x" * 4_200_000, {}, "invalid_request_error", 400),
        ("sk", "[[sandbox: status=429]]", {}, "rate_limit_error", 429),
        ("sk", "[[sandbox: status=500]]", {}, "api_error", 500),
        ("sk", "[[sandbox: status=529]]", {}, "overloaded_error", 529),
    ],
)
def test_errors_of_anthropic(
    sandbox: Sandbox, key: str, prompt: str, fields: dict[str, Any], kind: str, status: int
) -> None:
    client = anthropic.Anthropic(base_url=sandbox.url, api_key=key, max_retries=0)
    with client, pytest.raises(anthropic.APIStatusError) as caught:
        ask_claude(client, prompt, **fields)
    assert (caught.value.type, caught.value.status_code) == (kind, status)
    assert caught.value.request_id


def test_a_schema_that_the_provider_would_not_take(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    loose = {**SCHEMA, "additionalProperties": True}
    with pytest.raises(openai.BadRequestError, match="additionalProperties"):
        ask_gpt(gpt, text={"format": {"type": "json_schema", "name": "x", "schema": loose, "strict": True}})
    partial = {**SCHEMA, "required": ["summary"]}
    with pytest.raises(openai.BadRequestError, match="Missing 'passed'"):
        ask_gpt(gpt, text={"format": {"type": "json_schema", "name": "x", "schema": partial, "strict": True}})
    with pytest.raises(anthropic.BadRequestError, match="additionalProperties"):
        ask_claude(claude, output_config={"format": {"type": "json_schema", "schema": loose}})
    bounded = {**SCHEMA, "properties": {**SCHEMA["properties"], "score": {"type": "integer", "minimum": 0}}}
    with pytest.raises(anthropic.BadRequestError, match="minimum"):
        ask_claude(claude, output_config={"format": {"type": "json_schema", "schema": bounded}})


def test_a_body_of_another_shape(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError, match="shape"):
        ask_gpt(gpt, extra_body={"tools": ["search"]})
    with pytest.raises(anthropic.BadRequestError, match="shape"):
        ask_claude(claude, extra_body={"output_config": "json"})


def test_a_missing_key(sandbox: Sandbox) -> None:
    with pytest.raises(Exception, match="401"):
        sandbox.ask("POST", "/v1/responses", {"model": GPT, "input": "x"})
    assert [entry["status"] for entry in sandbox.log()] == [401]


# limits


def test_openai_says_how_much_is_left(sandbox: Sandbox, gpt: openai.OpenAI) -> None:
    sandbox.limits({"provider": "openai", "requests": 60, "tokens": 60_000})
    headers = gpt.responses.with_raw_response.create(model=GPT, input=REQUEST, max_output_tokens=1000).headers
    used = sandbox.bill()["sk-test"]["openai"][GPT]
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "59"
    assert headers["x-ratelimit-limit-tokens"] == "60000"
    assert int(headers["x-ratelimit-remaining-tokens"]) == 60_000 - used["input"] - used["output"]
    assert re.fullmatch(r"(\d+ms|1s)", headers["x-ratelimit-reset-requests"])
    assert re.fullmatch(r"\d+ms", headers["x-ratelimit-reset-tokens"])


def test_anthropic_says_how_much_is_left(sandbox: Sandbox, claude: anthropic.Anthropic) -> None:
    sandbox.limits({"provider": "anthropic", "requests": 50, "input_tokens": 30_000, "output_tokens": 8_000})
    raw = claude.messages.with_raw_response.create(
        model=CLAUDE, max_tokens=500, messages=[{"role": "user", "content": REQUEST}]
    )
    usage = raw.parse().usage
    found = {
        name.removeprefix("anthropic-ratelimit-"): value for name, value in raw.headers.items() if "ratelimit" in name
    }
    kinds = ("requests", "tokens", "input-tokens", "output-tokens")
    assert set(found) == {f"{kind}-{what}" for kind in kinds for what in ("limit", "remaining", "reset")}
    assert (found["requests-limit"], found["requests-remaining"]) == ("50", "49")
    assert int(found["input-tokens-remaining"]) == 30_000 - usage.input_tokens
    assert int(found["output-tokens-remaining"]) == 8_000 - usage.output_tokens
    reset = datetime.fromisoformat(found["output-tokens-reset"])
    assert reset.tzinfo is not None
    assert -1 < reset.timestamp() - time.time() < 10


def test_requests_over_the_limit_wait(sandbox: Sandbox, ask: Ask) -> None:
    sandbox.limits({"requests": 3, "per": 600})
    assert [status_of(ask, f"{REQUEST} {number}") for number in range(5)] == [200, 200, 200, 429, 429]
    with pytest.raises(RATE_LIMITED) as caught:
        ask()
    headers = caught.value.response.headers
    assert 190 <= int(headers["retry-after"]) <= 200
    if "x-ratelimit-limit-requests" in headers:
        assert 190_000 < int(headers["retry-after-ms"]) <= 200_000
    assert sandbox.count("status") == [{"status": 200, "count": 3}, {"status": 429, "count": 3}]


def test_a_429_without_retry_after(sandbox: Sandbox, ask: Ask) -> None:
    sandbox.limits({"requests": 1, "per": 600, "retry_after": False})
    ask()
    with pytest.raises(RATE_LIMITED) as caught:
        ask()
    assert "retry-after" not in caught.value.response.headers


def test_fixed_windows(sandbox: Sandbox, ask: Ask) -> None:
    sandbox.limits({"requests": 2, "per": 3600, "mode": "window", "window": 3600})
    assert [status_of(ask) for _ in range(3)] == [200, 200, 429]


def test_accounts_do_not_share_a_limit(sandbox: Sandbox) -> None:
    sandbox.limits({"account": "small", "requests": 1, "per": 600})
    for key, expected in (("small", [200, 429]), ("large", [200, 200])):
        with openai.OpenAI(base_url=sandbox.openai_url, api_key=key, max_retries=0) as client:
            assert [status_of(Ask("openai", client)) for _ in range(2)] == expected


def test_a_request_larger_than_the_limit(sandbox: Sandbox, gpt: openai.OpenAI) -> None:
    sandbox.limits({"tokens": 500})
    with pytest.raises(openai.RateLimitError, match="Request too large"):
        ask_gpt(gpt, max_output_tokens=4000)


def test_a_quota_is_used_up(sandbox: Sandbox, ask: Ask) -> None:
    sandbox.limits({"quota_tokens": 10})
    assert status_of(ask) == 200
    assert status_of(ask) in (402, 429)
    assert sandbox.log()[-1]["error"] in ("insufficient_quota", "billing_error")


def test_calls_in_flight_are_bounded(sandbox: Sandbox, ask: Ask) -> None:
    sandbox.limits({"concurrent": 2})
    with ThreadPoolExecutor(6) as pool:
        prompts = [f"[[sandbox: delay=500ms]] {number}" for number in range(6)]
        statuses = list(pool.map(lambda prompt: status_of(ask, prompt), prompts))
    assert sorted(statuses) == [200, 200, 429, 429, 429, 429]
    assert status_of(ask) == 200


# faults


def test_a_fault_ends_after_its_times(ask: Ask) -> None:
    prompt = "[[sandbox: status=500 times=2 key=abc]] do it"
    assert [status_of(ask, prompt) for _ in range(3)] == [500, 500, 200]


def test_rules_of_faults(sandbox: Sandbox, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    [number] = sandbox.faults({"provider": "openai", "role": "planner", "nth": 2, "status": 503, "retry_after": 3})
    planner = {"instructions": "Role: planner"}
    ask_gpt(gpt)
    ask_gpt(gpt, **planner)
    with pytest.raises(openai.InternalServerError) as caught:
        ask_gpt(gpt, **planner)
    assert caught.value.response.headers["retry-after"] == "3"
    ask_gpt(gpt, **planner)
    ask_claude(claude, system="Role: planner")
    state = sandbox.ask("GET", "/_faults")["faults"][0]
    assert (state["id"], state["matched"], state["fired"]) == (number, 3, 1)
    sandbox.ask("DELETE", f"/_faults/{number}")
    assert sandbox.ask("GET", "/_faults")["faults"] == []


@pytest.mark.parametrize("trigger", ["truncate", "drop", "reset"])
@pytest.mark.parametrize("stream", [False, True])
def test_broken_connections(sandbox: Sandbox, ask: Ask, trigger: str, stream: bool) -> None:
    with pytest.raises(Exception, match=r"Connection error|peer closed|disconnected|incomplete") as caught:
        for _ in ask(f"[[sandbox: {trigger}]]", stream=stream):
            pass
    assert not isinstance(caught.value, openai.APIStatusError | anthropic.APIStatusError)
    entry = sandbox.log()[-1]
    done = trigger != "reset"
    assert (entry["status"], entry["delivered"], entry["usage"] is not None) == (200 if done else 0, False, done)
    assert bool(sandbox.bill()) is done


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_no_json(sandbox: Sandbox, ask: Ask, stream: bool) -> None:
    with pytest.raises(Exception, match=r"Expecting|delimiter|JSON|control|Unterminated"):
        for _ in ask("[[sandbox: malformed]]", stream=stream):
            pass
    assert sandbox.log()[-1]["faults"] == ["malformed"]


def test_an_error_in_the_middle_of_a_stream(sandbox: Sandbox, gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "[[sandbox: status=529 midway]]"}]
    with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
        list(claude.messages.create(model=CLAUDE, max_tokens=900, messages=messages, stream=True))
    with claude.messages.create(model=CLAUDE, max_tokens=900, messages=messages, stream=True) as begun:
        kinds = [next(begun).type for _ in range(3)]
    assert kinds == ["message_start", "content_block_start", "content_block_delta"]
    events = list(ask_gpt(gpt, "[[sandbox: status=500 midway]]", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"
    assert [item.sequence_number for item in events] == list(range(len(events)))
    with pytest.raises(openai.APIError, match="529"):
        list(gpt.chat.completions.create(model=GPT, messages=messages, stream=True))
    errors = [entry["error"] for entry in sandbox.log()]
    assert errors == ["overloaded_error", "overloaded_error", "server_error", "server_error"]
    assert status_of(Ask("openai", gpt), "[[sandbox: status=503 midway]]") == 503


def test_a_reply_that_misses_its_schema(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    prompt = "[[sandbox: wrong_schema times=1 key={}]]"
    first, second = (ask_gpt(gpt, prompt.format("g"), text=OPENAI_FORMAT).output_text for _ in range(2))
    assert json.loads(first).keys() < {"summary", "passed"}
    validate(json.loads(second), SCHEMA)
    first, second = (text_of(ask_claude(claude, prompt.format("c"), output_config=ANTHROPIC_FORMAT)) for _ in range(2))
    assert json.loads(first).keys() < {"summary", "passed"}
    validate(json.loads(second), SCHEMA)


def test_dictated_replies(ask: Ask) -> None:
    assert json.loads(text_of(ask('[[sandbox: json={"a": [[1]], "b": null}]]'))) == {"a": [[1]], "b": None}
    assert text_of(ask("[[sandbox: text=as you wish]]")) == "as you wish"


def test_a_huge_reply(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert len(ask_gpt(gpt, "[[sandbox: huge=10MB]]").output_text.encode()) == 10_000_000
    with gpt.responses.stream(model=GPT, input="[[sandbox: huge=2MB]]") as stream:
        assert len(stream.get_final_response().output_text) == 2_000_000
    data = json.loads(text_of(ask_claude(claude, "[[sandbox: huge=1MB]]", output_config=ANTHROPIC_FORMAT)))
    assert len(data["summary"].encode()) == 1_000_000
    assert data["passed"] is True


def test_a_reply_that_never_comes(sandbox: Sandbox, ask: Ask) -> None:
    with pytest.raises((openai.APITimeoutError, anthropic.APITimeoutError)):
        ask("[[sandbox: hang]]", timeout=0.2)
    assert sandbox.log()[-1]["status"] == 0


def test_a_client_that_goes_away_is_still_charged(sandbox: Sandbox, ask: Ask) -> None:
    with pytest.raises((openai.APITimeoutError, anthropic.APITimeoutError)):
        ask("[[sandbox: delay=400ms]]", timeout=0.1)
    assert sandbox.log()[-1]["status"] == 200
    assert sandbox.bill()


# the log


def test_the_log_tells_what_was_asked(sandbox: Sandbox, gpt: openai.OpenAI) -> None:
    prompt = f"[[sandbox: delay=1ms]]{REQUEST} " + "x" * 300
    headers = {"Idempotency-Key": "run-1/step-2"}
    reply = ask_gpt(gpt, prompt, instructions="Role: tester\nTest it.", extra_headers=headers)
    [entry] = sandbox.log()
    expected = {
        "provider": "openai",
        "operation": "responses",
        "account": "sk-test",
        "model": GPT,
        "role": "tester",
        "status": 200,
        "idempotency_key": "run-1/step-2",
        "prompt": (REQUEST + " " + "x" * 300)[:200],
        "faults": ["delay=0.001"],
        "request_id": reply._request_id,
        "delivered": True,
    }
    assert {name: entry[name] for name in expected} == expected
    assert entry["usage"]["output"] == reply.usage.output_tokens
    assert abs(entry["time"] - time.time()) < 10
    ask_gpt(gpt, prompt, instructions="Role: tester\nTest it.")
    ask_gpt(gpt, prompt + "y", instructions="Role: tester\nTest it.")
    digests = [item["digest"] for item in sandbox.log()]
    assert digests[0] == digests[1] != digests[2]
    assert sandbox.count("role") == [{"role": "tester", "count": 3}]
    assert sandbox.log(role="builder") == []
    assert len(sandbox.log(status=200, delivered="true")) == 3
    assert sandbox.count("faults") == [{"faults": '["delay=0.001"]', "count": 3}]


def test_long_keys_are_not_shown(sandbox: Sandbox) -> None:
    key = "sk-proj-" + "s3cret" * 10
    with openai.OpenAI(base_url=sandbox.openai_url, api_key=key, max_retries=0) as client:
        ask_gpt(client)
    account = sandbox.log()[0]["account"]
    assert account.startswith("sk-pro")
    assert "s3cret" not in json.dumps(sandbox.ask("GET", "/_log"))


def test_a_base_url_may_name_its_provider(sandbox: Sandbox) -> None:
    with openai.OpenAI(base_url=f"{sandbox.url}/openai/v1", api_key="a", max_retries=0) as client:
        assert ask_gpt(client).output_text
    with anthropic.Anthropic(base_url=f"{sandbox.url}/anthropic", api_key="a", max_retries=0) as client:
        assert CLAUDE in [model.id for model in client.models.list()]


# the process


def test_slow_replies_do_not_wait_for_each_other() -> None:
    with (
        start_sandbox(latency="500ms") as running,
        openai.OpenAI(base_url=running.openai_url, api_key="a", max_retries=0) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        ask_gpt(client)
        begin = time.perf_counter()
        list(pool.map(lambda number: ask_gpt(client, f"{REQUEST} {number}"), range(20)))
        assert 0.5 <= time.perf_counter() - begin < 1.2
        begin = time.perf_counter()
        with client.responses.stream(model=GPT, input=REQUEST) as stream:
            stream.until_done()
        assert 0.45 <= time.perf_counter() - begin < 3


def test_lifelike_latency() -> None:
    with start_sandbox(latency=None) as running, openai.OpenAI(base_url=running.openai_url, api_key="a") as client:
        ask_gpt(client)
        begin = time.perf_counter()
        ask_gpt(client)
        assert 0.08 <= time.perf_counter() - begin < 0.5


@contextlib.contextmanager
def run(*options: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "gorgon_api.sandbox", *options]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_sigterm_ends_it_at_once_even_with_calls_in_flight(tmp_path: Path) -> None:
    ready = tmp_path / "url"
    with run("--port", "0", "--latency", "30s", "--ready-file", str(ready)) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert ready.read_text().strip() == url
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            body = json.dumps({"model": GPT, "input": "x"})
            head = f"POST /v1/responses HTTP/1.1\r\nauthorization: Bearer a\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
            process.send_signal(signal.SIGTERM)
            begin = time.perf_counter()
            assert process.wait(5) == 0
            assert time.perf_counter() - begin < 1.0


def test_it_ends_when_standard_input_closes() -> None:
    with run("--port", "0", "--watch-stdin", stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.stdin.close()
        assert process.wait(5) == 0


def test_it_ends_with_its_parent() -> None:
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'gorgon_api.sandbox', '--port', '0'"
    script += ", '--exit-with-parent'], stdout=1); sys.stdin.readline()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("http://")
        os.kill(parent.pid, signal.SIGKILL)
        # The pipe is shared with the sandbox: it is at its end when the sandbox has gone too.
        assert parent.stdout.read() == ""


def test_a_port_that_is_taken(sandbox: Sandbox) -> None:
    with run("--port", sandbox.url.rsplit(":", 1)[1]) as process:
        _, said = process.communicate(timeout=10)
    assert process.returncode == 2
    assert "cannot listen" in said
    assert "--port 0" in said


@pytest.mark.parametrize("option", [["--latency", "soon"], ["--limits", '{"rpm": 1}'], ["--faults", "@/no/such/file"]])
def test_options_that_make_no_sense(option: list[str]) -> None:
    with run("--port", "0", *option) as process:
        _, said = process.communicate(timeout=10)
    assert process.returncode == 2
    assert re.search(r"soon|rpm|/no/such/file", said)


def test_settings_of_the_environment() -> None:
    environment = {**os.environ, "GORGON_SANDBOX_SEED": "7", "GORGON_SANDBOX_LATENCY": "250ms"}
    with run("--port", "0", env=environment) as process:
        assert process.stdout is not None
        found = Sandbox(process.stdout.readline().strip(), process.pid, process).ask("GET", "/_health")
        process.terminate()
    assert (found["seed"], found["latency"], found["status"]) == (7, 0.25, "ok")


def test_bytes_that_are_no_http(sandbox: Sandbox) -> None:
    port = int(sandbox.url.rsplit(":", 1)[1])
    for sent in (
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(sent)
            assert client.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(
            b"POST /_faults HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n"
            b"GET /_health HTTP/1.1\r\n\r\n"
        )
        seen = b""
        while seen.count(b"HTTP/1.1 200") < 2:
            seen += client.recv(4096)
    assert b'"ids": []' in seen
