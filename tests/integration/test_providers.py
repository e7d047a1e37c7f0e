"""Both model providers through the real SDKs against the sandbox, and the conversation on top of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gorgon_common import errors
from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.agent import AgentResult
from gorgon_common.engine.ports import AgentCall, Message
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.settings import Settings
from gorgon_worker.providers import AgentProviders, agent_providers
from tests.support.calls import conversation
from tests.support.sandbox import Sandbox, sandbox, sandbox_process, start_sandbox

__all__ = ["sandbox", "sandbox_process"]

PROVIDERS = ("openai", "anthropic")
PRICER = GenaiPricer()
ROLES = load_roles()


@pytest.fixture
def providers(sandbox: Sandbox) -> Iterator[AgentProviders]:
    made = agent_providers("sandbox", Settings(), sandbox_url=sandbox.url)
    yield made
    made.close()


def converse_with(
    providers: AgentProviders, name: str, records: list[CallRecord] | None = None, **changes: Any
) -> AgentResult:
    call = AgentCall(**{"model": "fast", "messages": [Message("user", "Say hello.")], "timeout": 20.0, **changes})
    on_call = [].append if records is None else records.append
    return conversation(providers[name], call, PRICER, on_call, name=name)


@pytest.mark.parametrize("name", PROVIDERS)
def test_plain_text_is_charged_to_the_micro_dollar(providers: AgentProviders, sandbox: Sandbox, name: str) -> None:
    result = converse_with(providers, name)
    assert result.text
    usage = result.usage
    # Both fast models cost 0.1 in and 0.5 out per token, in micro-dollars.
    assert result.cost_micro == int(usage.input_tokens * 0.1 + usage.output_tokens * 0.5 + 0.5)
    (seen,) = sandbox.log(provider=name)
    assert seen["status"] == 200


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("role", sorted(ROLES))
def test_every_role_gets_what_it_asks_for(providers: AgentProviders, name: str, role: str) -> None:
    asked = ROLES[role]
    records: list[CallRecord] = []
    result = converse_with(
        providers,
        name,
        records,
        model=asked.tier,
        system=asked.system,
        schema=asked.output_schema,
        effort=asked.effort,
        max_tokens=asked.max_tokens,
        role=role,
    )
    assert set(result.data) == set(asked.output_schema["properties"])
    assert [record.outcome for record in records] == ["ok"]
    assert records[0].role == role


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_large_output_is_streamed(providers: AgentProviders, sandbox: Sandbox, name: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    result = converse_with(providers, name, schema=schema, max_tokens=64_000)
    assert isinstance(result.data["n"], int)
    assert result.usage.output_tokens > 0
    assert [entry["stream"] for entry in sandbox.log(provider=name)] == [True]


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_reply_that_misses_its_schema_is_repaired(providers: AgentProviders, sandbox: Sandbox, name: str) -> None:
    sandbox.faults({"wrong_schema": True, "times": 1})
    records: list[CallRecord] = []
    result = converse_with(providers, name, records, schema=ROLES["planner"].output_schema)
    assert [record.outcome for record in records] == ["invalid", "ok"]
    assert result.cost_micro == sum(record.cost_micro or 0 for record in records)
    assert len(sandbox.log(provider=name)) == 2


@pytest.mark.parametrize("name", PROVIDERS)
def test_it_is_repaired_twice_at_most(providers: AgentProviders, sandbox: Sandbox, name: str) -> None:
    sandbox.faults({"wrong_schema": True})
    records: list[CallRecord] = []
    with pytest.raises(errors.Malformed, match="2 rounds"):
        converse_with(providers, name, records, schema=ROLES["planner"].output_schema)
    assert [record.outcome for record in records] == ["invalid"] * 3
    assert all(record.cost_micro for record in records)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize(
    ("fault", "kind", "outcome", "charged"),
    [
        ({"status": 500}, errors.Retryable, "server", False),
        ({"status": 529}, errors.Retryable, "overloaded", False),
        ({"status": 429, "retry_after": 3}, errors.RateLimited, "rate_limited", False),
        ({"malformed": True}, errors.Malformed, "invalid_output", None),
        ({"truncate": True}, errors.Retryable, "connection", None),
        ({"drop": True}, errors.Retryable, "connection", None),
        ({"reset": True}, errors.Retryable, "connection", None),
        ({"refuse": True}, errors.Refused, "refused", True),
        ({"stop": "max_tokens"}, errors.Malformed, "invalid", True),
        ({"huge": "11MB"}, errors.OutputTooLarge, "invalid", True),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_faults(
    providers: AgentProviders,
    sandbox: Sandbox,
    name: str,
    fault: dict[str, Any],
    kind: type[errors.StepError],
    outcome: str,
    charged: bool | None,
) -> None:
    sandbox.faults(fault)
    records: list[CallRecord] = []
    with pytest.raises(kind) as caught:
        converse_with(providers, name, records)
    assert type(caught.value) is kind
    assert len(str(caught.value)) > 20
    assert caught.value.hint or caught.value.retryable  # a retried error gets its hint when the retries are spent
    (record,) = records
    assert record.outcome == outcome
    assert {True: (record.cost_micro or 0) > 0, False: record.cost_micro == 0, None: record.cost_micro is None}[charged]
    assert len(sandbox.log(provider=name)) == 1, "no hidden retries"


@pytest.mark.parametrize("name", PROVIDERS)
def test_the_sandbox_counts_what_we_count(providers: AgentProviders, sandbox: Sandbox, name: str) -> None:
    """Tokens as the provider bills them and as our ledger has them, cache kinds included, over several calls."""
    records: list[CallRecord] = []
    for _ in range(3):
        converse_with(providers, name, records, system="Be brief. " * 600, schema=ROLES["planner"].output_schema)
    billed: dict[str, int] = {}
    for models in sandbox.bill().values():
        for counts in models[name].values():
            for kind, count in counts.items():
                billed[kind] = billed.get(kind, 0) + count
    ours = [record.usage for record in records]
    assert billed["input"] == sum(usage.input_tokens for usage in ours)
    assert billed["output"] == sum(usage.output_tokens for usage in ours)
    assert billed.get("cached", 0) == sum(usage.cache_read_tokens for usage in ours)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize(("key", "kind"), [("bad-key", "auth"), ("broke-key", "quota")])
def test_a_key_that_does_not_work(sandbox: Sandbox, name: str, key: str, kind: str) -> None:
    settings = Settings(
        OPENAI_API_KEY=key, OPENAI_BASE_URL=f"{sandbox.url}/v1",
        ANTHROPIC_API_KEY=key, ANTHROPIC_BASE_URL=sandbox.url,
    )  # fmt: skip
    made = agent_providers("live", settings)
    try:
        with pytest.raises(errors.Final) as caught:
            converse_with(made, name)
    finally:
        made.close()
    assert caught.value.kind == kind
    assert f"{name.upper()}_API_KEY" in caught.value.hint


def test_a_gateway_to_openai_is_spoken_to_by_chat_completions(sandbox: Sandbox) -> None:
    made = agent_providers("live", Settings(OPENAI_BASE_URL=f"{sandbox.url}/v1"))
    result = converse_with(made, "openai", schema=ROLES["planner"].output_schema)
    made.close()
    assert result.data["tasks"]
    assert [entry["operation"] for entry in sandbox.log()] == ["chat.completions"]


@pytest.mark.parametrize("name", PROVIDERS)
def test_an_unknown_model(providers: AgentProviders, name: str) -> None:
    with pytest.raises(errors.Final) as caught:
        converse_with(providers, name, model="unknown-model")
    assert caught.value.kind == "unknown_model"
    assert "'unknown-model'" in caught.value.message


@pytest.mark.parametrize("name", PROVIDERS)
def test_rate_limit_headers(providers: AgentProviders, name: str) -> None:
    call = AgentCall(model="fast", messages=[Message("user", "Hello")])
    headers = providers[name].call(call, lambda: False).headers
    prefix = "x-ratelimit-" if name == "openai" else "anthropic-ratelimit-"
    assert headers
    assert all(header.startswith(prefix) for header in headers)


def test_twenty_calls_of_half_a_second_side_by_side() -> None:
    """They take little more than one: the adapters hold no lock and cost little CPU."""
    with start_sandbox(latency="500ms") as slow:
        made = agent_providers("sandbox", Settings(), sandbox_url=slow.url)
        for name in PROVIDERS:
            converse_with(made, name)  # imports the SDK, opens the first connection
        threads = [threading.Thread(target=converse_with, args=(made, PROVIDERS[i % 2])) for i in range(20)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - started
        assert len(slow.log(status=200)) == 22
        made.close()
    assert 0.5 <= elapsed < 1.5


def test_missing_keys_are_known_before_a_run() -> None:
    made = agent_providers("live", Settings())
    assert [problem.kind for problem in made.problems(["openai", "anthropic", "openai", "command"])] == ["auth", "auth"]
    with_keys = agent_providers("live", Settings(OPENAI_API_KEY="k", ANTHROPIC_BASE_URL="http://127.0.0.1:1"))
    assert with_keys.problems(PROVIDERS) == []


def test_targets() -> None:
    with pytest.raises(errors.ConfigurationError, match="The address of the sandbox is not known"):
        agent_providers("sandbox", Settings())
    with pytest.raises(errors.ConfigurationError, match="moon"):
        agent_providers("moon", Settings())
    assert set(agent_providers("live", Settings())) == set(PROVIDERS)
    with pytest.raises(KeyError):
        agent_providers("live", Settings())["gemini"]
