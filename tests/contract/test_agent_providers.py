"""What every model provider promises, over both adapters, both APIs of OpenAI, whole replies and streamed ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gorgon_common import errors
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.ports import AgentCall, AgentReply, Message
from gorgon_worker.providers.anthropic import AnthropicProvider
from gorgon_worker.providers.openai import OpenAIProvider
from tests.support import model_server as model_server_module
from tests.support.model_server import ModelServer, Say, error_body, model_server

CERTIFICATE = Path(model_server_module.__file__).with_name("loopback.pem")
"""For 127.0.0.1, with its key; made for these tests, valid until 2126."""

SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "count": {"type": "integer", "minimum": 1}},
    "required": ["title"],
}


@dataclass
class Case:
    """An adapter under test and the server that it talks to."""

    provider: str
    adapter: Any
    server: ModelServer
    make: Callable[..., Any]

    def call(self, cancelled: Callable[[], bool] = lambda: False, **changes: Any) -> AgentReply:
        made = {"model": "a-model", "messages": [Message("user", "ping")], "timeout": 20.0, **changes}
        reply: AgentReply = self.adapter.call(AgentCall(**made), cancelled)
        return reply

    def fails(self, kind: type[errors.GorgonError], **changes: Any) -> Any:
        with pytest.raises(kind) as caught:
            self.call(**changes)
        assert type(caught.value) is kind
        return caught.value


def _make(name: str, url: str, **changes: Any) -> Any:
    kind, _, way = name.partition("-")
    options = {"api_key": "sk-secret", "sandbox": True, "stream_above": 0 if way.endswith("streamed") else 10**9}
    if kind == "anthropic":
        return AnthropicProvider(**{**options, "base_url": url, **changes})
    api = "chat" if way.startswith("chat") else "responses"
    return OpenAIProvider(**{**options, "base_url": f"{url}/v1", "api": api, **changes})


NAMES = ["openai-responses", "openai-responses-streamed", "openai-chat", "openai-chat-streamed", "anthropic",
         "anthropic-streamed"]  # fmt: skip


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name = request.param
    with model_server() as server:
        adapter = _make(name, server.url)
        yield Case(name.partition("-")[0], adapter, server, lambda **changes: _make(name, server.url, **changes))
        adapter.close()


def test_plain(case: Case) -> None:
    case.server.say(Say(reply={"text": "Hello.", "model": "a-model-2026-11-01", "usage": {"input": 12, "output": 3}}))
    reply = case.call(system="Be brief.")
    assert (reply.text, reply.stop_reason, reply.model, reply.data) == ("Hello.", "end", "a-model-2026-11-01", None)
    assert reply.usage == Usage(input_tokens=12, output_tokens=3)
    asked = case.server.seen[0].body
    assert "Be brief." in json.dumps(asked)
    assert "ping" in json.dumps(asked)
    assert "temperature" not in asked


def test_a_conversation_keeps_its_turns(case: Case) -> None:
    turns = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]
    case.call(messages=turns)
    asked = case.server.seen[0].body
    sent = asked.get("messages") or asked["input"]
    assert [(turn["role"], turn["content"]) for turn in sent] == [(turn.role, turn.content) for turn in turns]


def test_usage_in_all_kinds(case: Case) -> None:
    usage = {"input": 1000, "cached": 600, "written": 100, "output": 50, "reasoning": 20}
    case.server.say(Say(reply={"text": "x", "usage": usage}))
    assert case.call().usage == Usage(
        input_tokens=1000, cache_read_tokens=600, cache_write_5m_tokens=100, output_tokens=50, reasoning_tokens=20
    )


def test_structured(case: Case) -> None:
    case.server.say(Say(reply={"text": '{"title": "A", "count": 2}'}))
    reply = case.call(schema=SCHEMA, role="planner")
    assert reply.data == {"title": "A", "count": 2}
    sent = json.dumps(case.server.seen[0].body)
    assert '"json_schema"' in sent
    assert '"additionalProperties": false' in sent


def test_an_optional_field_may_be_missing(case: Case) -> None:
    given = {"title": "A", "count": None} if case.provider == "openai" else {"title": "A"}
    case.server.say(Say(reply={"text": json.dumps(given)}))
    assert case.call(schema=SCHEMA).data == {"title": "A"}


def test_a_schema_that_is_no_object(case: Case) -> None:
    case.server.say(Say(reply={"text": '{"value": ["a", "b"]}'}))
    assert case.call(schema={"type": "array", "items": {"type": "string"}}).data == ["a", "b"]


def test_a_schema_without_a_native_form_is_asked_for_in_words(case: Case) -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    case.server.say(Say(reply={"text": '```json\n{"a": 1}\n```'}))
    assert case.call(schema=schema).data == {"a": 1}
    assert "JSON Schema" in json.dumps(case.server.seen[0].body)


def test_a_reply_that_is_not_json_has_no_data(case: Case) -> None:
    case.server.say(Say(reply={"text": "I would rather not say it in JSON."}))
    reply = case.call(schema=SCHEMA)
    assert reply.data is None
    assert reply.stop_reason == "end"


def test_effort(case: Case) -> None:
    case.call(effort="high")
    assert '"effort": "high"' in json.dumps(case.server.seen[0].body).replace("reasoning_effort", "effort")


def test_a_tier_becomes_a_model(case: Case) -> None:
    case.call(model="fast")
    assert case.server.seen[0].body["model"] in ("gpt-6-luna", "claude-haiku-5-5")


def test_rate_limit_headers(case: Case) -> None:
    name = "x-ratelimit-remaining-requests" if case.provider == "openai" else "anthropic-ratelimit-requests-remaining"
    case.server.say(Say(reply={"text": "x"}, headers={name.title(): "41", "Server-Timing": "1"}))
    assert case.call().headers == {name: "41"}


def test_refusal(case: Case) -> None:
    case.server.say(
        Say(reply={"text": "I cannot help with that.", "stop": "refusal", "usage": {"input": 9, "output": 2}})
    )
    reply = case.call(schema=SCHEMA)
    assert (reply.stop_reason, reply.text, reply.data) == ("refusal", "I cannot help with that.", None)
    assert reply.usage == Usage(input_tokens=9, output_tokens=2)


def test_cut_off(case: Case) -> None:
    case.server.say(Say(reply={"text": '{"title": "A', "stop": "max_tokens", "usage": {"input": 9, "output": 16}}))
    reply = case.call(schema=SCHEMA, max_tokens=16)
    assert (reply.stop_reason, reply.data) == ("max_tokens", None)
    assert reply.usage.output_tokens == 16


def test_no_key(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"{case.provider.upper()}_API_KEY"
    monkeypatch.setenv(variable, "from the environment of the process, which the settings did not give")
    case.adapter = case.make(api_key=None, base_url=None, sandbox=False)
    error = case.fails(errors.Final)
    assert variable in error.message
    assert variable in error.hint
    assert error.usage == Usage()
    assert str(case.adapter.problem()) == str(error)


def test_a_key_with_a_line_break(case: Case) -> None:
    case.adapter = case.make(api_key="sk-one\nsk-two")
    error = case.fails(errors.Final)
    assert "_API_KEY" in error.hint
    assert "sk-" not in str(error)


def test_wrong_key(case: Case) -> None:
    kind = "invalid_api_key" if case.provider == "openai" else "authentication_error"
    case.server.say(Say(status=401, raw=error_body(case.provider, kind, "Incorrect key.")))
    error = case.fails(errors.Final)
    assert error.kind == "auth"
    assert error.status == 401
    assert f"{case.provider.upper()}_API_KEY" in error.hint
    assert "sk-secret" not in f"{error} {error.hint}"
    assert len(case.server.seen) == 1


def test_unknown_model(case: Case) -> None:
    kind = "model_not_found" if case.provider == "openai" else "not_found_error"
    asked = "gpt-6-lunar" if case.provider == "openai" else "claude-opus-5.5"
    case.server.say(Say(status=404, raw=error_body(case.provider, kind, f"model: {asked}")))
    error = case.fails(errors.Final, model=asked)
    assert error.kind == "unknown_model"
    assert repr(asked) in error.message
    assert ("gpt-6-luna" if case.provider == "openai" else "claude-opus-5-5") in error.hint


def test_wrong_address(case: Case) -> None:
    case.server.say(Say(status=404, raw=b"<html>Nothing here</html>"))
    error = case.fails(errors.Final)
    assert case.server.url in error.message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({}, None), ({"retry-after": "7"}, 7.0), ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
     ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0), ({"retry-after": "soon"}, None)],
)  # fmt: skip
def test_rate_limited(case: Case, headers: dict[str, str], seconds: float | None) -> None:
    kind = "rate_limit_exceeded" if case.provider == "openai" else "rate_limit_error"
    case.server.say(Say(status=429, raw=error_body(case.provider, kind, "Slow down."), headers=headers))
    error = case.fails(errors.RateLimited)
    assert error.retry_after == seconds
    assert error.headers == headers
    assert error.usage == Usage()
    assert len(case.server.seen) == 1, "the SDK tried again by itself"


def test_no_quota_is_final(case: Case) -> None:
    status, kind = (429, "insufficient_quota") if case.provider == "openai" else (402, "billing_error")
    case.server.say(Say(status=status, raw=error_body(case.provider, kind, "You exceeded your current quota.")))
    error = case.fails(errors.Final)
    assert error.kind == "quota"
    assert "credit" in error.hint


@pytest.mark.parametrize(("status", "kind"), [(500, "server"), (502, "server"), (503, "server"), (529, "overloaded")])
def test_server_errors(case: Case, status: int, kind: str) -> None:
    case.server.say(Say(status=status, raw=b"<html>Bad Gateway</html>"))
    error = case.fails(errors.Retryable)
    assert (error.kind, error.status, error.usage) == (kind, status, Usage())
    assert len(case.server.seen) == 1, "the SDK tried again by itself"


def test_the_prompt_is_too_long(case: Case) -> None:
    kind = "context_length_exceeded" if case.provider == "openai" else "invalid_request_error"
    case.server.say(Say(status=400, raw=error_body(case.provider, kind, "prompt is too long: 9 tokens > 8 maximum")))
    assert case.fails(errors.Final).kind == "context_length"


def test_a_rejected_call_says_why(case: Case) -> None:
    case.server.say(Say(status=400, raw=error_body(case.provider, "invalid_request_error", "effort: unknown word")))
    assert "effort: unknown word" in case.fails(errors.Final).message


@pytest.mark.parametrize("body", [b'{"output": [', b"[]", b"{}", b'"text"', b"<html></html>", b""])
def test_malformed_body(case: Case, body: bytes) -> None:
    case.server.say(Say(raw=body))
    if case.adapter._stream_above == 0:
        # A stream that never begins looks like one that broke off.
        with pytest.raises((errors.Malformed, errors.Retryable)):
            case.call()
    else:
        error = case.fails(errors.Malformed)
        assert error.usage is None


def test_dropped_connection(case: Case) -> None:
    case.server.say(Say(end="drop"))
    error = case.fails(errors.Retryable)
    assert error.kind == "connection"
    assert error.usage is None, "the call may have been charged"
    assert len(case.server.seen) == 1


def test_truncated_body(case: Case) -> None:
    case.server.say(Say(reply={"text": "x" * 4000}, end="truncate"))
    error = case.fails(errors.Retryable)
    assert error.kind == "connection"
    assert error.usage is None


def test_timeout(case: Case) -> None:
    case.server.say(Say(end="hang"))
    started = time.monotonic()
    error = case.fails(errors.Retryable, timeout=0.4)
    assert time.monotonic() - started < 2.0
    assert error.kind == "timeout"
    assert "0.4 s" in error.message
    assert error.usage is None


def test_cancel_in_flight(case: Case) -> None:
    case.server.say(Say(end="hang"))
    stop = threading.Event()
    ended: list[float] = []

    def work() -> None:
        with pytest.raises(errors.Cancelled):
            case.call(stop.is_set, timeout=60.0)
        ended.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    assert case.server.asked.wait(10)
    stop.set()
    asked = time.monotonic()
    thread.join(10)
    assert ended
    assert ended[0] - asked < 0.5


def test_cancelled_before_it_began(case: Case) -> None:
    with pytest.raises(errors.Cancelled):
        case.call(lambda: True)
    assert not case.server.seen


def test_unreachable(case: Case) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        case.adapter = case.make(base_url=url)
        error = case.fails(errors.Retryable)
    assert error.kind == "connection"
    assert url in error.message
    assert "refused" in error.message
    assert error.usage == Usage(), "nothing can have been charged"


def test_an_address_that_is_none(case: Case) -> None:
    case.adapter = case.make(base_url="gopher://models", sandbox=False)
    error = case.fails(errors.Final)
    assert "BASE_URL" in error.hint


def test_the_connection_is_used_again(case: Case) -> None:
    for _ in range(3):
        case.call()
    assert len(case.server.seen) == 3


def test_many_threads_at_once(case: Case) -> None:
    """Two hundred calls are in flight together: none waits for a connection of another."""
    count = 200
    case.server.say(*(Say(end="hang") for _ in range(count)))
    stop = threading.Event()
    outcomes: list[type[BaseException]] = []

    def work() -> None:
        with pytest.raises(errors.Cancelled) as caught:
            case.call(stop.is_set, timeout=60.0)
        outcomes.append(caught.type)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for _ in range(600):
        if len(case.server.seen) == count:
            break
        case.server.asked.clear()
        case.server.asked.wait(0.1)
    assert len(case.server.seen) == count
    stop.set()
    for thread in threads:
        thread.join(20)
    assert len(outcomes) == count


def test_a_proxy_of_the_environment_is_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And can be cancelled and timed out like everything else."""
    monkeypatch.setenv("http_proxy", case.server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    case.adapter = case.make(base_url="http://models.invalid/v1")
    assert case.call().text == "pong"
    assert case.server.seen[0].path.startswith("http://models.invalid/v1/")
    case.server.say(Say(end="hang"))
    assert case.fails(errors.Retryable, timeout=0.3).kind == "timeout"
    case.adapter.close()


def test_loopback_needs_no_proxy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    assert case.call().text == "pong"


def test_over_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait is cut into slices here too; a reply that comes after some of them is whole."""
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with model_server(certificate=CERTIFICATE) as server:
        adapter = _make("openai-responses", server.url)
        slices: list[int] = []

        def cancelled() -> bool:
            slices.append(1)
            if len(slices) == 5:
                server.release.set()
            return False

        server.say(Say(reply={"text": "x" * 300_000}, end="late"))
        call = AgentCall(model="m", messages=[Message("user", "y" * 600_000)], timeout=20.0)
        assert len(adapter.call(call, cancelled).text) == 300_000
        assert len(slices) >= 5
        server.say(Say(end="hang"))
        with pytest.raises(errors.Retryable) as caught:
            adapter.call(AgentCall(model="m", messages=[Message("user", "?")], timeout=0.3), lambda: False)
        assert caught.value.kind == "timeout"
        adapter.close()


def test_a_certificate_that_nobody_vouches_for() -> None:
    with model_server(certificate=CERTIFICATE) as server:
        adapter = _make("anthropic", server.url)
        with pytest.raises(errors.Final, match="certificate verify failed") as caught:
            adapter.call(AgentCall(model="m", messages=[Message("user", "?")]), lambda: False)
        assert "SSL_CERT_FILE" in caught.value.hint
        assert caught.value.usage == Usage()
        assert not server.seen
        adapter.close()
