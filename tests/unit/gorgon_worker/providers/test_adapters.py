"""What only one of the adapters can meet: errors inside a reply, odd bodies, the choice of the API."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gorgon_common import errors
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.ports import AgentCall, AgentReply, Message
from gorgon_worker.providers import transport
from gorgon_worker.providers.anthropic import AnthropicProvider
from gorgon_worker.providers.openai import OpenAIProvider
from tests.support.model_server import ModelServer, Say, model_server

ROOT = Path(__file__).parents[4]
CALL = AgentCall(model="gpt-6-luna", messages=[Message("user", "ping")], timeout=20.0)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as running:
        yield running


def ask(adapter: Any, call: AgentCall = CALL) -> AgentReply:
    try:
        reply: AgentReply = adapter.call(call, lambda: False)
        return reply
    finally:
        adapter.close()


def openai(server: ModelServer, **options: Any) -> OpenAIProvider:
    return OpenAIProvider(**{"api_key": "k", "base_url": f"{server.url}/v1", "sandbox": True, **options})


def anthropic(server: ModelServer, **options: Any) -> AnthropicProvider:
    return AnthropicProvider(**{"api_key": "k", "base_url": server.url, "sandbox": True, **options})


def events(*said: dict[str, Any]) -> bytes:
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in said).encode()


@pytest.mark.parametrize(
    ("word", "kind", "error_kind"),
    [
        ("overloaded_error", errors.Retryable, "overloaded"),
        ("api_error", errors.Retryable, "server"),
        ("rate_limit_error", errors.RateLimited, "rate_limited"),
        ("invalid_request_error", errors.Final, "rejected"),
    ],
)
def test_an_error_in_the_middle_of_anthropics_stream(
    server: ModelServer, word: str, kind: type[errors.ProviderError], error_kind: str
) -> None:
    start = {"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant", "content": [],
             "model": "m", "stop_reason": None, "usage": {"input_tokens": 9, "output_tokens": 1}}}  # fmt: skip
    failed = {"type": "error", "error": {"type": word, "message": "Something happened."}}
    server.say(Say(raw=events(start, failed), headers={"request-id": "req_7"}))
    with pytest.raises(kind) as caught:
        ask(anthropic(server, stream_above=0))
    assert caught.value.kind == error_kind
    assert "Something happened." in caught.value.message
    assert caught.value.request_id == "req_7"
    assert caught.value.usage is None, "the part that came may be charged"


def failed_response(code: str) -> dict[str, Any]:
    usage = {"input_tokens": 50, "output_tokens": 5, "total_tokens": 55,
             "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
             "output_tokens_details": {"reasoning_tokens": 5}}  # fmt: skip
    return {"id": "r", "object": "response", "created_at": 0, "status": "failed", "model": "m", "output": [],
            "error": {"code": code, "message": "It broke."}, "usage": usage, "tools": [], "tool_choice": "auto",
            "parallel_tool_calls": False}  # fmt: skip


@pytest.mark.parametrize("stream_above", [0, 10**9])
@pytest.mark.parametrize(
    ("code", "kind", "error_kind"),
    [
        ("server_error", errors.Retryable, "server"),
        ("rate_limit_exceeded", errors.RateLimited, "rate_limited"),
        ("invalid_prompt", errors.Final, "rejected"),
    ],
)
def test_a_failed_response_is_charged(
    server: ModelServer, stream_above: int, code: str, kind: type[errors.ProviderError], error_kind: str
) -> None:
    body = failed_response(code)
    last = {"type": "response.failed", "sequence_number": 1, "response": body}
    server.say(Say(raw=json.dumps(body).encode() if stream_above else events(last)))
    with pytest.raises(kind) as caught:
        ask(openai(server, stream_above=stream_above))
    assert caught.value.kind == error_kind
    assert caught.value.usage == Usage(input_tokens=50, output_tokens=5, reasoning_tokens=5)


def test_an_error_event_in_openais_stream(server: ModelServer) -> None:
    server.say(Say(raw=b'data: {"error": {"message": "Slow down.", "code": "rate_limit_exceeded"}}\n\n'))
    with pytest.raises(errors.RateLimited, match="Slow down"):
        ask(openai(server, stream_above=0))


@pytest.mark.parametrize("change", [{"status": "in_progress"}, {"output": "text"}, {"output": None}])
def test_a_response_that_is_none(server: ModelServer, change: dict[str, Any]) -> None:
    server.say(Say(raw=json.dumps({"status": "completed", "output": [], **change}).encode()))
    with pytest.raises(errors.Malformed):
        ask(openai(server))


def test_content_filter_is_a_refusal(server: ModelServer) -> None:
    body = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "output": [], "model": "m"}
    server.say(Say(raw=json.dumps(body).encode()))
    assert ask(openai(server)).stop_reason == "refusal"
    server.say(Say(raw=b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}'))
    reply = ask(openai(server, api="chat"))
    assert (reply.stop_reason, reply.usage, reply.model) == ("refusal", None, "gpt-6-luna")


def test_an_hour_in_anthropics_cache(server: ModelServer) -> None:
    server.say(Say(reply={"text": "x", "usage": {"input": 100, "written": 60, "hour": 40, "output": 1}}))
    assert ask(anthropic(server)).usage == Usage(
        input_tokens=100, cache_write_5m_tokens=20, cache_write_1h_tokens=40, output_tokens=1
    )


@pytest.mark.parametrize("stop", ["pause", "context"])
def test_anthropics_other_ends(server: ModelServer, stop: str) -> None:
    server.say(Say(reply={"text": "half", "stop": stop}))
    assert ask(anthropic(server)).stop_reason == stop


@pytest.mark.parametrize(("given", "sent"), [("minimal", "low"), ("none", "low"), ("max", "max")])
def test_efforts_of_anthropic(server: ModelServer, given: str, sent: str) -> None:
    ask(anthropic(server), AgentCall(model="m", messages=CALL.messages, effort=given))
    assert server.seen[0].body["output_config"] == {"effort": sent}


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "/v1/responses"),
        ({"sandbox": False}, "/v1/chat/completions"),
        ({"sandbox": False, "api": "responses"}, "/v1/responses"),
        ({"api": "chat"}, "/v1/chat/completions"),
    ],
)
def test_which_api(server: ModelServer, options: dict[str, Any], path: str) -> None:
    ask(openai(server, **options))
    assert server.seen[0].path == path


def test_an_api_that_there_is_not(server: ModelServer) -> None:
    with pytest.raises(errors.ConfigurationError, match="soap"):
        openai(server, api="soap")


@pytest.mark.parametrize(("model", "name"), [("gpt-6-luna", "max_completion_tokens"), ("llama3.3", "max_tokens")])
def test_the_name_of_max_tokens(server: ModelServer, model: str, name: str) -> None:
    ask(openai(server, sandbox=False), AgentCall(model=model, messages=CALL.messages, max_tokens=77))
    assert server.seen[0].body[name] == 77


def test_a_compatible_server_needs_no_key(server: ModelServer) -> None:
    assert ask(openai(server, sandbox=False, api_key=None)).text == "pong"
    assert ask(anthropic(server, sandbox=False, api_key=None)).text == "pong"


def test_a_compatible_server_is_named_by_its_address(server: ModelServer) -> None:
    server.say(Say(status=404, raw=b'{"error": {"message": "model \'gpt-6-luna\' not found", "type": "api_error"}}'))
    with pytest.raises(errors.Final) as caught:
        ask(openai(server, sandbox=False))
    assert caught.value.message.startswith(f"The OpenAI-compatible server at {server.url}/v1 has no model")
    assert "model:" in caught.value.hint


def test_nothing_is_stored_at_openai(server: ModelServer) -> None:
    ask(openai(server))
    assert server.seen[0].body["store"] is False


def test_a_redirect_is_not_followed(server: ModelServer) -> None:
    server.say(Say(status=307, raw=b"", headers={"location": f"{server.url}/v1/elsewhere"}))
    with pytest.raises(errors.Final, match="HTTP 307"):
        ask(openai(server))
    assert len(server.seen) == 1


def test_a_reply_without_end(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_RECEIVED", 100_000)
    for adapter in (openai(server), anthropic(server)):
        server.say(Say(reply={"text": "x" * 200_000}))
        with pytest.raises(errors.OutputTooLarge):
            ask(adapter)


def test_a_body_that_is_not_what_its_encoding_says(server: ModelServer) -> None:
    server.say(Say(raw=b"not gzip", headers={"content-encoding": "gzip"}))
    with pytest.raises(errors.Malformed):
        ask(openai(server))


def test_after_close_it_connects_again(server: ModelServer) -> None:
    adapter = openai(server)
    assert ask(adapter).text == "pong"
    assert ask(adapter).text == "pong"


def test_json_schema_that_has_no_strict_form(server: ModelServer) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "string"}}
    server.say(Say(reply={"text": '{"a": "b"}'}))
    reply = ask(openai(server), AgentCall(model="m", messages=CALL.messages, schema=schema))
    assert reply.data == {"a": "b"}
    assert server.seen[0].body["text"]["format"]["strict"] is False
    ask(anthropic(server), AgentCall(model="m", messages=CALL.messages, schema=schema, system="Be kind."))
    assert "output_config" not in server.seen[1].body
    assert server.seen[1].body["system"].startswith("Be kind.\n\nAnswer with one JSON value")


def test_an_sdk_is_imported_when_it_is_needed() -> None:
    program = """
import sys
from gorgon_common.settings import Settings
from gorgon_worker.providers import agent_providers, preload_providers
providers = agent_providers("live", Settings(OPENAI_API_KEY="k"))
assert len(providers) == 2 and not {"openai", "anthropic", "httpx2", "genai_prices"} & set(sys.modules)
preload_providers(["openai", "command"]).join()
assert "anthropic" not in sys.modules
for name in ("openai", "gorgon_worker.providers.openai", "jsonschema", "genai_prices"):
    assert name in sys.modules, name
assert providers["openai"] is providers["openai"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
