"""Logs carry their run and hide secrets; metrics come from one list; heavy packages come late."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gorgon_common import lazy, logs, metrics, queues
from gorgon_common.errors import ConfigurationError
from gorgon_common.masking import MASK


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield io.StringIO()
    logs.configure()
    root.handlers[:], level = before
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_its_run_and_step(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    log = logs.get_logger("gorgon.engine")
    with logs.context(run_id="run_1"):
        with logs.context(step_id="plan"):
            log.info("claimed", attempt=2)
        log.debug("not shown")
        log.warning("slow")
    log.error("alone")
    first, second, third = lines(stream)
    assert first.pop("timestamp").endswith("Z")  # type: ignore[attr-defined]
    assert first == {
        "event": "claimed",
        "level": "info",
        "logger": "gorgon.engine",
        "run_id": "run_1",
        "step_id": "plan",
        "attempt": 2,
    }
    assert (second["event"], second.get("run_id"), second.get("step_id")) == ("slow", "run_1", None)
    assert "run_id" not in third


def test_secrets_are_hidden_wherever_they_are(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream, secrets=["sk-canary", "x"])
    try:
        raise ValueError("rejected key sk-canary")
    except ValueError:
        logs.get_logger("x").exception("failed with sk-canary", headers={"authorization": "Bearer sk-canary"})
    assert "sk-canary" not in stream.getvalue()
    assert "rejected key ********" in stream.getvalue()
    assert "Bearer ********" in stream.getvalue()
    assert "ValueError" in stream.getvalue()


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_others_say_cannot_steer_a_terminal_or_forge_a_line(stream: io.StringIO, form: str) -> None:
    logs.configure("info", form, stream=stream)
    logs.get_logger("x").error("failed\nERROR forged", said="\x1b[2J\x9b\u202e", more=["\x1b]0;owned\x07"])
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert not [sign for sign in "\x1b\x9b\u202e\x07" if sign in text]


def test_libraries_with_handlers_of_their_own_are_masked_too() -> None:
    code = (
        "import logging, sys; from gorgon_common.cli import streams; streams.prepare(); log = logging.getLogger('c')\n"
    )
    code += "handler = logging.StreamHandler(sys.stdout); handler.setFormatter(logging.Formatter('%(message)s'))\n"
    code += "log.addHandler(handler)\n"
    code += "try: raise ValueError('amqp://me:pw@h//')\n"
    code += "except ValueError: log.exception('lost %s\\x1b[2J', 'redis://:pw@h/0')\n"
    code += "logging.getLogger('other').warning('redis://:pw@h/1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *trace = done.stdout.splitlines()
    assert first == rf"lost redis://:{MASK}@h/0\x1b[2J"
    assert trace[-1] == f"ValueError: amqp://me:{MASK}@h//"
    assert f"redis://:{MASK}@h/1" in done.stderr
    assert ":pw@" not in done.stdout + done.stderr


def test_credentials_in_what_libraries_log_are_hidden(stream: io.StringIO) -> None:
    logs.configure("info", "json", stream=stream)
    logging.getLogger("celery").error("cannot connect to redis://:pw@h/0", exc_info=ValueError("amqp://me:pw@h//"))
    (line,) = lines(stream)
    assert line["event"] == f"cannot connect to redis://:{MASK}@h/0"
    assert f"amqp://me:{MASK}@h//" in str(line["exception"])


def test_other_libraries_log_the_same_way(stream: io.StringIO) -> None:
    logs.configure("warning", "json", stream=stream)
    logs.configure("warning", "json", stream=stream)  # twice does not double
    logging.getLogger("celery.worker").warning("lost %s", "redis")
    logging.getLogger("celery.worker").info("not shown")
    (line,) = lines(stream)
    assert (line["event"], line["logger"], line["level"]) == ("lost redis", "celery.worker", "warning")


def test_the_console_form_has_no_colours_in_a_pipe(stream: io.StringIO) -> None:
    logs.configure("info", "console", stream=stream)
    logs.get_logger("x").info("ready", port=8000)
    assert "ready" in stream.getvalue()
    assert "port=8000" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_without_configuration_only_warnings_appear_and_on_stderr() -> None:
    program = "from gorgon_common.logs import get_logger; log = get_logger('x'); log.info('no'); import sys;"
    program += "assert 'structlog' not in sys.modules; log.warning('yes')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert "yes" in result.stderr
    assert "no" not in result.stderr.replace("now", "")


def test_metrics_are_exposed_from_the_list() -> None:
    metrics.STEPS.inc(workflow="w", kind="agent", queue="openai", status="succeeded")
    metrics.STEP_SECONDS.observe(0.02, kind="agent", queue="openai")
    metrics.SLOTS_BUSY.set(3, queue="openai")
    text = metrics.exposition().decode()
    assert 'gorgon_steps_total{kind="agent",queue="openai",status="succeeded",workflow="w"} 1.0' in text
    assert 'gorgon_step_seconds_bucket{kind="agent",le="0.05",queue="openai"} 1.0' in text
    assert 'gorgon_slots_busy{queue="openai"} 3.0' in text
    for metric in metrics.ALL:
        assert f"# HELP {metric.name}" in text


def test_the_list_of_metrics_is_complete_and_named_alike() -> None:
    declared = {value for value in vars(metrics).values() if isinstance(value, metrics.Metric)}
    assert declared == set(metrics.ALL)
    assert len({metric.name for metric in metrics.ALL}) == len(metrics.ALL)
    assert all(metric.name.startswith("gorgon_") for metric in metrics.ALL)


def test_queues() -> None:
    declared = {value for name, value in vars(queues).items() if name.isupper() and isinstance(value, str)}
    assert set(queues.ALL) == declared


def test_lazy_loading() -> None:
    assert lazy.load("json") is json
    assert lazy.load("json:dumps") is json.dumps
    with pytest.raises(ConfigurationError, match="'no_such_sdk' is not installed") as failure:
        lazy.load("no_such_sdk.client:Client")
    assert failure.value.hint == "Install it with: pip install 'gorgon'"


def test_what_a_module_misses_itself_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import something_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_needs"):
        lazy.load("half_there")


def test_preloading_hides_nothing() -> None:
    lazy.preload(["json", "no_such_sdk"]).join()
    with pytest.raises(ConfigurationError):
        lazy.load("no_such_sdk")
