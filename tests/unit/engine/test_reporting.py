"""The engine tells what becomes of runs, steps and calls: the events of real machines on a real store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gorgon_common import telemetry
from gorgon_common.application.workflows import read as compile_text
from gorgon_common.errors import Retryable
from gorgon_common.workflow.plan import Plan
from tests.support.fleet import Fleet, Scripted, fleet


@pytest.fixture
def events() -> Iterator[list[Any]]:
    seen: list[Any] = []
    telemetry.subscribe(seen.append)
    yield seen
    telemetry.unsubscribe(seen.append)


def plan(text: str) -> Plan:
    return compile_text(text, file="it.yaml")[0]


def told(events: list[Any], *kinds: type) -> list[tuple[str, ...]]:
    found = []
    for event in events:
        if kinds and not isinstance(event, kinds):
            continue
        step = event.step.step if hasattr(event, "step") else ""
        found.append((type(event).__name__, step, getattr(event, "status", getattr(event, "why", ""))))
    return found


def finish(made: Fleet, number: int) -> None:
    for _ in range(50):
        made.drain()
        if made.row(number).finished_at is not None:
            return
        made.elapse(120)
        made.processes[0].sweep.once()
    raise AssertionError(made.statuses(number))


def test_a_run_from_its_creation_to_its_end(sqlite_url: str, events: list[Any]) -> None:
    text = (
        "name: two\nsteps:\n  - {id: a, provider: openai, prompt: one}\n"
        "  - {id: b, provider: openai, prompt: '{{a.output}}'}\n"
    )
    with fleet(sqlite_url) as made:
        finish(made, made.processes[0].submit(plan(text)))
    assert told(events) == [
        ("RunCreated", "", ""),
        ("StepClaimed", "a", ""),
        ("StepStarted", "a", ""),
        ("CallSettled", "a", ""),
        ("StepEnded", "a", "succeeded"),
        ("StepClaimed", "b", ""),
        ("StepStarted", "b", ""),
        ("CallSettled", "b", ""),
        ("StepEnded", "b", "succeeded"),
        ("RunEnded", "", "succeeded"),
    ]
    assert {event.run.trace_id for event in events if hasattr(event, "run")} != {None}
    assert len({event.run.trace_id for event in events if hasattr(event, "run")}) == 1


def test_a_step_that_fails_three_times_leaves_three_events(sqlite_url: str, events: list[Any]) -> None:
    def fails(_: Any) -> str:
        raise Retryable("HTTP 500")

    text = (
        "name: tries\nsteps:\n  - {id: a, provider: openai, retry: {max: 2, initial: 1s}, prompt: bad}\n"
        "  - {id: b, provider: openai, prompt: '{{a.output}}'}\n"
    )
    with fleet(sqlite_url, provider=Scripted({"bad": fails})) as made:
        finish(made, made.processes[0].submit(plan(text)))
    assert told(events, telemetry.StepParked, telemetry.StepEnded, telemetry.RunEnded) == [
        ("StepParked", "a", "retry"),
        ("StepParked", "a", "retry"),
        ("StepEnded", "a", "failed"),
        ("RunEnded", "", "failed"),
    ]
    parked = [event for event in events if isinstance(event, telemetry.StepParked)]
    assert [(event.step.attempt, event.attempt, event.kind) for event in parked] == [
        (1, True, "server"),
        (2, True, "server"),
    ]
    assert all(event.took is not None for event in parked)


def test_what_is_skipped_is_told_with_what_goes_with_it(sqlite_url: str, events: list[Any]) -> None:
    text = (
        "name: off\ninputs: {go: {type: boolean, default: false}}\nsteps:\n"
        "  - {id: a, provider: openai, prompt: one, when: inputs.go}\n"
        "  - {id: b, provider: openai, prompt: '{{a.output}}'}\n"
    )
    with fleet(sqlite_url) as made:
        finish(made, made.processes[0].submit(plan(text), {"go": False}))
    assert told(events, telemetry.StepEnded) == [("StepEnded", "a", "skipped"), ("StepEnded", "b", "skipped")]


def test_a_cancelled_run(sqlite_url: str, events: list[Any]) -> None:
    text = "name: stop\nsteps:\n  - {id: a, provider: openai, prompt: one}\n"
    with fleet(sqlite_url) as made:
        process = made.processes[0]
        number = process.submit(plan(text))
        run = process.knowledge.run(number)
        process.publisher.publish(
            made.store.stop(number, gate=run.gate, keeps=run.keeps, error=None, reason="the run was cancelled")
        )
        finish(made, number)
    assert told(events, telemetry.RunEnded) == [("RunEnded", "", "cancelled")]


def test_a_dead_workers_steps_are_recovered_and_its_results_fenced(sqlite_url: str, events: list[Any]) -> None:
    text = "name: dies\nsteps:\n  - {id: a, provider: openai, prompt: one}\n"
    with fleet(sqlite_url, processes=2, lease=5.0) as made:
        first, second = made.processes

        def outlived(_: Any) -> str:
            made.elapse(6)  # the lease of both runs out; the second one lives
            second.store.heartbeat(second.member, 1e6, {})
            second.sweep.once()
            made.provider.behaves.clear()
            second.serve(made.mailbox.take())
            return "late"

        made.provider.behaves["one"] = outlived
        number = first.submit(plan(text))
        first.serve(made.mailbox.take())
        made.provider.behaves.clear()
        for _ in range(20):
            while made.mailbox.waiting:
                second.serve(made.mailbox.take())
                made.idle()
            if made.row(number).finished_at is not None:
                break
            made.elapse(6)
            second.sweep.once()
        assert made.row(number).finished_at is not None
    assert ("StepRecovered", "a", "worker_died") in told(events)
    assert ("StepFenced", "a", "") in told(events)
    assert told(events, telemetry.StepEnded) == [("StepEnded", "a", "succeeded")]
