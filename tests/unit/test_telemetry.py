"""Events reach metrics and logs: every event has its figures and its line, every metric has samples."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from gorgon_common import logs, metrics, telemetry
from gorgon_common.telemetry import RunRef, StepRef

RUN = RunRef("run_1", "feature build", "platform", "live", "ab" * 16)
STEP = StepRef(RUN, "build[3]/review", "agent", "openai", "reviewer", 2, slow=True)
EVENTS: list[Any] = [
    telemetry.RunCreated(RUN),
    telemetry.RunEnded(RUN, "failed", 3.0, "no"),
    telemetry.StepClaimed(STEP),
    telemetry.StepStarted(STEP),
    telemetry.StepParked(STEP, "retry", 0.5, "HTTP 500", attempt=True, kind="server", took=0.2),
    telemetry.StepEnded(STEP, "failed", 0.2, "HTTP 500", "server"),
    telemetry.StepFenced(STEP),
    telemetry.StepRecovered(STEP, "worker_died"),
    telemetry.CallSent("openai", "gpt", "live", "platform"),
    telemetry.CallRefused("openai", "gpt", "live", "platform", "requests", 2.0),
    telemetry.CallSettled(STEP, "openai", "gpt", "ok", 1.0, 100, 20, 4500),
    telemetry.CallSettled(STEP, "openai", "gpt", "connection", 1.0, 0, 0, None),
    telemetry.BreakerChanged("openai", "gpt", "live", open=True, seconds=30),
    telemetry.BudgetRefused(STEP, "The budget is spent", waits=False),
]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    made = io.StringIO()
    logs.configure("debug", "json", stream=made)
    yield made
    logs.configure()
    root.handlers[:], level = before
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_examples_here_are_of_every_event() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(telemetry.Event))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_has_a_line_that_names_its_run_and_step(event: Any, stream: io.StringIO) -> None:
    logs.record(event)
    (line,) = lines(stream)
    assert "." in line["event"]
    if hasattr(event, "step") or hasattr(event, "run"):
        assert (line["run_id"], line["trace_id"], line["workflow"]) == ("run_1", "ab" * 16, "feature build")
    if hasattr(event, "step"):
        assert line["step"] == "build[3]/review"


def test_unknown_cost_is_told_as_unknown(stream: io.StringIO) -> None:
    logs.record(EVENTS[11])
    logs.record(EVENTS[10])
    assert [line["cost_usd"] for line in lines(stream)] == ["unknown", 0.0045]


SAMPLED = """
import sys
from tests.unit.test_telemetry import EVENTS
from gorgon_common import metrics, telemetry
telemetry.subscribe(metrics.record)
for event in EVENTS:
    telemetry.emit(event)
metrics.REQUESTS.inc(1, method="GET", route="/v1/runs", status="200")
metrics.REQUEST_SECONDS.observe(0.1, method="GET", route="/v1/runs")
metrics.BUDGET_ALERTS.inc(1, budget="org", kind="mark", mark="80")
metrics.SLOTS_BUSY.set(2, queue="openai")
metrics.BACKLOG.set(7, queue="openai")
metrics.SLOTS.set(8, target="live", queue="openai")
labels = {"budget": "org", "per": "month", "target": "live", "is": "spent"}
metrics.BUDGET_USD.set(1, **labels)
metrics.BUDGET_TOKENS.set(1, **labels)
sys.stdout.write(metrics.exposition().decode())
sys.stdout.flush()
sys.stdin.read()
"""


def sampled(folder: Path | None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if folder is not None:
        environment[metrics.MULTIPROCESS] = str(folder)
    return subprocess.Popen(
        [sys.executable, "-c", SAMPLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def value(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of a metric that have these labels."""
    found = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.split()[-1]) for line in found if all(f'{k}="{v}"' in line for k, v in labels.items()))


def test_every_declared_metric_is_recorded() -> None:
    process = sampled(None)
    text, _ = process.communicate(timeout=60)
    for metric in metrics.ALL:
        name = {"Counter": f"{metric.name}_total", "Histogram": f"{metric.name}_count"}.get(metric.kind, metric.name)
        assert value(text, name) > 0, metric.name
    assert value(text, "gorgon_step_retries_total", reason="server") == 1
    assert value(text, "gorgon_cost_usd_total", model="gpt", team="platform", target="live") == 0.0045
    assert value(text, "gorgon_unpriced_calls_total", model="gpt") == 1
    assert value(text, "gorgon_breaker_open", model="gpt") == 1


def test_processes_that_share_a_directory_have_one_exposition(tmp_path: Path) -> None:
    first = sampled(tmp_path)
    try:
        assert first.stdout is not None
        for line in first.stdout:  # until the first process has recorded, while it still lives
            if line.startswith("gorgon_http_request_seconds_count"):
                break
        second = sampled(tmp_path)
        text, _ = second.communicate(timeout=60)
    finally:
        first.communicate(timeout=60)
    for metric in metrics.ALL:
        assert f"# HELP {metric.name}" in text, metric.name
    assert value(text, "gorgon_runs_total", workflow="feature build") == 2
    assert value(text, "gorgon_step_seconds_count", kind="agent") == 4
    assert value(text, "gorgon_slots_busy", queue="openai") == 4
    assert value(text, "gorgon_backlog_steps", queue="openai") == 7


def test_a_subscriber_that_fails_is_told_and_disturbs_nobody(stream: io.StringIO) -> None:
    seen: list[Any] = []

    def broken(_: Any) -> None:
        raise ValueError("no")

    for subscriber in (broken, seen.append, seen.append):
        telemetry.subscribe(subscriber)
    try:
        assert telemetry.active()
        telemetry.emit(EVENTS[0])
    finally:
        telemetry.unsubscribe(broken)
        telemetry.unsubscribe(seen.append)
    assert seen == [EVENTS[0]], "once, however often it is subscribed"
    assert [line["event"] for line in lines(stream)] == ["a subscriber failed at RunCreated"]
    assert not telemetry.active()


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f" 00-{TRACE}-{SPAN}-00 ", TRACE),
        (f"cc-{TRACE}-{SPAN}-01-of a later version", TRACE),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        ("x", None),
        (None, None),
    ],
)
def test_traceparent(header: str | None, trace: str | None) -> None:
    assert telemetry.trace_of(header) == trace


def test_a_new_trace_can_be_one() -> None:
    made = telemetry.new_trace_id()
    assert telemetry.trace_of(f"00-{made}-{SPAN}-01") == made


def test_celery_does_not_speak_for_steps(stream: io.StringIO) -> None:
    """Its lines name no step, and call a message whose step has failed `succeeded`."""
    logging.getLogger("celery.app.trace").info("Task %s succeeded", "gorgon.agent")
    logging.getLogger("celery.worker.strategy").info("Task %s received", "gorgon.agent")
    logging.getLogger("celery.worker").info("mingle")
    logging.getLogger("celery.app.trace").error("Task %s raised", "gorgon.agent")
    assert [line["event"] for line in lines(stream)] == ["mingle", "Task gorgon.agent raised"]
