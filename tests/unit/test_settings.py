"""Settings: what can be set, how it is read, what is said when it is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gorgon_common.errors import ConfigurationError
from gorgon_common.masking import MASK, SECRETS
from gorgon_common.settings import describe, get_settings, load, unknown_variables


def test_the_defaults_need_nothing(tmp_path: Path) -> None:
    settings = load()
    assert settings.database_url == f"sqlite:///{tmp_path}/home/gorgon.db"
    assert settings.broker_url == "gmem://"
    assert settings.embedded
    assert settings.commands_allow == ()
    assert (settings.host, settings.api_port, settings.dashboard_port) == ("127.0.0.1", 8000, 8501)
    assert (settings.flower_port, settings.sandbox_port, settings.lease_seconds) == (5555, 8900, 30.0)


@pytest.mark.parametrize(
    ("redis", "broker"),
    [
        ("redis://cache:6379/3", "redis://cache:6379/3"),
        ("unix:///run/redis.sock?db=2", "redis+socket:///run/redis.sock?virtual_host=2"),
        ("unix:///run/redis.sock", "redis+socket:///run/redis.sock?virtual_host=0"),
    ],
)
def test_the_broker_follows_redis(monkeypatch: pytest.MonkeyPatch, redis: str, broker: str) -> None:
    monkeypatch.setenv("GORGON_REDIS_URL", redis)
    assert load().broker_url == broker
    assert not load().embedded
    monkeypatch.setenv("GORGON_BROKER_URL", "redis://other:6379/0")
    assert load().broker_url == "redis://other:6379/0"


def test_values_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_COMMANDS_ALLOW", "pytest, ls cat,")
    monkeypatch.setenv("GORGON_SANDBOX_LATENCY", "500ms")
    monkeypatch.setenv("GORGON_LEASE_SECONDS", "2s")
    monkeypatch.setenv("GORGON_DATABASE_URL", "postgres://u@h/db")
    monkeypatch.setenv("GORGON_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("GORGON_SLOTS", "")  # empty is not set
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:11434/v1/")
    settings = load()
    assert settings.commands_allow == ("pytest", "ls", "cat")
    assert settings.sandbox_latency == 0.5
    assert settings.lease_seconds == 2.0
    assert settings.database_url == "postgresql://u@h/db"
    assert settings.log_level == "debug"
    assert settings.slots == 50
    assert settings.openai_base_url == "http://127.0.0.1:11434/v1"


def test_a_home_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("GORGON_HOME", "~/x")
    assert load().home == Path("/home/somebody/x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GORGON_HOME", "here")
    assert load().home == tmp_path / "here"


def test_a_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GORGON_SLOTS=7\nOPENAI_API_KEY=sk-from-file\nGORGON_API_PORT=1\nUNKNOWN=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GORGON_ENV_FILE")
    monkeypatch.setenv("GORGON_API_PORT", "2")
    settings = load()
    assert (settings.slots, settings.api_port) == (7, 2)
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == "sk-from-file"


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("GORGON_SLOTS", "3")
    assert get_settings() is first


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("GORGON_API_PORT", "http", "valid integer"),
        ("GORGON_API_PORT", "70000", "65535"),
        ("GORGON_REDIS_URL", "localhost:6379", "begins with redis://"),
        ("GORGON_DATABASE_URL", "mysql://x/y", "begins with sqlite://"),
        ("GORGON_BROKER_URL", "memory://", "begins with gmem://"),
        ("GORGON_API_URL", "127.0.0.1:8000", "begins with http://"),
        ("GORGON_SANDBOX_LATENCY", "soon", "Write 30s, 5m"),
        ("GORGON_LEASE_SECONDS", "0", "greater than 0"),
        ("GORGON_LOG_FORMAT", "xml", "'console' or 'json'"),
        ("ANTHROPIC_BASE_URL", "here", "begins with http://"),
    ],
)
def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as failure:
        load()
    assert failure.value.message.startswith(f"{variable}: ")
    assert len(failure.value.message.splitlines()) == 1
    assert said in failure.value.message
    assert "gorgon doctor" in failure.value.hint


def test_every_problem_is_told_at_once_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_API_PORT", "x")
    monkeypatch.setenv("GORGON_REDIS_URL", "me:s3cret@h")
    with pytest.raises(ConfigurationError) as failure:
        load()
    assert [line.split(":")[0] for line in failure.value.message.splitlines()] == [
        "GORGON_REDIS_URL",
        "GORGON_API_PORT",
    ]
    assert "s3cret" not in str(failure.value)


def test_the_description_lists_all_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-1")
    monkeypatch.setenv("GORGON_DATABASE_URL", "postgresql://me:p4ssword@host:5432/db?sslmode=require")
    monkeypatch.setenv("GORGON_REDIS_URL", "redis://:p4ssword@host/0")
    lines = {line.variable: line for line in describe(load())}
    assert {"GORGON_HOME", "GORGON_COMMANDS_ALLOW", "OPENAI_API_KEY", "GORGON_SANDBOX_URL"} <= set(lines)
    assert all(line.description.endswith(".") for line in lines.values())
    assert lines["ANTHROPIC_API_KEY"].value == "********"
    assert lines["OPENAI_API_KEY"].value == ""
    assert lines["GORGON_DATABASE_URL"].value == "postgresql://me:********@host:5432/db?sslmode=require"
    assert lines["GORGON_DATABASE_URL"].default == "sqlite:///$GORGON_HOME/gorgon.db"
    assert not [line for line in lines.values() if "p4ssword" in line.value or "sk-ant" in line.value]
    assert SECRETS.mask("sk-ant-1 and p4ssword") == f"{MASK} and {MASK}"


def test_slips_of_the_pen_are_found() -> None:
    given = {"GORGON_COMMAND_ALLOW": "*", "GORGON_SLOTS": "3", "GORGON_TEST_REDIS_URL": "", "PATH": ""}
    assert unknown_variables(given) == ["GORGON_COMMAND_ALLOW"]


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("2s", 2), ("1.5m", 90), ("1h30m", 5400), ("3", 3)])
def test_durations(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_SANDBOX_LATENCY", text)
    assert load().sandbox_latency == seconds


def test_what_is_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_SANDBOX_LATENCY", "1 day")
    with pytest.raises(ConfigurationError, match=r"`1 day` is not a duration. Write 30s, 5m"):
        load()


def test_help_does_not_import_the_heavy_ones() -> None:
    program = "import sys; sys.argv = ['gorgon', '--help']\nfrom gorgon_common import cli\n"
    program += "try: cli.main()\nexcept SystemExit: pass\n"
    heavy = "['pydantic', 'sqlalchemy', 'celery', 'openai', 'anthropic', 'fastapi', 'structlog', 'prometheus_client']"
    program += f"print('heavy:', [name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "heavy: []"
